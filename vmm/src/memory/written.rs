//! Which pages of a memory image its guests write to at first. Every guest that goes on from the image writes to much the same
//! pages, and each costs an exit and a copy, or two exits when it is read before. A VM that knows them copies them before its
//! guest runs, all at once.
//!
//! The list is a hint: a page too many costs a page of memory, one too few an exit. It has a header of 8 bytes, then of each
//! run of pages the first one's number in the file and how many there are, 4 bytes each, little endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::GuestMemory;
use super::mapping::{self, PAGE_BYTES};

const MAGIC: &[u8; 8] = b"ECIWRT1\n";
/// Most pages of a list: 32 MiB. What a guest writes later is its containers', and no two groups' are the same.
pub const MAX_PAGES: usize = 8192;
const RUN_BYTES: usize = 8;

/// A run of pages of the file: the first one's number, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    first: u32,
    n_pages: u32,
}

/// Pages of a file, given by number in ascending order, as a list; those beyond [`MAX_PAGES`] are left out.
#[must_use]
pub fn encode(pages: impl IntoIterator<Item = u32>) -> Vec<u8> {
    let mut runs: Vec<Run> = Vec::new();
    for page in pages.into_iter().take(MAX_PAGES) {
        match runs.last_mut() {
            Some(last) if last.first + last.n_pages == page => last.n_pages += 1,
            _ => runs.push(Run {
                first: page,
                n_pages: 1,
            }),
        }
    }
    let mut list = MAGIC.to_vec();
    for run in runs {
        list.extend(run.first.to_le_bytes());
        list.extend(run.n_pages.to_le_bytes());
    }
    list
}

/// Reads a list; `None` when it is none.
#[must_use]
pub fn decode(list: &[u8]) -> Option<Vec<Run>> {
    let (runs, []) = list.strip_prefix(MAGIC)?.as_chunks::<RUN_BYTES>() else {
        return None;
    };
    let number = |bytes: &[u8]| bytes.try_into().map(u32::from_le_bytes).ok();
    let runs: Vec<Run> = runs
        .iter()
        .map(|run| {
            Some(Run {
                first: number(&run[..4])?,
                n_pages: number(&run[4..])?,
            })
        })
        .collect::<Option<_>>()?;
    let n_pages: u64 = runs.iter().map(|run| u64::from(run.n_pages)).sum();
    (n_pages <= MAX_PAGES as u64).then_some(runs)
}

/// Gives the memory pages of its own where the list says that the guest will write; how many. The memory shows the image
/// ([`super::image::map`]), and the guest does not run yet. What is not in the image is passed over.
///
/// # Errors
/// The file cannot be read, is no list, or the host has no such pages to give: then the guest gets them when it writes.
pub fn populate(memory: &GuestMemory, list: &File) -> io::Result<u64> {
    let longest = MAGIC.len() + MAX_PAGES * RUN_BYTES;
    let mut bytes = vec![0; longest + 1];
    let n = list.read_at(&mut bytes, 0)?;
    let runs = decode(&bytes[..n]).ok_or(io::ErrorKind::InvalidData)?;
    let mut n_pages = 0;
    // Byte `n` of the file is byte `n` of the regions, one after the other.
    let mut region_offset = 0;
    for region in memory.iter() {
        let region_end = region_offset + region.len();
        for run in &runs {
            let start = u64::from(run.first) * PAGE_BYTES as u64;
            let end = start + u64::from(run.n_pages) * PAGE_BYTES as u64;
            let (start, end) = (start.max(region_offset), end.min(region_end));
            if start < end {
                let offset = usize::try_from(start - region_offset).map_err(io::Error::other)?;
                let length = usize::try_from(end - start).map_err(io::Error::other)?;
                mapping::populate(region, offset, length)?;
                n_pages += (end - start) / PAGE_BYTES as u64;
            }
        }
        region_offset = region_end;
    }
    Ok(n_pages)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::image::{self, DataRange};
    use super::*;

    #[test]
    fn pages_become_runs() {
        let runs = decode(&encode([1, 2, 3, 9, 4_000_000_000])).unwrap();
        let run = |first, n_pages| Run { first, n_pages };
        assert_eq!(runs, [run(1, 3), run(9, 1), run(4_000_000_000, 1)]);
        assert_eq!(decode(&encode([])), Some(Vec::new()));
        let many = decode(&encode(0..10_000)).unwrap();
        assert_eq!(many, [run(0, 8192)]);
    }

    #[test]
    fn listed_pages_are_the_memorys_own_and_hold_what_the_image_has() {
        let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)];
        let file = tempfile::tempfile().unwrap();
        file.set_len(6 << 20).unwrap();
        file.write_all_at(b"first", 0x3000).unwrap();
        file.write_all_at(b"second", (4 << 20) + 0x1000).unwrap();
        let data = [
            DataRange {
                guest_address: 0,
                file_offset: 0,
                length: 1 << 20,
            },
            DataRange {
                guest_address: 1 << 32,
                file_offset: 4 << 20,
                length: 1 << 20,
            },
        ];
        let memory = image::map(&ranges, &file, &data).unwrap();
        // Two pages over the end of the first region, one beyond the image.
        let list = tempfile::tempfile().unwrap();
        list.write_all_at(&encode([3, 1023, 1024, 1025, 4000]), 0)
            .unwrap();
        assert_eq!(populate(&memory, &list).unwrap(), 4);
        // What comes to the file afterwards is not seen where a page is the memory's own.
        file.write_all_at(b"FIRST", 0x3000).unwrap();
        file.write_all_at(b"SECOND", (4 << 20) + 0x1000).unwrap();
        file.write_all_at(b"shown", 0x5000).unwrap();
        let read = |address: u64| {
            let mut bytes = [0; 5];
            memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        };
        assert_eq!(&read(0x3000), b"first");
        assert_eq!(&read((1 << 32) + 0x1000), b"secon");
        assert_eq!(&read(0x5000), b"shown");
    }

    proptest! {
        /// Whatever is in the file: it is refused, or asks for no more than there may be.
        #[test]
        fn any_file_is_bounded(junk in proptest::collection::vec(any::<u8>(), 0..200), is_list in any::<bool>()) {
            let bytes = if is_list { [&MAGIC[..], &junk].concat() } else { junk };
            if let Some(runs) = decode(&bytes) {
                let n: u64 = runs.iter().map(|run| u64::from(run.n_pages)).sum();
                prop_assert!(n <= MAX_PAGES as u64);
            }
        }
    }
}
