//! Guest memory as a file: written for a snapshot, and shown by the memory of a VM that is made from it.
//!
//! The file is sparse and as long as guest memory: byte `n` of it is byte `n` of the regions, one after the other. Pages
//! of zeroes are holes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    WriteVolatile,
};

use super::mapping::{self, PAGE_BYTES};
use super::{GuestMemory, MemoryError};

/// Ranges nearer to each other than this become one: a mapping costs more than some pages of zeroes in the file.
const MERGE_GAP_BYTES: u64 = 256 << 10;

/// A part of guest memory that has content in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRange {
    /// First byte in guest memory, a multiple of the page size.
    pub guest_address: u64,
    /// First byte in the file.
    pub file_offset: u64,
    /// Bytes, a multiple of the page size.
    pub length: u64,
}

/// Writes what is not zero into an empty file, sets its length, and tells where content is. The guest must not run.
///
/// # Errors
/// The file cannot be written, or memory not read.
pub fn write(memory: &GuestMemory, mut file: &File) -> io::Result<Vec<DataRange>> {
    let mut ranges = Vec::new();
    let mut region_offset = 0;
    for region in memory.iter() {
        let mut resident = mapping::resident_pages(region)?;
        if is_swapping() {
            // A page in swap is not resident and has content: every page is looked at.
            resident.fill(true);
        }
        let mut page = 0;
        while page < resident.len() {
            let first = page;
            while page < resident.len() && resident[page] && !is_zero(region, page)? {
                page += 1;
            }
            if page == first {
                page += 1;
                continue;
            }
            let (offset, length) = (first * PAGE_BYTES, (page - first) * PAGE_BYTES);
            file.seek(SeekFrom::Start(region_offset + offset as u64))?;
            copy_out(region, offset, length, &mut file)?;
            push(
                &mut ranges,
                DataRange {
                    guest_address: region.start_addr().0 + offset as u64,
                    file_offset: region_offset + offset as u64,
                    length: length as u64,
                },
            );
        }
        region_offset += region.len();
    }
    file.set_len(region_offset)?;
    Ok(ranges)
}

/// The host has put some memory, perhaps the guest's, into swap.
fn is_swapping() -> bool {
    let host = rustix::system::sysinfo();
    host.freeswap != host.totalswap
}

fn copy_out(
    region: &GuestRegionMmap,
    offset: usize,
    length: usize,
    file: &mut impl WriteVolatile,
) -> io::Result<()> {
    region
        .write_all_volatile_to(MemoryRegionAddress(offset as u64), file, length)
        .map_err(io::Error::other)
}

fn is_zero(region: &GuestRegionMmap, page: usize) -> io::Result<bool> {
    let mut bytes = [0; PAGE_BYTES];
    region
        .read_slice(&mut bytes, MemoryRegionAddress((page * PAGE_BYTES) as u64))
        .map_err(io::Error::other)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

/// Appends a range, or lengthens the last one when both are near each other.
fn push(ranges: &mut Vec<DataRange>, next: DataRange) {
    if let Some(last) = ranges.last_mut() {
        let gap = next.guest_address.checked_sub(last.guest_address + last.length);
        let same_region = next.guest_address - last.guest_address == next.file_offset - last.file_offset;
        if let Some(gap) = gap.filter(|gap| same_region && *gap <= MERGE_GAP_BYTES) {
            last.length += gap + next.length;
            return;
        }
    }
    ranges.push(next);
}

/// Memory that shows the file where it has content, privately, and is zero elsewhere. `ranges` as for
/// [`super::allocate`].
///
/// # Errors
/// [`MemoryError`]: the file is shorter than the memory, or a data range is not inside of it.
pub fn map(
    ranges: &[(GuestAddress, u64)],
    file: &File,
    data: &[DataRange],
) -> Result<GuestMemory, MemoryError> {
    let memory = super::allocate(ranges)?;
    let length: u64 = ranges.iter().map(|(_, length)| length).sum();
    let file_length = file
        .metadata()
        .map_err(|source| MemoryError::Image { source })?
        .len();
    // A page past the end of the file would kill this process when it is touched.
    if file_length != length {
        return Err(MemoryError::ImageLength {
            memory: length,
            file: file_length,
        });
    }
    for range in data {
        let bad = || MemoryError::ImageRange {
            address: range.guest_address,
            length: range.length,
        };
        let (region, offset) = memory
            .to_region_addr(GuestAddress(range.guest_address))
            .ok_or_else(bad)?;
        let is_in_file = range
            .file_offset
            .checked_add(range.length)
            .is_some_and(|end| end <= file_length);
        let (Ok(offset), Ok(length), true) = (
            usize::try_from(offset.0),
            usize::try_from(range.length),
            is_in_file,
        ) else {
            return Err(bad());
        };
        mapping::show_file(region, offset, length, file.as_fd(), range.file_offset).map_err(|source| {
            match source.kind() {
                io::ErrorKind::InvalidInput => bad(),
                _ => MemoryError::Image { source },
            }
        })?;
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGES: [(GuestAddress, u64); 2] = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)];

    fn written() -> (GuestMemory, File, Vec<DataRange>) {
        let memory = super::super::allocate(&RANGES).unwrap();
        for address in [0x1000, 0x2ff8, 0x20_0000, (1 << 32) + 0x1f_f000] {
            memory
                .write_obj(address ^ 0xabcd_u64, GuestAddress(address))
                .unwrap();
        }
        // Touched, but zero.
        memory.write_obj(0_u64, GuestAddress(0x10_0000)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let data = write(&memory, &file).unwrap();
        (memory, file, data)
    }

    fn range(guest_address: u64, file_offset: u64, length: u64) -> DataRange {
        DataRange {
            guest_address,
            file_offset,
            length,
        }
    }

    #[test]
    fn only_pages_with_content_are_in_the_file() {
        let (_, file, data) = written();
        assert_eq!(file.metadata().unwrap().len(), 6 << 20);
        let expected = [
            range(0x1000, 0x1000, 0x2000),
            range(0x20_0000, 0x20_0000, 0x1000),
            range((1 << 32) + 0x1f_f000, (4 << 20) + 0x1f_f000, 0x1000),
        ];
        assert_eq!(data, expected);
    }

    #[test]
    fn mapped_memory_is_what_was_written_and_keeps_its_own_changes() {
        let (_, file, data) = written();
        let (first, second) = (
            map(&RANGES, &file, &data).unwrap(),
            map(&RANGES, &file, &data).unwrap(),
        );
        for address in [0x1000, 0x2ff8, 0x20_0000, (1 << 32) + 0x1f_f000] {
            let value: u64 = first.read_obj(GuestAddress(address)).unwrap();
            assert_eq!(value, address ^ 0xabcd);
        }
        assert_eq!(first.read_obj::<u64>(GuestAddress(0x30_0000)).unwrap(), 0);
        first.write_obj(7_u64, GuestAddress(0x1000)).unwrap();
        assert_eq!(
            second.read_obj::<u64>(GuestAddress(0x1000)).unwrap(),
            0x1000 ^ 0xabcd
        );
        assert_eq!(
            map(&RANGES, &file, &data)
                .unwrap()
                .read_obj::<u64>(GuestAddress(0x1000))
                .unwrap(),
            0x1000 ^ 0xabcd
        );
    }

    #[test]
    fn near_ranges_are_merged_within_a_region_only() {
        let mut ranges = Vec::new();
        push(&mut ranges, range(0, 0, 0x1000));
        push(
            &mut ranges,
            range(0x1000 + MERGE_GAP_BYTES, 0x1000 + MERGE_GAP_BYTES, 0x1000),
        );
        push(&mut ranges, range(1 << 32, 4 << 20, 0x1000));
        assert_eq!(
            ranges,
            [
                range(0, 0, 0x2000 + MERGE_GAP_BYTES),
                range(1 << 32, 4 << 20, 0x1000)
            ]
        );
    }

    #[test]
    fn images_that_do_not_fit_are_refused() {
        let (_, file, data) = written();
        let short = tempfile::tempfile().unwrap();
        short.set_len(4 << 20).unwrap();
        assert!(matches!(
            map(&RANGES, &short, &data),
            Err(MemoryError::ImageLength { .. })
        ));
        for bad in [
            range(0x1800, 0x1000, 0x1000),
            range(5 << 20, 0, 0x1000),
            range(0x3f_f000, 0, 0x2000),
            range(0, (6 << 20) - 0x1000, 0x2000),
            range(0, u64::MAX - 0xfff, 0x1000),
            range(0, 0, 0),
        ] {
            assert!(
                matches!(map(&RANGES, &file, &[bad]), Err(MemoryError::ImageRange { .. })),
                "{bad:?}"
            );
        }
    }
}
