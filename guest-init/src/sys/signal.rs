//! Signals as a descriptor, and a clean signal state for new processes.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

/// Highest signal number on Linux.
const LAST_SIGNAL: libc::c_int = 64;

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is writable; sigemptyset cannot fail for a valid pointer.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset initialised it.
    unsafe { set.assume_init() }
}

/// Blocks `SIGCHLD` and gives a non-blocking descriptor that becomes readable when children have changed state.
///
/// # Errors
/// What the kernel answers.
pub fn child_signal_fd() -> io::Result<OwnedFd> {
    let mut set = empty_set();
    // SAFETY: `set` is an initialised signal set.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) };
    // SAFETY: `set` is initialised; no old mask is asked for.
    let blocked = unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    super::check(blocked.into())?;
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    super::check(fd.into())?;
    // SAFETY: signalfd succeeded, so `fd` is open and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives the calling process the default action for every signal and an empty mask, as a new program expects it.
/// Does not allocate.
pub fn reset() {
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: SIG_DFL is a valid action; SIGKILL, SIGSTOP and the C library's own signals are refused, which is
        // right.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let set = empty_set();
    // SAFETY: `set` is initialised; no old mask is asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut()) };
}

/// Has the kernel reap the children of the calling process, and does nothing for ever. Does not allocate.
pub fn rest() -> ! {
    // SAFETY: SIG_IGN is a valid action. Children that end leave nothing behind then (wait(2), "Linux notes"), those that
    // had ended when they became children too.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    loop {
        // SAFETY: no memory is passed.
        unsafe { libc::pause() };
    }
}

/// Sends `signal`, 0 for none, to exactly the process behind `pidfd`.
///
/// # Errors
/// `ESRCH` when it has ended, `EINVAL` for a number that is no signal.
pub fn send(pidfd: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    let info = ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed (pidfd_send_signal(2)); no other memory is passed.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info, 0) };
    super::check(result).map(drop)
}

/// Sends `signal` to the process `pid`; never to a group.
///
/// # Errors
/// `ESRCH` when there is none, `EINVAL` for a number that is no signal.
pub fn send_to_pid(pid: u32, signal: libc::c_int) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).ok().filter(|pid| *pid > 0);
    let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: no memory is passed.
    let result = unsafe { libc::kill(pid, signal) };
    super::check(result.into()).map(drop)
}
