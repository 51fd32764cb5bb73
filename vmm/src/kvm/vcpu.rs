//! A vCPU: its registers, running it, and making it stop running.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{KvmError, Tsc, VcpuState, failed};

/// A vCPU. It lives as long as the process.
#[derive(Debug)]
pub struct Vcpu {
    id: u32,
    /// Leaked, so that [`ImmediateExit`] can point into its shared page for ever.
    vcpu: &'static mut VcpuFd,
}

/// Makes a vCPU leave the guest before its next instruction. Usable from any thread.
#[derive(Debug, Clone, Copy)]
pub struct ImmediateExit {
    /// `kvm_run::immediate_exit`.
    flag: *mut u8,
}

// SAFETY: the pointer is to a byte that is mapped as long as the process lives (the vCPU is leaked in Vcpu::new), and
// it is only written to, with volatile stores of one byte.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Sets the flag: the next `KVM_RUN` returns at once. One that is under way needs a signal too.
    pub fn request(&self) {
        // SAFETY: the byte stays mapped (see the type); KVM itself reads it while other threads write it.
        unsafe { self.flag.write_volatile(1) };
    }
}

impl Vcpu {
    pub(super) fn new(id: u32, vcpu: VcpuFd) -> Self {
        Self {
            id,
            vcpu: Box::leak(Box::new(vcpu)),
        }
    }

    /// Its number, and its APIC id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What stops it from another thread.
    #[must_use]
    pub fn immediate_exit(&mut self) -> ImmediateExit {
        ImmediateExit {
            flag: &raw mut self.vcpu.get_kvm_run().immediate_exit,
        }
    }

    /// Takes back a request of [`ImmediateExit`].
    pub fn clear_immediate_exit(&mut self) {
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Sets CPUID; before the first run.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(entries).map_err(|_| KvmError {
            operation: "take CPUID".to_owned(),
            source: std::io::Error::other(format!("{} leaves are too many", entries.len())),
        })?;
        self.vcpu
            .set_cpuid2(&cpuid)
            .map_err(failed(format!("set CPUID of vCPU {}", self.id)))
    }

    /// Sets model specific registers.
    ///
    /// # Errors
    /// [`KvmError`], naming the first register that was refused.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        let operation = || format!("set model specific registers of vCPU {}", self.id);
        let msrs = Msrs::from_entries(entries).map_err(|_| KvmError {
            operation: operation(),
            source: std::io::Error::other(format!("{} are too many", entries.len())),
        })?;
        let n_set = self.vcpu.set_msrs(&msrs).map_err(failed(operation()))?;
        match entries.get(n_set) {
            None => Ok(()),
            Some(refused) => Err(KvmError {
                operation: operation(),
                source: std::io::Error::other(format!("{:#x} was refused", refused.index)),
            }),
        }
    }

    /// Sets general registers, and changes segment and control registers with `set_sregs`.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn set_registers(
        &self,
        regs: &kvm_regs,
        set_sregs: impl FnOnce(&mut kvm_sregs),
    ) -> Result<(), KvmError> {
        let operation = || format!("set registers of vCPU {}", self.id);
        let mut sregs = self.vcpu.get_sregs().map_err(failed(operation()))?;
        set_sregs(&mut sregs);
        self.vcpu.set_sregs(&sregs).map_err(failed(operation()))?;
        self.vcpu.set_regs(regs).map_err(failed(operation()))
    }

    /// Its state, while it is not in the guest. `known_msrs` are those of [`super::Host::known_msrs`].
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn save(&self, known_msrs: &[u32]) -> Result<VcpuState, KvmError> {
        VcpuState::save(self.vcpu, known_msrs)
    }

    /// Takes a saved state; before the first run, after CPUID.
    ///
    /// # Errors
    /// [`KvmError`], naming the part that was refused.
    pub fn restore(&self, state: &VcpuState, tsc: Tsc) -> Result<(), KvmError> {
        state.restore(self.vcpu, tsc, self.id == 0, |msrs| self.set_msrs(msrs))
    }

    /// Gives a vCPU that a restored VM has beside its saved ones their TSC; after theirs.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn set_tsc(&self, tsc: Tsc) -> Result<(), KvmError> {
        tsc.apply(self.vcpu, self.id == 0, |msrs| self.set_msrs(msrs))
    }

    /// Has the other vCPUs' interrupts find this one, which was made after they had run. KVM draws up its list of local APICs
    /// when one of them changes, and a new vCPU is not among them yet when its own is set up.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn announce_apic(&self) -> Result<(), KvmError> {
        let operation = |what| format!("{what} the local APIC of vCPU {}", self.id);
        let lapic = self.vcpu.get_lapic().map_err(failed(operation("give")))?;
        self.vcpu.set_lapic(&lapic).map_err(failed(operation("take")))
    }

    /// Its TSC, while it is not in the guest.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn tsc(&self) -> Result<Tsc, KvmError> {
        Tsc::of(self.vcpu)
    }

    /// TSC frequency in kHz, 0 when unknown.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        self.vcpu.get_tsc_khz().unwrap_or(0)
    }

    /// Runs the guest until something is to be done for it.
    ///
    /// # Errors
    /// `EINTR` and `EAGAIN` when asked to stop; anything else is the end of this vCPU.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.vcpu.run()
    }

    /// Tells the guest that it was stopped, so that its watchdogs forgive the time.
    pub fn announce_pause(&self) {
        // Fails when the guest does not use the KVM clock; there is nothing to tell it then.
        let _ = self.vcpu.kvmclock_ctrl();
    }

    /// Where the vCPU is, and what KVM says of an internal error: for people.
    pub fn describe(&mut self) -> String {
        let run = self.vcpu.get_kvm_run();
        let mut text = format!("exit reason {}", run.exit_reason);
        if run.exit_reason == kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: the exit reason says that this member of the union was written.
            let internal = unsafe { &run.__bindgen_anon_1.internal };
            let n_data = usize::try_from(internal.ndata)
                .unwrap_or(0)
                .min(internal.data.len());
            text += &format!(
                ", suberror {}, data {:#x?}",
                internal.suberror,
                &internal.data[..n_data]
            );
        }
        if let Ok(regs) = self.vcpu.get_regs() {
            text += &format!(
                ", rip {:#x}, rsp {:#x}, rflags {:#x}, rax {:#x}, rbx {:#x}, rcx {:#x}, rdx {:#x}, rsi {:#x}, rdi {:#x}",
                regs.rip, regs.rsp, regs.rflags, regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi
            );
        }
        if let Ok(sregs) = self.vcpu.get_sregs() {
            text += &format!(
                ", cs {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}",
                sregs.cs.selector, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer
            );
        }
        text
    }
}
