//! Guest RAM. The only maker of host addresses of guest memory.
#![allow(unsafe_code)]

mod discard;
pub mod image;
mod mapping;
pub mod written;

pub use discard::{DiscardError, PAGE_BYTES, discard};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// All RAM of the guest. Cloning is cheap: the regions are shared.
pub type GuestMemory = GuestMemoryMmap;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than this process can address.
    #[error("A memory region of {0} bytes is too long for this host")]
    TooLong(u64),
    /// The kernel refused.
    #[error("Failed to map {length} bytes of guest memory")]
    Map {
        /// Length of the region.
        length: u64,
        /// The cause.
        #[source]
        source: MmapRegionError,
    },
    /// The file of a memory image cannot be used.
    #[error("Failed to use the memory image")]
    Image {
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file of a memory image has another length than the memory.
    #[error("The memory image has {file} bytes for {memory} bytes of guest memory")]
    ImageLength {
        /// Bytes of guest memory.
        memory: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// A range of a memory image that is not in guest memory or not in the file.
    #[error(
        "The memory image has {length} bytes for {address:#x}, which is outside of guest memory or of the file"
    )]
    ImageRange {
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// Regions that overlap or are not in order.
    #[error("The memory regions overlap or are not in order")]
    Regions {
        /// The cause.
        #[source]
        source: vm_memory::GuestRegionCollectionError,
    },
}

/// Maps private, zeroed memory for the ranges, given as guest address and length in bytes. The host gives a page when
/// it is first touched, and promises none before (`MAP_NORESERVE`).
///
/// # Errors
/// [`MemoryError`].
pub fn allocate(ranges: &[(GuestAddress, u64)]) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::with_capacity(ranges.len());
    for (address, length) in ranges {
        let size = usize::try_from(*length).map_err(|_| MemoryError::TooLong(*length))?;
        let mapping = mapping::anonymous(size).map_err(|source| MemoryError::Map {
            length: *length,
            source,
        })?;
        regions.push(GuestRegionMmap::new(mapping, *address).ok_or(MemoryError::TooLong(*length))?);
    }
    GuestMemory::from_regions(regions).map_err(|source| MemoryError::Regions { source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn huge_pages_of_host_and_guest_match() {
        let memory = allocate(&[(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)]).unwrap();
        for region in memory.iter() {
            assert_eq!(region.as_ptr().addr() % mapping::HUGE_PAGE_BYTES, 0);
        }
    }

    #[test]
    fn memory_is_zeroed_and_has_the_hole() {
        let memory = allocate(&[(GuestAddress(0), 1 << 20), (GuestAddress(4 << 20), 1 << 20)]).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress((5 << 20) - 8)).unwrap(), 0);
        assert!(!memory.address_in_range(GuestAddress(2 << 20)));
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let overlap = [(GuestAddress(0), 1 << 20), (GuestAddress(4096), 1 << 20)];
        assert!(matches!(allocate(&overlap), Err(MemoryError::Regions { .. })));
    }
}
