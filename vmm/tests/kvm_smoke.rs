//! Guests of a few instructions on real KVM, driven over the control socket as the shim does.

#![allow(clippy::unwrap_used, reason = "a test")]

mod machine;
mod stub_guest;

use std::os::fd::AsRawFd;
use std::process::Command as Process;

use machine::{Machine, config};
use stub_guest::Code;
use vmm::config::VmConfig;
use vmm::control::{self, Command, Event, ExitReason};

/// Runs a guest that ends by itself.
fn run(code: Code) -> (ExitReason, String) {
    let machine = Machine::start(code, config());
    assert_eq!(machine.event(), Event::Started);
    machine.end()
}

#[test]
fn guest_prints_and_resets() {
    assert_eq!(
        run(Code::default().print("ok\n").out(0x64, 0xfe).spin()),
        (ExitReason::Reset, "ok\n".into())
    );
}

#[test]
fn guest_powers_off() {
    assert_eq!(
        run(Code::default().print("off").out(0x600, 0x34).spin()),
        (ExitReason::Shutdown, "off".into())
    );
}

/// Whoever closes the VM last waits for the kernel to take it apart: that is left to the owner.
#[test]
fn what_is_left_of_the_vm_goes_to_its_owner() {
    let mut machine = Machine::start(Code::default().out(0x600, 0x34).spin(), config());
    assert_eq!(machine.event(), Event::Started);
    let (event, remains) = machine.owner.recv().unwrap();
    assert_eq!(event, Event::Exited(ExitReason::Shutdown));
    let kinds: Vec<_> = remains
        .iter()
        .map(|fd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap())
        .collect();
    assert_eq!(kinds, [std::path::Path::new("anon_inode:kvm-vm")]);
    // The process ends all the same.
    assert!(machine.process.wait().unwrap().success());
}

#[test]
fn guest_panics() {
    assert_eq!(
        run(Code::default().out(0x505, 1).spin()).0,
        ExitReason::GuestPanic
    );
}

#[test]
fn triple_fault_is_a_reset() {
    // lidt of six zero bytes in empty memory; int3.
    let code = Code::default()
        .raw(&[0x0f, 0x01, 0x1d])
        .raw(&0x5000_u32.to_le_bytes())
        .raw(&[0xcc])
        .spin();
    assert_eq!(run(code).0, ExitReason::Reset);
}

#[test]
fn jump_to_nowhere_is_a_kvm_error_with_registers() {
    // mov eax, 0xd8000000; jmp eax
    let (reason, _) = run(Code::default().raw(&[0xb8, 0, 0, 0, 0xd8, 0xff, 0xe0]));
    let ExitReason::KvmError { vcpu: 0, message } = reason else {
        panic!("{reason:?}")
    };
    assert!(
        message.contains("suberror 1") && message.contains("rip 0xd8000000"),
        "{message}"
    );
}

#[test]
fn string_instruction_prints_every_byte() {
    for text in ["ab", "abcd", "abcdefghijklm"] {
        assert_eq!(
            run(Code::default().print_string(text).out(0x64, 0xfe).spin()).1,
            text
        );
    }
}

#[test]
fn accesses_to_nothing_do_nothing() {
    // in al, dx at 0x1234; mov eax, [0xd8000000]; mov [0xd8000000], eax
    let code = Code::default()
        .raw(&[0x66, 0xba, 0x34, 0x12, 0xec])
        .raw(&[0xa1, 0, 0, 0, 0xd8])
        .raw(&[0xa3, 0, 0, 0, 0xd8])
        .print("ok")
        .out(0x64, 0xfe)
        .spin();
    assert_eq!(run(code).1, "ok");
}

#[test]
fn kill_ends_a_guest_that_spins() {
    let machine = Machine::start(Code::default().spin(), config());
    assert_eq!(machine.event(), Event::Started);
    machine.owner.send(&Command::Kill, &[]).unwrap();
    assert_eq!(machine.end().0, ExitReason::Killed);
}

#[test]
fn vmm_ends_with_its_owner() {
    let mut machine = Machine::start(Code::default().spin(), config());
    assert_eq!(machine.event(), Event::Started);
    drop(machine.owner);
    machine.process.wait().unwrap();
}

#[test]
fn pause_stops_the_guest_and_resume_lets_it_go_on() {
    for n_vcpus in [1, 3] {
        // Prints for ever: a jump back over the nine bytes of both instructions.
        let code = Code::default().out(0x3f8, b'.').raw(&[0xeb, 0xf7]);
        let machine = Machine::start(
            code,
            VmConfig {
                n_vcpus,
                n_possible_vcpus: n_vcpus,
                ..config()
            },
        );
        assert_eq!(machine.event(), Event::Started);
        let length = || machine.console.metadata().unwrap().len();
        for id in 1..4 {
            machine.owner.send(&Command::Pause { id }, &[]).unwrap();
            assert_eq!(machine.event(), Event::Done { id });
            let stopped_at = length();
            machine.owner.send(&Command::Stats { id }, &[]).unwrap();
            let Event::Stats { counters, .. } = machine.event() else {
                panic!("no statistics")
            };
            assert_eq!(
                counters["console_written_bytes"] + counters["console_dropped_bytes"],
                counters["vcpu_exits_pio"]
            );
            assert_eq!(length(), stopped_at);
            machine.owner.send(&Command::Resume { id }, &[]).unwrap();
            assert_eq!(machine.event(), Event::Done { id });
            while length() == stopped_at {
                std::thread::yield_now();
            }
        }
        machine.owner.send(&Command::Kill, &[]).unwrap();
        assert_eq!(machine.end().0, ExitReason::Killed);
    }
}

#[test]
fn bad_configuration_and_missing_descriptors_are_told() {
    let machine = Machine::start(
        Code::default().spin(),
        VmConfig {
            n_vcpus: 65,
            n_possible_vcpus: 65,
            ..config()
        },
    );
    let (ExitReason::StartFailed { message }, _) = machine.end() else {
        panic!("started")
    };
    assert!(message.contains("n_vcpus is 65"), "{message}");

    let (owner, socket) = control::pair().unwrap();
    let mut command = Process::new(env!("CARGO_BIN_EXE_eci-vmm"));
    vmm::sys::inherited::pass_control_fd(&mut command, socket);
    let mut process = command.spawn().unwrap();
    drop(command);
    owner.send(&Command::Start(Box::new(config())), &[]).unwrap();
    let Event::Exited(ExitReason::StartFailed { message }) = owner.recv().unwrap().0 else {
        panic!("started")
    };
    assert!(message.contains("Kvm is missing"), "{message}");
    process.wait().unwrap();
}
