//! A snapshot of a paused machine: its state into one file, its memory into another.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_cpuid_entry2;

use super::Machine;
use crate::config::VmConfig;
use crate::devices::legacy::Console;
use crate::devices::virtio::transport::MmioTransport;
use crate::kvm::{self, KvmError};
use crate::memory::image;
use crate::snapshot::{MachineState, SnapshotError};

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
    /// The memory could not be written.
    #[error("Failed to write the snapshot's memory")]
    Memory(#[source] io::Error),
    /// The state could not be written.
    #[error("Failed to write the snapshot")]
    State(#[source] SnapshotError),
}

/// Writes a snapshot of a machine that is paused ([`Machine::pause`]) into two empty files.
///
/// # Errors
/// [`SaveError`]; what the files hold then is no snapshot.
pub fn save(machine: &Machine, mut state_file: File, mut memory_file: File) -> Result<(), SaveError> {
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
    let data = image::write(&machine.vm.memory, &mut memory_file).map_err(SaveError::Memory)?;
    let state = MachineState {
        n_possible_vcpus: sources.config.n_possible_vcpus,
        memory_mib: sources.config.memory_mib,
        hotplug_mib: sources.config.hotplug_mib,
        data,
        cpuid: sources.cpuid.clone(),
        vm,
        vcpus,
        console,
        devices,
    };
    state.write(&mut state_file).map_err(SaveError::State)?;
    state_file.flush().map_err(|source| {
        SaveError::State(SnapshotError::Io {
            operation: "write",
            source,
        })
    })
}
