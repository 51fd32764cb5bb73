//! The guest init's API, called as the shim calls it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use protocol::GUEST_API_PORT;
use shim::guest::{Guest, SandboxStats};
use tokio::runtime::Runtime;

use crate::monitor::Running;

/// Calls guest inits.
#[derive(Debug)]
pub(crate) struct Caller(Runtime);

/// An answer of the init.
#[derive(Debug)]
pub(crate) struct Answer {
    /// From the spawn of the monitor.
    pub(crate) after: Duration,
    pub(crate) stats: SandboxStats,
}

impl Caller {
    pub(crate) fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the async runtime")?;
        Ok(Self(runtime))
    }

    /// Waits until the init is ready, connects to it and asks it for something.
    pub(crate) fn first_answer(&self, running: &mut Running) -> Result<Answer> {
        running.wait_until_init_is_ready()?;
        let (ours, theirs) = UnixStream::pair().context("make a socket pair")?;
        running.connect(GUEST_API_PORT, &OwnedFd::from(theirs))?;
        ours.set_nonblocking(true)
            .context("set up the connection to the init")?;
        let stats = self.0.block_on(async {
            let stream = tokio::net::UnixStream::from_std(ours).context("poll the connection to the init")?;
            let answer = Guest::new(stream).sandbox_stats().await;
            answer.map_err(|error| anyhow::anyhow!("ask the init: {}", error.chain()))
        })?;
        Ok(Answer {
            after: running.since_spawn(),
            stats,
        })
    }
}
