//! Mappings of this process that become guest RAM.

use std::io;
use std::ptr;

use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

/// KVM maps a huge page of the host as one of the guest only where both addresses have the same offset in it; else every
/// 4 KiB page costs an exit of its own.
pub(super) const HUGE_PAGE_BYTES: usize = 2 << 20;

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

/// Gives back a part of the mapping that `anonymous` has just made.
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
