//! Snapshots of guests of a few instructions on real KVM: what goes on, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test")]

mod machine;
#[allow(dead_code, reason = "not every instruction is needed here")]
mod stub_guest;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use machine::{Machine, config};
use stub_guest::Code;
use vmm::config::VmConfig;
use vmm::control::{Command, Event, ExitReason};
use vmm::snapshot::MachineState;

/// Counts in a byte of memory and prints it, for ever.
fn counting() -> Code {
    Code::default()
        // mov edi, 0x200000; mov dx, 0x3f8
        .raw(&[0xbf, 0, 0, 0x20, 0])
        .raw(&[0x66, 0xba, 0xf8, 0x03])
        // inc byte [edi]; mov al, [edi]; out dx, al; jmp back over these seven bytes
        .raw(&[0xfe, 0x07, 0x8a, 0x07, 0xee, 0xeb, 0xf9])
}

fn done(machine: &Machine, command: &Command, fds: &[&File], id: u64) {
    let fds: Vec<_> = fds.iter().map(|file| file.as_fd()).collect();
    machine.owner.send(command, &fds).unwrap();
    assert_eq!(machine.event(), Event::Done { id });
}

/// Takes a snapshot of a running machine, which then goes on.
fn snapshot(machine: &Machine) -> [File; 2] {
    let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
    done(machine, &Command::Pause { id: 1 }, &[], 1);
    done(machine, &Command::Snapshot { id: 2 }, &[&files[0], &files[1]], 2);
    done(machine, &Command::FinishSnapshot { id: 3 }, &[], 3);
    files
}

fn console(machine: &Machine) -> Vec<u8> {
    let mut bytes = Vec::new();
    (&machine.console).rewind().unwrap();
    (&machine.console).read_to_end(&mut bytes).unwrap();
    bytes
}

/// Waits until the guest has printed that much.
fn wait_for_output(machine: &Machine, length: u64) {
    while machine.console.metadata().unwrap().len() < length {
        std::thread::yield_now();
    }
}

fn kill(machine: Machine) {
    machine.owner.send(&Command::Kill, &[]).unwrap();
    assert_eq!(machine.end().0, ExitReason::Killed);
}

/// A snapshot of [`counting`], and the last byte it had printed.
fn counted() -> ([File; 2], u8) {
    let machine = Machine::start(counting(), config());
    assert_eq!(machine.event(), Event::Started);
    wait_for_output(&machine, 300);
    let files = snapshot(&machine);
    let last = *console(&machine).last().unwrap();
    kill(machine);
    (files, last)
}

#[test]
fn clones_go_on_where_the_snapshot_was_taken_and_do_not_meet() {
    let (files, last) = counted();
    let clones = [(); 2].map(|()| Machine::restore(&files, config()));
    for clone in clones {
        assert_eq!(clone.event(), Event::Started);
        wait_for_output(&clone, 300);
        let printed = console(&clone);
        for (byte, n) in printed.iter().zip((0..=u8::MAX).cycle().skip(1)) {
            assert_eq!(*byte, last.wrapping_add(n));
        }
        kill(clone);
    }
}

#[test]
fn the_snapshotted_machine_goes_on_itself() {
    let machine = Machine::start(counting(), config());
    assert_eq!(machine.event(), Event::Started);
    snapshot(&machine);
    let before = console(&machine).len() as u64;
    done(&machine, &Command::Resume { id: 3 }, &[], 3);
    wait_for_output(&machine, before + 10);
    kill(machine);
}

#[test]
fn a_snapshot_is_of_the_moment_it_was_taken_whatever_the_machine_does_while_it_is_written() {
    let machine = Machine::start(counting(), config());
    assert_eq!(machine.event(), Event::Started);
    wait_for_output(&machine, 300);
    let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
    done(&machine, &Command::Pause { id: 1 }, &[], 1);
    let last = *console(&machine).last().unwrap();
    done(&machine, &Command::Snapshot { id: 2 }, &[&files[0], &files[1]], 2);
    let before = console(&machine).len() as u64;
    done(&machine, &Command::Resume { id: 3 }, &[], 3);
    wait_for_output(&machine, before + 300);
    done(&machine, &Command::FinishSnapshot { id: 4 }, &[], 4);
    let clone = Machine::restore(&files, config());
    assert_eq!(clone.event(), Event::Started);
    wait_for_output(&clone, 1);
    assert_eq!(console(&clone)[0], last.wrapping_add(1));
    kill(clone);
    kill(machine);
}

#[test]
fn a_snapshot_that_cannot_be_written_fails_and_the_machine_goes_on() {
    let machine = Machine::start(counting(), config());
    assert_eq!(machine.event(), Event::Started);
    wait_for_output(&machine, 1);
    machine
        .owner
        .send(&Command::FinishSnapshot { id: 1 }, &[])
        .unwrap();
    assert!(matches!(machine.event(), Event::Failed { id: 1, .. }));
    done(&machine, &Command::Pause { id: 2 }, &[], 2);
    let (state, full) = (
        tempfile::tempfile().unwrap(),
        File::options().write(true).open("/dev/full").unwrap(),
    );
    done(&machine, &Command::Snapshot { id: 3 }, &[&state, &full], 3);
    let before = console(&machine).len() as u64;
    done(&machine, &Command::Resume { id: 4 }, &[], 4);
    machine
        .owner
        .send(&Command::FinishSnapshot { id: 5 }, &[])
        .unwrap();
    let Event::Failed { id: 5, message } = machine.event() else {
        panic!("no failure")
    };
    assert!(message.contains("write the snapshot"), "{message}");
    wait_for_output(&machine, before + 10);
    kill(machine);
}

#[test]
fn a_running_machine_is_not_snapshotted() {
    let machine = Machine::start(Code::default().spin(), config());
    assert_eq!(machine.event(), Event::Started);
    let file = tempfile::tempfile().unwrap();
    machine
        .owner
        .send(&Command::Snapshot { id: 9 }, &[file.as_fd(), file.as_fd()])
        .unwrap();
    let Event::Failed { id: 9, message } = machine.event() else {
        panic!("no failure")
    };
    assert!(message.contains("send Pause first"), "{message}");
    kill(machine);
}

/// Why a snapshot is refused.
fn refusal(files: &[File; 2], config: VmConfig) -> String {
    let machine = Machine::restore(files, config);
    match machine.end() {
        (ExitReason::SnapshotRefused { message }, _) => message,
        other => panic!("{other:?}"),
    }
}

fn state_bytes(files: &[File; 2]) -> Vec<u8> {
    let mut bytes = Vec::new();
    (&files[0]).rewind().unwrap();
    (&files[0]).read_to_end(&mut bytes).unwrap();
    bytes
}

/// The snapshot with another state.
fn with_state(files: &[File; 2], bytes: &[u8]) -> [File; 2] {
    let mut state = tempfile::tempfile().unwrap();
    state.write_all(bytes).unwrap();
    [state, files[1].try_clone().unwrap()]
}

#[test]
fn snapshots_that_do_not_fit_are_refused_by_reason() {
    let (files, _) = counted();
    let bytes = state_bytes(&files);
    let refused = |bytes: &[u8]| refusal(&with_state(&files, bytes), config());
    let flipped = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    assert!(refused(&[]).contains("no snapshot"));
    assert!(refused(&flipped(0)).contains("no snapshot"));
    assert!(refused(&flipped(8)).contains("has version"));
    assert!(refused(&bytes[..bytes.len() - 1]).contains("truncated"));
    assert!(refused(&flipped(bytes.len() / 2)).contains("damaged"));

    let mut other_processor = MachineState::read(&bytes[..]).unwrap();
    other_processor.cpuid[1].ecx ^= 1;
    let mut changed = Vec::new();
    other_processor.write(&mut changed).unwrap();
    assert!(refused(&changed).contains("another processor"));

    let larger = VmConfig {
        memory_mib: 128,
        ..config()
    };
    assert!(refusal(&files, larger).contains("64 MiB of memory, 128 are wanted"));
    let more_possible = VmConfig {
        n_possible_vcpus: 2,
        ..config()
    };
    assert!(refusal(&files, more_possible).contains("1 possible vCPUs, 2 are wanted"));

    let mut short = tempfile::tempfile().unwrap();
    (&files[1]).seek(SeekFrom::Start(0)).unwrap();
    std::io::copy(&mut (&files[1]).take(1 << 20), &mut short).unwrap();
    let short = [files[0].try_clone().unwrap(), short];
    assert!(refusal(&short, config()).contains("memory image has 1048576 bytes"));
}

#[test]
fn vcpus_added_while_it_runs_come_with_a_snapshot_and_more_than_possible_are_refused() {
    let wide = |n_vcpus| VmConfig {
        n_vcpus,
        n_possible_vcpus: 3,
        hotplug_mib: 128,
        ..config()
    };
    let machine = Machine::start(counting(), wide(1));
    assert_eq!(machine.event(), Event::Started);
    wait_for_output(&machine, 300);
    done(&machine, &Command::AddVcpus { id: 5, n_vcpus: 3 }, &[], 5);
    done(&machine, &Command::AddVcpus { id: 6, n_vcpus: 2 }, &[], 6);
    let before = console(&machine).len() as u64;
    wait_for_output(&machine, before + 10);
    let refused = |command: &Command| {
        machine.owner.send(command, &[]).unwrap();
        match machine.event() {
            Event::Failed { id: 7, message } => message,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(&Command::AddVcpus { id: 7, n_vcpus: 4 }).contains("at most 3"));
    let too_much = Command::ResizeMemory {
        id: 7,
        plugged_mib: 256,
    };
    assert!(refused(&too_much).contains("at most 128 MiB"));
    let files = snapshot(&machine);
    assert!(refused(&Command::AddVcpus { id: 7, n_vcpus: 4 }).contains("at most 3"));
    kill(machine);
    assert_eq!(
        MachineState::read(&state_bytes(&files)[..]).unwrap().vcpus.len(),
        3
    );
    assert!(refusal(&files, wide(2)).contains("3 running vCPUs, 2 are wanted"));
    let clone = Machine::restore(&files, wide(3));
    assert_eq!(clone.event(), Event::Started);
    wait_for_output(&clone, 10);
    kill(clone);
}
