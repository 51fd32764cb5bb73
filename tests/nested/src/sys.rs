//! What has to happen between `fork` and `exec` of a child.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd;

/// The child leads a session of its own, so that no signal of our terminal reaches it, and is killed when the thread
/// that spawns it ends, however that happens.
pub(crate) fn die_with_this_thread(command: &mut Command) {
    let prepare = || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        SigSet::empty().thread_set_mask()?;
        unistd::setsid()?;
        Ok(())
    };
    // SAFETY: the closure makes three system calls, allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// The child is killed when the thread that spawns it ends, and leads a process group.
pub(crate) fn die_with_this_thread_in_own_group(command: &mut Command) {
    let prepare = || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        SigSet::empty().thread_set_mask()?;
        Ok(())
    };
    command.process_group(0);
    // SAFETY: the closure makes two system calls, allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// The child leads a session of its own, with no signal blocked.
pub(crate) fn lead_session(command: &mut Command) {
    let prepare = || {
        SigSet::empty().thread_set_mask()?;
        unistd::setsid()?;
        Ok(())
    };
    // SAFETY: the closure makes two system calls, allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// The child leads a session of its own and starts inside the cgroup whose `cgroup.procs` is given.
pub(crate) fn lead_session_in_cgroup(command: &mut Command, procs: File) {
    let prepare = move || {
        // "0" stands for the writing process (cgroup-v2.rst, "cgroup.procs").
        let written = unistd::write(procs.as_fd(), b"0")?;
        if written != 1 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        unistd::setsid()?;
        Ok(())
    };
    // SAFETY: the closure makes two system calls, allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}
