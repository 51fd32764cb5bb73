//! A command of our own in a container, for probes and hooks: its output is ours, and it does not outlive who waits.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
};
use tokio::time::timeout;

use super::{
    Container,
    plan::{self, Stdio},
    process, spec,
};
use crate::{
    error::{Context, Result},
    reaper::Reaper,
    stream::Stream,
    sys,
};

/// Most bytes of output that are kept, as a kubelet keeps them.
const MAX_OUTPUT_BYTES: usize = 10 << 10;
/// Taken at once.
const CHUNK_BYTES: usize = 1024;

/// What a command did.
#[derive(Debug)]
pub struct Output {
    /// Its exit code, or 128 + signal.
    pub status: u32,
    /// What it said first, on both streams.
    pub text: Vec<u8>,
}

/// Ends the process when nobody waits for it any more.
struct Killer(OwnedFd);

impl Drop for Killer {
    fn drop(&mut self) {
        // It has most likely ended.
        let _ = sys::signal::send(self.0.as_fd(), libc::SIGKILL);
    }
}

impl Container {
    /// Runs a command in the environment of the container's init, to its end. Cancelling kills it.
    ///
    /// # Errors
    /// `FailedPrecondition` when the container does not run; why the command could not be run.
    pub async fn run_command(&self, reaper: &Reaper, command: &[String]) -> Result<Output> {
        let init = self.process("")?;
        let (_, pidfd) = init.running()?;
        let process = spec::Process {
            args: command.to_vec(),
            terminal: false,
            console_size: None,
            ..init.spec.clone()
        };
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe")?;
        let (program, report, child) = {
            let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .context(|| "open /dev/null")?;
            let error = rustix::io::fcntl_dupfd_cloexec(&write, 3).context(|| "duplicate a pipe")?;
            let stdio = Stdio::Streams([null, write, error]);
            let (ours, theirs) = process::report_channel()?;
            let program = plan::exec(&self.spec, &process, &init.identity, Arc::clone(&pidfd), stdio)?;
            let child = self.spawn_beside(&pidfd, 0, &program, &theirs)?;
            (program, ours, child)
        };
        let exit = reaper.watch(child.pid);
        let _killer = Killer(child.pidfd);
        process::follow_command(program, report).await?;
        let output = Stream::new(read).context(|| "watch a pipe")?;
        let mut text = Vec::new();
        tokio::pin!(exit);
        let exit = loop {
            tokio::select! {
                exit = &mut exit => break exit,
                more = output.read(CHUNK_BYTES) => match more {
                    Ok(chunk) if !chunk.is_empty() => keep(&mut text, &chunk),
                    // Closed, or nothing that can be read: its end is what counts.
                    _ => break exit.await,
                },
            }
        };
        // What it said last; others may hold the pipe open.
        while let Ok(Ok(chunk)) = timeout(Duration::ZERO, output.read(CHUNK_BYTES)).await {
            if chunk.is_empty() || text.len() >= MAX_OUTPUT_BYTES {
                break;
            }
            keep(&mut text, &chunk);
        }
        // The reaper lives as long as the program.
        let status = exit.map_or(255, |exit| exit.status);
        Ok(Output { status, text })
    }
}

fn keep(text: &mut Vec<u8>, chunk: &[u8]) {
    let room = MAX_OUTPUT_BYTES - text.len();
    text.extend_from_slice(&chunk[..chunk.len().min(room)]);
}
