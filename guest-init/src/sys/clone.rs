//! `clone3(2)`: a child in new namespaces and in its cgroup from its first instruction.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// A child process just made.
#[derive(Debug)]
pub struct Child {
    /// Its process id in the caller's PID namespace.
    pub pid: i32,
    /// Refers to exactly this process, also when the id is used again.
    pub pidfd: OwnedFd,
}

/// Makes a child that runs `program` and never returns, in `cgroup` or the caller's. `namespaces` are `CLONE_NEW*` flags.
///
/// The child has a copy of the caller's memory and descriptors. `program` must not allocate, take locks or unwind:
/// another thread may have held the allocator's lock when the memory was copied.
///
/// # Errors
/// What `clone3` answers; nothing was made then.
pub fn spawn(
    namespaces: libc::c_int,
    cgroup: Option<BorrowedFd<'_>>,
    program: impl FnOnce() -> i32,
) -> io::Result<Child> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers; all zeroes is the documented default.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    let flags = libc::CLONE_PIDFD | namespaces;
    arguments.flags = u64::from(flags.cast_unsigned());
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: without CLONE_VM the child works on a copy of this memory and stack, so both sides may go on from here;
    // `arguments` is live and of the size given, `pidfd` is writable.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    };
    if super::check(pid)? == 0 {
        let status = program();
        // SAFETY: ends the child without running the caller's exit handlers.
        unsafe { libc::_exit(status) }
    }
    let pid = i32::try_from(pid).expect("process ids are below 2^22");
    // SAFETY: clone3 succeeded with CLONE_PIDFD, so `pidfd` is an open descriptor that nothing else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid, pidfd })
}

/// `linux/sched.h`; wider than the flags `libc` types as `c_int`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
