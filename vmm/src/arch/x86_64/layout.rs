//! Every guest physical address, port and interrupt number that is not allocated at run time.
//!
//! ```text
//!          0 +---------------------------+
//!            | RAM: start info, memory   |   everything the kernel is told, below 640 KiB
//!            | map, command line         |
//!    0xa0000 +---------------------------+
//!            | RAM, reserved: VMGenID,   |   found through the start info, not by scanning
//!            | ACPI tables               |
//!   0x100000 +---------------------------+
//!            | RAM: kernel (at its own   |
//!            | address), then initramfs  |
//! 0xc0000000 +---------------------------+
//!            | hole: virtio-mmio,        |
//!            | I/O APIC, local APICs,    |
//!            | pages that KVM takes      |
//! 4 GiB      +---------------------------+
//!            | RAM that did not fit below|
//!            +---------------------------+
//!            | memory to be plugged      |   from the next multiple of 2 GiB on; not in the memory map
//!            +---------------------------+
//! ```

use vm_memory::GuestAddress;

use crate::irq::Gsi;

/// `hvm_start_info`, the PVH boot block.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// `hvm_modlist_entry` of the initramfs.
pub const MODULE_LIST: GuestAddress = GuestAddress(0x6080);
/// `hvm_memmap_table_entry` array.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// The kernel command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line with its terminator (Linux: `COMMAND_LINE_SIZE`, asm/setup.h).
pub const COMMAND_LINE_MAX_BYTES: usize = 2048;
/// End of the RAM below 1 MiB that the guest may use.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// The 16 byte VM generation id, in a page of its own because clones get another one there.
pub const VM_GENERATION_ID: GuestAddress = GuestAddress(0xd_f000);
/// The ACPI tables, the RSDP first.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// End of the ACPI tables, and of what is reserved below the kernel.
pub const HIGH_RAM_START: GuestAddress = GuestAddress(0x10_0000);

/// End of the RAM below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// RAM goes on here.
pub const HOLE_END: u64 = 1 << 32;

/// The first virtio device's registers; the others follow.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Every local APIC's registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM needs for real mode on old Intel processors (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three more (KVM_SET_TSS_ADDR).
pub const KVM_TSS: usize = 0xfffb_d000;

/// The serial port: eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller's command port; a guest writes [`RESET_VALUE`] to be reset.
pub const RESET_PORT: u16 = 0x64;
/// "Pulse the reset line".
pub const RESET_VALUE: u8 = 0xfe;
/// pvpanic, where Linux and QEMU put it (qemu: docs/specs/pvpanic.rst).
pub const PANIC_PORT: u16 = 0x505;
/// ACPI sleep control register, then sleep status (ACPI 6.5, 4.8.3.7).
pub const SLEEP_PORT: u16 = 0x600;
/// `SLP_TYP` of S5, soft off, as our DSDT gives it.
pub const SLEEP_TYPE_S5: u8 = 5;

/// The serial port's interrupt, as on every PC.
pub const SERIAL_GSI: Gsi = Gsi(4);
/// First interrupt for virtio devices: pins of the I/O APIC that no legacy interrupt controller has too.
pub const FIRST_DEVICE_GSI: Gsi = Gsi(16);
/// The I/O APIC's last pin.
pub const LAST_DEVICE_GSI: Gsi = Gsi(23);
/// The ACPI generic event device's interrupt.
pub const EVENT_DEVICE_GSI: Gsi = Gsi(5);

/// Memory to be plugged begins at a multiple of this: the largest memory block that Linux chooses on x86-64
/// (`probe_memory_block_size`, arch/x86/mm/init_64.c), which can use whole blocks only.
const HOTPLUG_ALIGN: u64 = 2 << 30;

/// Where memory to be plugged goes in a guest with that much RAM, as address and length in bytes; `None` without any.
#[must_use]
pub fn hotplug_range(memory_bytes: u64, hotplug_bytes: u64) -> Option<(GuestAddress, u64)> {
    let ram_end = ram_ranges(memory_bytes)
        .last()
        .map_or(0, |(start, length)| start.0 + length);
    let start = ram_end.max(HOLE_END).next_multiple_of(HOTPLUG_ALIGN);
    (hotplug_bytes != 0).then_some((GuestAddress(start), hotplug_bytes))
}

/// The RAM ranges of a guest with that much memory, as address and length in bytes.
#[must_use]
pub fn ram_ranges(memory_bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = memory_bytes.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if memory_bytes > low {
        ranges.push((GuestAddress(HOLE_END), memory_bytes - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugged_memory_is_above_all_ram() {
        for (memory_bytes, start) in [(64 << 20, 4), (3 << 30, 4), ((3 << 30) + 4096, 6), (8 << 30, 10)] {
            let range = hotplug_range(memory_bytes, 1 << 30);
            assert_eq!(range, Some((GuestAddress(start << 30), 1 << 30)));
            assert_eq!(hotplug_range(memory_bytes, 0), None);
        }
    }

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram_ranges((3 << 30) + 4096),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 4096)]
        );
    }
}
