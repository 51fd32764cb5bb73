//! The one descriptor that a VMM process is started with: passing it, and taking it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::FdFlags;

use crate::control::{CONTROL_FD, VmmSocket};

/// Takes [`CONTROL_FD`], which only a process that was started with it may call, and makes it close-on-exec.
///
/// # Errors
/// When it is not open, or was taken before.
pub fn take_control_fd() -> io::Result<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    // SAFETY: borrowed only to ask whether it is open; nothing has closed it, see below.
    let borrowed = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(io::Error::other("the control descriptor was taken before"));
    }
    // SAFETY: it is open, as the call above succeeded; the number belongs to whoever started this process, so nothing
    // in here owns it, and TAKEN lets only one caller have it.
    Ok(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) })
}

/// Lets the process that `command` starts have `socket` as its [`CONTROL_FD`]. This process's copy is closed with
/// `command`.
pub fn pass_control_fd(command: &mut Command, socket: VmmSocket) {
    let pass = move || {
        let number = socket.as_raw_fd();
        if number == CONTROL_FD {
            rustix::io::fcntl_setfd(&socket, FdFlags::empty())?;
            return Ok(());
        }
        // SAFETY: socket is open, owned by this closure; who has the number in the child, see below.
        let done = unsafe { libc::dup2(number, CONTROL_FD) };
        if done < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: between fork and exec the closure makes one async-signal-safe system call and allocates nothing. If
    // another descriptor has the number in the child, it is the parent's close-on-exec one and not used there again.
    unsafe { command.pre_exec(pass) };
}
