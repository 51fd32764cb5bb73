//! The only `wait()` in the program.
//!
//! A process is announced ([`Reaper::watch`]) in the same turn of the event loop that makes it, so its end cannot be
//! seen before. Orphans that end up here are reaped and forgotten.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
};

use rustix::{
    io::Errno,
    process::{Pid, WaitOptions, WaitStatus},
};
use tokio::sync::oneshot;

use crate::{boot::clock, stream::Stream, sys};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 + signal.
    pub status: u32,
    /// Wall clock, nanoseconds since the Unix epoch.
    pub at_ns: u64,
}

/// Size of a `signalfd_siginfo`; signals that come together are one.
const SIGNAL_BYTES: usize = 128;

/// Hands out the ends of processes.
#[derive(Debug, Clone)]
pub struct Reaper {
    watched: Arc<Mutex<HashMap<i32, oneshot::Sender<Exit>>>>,
}

impl Reaper {
    /// Takes over all children of this process: starts the task that reaps them.
    ///
    /// # Errors
    /// When the signal descriptor cannot be made.
    pub fn start() -> io::Result<Self> {
        let signals = Stream::new(sys::signal::child_signal_fd()?)?;
        let reaper = Self {
            watched: Arc::default(),
        };
        let task = reaper.clone();
        tokio::spawn(async move {
            loop {
                task.reap();
                if let Err(error) = signals.read(SIGNAL_BYTES).await {
                    crate::log::error(&format!("read the signal descriptor: {error}"));
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Receives the end of the child `pid`, which the caller has just made.
    #[must_use]
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        self.watched
            .lock()
            .expect("no panic while held")
            .insert(pid, sender);
        receiver
    }

    fn reap(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.ended(pid, status),
                Err(Errno::INTR) => {}
                // No child has ended, or there is none.
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn ended(&self, pid: Pid, status: WaitStatus) {
        let sender = self
            .watched
            .lock()
            .expect("no panic while held")
            .remove(&pid.as_raw_nonzero().get());
        if let Some(sender) = sender {
            // Nobody waits any more: fine.
            let _ = sender.send(Exit {
                status: exit_status(status),
                at_ns: clock::now_ns(),
            });
        }
    }
}

/// As shells and OCI runtimes count.
fn exit_status(status: WaitStatus) -> u32 {
    let number = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        // Stops are not waited for.
        (None, None) => 255,
    };
    number.try_into().unwrap_or(255)
}
