//! Hosts that need no L1: those whose own KVM can run a guest.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, geteuid};

use crate::runner::{self, Order, TIME_LIMIT_CODE};
use crate::sys;

/// Whether this machine's own KVM is usable: the CPU shows hardware virtualisation and `/dev/kvm` opens. There are
/// machines whose `/dev/kvm` answers without such a CPU; they cannot run an ordinary guest.
pub(crate) fn kvm_is_usable() -> bool {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
        && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Runs the command on this machine as root and returns its exit code.
pub(crate) fn run(order: &Order) -> Result<i32> {
    let mut argv = order.argv.clone();
    if !geteuid().is_root() {
        argv.splice(0..0, ["sudo".to_owned(), "--preserve-env".to_owned()]);
    }
    let (program, arguments) = argv.split_first().context("the command is empty")?;
    let signals = runner::take_stop_signals()?;
    let mut command = Command::new(program);
    command.args(arguments).envs(order.env.iter().cloned());
    sys::die_with_this_thread_in_own_group(&mut command);
    let mut child = command.spawn().with_context(|| format!("run {program}"))?;
    let group = Pid::from_raw(i32::try_from(child.id()).context("read the command's pid")?);
    thread::spawn(move || {
        while let Ok(Some(signal)) = signals.read_signal() {
            let passed_on = i32::try_from(signal.ssi_signo)
                .ok()
                .and_then(|number| Signal::try_from(number).ok());
            let _ = killpg(group, passed_on.unwrap_or(Signal::SIGTERM));
        }
    });
    if let Some(limit) = order.time_limit {
        thread::spawn(move || kill_after(limit, group));
    }
    let status = child.wait().context("wait for the command")?;
    // Whoever is left of the group.
    let _ = killpg(group, Signal::SIGKILL);
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

fn kill_after(limit: Duration, group: Pid) {
    thread::sleep(limit);
    eprintln!(
        "nested: the command exceeded its time limit of {} s and is killed",
        limit.as_secs()
    );
    let _ = killpg(group, Signal::SIGKILL);
    std::process::exit(TIME_LIMIT_CODE);
}
