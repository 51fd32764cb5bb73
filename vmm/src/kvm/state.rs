//! What KVM knows of a VM and its vCPUs, taken out and put back (Documentation/virt/kvm/api.rst, the `KVM_GET_` and
//! `KVM_SET_` calls named below). Plain data, for a snapshot.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_clock_data, kvm_debugregs, kvm_device_attr, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::{KvmError, failed};

// The bindings have the call for devices and VMs only (linux/kvm.h).
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

const MSR_TSC: u32 = 0x10;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Registers of the Hyper-V interface, which our CPUID does not offer.
const HYPER_V_MSRS: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
/// Further than KVM looks when it takes a write of the TSC for an attempt to synchronise vCPUs: a second.
const FAR_AWAY_SECONDS: u64 = 10;

/// A VM's interrupt controllers and clock.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    irqchips: [kvm_irqchip; 3],
    clock: kvm_clock_data,
}

/// A vCPU: every register, pending events, local APIC.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    /// Without the TSC and its deadline.
    msrs: Vec<kvm_msr_entry>,
    tsc: u64,
    tsc_deadline: u64,
    tsc_khz: u32,
}

impl VmState {
    /// Takes the state of a VM whose vCPUs do not run.
    pub(super) fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let irqchip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip).map_err(failed(format!(
                "give the state of interrupt controller {chip_id}"
            )))?;
            Ok(chip)
        };
        Ok(Self {
            irqchips: [
                irqchip(KVM_IRQCHIP_PIC_MASTER)?,
                irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
                irqchip(KVM_IRQCHIP_IOAPIC)?,
            ],
            clock: vm.get_clock().map_err(failed("give the clock"))?,
        })
    }

    /// Puts the interrupt controllers back.
    pub(super) fn restore_irqchips(&self, vm: &VmFd) -> Result<(), KvmError> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(failed(format!(
                "take the state of interrupt controller {}",
                chip.chip_id
            )))?;
        }
        Ok(())
    }

    /// Lets the clock go on from where it was. Last, when the vCPUs are about to run.
    pub(super) fn restore_clock(&self, vm: &VmFd) -> Result<(), KvmError> {
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(failed("take the clock"))
    }
}

impl VcpuState {
    /// Takes the state of a vCPU that is not in the guest. Model specific registers that the vCPU does not have are left
    /// out, and those that are zero, as they are after a reset.
    pub(super) fn save(vcpu: &VcpuFd, known_msrs: &[u32]) -> Result<Self, KvmError> {
        let mut state = Self {
            // First: KVM takes pending INIT and SIPI in here.
            mp_state: vcpu.get_mp_state().map_err(failed("give the run state"))?,
            regs: vcpu.get_regs().map_err(failed("give the general registers"))?,
            sregs: vcpu.get_sregs().map_err(failed("give the special registers"))?,
            xsave: vcpu.get_xsave().map_err(failed("give the extended state"))?,
            xcrs: vcpu
                .get_xcrs()
                .map_err(failed("give the extended control registers"))?,
            debugregs: vcpu
                .get_debug_regs()
                .map_err(failed("give the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(failed("give the local APIC"))?,
            events: vcpu
                .get_vcpu_events()
                .map_err(failed("give the pending events"))?,
            msrs: Vec::new(),
            tsc: 0,
            tsc_deadline: 0,
            tsc_khz: vcpu.get_tsc_khz().map_err(failed("give the TSC frequency"))?,
        };
        for &index in known_msrs {
            match read_msr(vcpu, index) {
                None => {}
                Some(data) if index == MSR_TSC => state.tsc = data,
                Some(data) if index == MSR_TSC_DEADLINE => state.tsc_deadline = data,
                Some(0) if index != MSR_MISC_ENABLE => {}
                Some(_) if HYPER_V_MSRS.contains(&index) => {}
                Some(data) => state.msrs.push(kvm_msr_entry {
                    index,
                    data,
                    ..Default::default()
                }),
            }
        }
        Ok(state)
    }

    /// Puts everything back into a vCPU that has not run and has its CPUID.
    pub(super) fn restore(
        &self,
        vcpu: &VcpuFd,
        tsc: Tsc,
        is_first: bool,
        set_msrs: impl Fn(&[kvm_msr_entry]) -> Result<(), KvmError>,
    ) -> Result<(), KvmError> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed("take the run state"))?;
        vcpu.set_regs(&self.regs)
            .map_err(failed("take the general registers"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(failed("take the special registers"))?;
        // SAFETY: KVM reads no more than the 4096 bytes of the structure unless the process was granted larger features by
        // arch_prctl(2), which this program never asks for.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("take the extended state"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(failed("take the extended control registers"))?;
        vcpu.set_debug_regs(&self.debugregs)
            .map_err(failed("take the debug registers"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(failed("take the local APIC"))?;
        set_msrs(&self.msrs)?;
        tsc.apply(vcpu, is_first, &set_msrs)?;
        if self.tsc_deadline != 0 {
            // After the TSC, which it is compared with, and the local APIC, whose mode decides whether it counts.
            set_msrs(&[kvm_msr_entry {
                index: MSR_TSC_DEADLINE,
                data: self.tsc_deadline,
                ..Default::default()
            }])?;
        }
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed("take the pending events"))
    }

    /// The TSC of a VM in which this is the first vCPU, going on from now.
    #[must_use]
    pub fn tsc(&self) -> Tsc {
        // SAFETY: every x86-64 processor has the instruction, and Linux never forbids it to processes that do not ask for
        // that.
        let host_tsc = unsafe { core::arch::x86_64::_rdtsc() };
        Tsc {
            value: self.tsc,
            offset: self.tsc.wrapping_sub(host_tsc),
            khz: self.tsc_khz,
        }
    }
}

/// The time stamp counter that all vCPUs of a restored VM have in common: it goes on from where it was, whatever the time
/// between.
#[derive(Debug, Clone, Copy)]
pub struct Tsc {
    value: u64,
    /// To the host's.
    offset: u64,
    khz: u32,
}

impl Tsc {
    /// That of a vCPU that is not in the guest, and of its VM.
    pub(super) fn of(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let khz = vcpu.get_tsc_khz().map_err(failed("give the TSC frequency"))?;
        let value = read_msr(vcpu, MSR_TSC).unwrap_or_default();
        let mut offset = 0_u64;
        let attribute = kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: u64::from(KVM_VCPU_TSC_OFFSET),
            addr: (&raw mut offset).expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads a kvm_device_attr at the pointer, and writes the eight bytes of the offset that it points
        // to; both live until after the call, and nobody else looks at them meanwhile.
        let known = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } == 0;
        if !known {
            // Before Linux 5.16: the offset is not looked at by `apply` either.
            // SAFETY: as in `VcpuState::tsc`.
            offset = value.wrapping_sub(unsafe { core::arch::x86_64::_rdtsc() });
        }
        Ok(Self { value, offset, khz })
    }

    /// Sets a vCPU's frequency, and the offset between host and guest TSC. A plain write of the register would not do: within
    /// a second of the vCPU's creation KVM takes a value that is less than a second away for an attempt to synchronise
    /// vCPUs, and keeps its own. A guest whose TSC stood at less than a second then waits until its old time comes again.
    pub(super) fn apply(
        self,
        vcpu: &VcpuFd,
        is_first: bool,
        set_msrs: impl Fn(&[kvm_msr_entry]) -> Result<(), KvmError>,
    ) -> Result<(), KvmError> {
        if vcpu.get_tsc_khz().ok() != Some(self.khz) {
            vcpu.set_tsc_khz(self.khz)
                .map_err(failed(format!("take the TSC frequency of {} kHz", self.khz)))?;
        }
        let attribute = kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: u64::from(KVM_VCPU_TSC_OFFSET),
            addr: (&raw const self.offset).expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads a kvm_device_attr at the pointer, and the eight bytes of the offset that it points to; both
        // live until after the call.
        if unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } == 0 {
            return Ok(());
        }
        // Before Linux 5.16: the first vCPU is given two values that are far from each other, so neither is taken for a
        // synchronisation; the write of every other is one, with the first.
        let write = |data| {
            set_msrs(&[kvm_msr_entry {
                index: MSR_TSC,
                data,
                ..Default::default()
            }])
        };
        if is_first {
            write(
                self.value
                    .wrapping_add(u64::from(self.khz) * 1000 * FAR_AWAY_SECONDS),
            )?;
        }
        write(self.value)
    }
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .ok()?;
    match vcpu.get_msrs(&mut msrs) {
        Ok(1) => Some(msrs.as_slice()[0].data),
        _ => None,
    }
}
