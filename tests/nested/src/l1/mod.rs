//! Inside the L1 host: PID 1, and the server that runs the commands.
//!
//! PID 1 sets the machine up and then only reaps orphans; the server is its child, so that its own waits for
//! commands never meet a stranger's exit.

mod server;
mod session;
mod setup;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::waitpid;
use nix::unistd::{self, Pid};

/// The name under which PID 1 starts the server.
pub(crate) const SERVER_NAME: &str = "nested-l1-server";

/// The life of PID 1. Returns only if the L1 host could not be turned off.
pub(crate) fn init() -> ExitCode {
    if let Err(error) = set_up_and_reap() {
        eprintln!("nested: the L1 host fails: {error:#}");
    }
    unistd::sync();
    match reboot(RebootMode::RB_POWER_OFF) {
        Ok(never) => match never {},
        Err(error) => eprintln!("nested: could not turn off: {error}"),
    }
    ExitCode::FAILURE
}

fn set_up_and_reap() -> Result<()> {
    setup::run()?;
    let server = Command::new("/proc/self/exe")
        .arg0(SERVER_NAME)
        .spawn()
        .context("start the command server")?;
    let server = Pid::from_raw(i32::try_from(server.id()).context("read the server's pid")?);
    loop {
        match waitpid(None, None) {
            Ok(status) if status.pid() == Some(server) => {
                eprintln!("nested: the command server ended: {status:?}");
                return Ok(());
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for children"),
        }
    }
}

/// The life of the command server.
pub(crate) fn serve() -> ExitCode {
    match open_port().and_then(server::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nested: command server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn open_port() -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open(setup::COMMAND_PORT)
        .context("open the command port")
}
