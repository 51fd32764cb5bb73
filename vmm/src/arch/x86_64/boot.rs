//! Puts kernel, initramfs, command line and the PVH start info into guest memory.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability, start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout;
use crate::memory::GuestMemory;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not an ELF file for this processor, or it does not fit.
    #[error("Failed to load the kernel: give an uncompressed ELF vmlinux that fits into {memory_mib} MiB")]
    Kernel {
        /// Guest memory.
        memory_mib: u64,
        /// The cause.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// No PVH entry point.
    #[error("The kernel has no PVH entry: build it with CONFIG_PVH=y")]
    NoPvhEntry,
    /// The initramfs does not fit.
    #[error(
        "The initramfs of {initrd_bytes} bytes does not fit behind the kernel into {memory_bytes} bytes of memory"
    )]
    InitrdTooLarge {
        /// Its length.
        initrd_bytes: u64,
        /// Memory below the hole.
        memory_bytes: u64,
    },
    /// The initramfs could not be read.
    #[error("Failed to read the initramfs")]
    Initrd {
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The initramfs ended early, or is not in memory.
    #[error("Failed to copy the initramfs into guest memory")]
    InitrdCopy {
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// Command line with a zero byte, or too long.
    #[error("The kernel command line of {0} bytes contains a zero byte or is longer than {max} bytes", max = layout::COMMAND_LINE_MAX_BYTES - 1)]
    CommandLine(usize),
    /// Guest memory does not hold the boot structures.
    #[error("Failed to write the {structure} into guest memory")]
    Structure {
        /// Which.
        structure: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Loads everything and writes the start info; returns the address of the first instruction. The guest is told of
/// `memory_bytes` of RAM, which is not all of `memory` when some is yet to be plugged.
///
/// # Errors
/// [`BootError`]; guest memory is then of no use.
pub fn load(
    memory: &GuestMemory,
    memory_bytes: u64,
    kernel: &mut File,
    initrd: &mut File,
    command_line: &str,
) -> Result<GuestAddress, BootError> {
    let loaded = Elf::load(memory, None, kernel, Some(layout::HIGH_RAM_START)).map_err(|source| {
        BootError::Kernel {
            memory_mib: memory_bytes >> 20,
            source,
        }
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry);
    };
    let initrd = load_initrd(memory, initrd, loaded.kernel_end)?;
    write_command_line(memory, command_line)?;
    write_start_info(memory, memory_bytes, initrd)?;
    Ok(entry)
}

/// Copies the initramfs to the first page behind the kernel: there it shares huge pages with it.
fn load_initrd(
    memory: &GuestMemory,
    initrd: &mut File,
    kernel_end: u64,
) -> Result<(GuestAddress, u64), BootError> {
    let io_error = |source| BootError::Initrd { source };
    let initrd_bytes = initrd.seek(SeekFrom::End(0)).map_err(io_error)?;
    initrd.rewind().map_err(io_error)?;
    let address = GuestAddress(kernel_end.max(layout::HIGH_RAM_START.0).next_multiple_of(4096));
    let low_ram_end = memory.iter().next().map_or(0, vm_memory::GuestMemoryRegion::len);
    let length = usize::try_from(initrd_bytes)
        .ok()
        .filter(|_| {
            address
                .0
                .checked_add(initrd_bytes)
                .is_some_and(|end| end <= low_ram_end)
        })
        .ok_or(BootError::InitrdTooLarge {
            initrd_bytes,
            memory_bytes: low_ram_end,
        })?;
    memory
        .read_exact_volatile_from(address, initrd, length)
        .map_err(|source| BootError::InitrdCopy { source })?;
    Ok((address, initrd_bytes))
}

fn write_command_line(memory: &GuestMemory, command_line: &str) -> Result<(), BootError> {
    let mut bytes = command_line.as_bytes().to_vec();
    if bytes.contains(&0) || bytes.len() >= layout::COMMAND_LINE_MAX_BYTES {
        return Err(BootError::CommandLine(bytes.len()));
    }
    bytes.push(0);
    memory
        .write_slice(&bytes, layout::COMMAND_LINE)
        .map_err(|source| BootError::Structure {
            structure: "command line",
            source: source.into(),
        })
}

fn write_start_info(
    memory: &GuestMemory,
    memory_bytes: u64,
    (initrd, initrd_bytes): (GuestAddress, u64),
) -> Result<(), BootError> {
    let memory_map = memory_map(memory_bytes);
    let start_info = start_info::hvm_start_info {
        magic: 0x336e_c578,
        version: 1,
        nr_modules: 1,
        modlist_paddr: layout::MODULE_LIST.0,
        cmdline_paddr: layout::COMMAND_LINE.0,
        rsdp_paddr: layout::ACPI_TABLES.0,
        memmap_paddr: layout::MEMORY_MAP.0,
        memmap_entries: u32::try_from(memory_map.len()).expect("the memory map has at most four entries"),
        ..Default::default()
    };
    let module = start_info::hvm_modlist_entry {
        paddr: initrd.0,
        size: initrd_bytes,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, layout::START_INFO);
    params.set_modules(&[module], layout::MODULE_LIST);
    params.set_sections(&memory_map, layout::MEMORY_MAP);
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(|source| BootError::Structure {
        structure: "start info",
        source: source.into(),
    })
}

/// What is RAM and what is not, in E820 terms.
fn memory_map(memory_bytes: u64) -> Vec<start_info::hvm_memmap_table_entry> {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let entry = |addr, end: u64, type_| start_info::hvm_memmap_table_entry {
        addr,
        size: end - addr,
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, RAM),
        entry(layout::LOW_RAM_END, layout::HIGH_RAM_START.0, RESERVED),
    ];
    for (start, length) in layout::ram_ranges(memory_bytes) {
        map.push(entry(
            start.0.max(layout::HIGH_RAM_START.0),
            start.0 + length,
            RAM,
        ));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_map_covers_all_ram_once_and_in_order() {
        for memory_bytes in [32 << 20, 3 << 30, 5 << 30] {
            let map = memory_map(memory_bytes);
            assert!(
                map.windows(2)
                    .all(|pair| pair[0].addr + pair[0].size <= pair[1].addr)
            );
            assert_eq!(map.iter().map(|entry| entry.size).sum::<u64>(), memory_bytes);
        }
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
    }

    #[test]
    fn initrd_goes_to_the_next_page_and_must_fit() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &[7; 5000]).unwrap();
        let placed = load_initrd(&memory(), &mut file, 0x20_0001).unwrap();
        assert_eq!(placed, (GuestAddress(0x20_1000), 5000));
        let error = load_initrd(&memory(), &mut file, (4 << 20) - 4096).unwrap_err();
        assert!(matches!(
            error,
            BootError::InitrdTooLarge {
                initrd_bytes: 5000,
                ..
            }
        ));
        assert!(load_initrd(&memory(), &mut file, u64::MAX - 4096).is_err());
    }

    #[test]
    fn command_line_is_terminated_and_bounded() {
        let memory = memory();
        write_command_line(&memory, "quiet").unwrap();
        let mut bytes = [0xff; 6];
        memory.read_slice(&mut bytes, layout::COMMAND_LINE).unwrap();
        assert_eq!(&bytes, b"quiet\0");
        assert!(write_command_line(&memory, &"x".repeat(2047)).is_ok());
        assert!(write_command_line(&memory, &"x".repeat(2048)).is_err());
        assert!(write_command_line(&memory, "a\0b").is_err());
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &[0; 4096]).unwrap();
        let mut initrd = tempfile::tempfile().unwrap();
        assert!(matches!(
            load(&memory(), 4 << 20, &mut file, &mut initrd, ""),
            Err(BootError::Kernel { .. })
        ));
    }
}
