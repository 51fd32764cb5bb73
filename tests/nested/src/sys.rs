//! What has to happen between `fork` and `exec` of a child, and the CPU's time stamp counter.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

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

/// The frequency of this machine's time stamp counter, which the emulated CPU shows as its own.
pub(crate) fn tsc_khz() -> u64 {
    let (start, start_ticks) = tsc_sample();
    thread::sleep(Duration::from_millis(50));
    let (end, end_ticks) = tsc_sample();
    let elapsed_us = u64::try_from(end.duration_since(start).as_micros())
        .unwrap_or(u64::MAX)
        .max(1);
    end_ticks.wrapping_sub(start_ticks).saturating_mul(1000) / elapsed_us
}

/// A moment on both clocks: of some tries, the one that was interrupted least.
fn tsc_sample() -> (Instant, u64) {
    let sample = || {
        let before = Instant::now();
        // SAFETY: reading the counter has no precondition on x86-64; it touches no memory.
        let ticks = unsafe { std::arch::x86_64::_rdtsc() };
        (before.elapsed(), (before, ticks))
    };
    let (_, best) = (0..20)
        .map(|_| sample())
        .min_by_key(|(gap, _)| *gap)
        .unwrap_or_else(sample);
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_frequency_is_plausible_and_repeats() {
        let (first, second) = (tsc_khz(), tsc_khz());
        assert!((100_000..20_000_000).contains(&first), "{first} kHz");
        assert!(first.abs_diff(second) < first / 1000, "{first} and {second} kHz");
    }
}
