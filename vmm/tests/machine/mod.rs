//! A VMM process under test.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::process::{Child, Command as Process};

use vmm::config::{Origin, VmConfig};
use vmm::control::{self, Command, Event, ExitReason, OwnerSocket};

use super::stub_guest::Code;

/// An eci-vmm with a stub guest.
pub(crate) struct Machine {
    pub(crate) owner: OwnerSocket,
    pub(crate) console: File,
    pub(crate) process: Child,
}

/// One vCPU, no network.
pub(crate) fn config() -> VmConfig {
    VmConfig {
        origin: Origin::Boot,
        n_vcpus: 1,
        n_possible_vcpus: 1,
        memory_mib: 64,
        hotplug_mib: 0,
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
    /// Boots a stub guest.
    pub(crate) fn start(code: Code, config: VmConfig) -> Self {
        Self::launch(config, &[code.into_kernel(), tempfile::tempfile().unwrap()])
    }

    /// Goes on from a snapshot: state and memory.
    #[allow(dead_code, reason = "not every test program takes snapshots")]
    pub(crate) fn restore(snapshot: &[File; 2], config: VmConfig) -> Self {
        let config = VmConfig {
            origin: Origin::Snapshot { with_written: false },
            ..config
        };
        Self::launch(config, snapshot)
    }

    fn launch(config: VmConfig, origin: &[File; 2]) -> Self {
        let (owner, socket) = control::pair().unwrap();
        let mut command = Process::new(env!("CARGO_BIN_EXE_eci-vmm"));
        vmm::sys::inherited::pass_control_fd(&mut command, socket);
        let process = command.spawn().unwrap();
        let kvm = open_kvm();
        let console = tempfile::tempfile().unwrap();
        let fds = [kvm.as_fd(), origin[0].as_fd(), origin[1].as_fd(), console.as_fd()];
        owner.send(&Command::Start(Box::new(config)), &fds).unwrap();
        Self {
            owner,
            console,
            process,
        }
    }

    /// The next event.
    pub(crate) fn event(&self) -> Event {
        self.owner.recv().unwrap().0
    }

    /// Waits for the end of the process; the last event and all console output.
    pub(crate) fn end(mut self) -> (ExitReason, String) {
        let reason = match self.event() {
            Event::Exited(reason) => reason,
            other => panic!("{other:?} instead of the end"),
        };
        assert!(matches!(self.owner.recv(), Err(control::ControlError::Closed)));
        self.process.wait().unwrap();
        let mut bytes = Vec::new();
        self.console.rewind().unwrap();
        self.console.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        (reason, text)
    }
}
