//! The system calls without a safe wrapper, and the only unsafe code of the shim.

#![allow(unsafe_code, reason = "this module exists for it")]

use std::{
    ffi::c_int,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    process::Command,
};

use tokio::io::unix::AsyncFd;
use vmm::control::OwnerSocket;

/// First descriptor after standard input, output and error: where a child finds the one descriptor it is given.
pub const PASSED_FD: RawFd = 3;

/// What a child process gets besides its standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildKind {
    /// A session of its own: it outlives its parent and its parent's terminal.
    Daemon,
    /// Killed when the thread that started it ends.
    Dependent,
}

/// Makes `command` pass exactly one descriptor, as number [`PASSED_FD`]; every other one above the standard streams is
/// closed at exec. `passed` stays the caller's and must stay open until the command was spawned.
pub fn pass_descriptor(command: &mut Command, passed: &impl AsRawFd, kind: ChildKind) {
    let passed = passed.as_raw_fd();
    let prepare = move || {
        match kind {
            ChildKind::Daemon => {
                // SAFETY: setsid takes no arguments and is async-signal-safe.
                check(unsafe { libc::setsid() })?;
            }
            ChildKind::Dependent => {
                // SAFETY: PR_SET_PDEATHSIG takes a signal number and touches no memory.
                check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
            }
        }
        if passed == PASSED_FD {
            // SAFETY: fcntl on a number; F_SETFD takes an int.
            check(unsafe { libc::fcntl(passed, libc::F_SETFD, 0) })?;
        } else {
            // SAFETY: dup2 on numbers. What number 3 was in this child is not used after: the child only executes.
            check(unsafe { libc::dup2(passed, PASSED_FD) })?;
        }
        // Marks instead of closing: the standard library's own pipe for reporting exec errors is among them.
        // SAFETY: close_range on numbers with a flag that closes at exec only.
        let marked = unsafe {
            libc::syscall(
                libc::SYS_close_range,
                PASSED_FD + 1,
                c_int::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            )
        };
        if marked < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: `prepare` makes only async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Takes the descriptor a parent passed with [`pass_descriptor`]. Call it once, first thing in the process.
///
/// # Errors
/// Nothing was passed.
pub fn take_passed_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: fcntl on a number, F_GETFD takes no argument; fails when it is not open.
    check(unsafe { libc::fcntl(PASSED_FD, libc::F_GETFD) })?;
    // SAFETY: the descriptor is open (checked above), and nothing else of this process owns it: the caller calls this
    // first thing.
    let passed = unsafe { OwnedFd::from_raw_fd(PASSED_FD) };
    // SAFETY: fcntl on an open descriptor; F_SETFD takes an int.
    check(unsafe { libc::fcntl(PASSED_FD, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok(passed)
}

/// Attaches to an existing tap interface, with virtio-net headers and without packet information (Linux
/// `Documentation/networking/tuntap.rst`).
///
/// # Errors
/// The name is too long, there is no `/dev/net/tun`, or the interface is taken.
pub fn open_tap(name: &str) -> io::Result<File> {
    // SAFETY: ifreq is plain data; all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.bytes().any(|byte| byte == 0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "an interface name has 1 to 15 bytes",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).expect("the three flags fit 15 bits");
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(tun)
}

/// Registers a control socket with the runtime.
///
/// # Errors
/// The descriptor cannot be polled.
pub fn poll_control(socket: OwnerSocket) -> io::Result<AsyncFd<OwnerSocket>> {
    // SAFETY: `OwnerSocket` owns its descriptor and gives out the same one as long as it lives, and `AsyncFd` keeps it.
    let registered = unsafe { AsyncFd::register(socket) };
    registered.map_err(io::Error::from)
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
        process::Stdio,
    };

    use super::*;

    #[test]
    fn a_child_gets_the_passed_descriptor_and_no_other() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        // A descriptor that leaks would be one without close-on-exec.
        let leaky = rustix::io::dup(&theirs).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", "read word <&3; echo \"$word\" >&3; ls /proc/$$/fd"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        pass_descriptor(&mut command, &theirs, ChildKind::Dependent);
        let child = command.spawn().unwrap();
        drop((theirs, leaky));
        ours.write_all(b"hello\n").unwrap();
        let mut answer = [0; 6];
        ours.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello\n");
        let listed = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let open: Vec<u32> = listed
            .lines()
            .map(|line| line.parse().unwrap())
            .filter(|fd| *fd <= 9)
            .collect();
        assert_eq!(open, [0, 1, 2, 3], "dash keeps 10 for itself");
    }

    #[test]
    fn a_tap_name_is_checked() {
        for name in ["", "sixteen-chars-xx", "a\0b"] {
            assert_eq!(
                open_tap(name).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{name:?}"
            );
        }
    }
}
