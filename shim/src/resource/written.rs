//! Finds out which pages of a template the first group that was made from it has written to, for the guests after it
//! (`vmm::memory::written`). Only the numbers of pages are kept.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use vmm::memory::written;

const PAGE_BYTES: u64 = 4096;
/// The page is in memory, or in swap (Linux, Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// It is a page of the file itself.
const OF_FILE: u64 = 1 << 61;

/// Writes the list for the memory image that a VMM shows to its guest, unless there is one.
///
/// # Errors
/// The process is gone, or the list cannot be written.
pub fn record(vmm_pid: u32, image: &Path, list: &Path) -> io::Result<()> {
    if list.exists() {
        return Ok(());
    }
    let pages = pages(vmm_pid, &fs::metadata(image)?)?;
    let draft = list.with_extension(vmm_pid.to_string());
    fs::write(&draft, written::encode(pages))?;
    fs::rename(&draft, list)
}

/// The numbers of the file's pages that the process has pages of its own for, in ascending order.
fn pages(pid: u32, file: &Metadata) -> io::Result<Vec<u32>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut pages = Vec::new();
    for mapping in maps.lines().filter_map(Mapping::parse) {
        if mapping.inode != file.ino() || mapping.device != file.dev() {
            continue;
        }
        let n_pages = (mapping.end - mapping.start) / PAGE_BYTES;
        let mut entries = vec![0; usize::try_from(n_pages * 8).map_err(io::Error::other)?];
        pagemap.read_exact_at(&mut entries, mapping.start / PAGE_BYTES * 8)?;
        let first = mapping.offset / PAGE_BYTES;
        for (number, entry) in (first..).zip(entries.as_chunks().0) {
            let entry = u64::from_le_bytes(*entry);
            if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                pages.push(u32::try_from(number).map_err(io::Error::other)?);
            }
        }
    }
    pages.sort_unstable();
    pages.dedup();
    Ok(pages)
}

/// A line of `/proc/PID/maps`: `7f00-7f10 rw-p 00001000 00:19 1234   /path`.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    device: u64,
    inode: u64,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = words.next()?.split_once('-')?;
        let offset = words.nth(1)?;
        let (major, minor) = words.next()?.split_once(':')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            offset: hex(offset)?,
            device: rustix::fs::makedev(number(major)?, number(minor)?),
            inode: words.next()?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};
    use vmm::memory::image::{self, DataRange};

    use super::*;

    #[test]
    fn pages_that_a_vm_wrote_to_are_listed_once() {
        let dir = tempfile::tempdir().unwrap();
        let (path, list) = (dir.path().join("memory"), dir.path().join("written"));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&vec![1; 1 << 20], 2 << 20).unwrap();
        let data = [DataRange {
            guest_address: 2 << 20,
            file_offset: 2 << 20,
            length: 1 << 20,
        }];
        let memory = image::map(&[(GuestAddress(0), 4 << 20)], &file, &data).unwrap();
        for page in [512_u64, 514, 515] {
            memory.write_obj(7_u8, GuestAddress(page * 4096)).unwrap();
        }
        // Read only, and written outside of the image.
        memory.read_obj::<u8>(GuestAddress(600 * 4096)).unwrap();
        memory.write_obj(7_u8, GuestAddress(0)).unwrap();
        record(std::process::id(), &path, &list).unwrap();
        let listed = fs::read(&list).unwrap();
        assert_eq!(listed, written::encode([512, 514, 515]));
        // The first list stays.
        memory.write_obj(7_u8, GuestAddress(513 * 4096)).unwrap();
        record(std::process::id(), &path, &list).unwrap();
        assert_eq!(fs::read(&list).unwrap(), listed);
    }
}
