//! Mappings of this process that become guest RAM.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

/// KVM maps a huge page of the host as one of the guest only where both addresses have the same offset in it; else every
/// 4 KiB page costs an exit of its own.
pub(super) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A page of the host, the smallest thing that is mapped.
pub(super) const PAGE_BYTES: usize = 4096;

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Private, zeroed memory that begins at a huge page. It stays mapped as long as the process lives, which is as long as
/// its guest may run.
pub(super) fn anonymous(length: usize) -> Result<MmapRegion, MmapRegionError> {
    let reserved = length
        .checked_add(HUGE_PAGE_BYTES)
        .ok_or_else(|| MmapRegionError::Mmap(io::ErrorKind::InvalidInput.into()))?;
    // SAFETY: a new mapping at an address that the kernel chooses takes nothing from anyone.
    let start = unsafe { libc::mmap(ptr::null_mut(), reserved, PROTECTION, FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(MmapRegionError::Mmap(io::Error::last_os_error()));
    }
    let before = start.addr().next_multiple_of(HUGE_PAGE_BYTES) - start.addr();
    unmap(start, before)?;
    let start = start.wrapping_byte_add(before);
    unmap(start.wrapping_byte_add(length), HUGE_PAGE_BYTES - before)?;
    // SAFETY: `length` bytes from `start` are what is left of the mapping made above; nobody else knows of it, and nothing
    // unmaps it.
    unsafe { MmapRegion::build_raw(start.cast(), length, PROTECTION, FLAGS) }
}

/// Lets `length` bytes at `offset` of a region show a file, privately: what is written stays in this process. The region is
/// one of [`anonymous`], and not in use yet.
///
/// # Errors
/// A range outside of the region or not of whole pages; those of mmap(2).
pub(super) fn show_file(
    region: &MmapRegion,
    offset: usize,
    length: usize,
    file: BorrowedFd<'_>,
    file_offset: u64,
) -> io::Result<()> {
    let is_inside = offset.checked_add(length).is_some_and(|end| end <= region.size());
    let is_whole = [offset, length].iter().all(|n| n.is_multiple_of(PAGE_BYTES));
    let file_offset = libc::off_t::try_from(file_offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    if !is_inside || !is_whole || length == 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let start = region.as_ptr().wrapping_add(offset).cast();
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range is inside of a mapping that `anonymous` made and that nobody else knows of yet (checked above), so
    // nothing but its own pages is replaced.
    let mapped = unsafe { libc::mmap(start, length, PROTECTION, flags, file.as_raw_fd(), file_offset) };
    if mapped == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes one huge page of the file's pages in a huge page's length from `file_offset`, a multiple of that. Holes in it are filled
/// with zeroes. Linux 6.1 and later can, for files in memory.
///
/// # Errors
/// Those of mmap(2), and of madvise(2) for `MADV_COLLAPSE`; the file's content is what it was.
pub(super) fn collapse(file: BorrowedFd<'_>, file_offset: u64) -> io::Result<()> {
    let window = anonymous(HUGE_PAGE_BYTES).map_err(io::Error::other)?;
    show_file(&window, 0, HUGE_PAGE_BYTES, file, file_offset)?;
    let start = window.as_ptr().cast();
    let collapse = || {
        // SAFETY: the window is mapped until the end of this function, and the call changes no content.
        let result = unsafe { libc::madvise(start, HUGE_PAGE_BYTES, libc::MADV_COLLAPSE) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    // Linux 6.1 makes the page of a file that is not mapped here yet and then fails to map it: whether there is one now, a
    // second call tells.
    let collapsed = collapse().or_else(|_| collapse());
    unmap(start, HUGE_PAGE_BYTES).map_err(io::Error::other)?;
    collapsed
}

/// Gives a part of a region pages of this process's own, with the content it shows. Linux 5.14 and later can.
///
/// # Errors
/// A range outside of the region or not of whole pages; those of madvise(2) for `MADV_POPULATE_WRITE`, and then some pages may
/// be there.
pub(super) fn populate(region: &MmapRegion, offset: usize, length: usize) -> io::Result<()> {
    let is_inside = offset.checked_add(length).is_some_and(|end| end <= region.size());
    let is_whole = [offset, length].iter().all(|n| n.is_multiple_of(PAGE_BYTES));
    if !is_inside || !is_whole {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let start = region.as_ptr().wrapping_add(offset).cast();
    // SAFETY: the range is inside of a mapping that `anonymous` made (checked above), and the call changes no content.
    let result = unsafe { libc::madvise(start, length, libc::MADV_POPULATE_WRITE) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Which pages of a region may have content: one entry a page. Those of a private file that are in the page cache count too.
///
/// # Errors
/// Those of mincore(2).
pub(super) fn resident_pages(region: &MmapRegion) -> io::Result<Vec<bool>> {
    let mut pages = vec![0_u8; region.size().div_ceil(PAGE_BYTES)];
    // SAFETY: the region is mapped as long as it is borrowed, and the vector has a byte for each of its pages.
    let result = unsafe { libc::mincore(region.as_ptr().cast(), region.size(), pages.as_mut_ptr()) };
    if result == 0 {
        Ok(pages.into_iter().map(|page| page & 1 != 0).collect())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives back a part of a mapping that `anonymous` made, and that nobody else knows of.
fn unmap(start: *mut libc::c_void, length: usize) -> Result<(), MmapRegionError> {
    if length == 0 {
        return Ok(());
    }
    // SAFETY: the caller passes whole pages of its own mapping, to which there are no references yet.
    let result = unsafe { libc::munmap(start, length) };
    if result == 0 {
        Ok(())
    } else {
        Err(MmapRegionError::Mmap(io::Error::last_os_error()))
    }
}
