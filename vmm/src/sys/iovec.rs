//! Guest memory as the kernel's scatter lists.

use std::io;
use std::marker::PhantomData;

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Some bytes of guest memory that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// The first byte.
    pub address: GuestAddress,
    /// How many bytes.
    pub length: u32,
}

impl GuestRange {
    /// The length as the size of a buffer.
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// No byte at all.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The first `n` bytes, or all if there are fewer.
    #[must_use]
    pub fn prefix(&self, n: usize) -> GuestRange {
        let length = u32::try_from(n).map_or(self.length, |n| n.min(self.length));
        GuestRange {
            address: self.address,
            length,
        }
    }

    /// What follows the first `n` bytes.
    #[must_use]
    pub fn suffix(&self, n: usize) -> GuestRange {
        let skipped = self.prefix(n).length;
        GuestRange {
            address: GuestAddress(self.address.0.wrapping_add(u64::from(skipped))),
            length: self.length - skipped,
        }
    }
}

/// Most entries the kernel takes (`UIO_MAXIOV`).
pub const MAX_IOVECS: usize = 1024;

/// An iovec list that points into guest memory. Valid as long as the memory that it was made from, which the borrow
/// keeps alive.
#[derive(Debug)]
pub struct GuestIovecs<'m> {
    iovecs: Vec<libc::iovec>,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> GuestIovecs<'m> {
    /// Translates `ranges`, for the device to `access` them.
    ///
    /// # Errors
    /// `EFAULT` for a range outside of memory, `EINVAL` for more than [`MAX_IOVECS`] pieces.
    pub fn new(memory: &'m GuestMemoryMmap, ranges: &[GuestRange], access: Permissions) -> io::Result<Self> {
        let mut iovecs = Vec::with_capacity(ranges.len());
        for range in ranges {
            let slices = memory
                .get_slices(range.address, range.len(), access)
                .map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            for slice in slices {
                let slice = slice.map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
                // The guard only matters for memory mapped on demand (Xen); this memory stays mapped.
                let base = slice.ptr_guard_mut().as_ptr();
                iovecs.push(libc::iovec {
                    iov_base: base.cast(),
                    iov_len: slice.len(),
                });
            }
        }
        if iovecs.len() > MAX_IOVECS {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(GuestIovecs {
            iovecs,
            memory: PhantomData,
        })
    }

    /// The list for a system call.
    pub fn as_slice(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The list without its borrow: whoever takes it keeps the memory mapped itself.
    pub(super) fn into_unborrowed(self) -> Vec<libc::iovec> {
        self.iovecs
    }
}
