//! Registers of the first vCPU at the kernel's PVH entry: 32 bit protected mode without paging (Xen
//! docs/misc/pvh.pandoc). The others start in the state after a reset, and wait there for the kernel.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestAddress;

const CR0_PROTECTION: u64 = 1 << 0;
const CR0_NUMERIC_ERROR_EXTENSION: u64 = 1 << 4;
/// Always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
/// Without it Linux takes Intel processors for ones with slow `rep movsb`.
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Ranges without an MTRR of their own, which is all, are write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// General registers: where to start, and the start info.
#[must_use]
pub fn boot_regs(entry: GuestAddress, start_info: GuestAddress) -> kvm_regs {
    kvm_regs {
        rip: entry.0,
        rbx: start_info.0,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// Puts flat segments and protected mode into what KVM has after a reset.
pub fn set_boot_sregs(sregs: &mut kvm_sregs) {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // Execute, read, accessed; read, write, accessed.
    sregs.cs = flat(0x08, 0xb);
    let data = flat(0x10, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 32 bit task state segment, which must be there and is never looked at.
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.cr0 = CR0_PROTECTION | CR0_NUMERIC_ERROR_EXTENSION;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// Model specific registers that KVM's reset leaves otherwise than firmware would.
#[must_use]
pub fn boot_msrs() -> [kvm_msr_entry; 2] {
    [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
}
