//! The VM: memory slots, interrupt controller, events wired to the guest.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, Vcpu, VmState, failed};
use crate::irq::Gsi;
use crate::memory::GuestMemory;

/// The only version there is (Documentation/virt/kvm/api.rst, 4.1).
const KVM_API_VERSION: i32 = 12;

/// `/dev/kvm`.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
}

impl Host {
    /// Takes an open `/dev/kvm`.
    ///
    /// # Errors
    /// When the descriptor is something else.
    pub fn new(kvm: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is open and owned by nobody else: it was an OwnedFd.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        if kvm.get_api_version() != KVM_API_VERSION {
            let source = std::io::Error::other("the descriptor passed as /dev/kvm is not it");
            return Err(KvmError {
                operation: "tell its version".to_owned(),
                source,
            });
        }
        Ok(Self { kvm })
    }

    /// All CPUID leaves that KVM can give a guest.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("tell the supported CPUID"))?;
        Ok(cpuid.as_slice().to_vec())
    }

    /// Model specific registers that this host's KVM can give and take.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn known_msrs(&self) -> Result<Vec<u32>, KvmError> {
        let indices = self
            .kvm
            .get_msr_index_list()
            .map_err(failed("list the model specific registers"))?;
        Ok(indices.as_slice().to_vec())
    }

    /// The local APIC has the TSC deadline timer.
    #[must_use]
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Makes a VM without memory or vCPUs, with an interrupt controller in the kernel.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn create_vm(&self, identity_map: u64, tss: usize) -> Result<Vm, KvmError> {
        let vm = self.kvm.create_vm().map_err(failed("create a VM"))?;
        vm.set_identity_map_address(identity_map)
            .map_err(failed("place the identity map"))?;
        vm.set_tss_address(tss)
            .map_err(failed("place the task state segment"))?;
        let mut no_pmu = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            ..Default::default()
        };
        no_pmu.args[0] = KVM_PMU_CAP_DISABLE.into();
        // Older kernels and hosts without a PMU lack it; CPUID then alone says that there is none.
        let _ = vm.enable_cap(&no_pmu);
        vm.create_irq_chip()
            .map_err(failed("create the interrupt controller"))?;
        Ok(Vm { vm: Arc::new(vm) })
    }
}

/// A VM; clones are the same one.
#[derive(Debug, Clone)]
pub struct Vm {
    vm: Arc<VmFd>,
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `vm` owns the descriptor and closes it when dropped; the borrow keeps `self`, and so `vm`, from that.
        unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }
    }
}

impl Vm {
    /// Gives the guest these regions of `memory`, by their numbers, which must live as long as the VM: so it is taken, and
    /// never dropped.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn set_memory(&self, memory: &GuestMemory, regions: Range<usize>) -> Result<(), KvmError> {
        // The mappings are reference-counted: one more reference that is never given back keeps them until the
        // process ends, and with it the VM.
        std::mem::forget(memory.clone());
        for (slot, region) in (0..).zip(memory.iter()).take(regions.end).skip(regions.start) {
            let address = region.start_addr();
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: address.0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is one whole mapping, which the forgotten reference above keeps mapped for ever.
            unsafe { self.vm.set_user_memory_region(slot) }.map_err(failed(format!(
                "map {} bytes of memory at {:#x}",
                region.len(),
                address.0
            )))?;
        }
        Ok(())
    }

    /// Interrupt controllers and clock, while no vCPU runs.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn save(&self) -> Result<VmState, KvmError> {
        VmState::save(&self.vm)
    }

    /// Puts saved interrupt controllers back; before the vCPUs.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn restore_interrupts(&self, state: &VmState) -> Result<(), KvmError> {
        state.restore_irqchips(&self.vm)
    }

    /// Lets the guest's clock go on from where it was saved; last, when the vCPUs are about to run.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn restore_clock(&self, state: &VmState) -> Result<(), KvmError> {
        state.restore_clock(&self.vm)
    }

    /// A write to `event` becomes an edge on the line.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn connect_interrupt(&self, event: &EventFd, gsi: Gsi) -> Result<(), KvmError> {
        self.vm
            .register_irqfd(event, gsi.0)
            .map_err(failed(format!("connect interrupt {}", gsi.0)))
    }

    /// A guest's 4 byte write of `value` at `address` becomes a write to `event`.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn connect_kick(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(failed(format!(
                "connect the queue notification {value} at {address:#x}"
            )))
    }

    /// Makes a vCPU with its id.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu, KvmError> {
        let vcpu = self
            .vm
            .create_vcpu(id.into())
            .map_err(failed(format!("create vCPU {id}")))?;
        Ok(Vcpu::new(id, vcpu))
    }
}
