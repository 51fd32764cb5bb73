//! More for a machine that runs: vCPUs, and memory that its guest plugs.
//!
//! A vCPU is made as those at the boot were, and waits for the guest to start it. None is ever taken away: what the guest puts
//! offline halts in KVM for good, and costs a thread that sleeps.

use std::io;

use super::Machine;
use crate::arch::{cpuid, layout, regs};
use crate::devices::virtio::mem::ResizeError;
use crate::kvm::{self, KvmError};

/// Why a machine did not grow.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// More vCPUs than the guest knows of.
    #[error("{wanted} vCPUs are more than this guest knows of: give at most {n_possible}")]
    TooManyVcpus {
        /// What was asked for.
        wanted: u32,
        /// `n_possible_vcpus` of the configuration.
        n_possible: u32,
    },
    /// It stands still.
    #[error("the VM is paused: send Resume first")]
    Paused,
    /// It does not stand still for the moment that this takes.
    #[error("a vCPU did not leave the guest in time")]
    NotPaused,
    /// KVM did not make a vCPU, or did not take memory.
    #[error("Failed to set up the VM in KVM")]
    Kvm(#[source] KvmError),
    /// No thread.
    #[error("Failed to start the vCPU threads")]
    Thread(#[source] io::Error),
    /// The guest was started without memory to plug.
    #[error("this guest was started without memory to plug: give hotplug_mib")]
    NoHotplug,
    /// A size that cannot be.
    #[error(transparent)]
    Memory(ResizeError),
}

impl Machine {
    /// Makes vCPUs until there are so many.
    ///
    /// # Errors
    /// [`GrowError`]; the machine goes on.
    pub fn add_vcpus(&mut self, n_vcpus: u32) -> Result<(), GrowError> {
        let n_possible = self.saved.config.n_possible_vcpus;
        if n_vcpus > n_possible {
            return Err(GrowError::TooManyVcpus {
                wanted: n_vcpus,
                n_possible,
            });
        }
        let first = u32::try_from(self.vm.vcpus.count()).unwrap_or(u32::MAX);
        if first >= n_vcpus {
            return Ok(());
        }
        if self.vm.is_paused() {
            return Err(GrowError::Paused);
        }
        // The TSC of a vCPU can be read only while it is not in the guest.
        if !self.vm.pause() {
            return Err(GrowError::NotPaused);
        }
        let made = self.make_vcpus(first, n_vcpus).map_err(GrowError::Kvm);
        self.vm.resume();
        self.vm.vcpus.add(made?).map_err(GrowError::Thread)
    }

    fn make_vcpus(&self, first: u32, end: u32) -> Result<Vec<kvm::Vcpu>, KvmError> {
        let tsc = self.vm.vcpus.tsc()?;
        let mut entries = self.saved.cpuid.clone();
        let make = |id| {
            let vcpu = self.vm.kvm.create_vcpu(id)?;
            cpuid::set_vcpu(&mut entries, id);
            vcpu.set_cpuid(&entries)?;
            vcpu.set_msrs(&regs::boot_msrs())?;
            tsc.map_or(Ok(()), |tsc| vcpu.set_tsc(tsc))?;
            vcpu.announce_apic()?;
            Ok(vcpu)
        };
        (first..end).map(make).collect()
    }

    /// Asks the guest to have so much memory plugged, in all.
    ///
    /// # Errors
    /// [`GrowError`]; then the old size stays.
    pub fn resize_memory(&mut self, plugged_mib: u64) -> Result<(), GrowError> {
        let mem = self.mem.as_ref().ok_or(GrowError::NoHotplug)?;
        if plugged_mib != 0 && !self.has_hotplug_slot {
            let n_ram = layout::ram_ranges(self.saved.config.memory_mib << 20).len();
            let (kvm, memory) = (&self.vm.kvm, &self.vm.memory);
            kvm.set_memory(memory, n_ram..n_ram + 1).map_err(GrowError::Kvm)?;
            self.has_hotplug_slot = true;
        }
        mem.resize(plugged_mib).map_err(GrowError::Memory)
    }
}
