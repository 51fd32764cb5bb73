//! Guests of a few instructions on real KVM, driven over the control socket as the shim does.

#![allow(clippy::unwrap_used, reason = "a test")]

mod stub_guest;

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::process::{Child, Command as Process};

use stub_guest::Code;
use vmm::config::VmConfig;
use vmm::control::{self, Command, Event, ExitReason, OwnerSocket};

/// An eci-vmm with a stub guest.
struct Machine {
    owner: OwnerSocket,
    console: File,
    process: Child,
}

fn config() -> VmConfig {
    VmConfig {
        n_vcpus: 1,
        memory_mib: 64,
        kernel_args: String::new(),
        cid: 3,
        net: None,
        read_only_extents: Vec::new(),
        read_write_extents: Vec::new(),
        io_uring: true,
    }
}

fn open_kvm() -> File {
    // Some machines have a /dev/kvm that opens but cannot run a guest.
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(
        processor
            .split_whitespace()
            .any(|flag| flag == "svm" || flag == "vmx"),
        "this processor shows neither vmx nor svm. This test runs a guest: run it where KVM works, with \
         `make nested-test ARGS='-p vmm --test kvm_smoke'`"
    );
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap_or_else(|error| {
            panic!(
                "cannot open /dev/kvm: {error}. This test runs a guest: run it where KVM works, \
             with `make nested CMD='...'`"
            )
        })
}

impl Machine {
    fn start(code: Code, config: VmConfig) -> Self {
        let (owner, socket) = control::pair().unwrap();
        let mut command = Process::new(env!("CARGO_BIN_EXE_eci-vmm"));
        vmm::sys::inherited::pass_control_fd(&mut command, socket);
        let process = command.spawn().unwrap();
        let (kvm, kernel, initrd) = (open_kvm(), code.into_kernel(), tempfile::tempfile().unwrap());
        let console = tempfile::tempfile().unwrap();
        let fds = [kvm.as_fd(), kernel.as_fd(), initrd.as_fd(), console.as_fd()];
        owner.send(&Command::Start(Box::new(config)), &fds).unwrap();
        Self {
            owner,
            console,
            process,
        }
    }

    fn event(&self) -> Event {
        self.owner.recv().unwrap().0
    }

    /// Waits for the end of the process; the last event and all console output.
    fn end(mut self) -> (ExitReason, String) {
        let reason = match self.event() {
            Event::Exited(reason) => reason,
            other => panic!("{other:?} instead of the end"),
        };
        assert!(matches!(self.owner.recv(), Err(control::ControlError::Closed)));
        self.process.wait().unwrap();
        let mut text = String::new();
        self.console.rewind().unwrap();
        self.console.read_to_string(&mut text).unwrap();
        (reason, text)
    }
}

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
        let machine = Machine::start(code, VmConfig { n_vcpus, ..config() });
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
