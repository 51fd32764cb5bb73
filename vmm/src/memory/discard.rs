//! Giving memory that the guest does not use back to the host.
//!
//! `MADV_DONTNEED` frees the pages that belong to this VM alone, whichever way its RAM is mapped:
//!
//! - anonymous memory: the next access finds zeroes;
//! - a private mapping of a file (a VM that was restored): the VM's own copies are freed, and the next access finds what
//!   the file has there. That is memory of the template, which holds no tenant's data, and comes from the page cache that
//!   all VMs of the template share.
//!
//! Neither is what the guest last wrote: callers discard only what the guest has said not to rely on. Nothing reaches the
//! file, and the mapping stays one mapping, however often a guest asks (to map anonymous memory over a file's would
//! split it, and let a guest use up the process's mappings).

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestMemory, mapping};

/// Memory is given back in multiples of this.
pub const PAGE_BYTES: u64 = mapping::PAGE_BYTES as u64;

/// Why memory was not given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// Not whole pages.
    #[error("{length:#x} bytes at {address:#x} are not whole pages")]
    Unaligned {
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// Not RAM of this guest, or not all of it.
    #[error("{length:#x} bytes at {address:#x} are not inside guest memory")]
    Outside {
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// A mapping whose pages are not this VM's alone, so that freeing them here frees nothing.
    #[error("the memory at {address:#x} is shared with other processes")]
    Shared {
        /// Guest address.
        address: u64,
    },
    /// The host refused. A part of the range may have been given back.
    #[error("Failed to give {length:#x} bytes at {address:#x} back to the host")]
    Host {
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Gives the pages of `length` bytes from `address` back to the host. Their content is lost. The range is whole pages of
/// guest RAM; it may cross from one region into the next.
///
/// # Errors
/// [`DiscardError`]; only with [`DiscardError::Host`] anything has changed.
pub fn discard(memory: &GuestMemory, address: GuestAddress, length: u64) -> Result<(), DiscardError> {
    let start = address.0;
    let outside = || DiscardError::Outside {
        address: start,
        length,
    };
    if !start.is_multiple_of(PAGE_BYTES) || !length.is_multiple_of(PAGE_BYTES) {
        return Err(DiscardError::Unaligned {
            address: start,
            length,
        });
    }
    if length == 0 {
        return Err(outside());
    }
    // All of it is looked up before any of it is given back.
    let mut pieces = Vec::with_capacity(1);
    let mut done = 0;
    while done < length {
        let at = GuestAddress(start + done);
        let (region, offset) = memory.to_region_addr(at).ok_or_else(outside)?;
        if region.flags() & libc::MAP_PRIVATE == 0 {
            return Err(DiscardError::Shared { address: at.0 });
        }
        let piece = (length - done).min(region.len() - offset.0);
        let host_address = region.get_host_address(offset).map_err(|_| outside())?;
        pieces.push((at.0, host_address, piece));
        done += piece;
    }
    for (address, host_address, length) in pieces {
        let bytes = usize::try_from(length).map_err(|_| outside())?;
        // SAFETY: these are whole pages of one region: `piece` above ends where the region does. Nobody holds a reference to
        // guest memory (the memory module hands out none), and all that use it expect it to change under them.
        let result = unsafe { libc::madvise(host_address.cast(), bytes, libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(DiscardError::Host {
                address,
                length,
                source: io::Error::last_os_error(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, FileOffset, GuestRegionMmap, MmapRegion};

    use super::*;

    const PAGE: usize = mapping::PAGE_BYTES;

    fn two_regions() -> GuestMemory {
        super::super::allocate(&[(GuestAddress(0), 4 << 20), (GuestAddress(4 << 20), 4 << 20)]).unwrap()
    }

    fn byte(memory: &GuestMemory, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Resident pages of this process in the range, by the kernel's count.
    fn resident(memory: &GuestMemory, address: u64, length: usize) -> usize {
        let (region, offset) = memory.to_region_addr(GuestAddress(address)).unwrap();
        let first = usize::try_from(offset.0).unwrap() / PAGE;
        let pages = mapping::resident_pages(region).unwrap();
        pages[first..first + length / PAGE]
            .iter()
            .filter(|page| **page)
            .count()
    }

    #[test]
    fn pages_are_given_back_and_only_those() {
        let memory = two_regions();
        memory.write_slice(&[7; 8 * PAGE], GuestAddress(0)).unwrap();
        assert_eq!(resident(&memory, 0, 8 * PAGE), 8);
        discard(&memory, GuestAddress(0x2000), 0x3000).unwrap();
        assert_eq!(resident(&memory, 0, 8 * PAGE), 5);
        assert_eq!(byte(&memory, 0x1fff), 7);
        assert_eq!(byte(&memory, 0x2000), 0);
        assert_eq!(byte(&memory, 0x4fff), 0);
        assert_eq!(byte(&memory, 0x5000), 7);
    }

    #[test]
    fn a_range_may_cross_regions() {
        let memory = two_regions();
        let middle = (4 << 20) - 0x1000;
        memory.write_slice(&[7; 2 * PAGE], GuestAddress(middle)).unwrap();
        discard(&memory, GuestAddress(middle), 0x2000).unwrap();
        assert_eq!(byte(&memory, middle), 0);
        assert_eq!(byte(&memory, 4 << 20), 0);
    }

    #[test]
    fn a_private_file_mapping_loses_its_copies_and_the_file_stays() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 4 * PAGE]).unwrap();
        let mapping = |flags| {
            let offset = FileOffset::new(file.try_clone().unwrap(), 0);
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let region = MmapRegion::build(Some(offset), 4 * PAGE, protection, flags).unwrap();
            let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
            GuestMemory::from_regions(vec![region]).unwrap()
        };
        let memory = mapping(libc::MAP_PRIVATE);
        memory.write_slice(&[7; 4 * PAGE], GuestAddress(0)).unwrap();
        let private_kib =
            |memory: &GuestMemory| anonymous_kib(memory.get_host_address(GuestAddress(0)).unwrap());
        assert_eq!(private_kib(&memory), 16);
        discard(&memory, GuestAddress(0), 2 * PAGE_BYTES).unwrap();
        assert_eq!(private_kib(&memory), 8);
        assert_eq!(byte(&memory, 0), 1);
        assert_eq!(byte(&memory, 2 * PAGE_BYTES), 7);
        let mut seen = [0; 4 * PAGE];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [1; 4 * PAGE]);
        // There nothing would be freed.
        let shared = mapping(libc::MAP_SHARED);
        let error = discard(&shared, GuestAddress(0), PAGE_BYTES).unwrap_err();
        assert!(matches!(error, DiscardError::Shared { address: 0 }));
    }

    /// KiB of the mapping at `start` that are this process's own.
    fn anonymous_kib(start: *mut u8) -> u64 {
        let mut maps = String::new();
        File::open("/proc/self/smaps")
            .unwrap()
            .read_to_string(&mut maps)
            .unwrap();
        let prefix = format!("{:x}-", start.addr());
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&prefix));
        let line = lines.find(|line| line.starts_with("Anonymous:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn what_is_not_whole_pages_of_ram_is_refused() {
        let memory = two_regions();
        memory.write_slice(&[7; 8 * PAGE], GuestAddress(0)).unwrap();
        let end = 8 << 20;
        for (address, length) in [(1, 0x1000), (0x1000, 1), (0x1800, 0x1800)] {
            let error = discard(&memory, GuestAddress(address), length).unwrap_err();
            assert!(matches!(error, DiscardError::Unaligned { .. }), "{error}");
        }
        for (address, length) in [
            (0, 0),
            (end, 0x1000),
            (end - 0x1000, 0x2000),
            (1 << 40, 0x1000),
            (0, !0xfff),
            (!0xfff, 0x1000),
            (0x1000, !0xfff),
        ] {
            let error = discard(&memory, GuestAddress(address), length).unwrap_err();
            assert!(matches!(error, DiscardError::Outside { .. }), "{error}");
        }
        assert_eq!(resident(&memory, 0, 8 * PAGE), 8);
    }
}
