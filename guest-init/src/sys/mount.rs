//! `mount_setattr(2)`.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// What to change on a mount: `MOUNT_ATTR_*` bits and a propagation type (`MS_PRIVATE` and so on, or 0 for no change).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MountAttributes {
    /// Bits to set.
    pub set: u64,
    /// Bits to clear.
    pub clear: u64,
    /// Propagation type.
    pub propagation: u64,
}

/// Changes the mount that `mount` refers to, with all below it when `recursive`.
///
/// # Errors
/// What the kernel answers.
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: MountAttributes, recursive: bool) -> io::Result<()> {
    let mut attr = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a constant C string, `attr` is live and of the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw mut attr,
            size_of::<libc::mount_attr>(),
        )
    };
    super::check(result).map(drop)
}
