//! Guest memory as a file: written for a snapshot, and shown by the memory of a VM that is made from it.
//!
//! The file is sparse and as long as guest memory: byte `n` of it is byte `n` of the regions, one after the other. Pages
//! of zeroes are holes. Where the file is in memory (tmpfs), ranges that are mostly content become huge pages of it: KVM maps
//! such a page into each VM in one piece, as long as that VM only reads there. Kernel text is so.

use std::collections::{BTreeMap, BTreeSet};
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

/// Ranges nearer to each other than this become one: each mapping costs every start. A VM that touches a page between them makes a
/// page of zeroes of the file.
const MERGE_GAP_BYTES: u64 = 2 << 20;

/// A huge page of the file is worth its memory when at least this much of it has content: the file is there once, and each small
/// page that a VM reads costs an exit.
const HUGE_CONTENT_BYTES: u64 = HUGE_BYTES / 4;
const HUGE_BYTES: u64 = mapping::HUGE_PAGE_BYTES as u64;

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

impl DataRange {
    /// Its huge pages in the file are those of the guest too.
    fn can_be_huge(&self) -> bool {
        self.guest_address % HUGE_BYTES == self.file_offset % HUGE_BYTES
    }
}

/// Writes what is not zero into an empty file, sets its length, and tells where content is. The guest must not run.
///
/// # Errors
/// The file cannot be written, or memory not read.
pub fn write(memory: &GuestMemory, mut file: &File) -> io::Result<Vec<DataRange>> {
    let mut ranges = Vec::new();
    let mut region_offset = 0;
    let mut region_ends = Vec::new();
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
            ranges.push(DataRange {
                guest_address: region.start_addr().0 + offset as u64,
                file_offset: region_offset + offset as u64,
                length: length as u64,
            });
        }
        region_offset += region.len();
        region_ends.push(region_offset);
    }
    file.set_len(region_offset)?;
    Ok(use_huge_pages(file, ranges, &region_ends))
}

/// Makes huge pages of the file where that is of use and the file system can; returns the ranges, made longer where they are now
/// in huge pages, and those near each other as one. A range shorter than its huge page would be mapped in small ones.
fn use_huge_pages(file: &File, ranges: Vec<DataRange>, region_ends: &[u64]) -> Vec<DataRange> {
    // Content of each huge page of the file, by its offset there.
    let mut content = BTreeMap::<u64, u64>::new();
    for range in ranges.iter().filter(|range| range.can_be_huge()) {
        let (mut offset, end) = (range.file_offset, range.file_offset + range.length);
        while offset < end {
            let next = (offset + 1).next_multiple_of(HUGE_BYTES).min(end);
            *content.entry(offset - offset % HUGE_BYTES).or_default() += next - offset;
            offset = next;
        }
    }
    let crosses_end = |offset: u64| {
        region_ends
            .iter()
            .any(|end| (offset + 1..offset + HUGE_BYTES).contains(end))
    };
    content.retain(|offset, bytes| *bytes >= HUGE_CONTENT_BYTES && !crosses_end(*offset));
    // Where this is no file in memory none can be made; in one, a page that can't be for the moment says nothing of the next.
    // Small pages do as well.
    let is_huge: BTreeSet<u64> = content
        .into_keys()
        .filter(|offset| mapping::collapse(file.as_fd(), *offset).is_ok())
        .collect();
    let mut longer = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (mut start, mut end) = (range.file_offset, range.file_offset + range.length);
        if range.can_be_huge() {
            let (first, last) = (start - start % HUGE_BYTES, (end - 1) - (end - 1) % HUGE_BYTES);
            if is_huge.contains(&first) {
                start = first;
            }
            if is_huge.contains(&last) {
                end = last + HUGE_BYTES;
            }
        }
        push(
            &mut longer,
            DataRange {
                guest_address: range.guest_address - (range.file_offset - start),
                file_offset: start,
                length: end - start,
            },
        );
    }
    longer
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

/// Appends a range that begins behind the start of the last one, or lengthens the last one when both overlap or are near each
/// other.
fn push(ranges: &mut Vec<DataRange>, next: DataRange) {
    if let Some(last) = ranges.last_mut() {
        let is_near = next.guest_address <= last.guest_address + last.length + MERGE_GAP_BYTES;
        let same_region = next.guest_address - last.guest_address == next.file_offset - last.file_offset;
        if is_near && same_region {
            let end = next.guest_address + next.length;
            last.length = last.length.max(end - last.guest_address);
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
            range(0x1000, 0x1000, 0x20_0000),
            range((1 << 32) + 0x1f_f000, (4 << 20) + 0x1f_f000, 0x1000),
        ];
        assert_eq!(data, expected);
        // What is between them is none: two pages, two more, and what a file system needs for itself.
        let used_bytes = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
        assert!(used_bytes < 0x1_0000, "{used_bytes:#x}");
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

    /// Bytes of this process' mappings of files in memory that are huge pages, in the mapping around an address.
    fn huge_bytes_around(address: usize) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_here = false;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap();
            if let Some((start, end)) = first.split_once('-') {
                let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
                is_here = (start..end).contains(&address);
            } else if is_here && first == "ShmemPmdMapped:" {
                return words.next().unwrap().parse::<u64>().unwrap() << 10;
            }
        }
        0
    }

    #[test]
    fn what_is_mostly_content_is_read_in_huge_pages_of_a_file_in_memory() {
        // Regions whose ends and file offsets are no huge pages.
        let ranges = [(GuestAddress(0), 7 << 20), (GuestAddress(1 << 32), 5 << 20)];
        let memory = super::super::allocate(&ranges).unwrap();
        let words = |start: u64, end: u64| (start..end).step_by(PAGE_BYTES);
        // One huge page in full but for its first page, one a bit, one to the end of the region; a full one elsewhere in the file.
        // The first three are near each other, but that does not fill the second.
        for address in words(0x20_1000, 0x40_0000)
            .chain(words(0x40_0000, 0x41_0000))
            .chain(words(0x60_0000, 0x70_0000))
            .chain(words(1 << 32, (1 << 32) + 0x20_0000))
        {
            memory.write_obj(!address, GuestAddress(address)).unwrap();
        }
        let file = File::from(rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let data = write(&memory, &file).unwrap();
        assert_eq!(
            data,
            [
                range(0x20_0000, 0x20_0000, 0x50_0000),
                range(1 << 32, 7 << 20, 0x20_0000),
            ]
        );
        let copy = map(&ranges, &file, &data).unwrap();
        for region in [&memory, &copy].map(|memory| memory.find_region(GuestAddress(0)).unwrap()) {
            let mut bytes = vec![0; 7 << 20];
            region.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
            assert_eq!(bytes[0x20_0000..0x20_1000], [0; PAGE_BYTES]);
            assert_eq!(bytes[0x20_1000..0x20_1008], (!0x20_1000_u64).to_le_bytes());
        }
        let start = copy.find_region(GuestAddress(0)).unwrap().as_ptr().addr();
        assert_eq!(huge_bytes_around(start + 0x20_0000), HUGE_BYTES);
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
