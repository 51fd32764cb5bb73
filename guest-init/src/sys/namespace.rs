//! Namespaces of the calling process.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Moves into the namespaces `kinds` (`CLONE_NEW*`) of the process or namespace file behind `target`. For the PID
/// namespace only later children are moved.
///
/// # Errors
/// What the kernel answers: `ESRCH` when the process has ended.
pub fn join(target: BorrowedFd<'_>, kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let result = unsafe { libc::setns(target.as_raw_fd(), kinds) };
    super::check(result.into()).map(drop)
}

/// Puts the calling process into new namespaces of `kinds`.
///
/// # Errors
/// What the kernel answers.
pub fn unshare(kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is passed, and the kinds used (CLONE_NEWCGROUP) do not unshare memory or descriptors.
    let result = unsafe { libc::unshare(kinds) };
    super::check(result.into()).map(drop)
}

/// Closes all descriptors.
///
/// # Errors
/// What the kernel answers.
pub fn close_all() -> io::Result<()> {
    // SAFETY: no memory is passed; only a process that uses none of them afterwards calls this.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    super::check(result).map(drop)
}

/// Marks all descriptors from `first` up close-on-exec.
///
/// # Errors
/// What the kernel answers.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: no memory is passed; descriptors stay open until execve.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    super::check(result).map(drop)
}
