//! A snapshot of a paused machine: its state into one file, its memory into another.
//!
//! Memory takes long to write, and the machine is to go on meanwhile: a copy of this process writes it (ADR 0005). The kernel
//! copies each page that is written to after that, whoever writes: a vCPU, a device's thread, io_uring or vhost.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_cpuid_entry2;

use super::Machine;
use crate::config::VmConfig;
use crate::control::chain;
use crate::devices::legacy::Console;
use crate::devices::virtio::transport::MmioTransport;
use crate::kvm::{self, KvmError};
use crate::memory::{GuestMemory, image};
use crate::snapshot::MachineState;
use crate::sys::fork;

/// What a snapshot needs to know of a machine, besides its VM.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) kvm_host: kvm::Host,
    pub(super) config: VmConfig,
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) console: Arc<Mutex<Console>>,
    pub(super) transports: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Sources {
    /// Acts on every transport; whether all acts went well.
    pub(super) fn all_transports(&self, act: impl Fn(&mut MmioTransport) -> bool) -> bool {
        let results = self
            .transports
            .iter()
            .map(|transport| act(&mut transport.lock().unwrap_or_else(PoisonError::into_inner)));
        // All of them, also past a failure.
        results.fold(true, |all, one| all & one)
    }
}

/// Why a snapshot was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// KVM did not give its state.
    #[error("Failed to take the state from KVM")]
    Kvm(#[source] KvmError),
    /// The copy of this process that writes could not be made.
    #[error("Failed to make a copy of the process")]
    Copy(#[source] io::Error),
}

/// Takes a snapshot of a machine that is paused ([`Machine::pause`]) and begins to write it into two empty files. The machine
/// may go on once this has returned.
///
/// # Errors
/// [`SaveError`]; what the files hold then is no snapshot. Neither is it when the copy fails.
pub fn begin_save(machine: &Machine, state_file: &File, memory_file: &File) -> Result<fork::Copy, SaveError> {
    let sources = &machine.saved;
    let known_msrs = sources.kvm_host.known_msrs().map_err(SaveError::Kvm)?;
    let vcpus = machine.vm.vcpus.save(&known_msrs).map_err(SaveError::Kvm)?;
    let vm = machine.vm.kvm.save().map_err(SaveError::Kvm)?;
    let devices = sources
        .transports
        .iter()
        .map(|transport| transport.lock().unwrap_or_else(PoisonError::into_inner).save())
        .collect();
    let console = sources
        .console
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .save();
    let state = MachineState {
        n_possible_vcpus: sources.config.n_possible_vcpus,
        memory_mib: sources.config.memory_mib,
        hotplug_mib: sources.config.hotplug_mib,
        data: Vec::new(),
        cpuid: sources.cpuid.clone(),
        vm,
        vcpus,
        console,
        devices,
    };
    let memory = &machine.vm.memory;
    fork::Copy::begin(&[state_file.as_fd(), memory_file.as_fd()], || {
        write(state, memory, state_file, memory_file).map_err(|error| chain(&*error))
    })
    .map_err(SaveError::Copy)
}

/// Memory first: the state says where it has content.
fn write(
    mut state: MachineState,
    memory: &GuestMemory,
    mut state_file: &File,
    memory_file: &File,
) -> Result<(), Box<dyn std::error::Error>> {
    state.data = image::write(memory, memory_file)?;
    state.write(&mut state_file)?;
    Ok(state_file.flush()?)
}
