//! Standard streams between processes and the host, without loss.
//!
//! Rules, for output:
//! - All that was written before the process ended is handed to the host before the end is reported. What lies in the
//!   pipe at that moment is counted and copied, however long the host takes to read it.
//! - Other processes may hold the pipe open (a daemon an exec left behind, or `exec > >(tee log)`). Their output is
//!   copied too until there is none for [`QUIET`] or until [`LINGER`] has passed; then the pipe is closed and a late
//!   writer gets `EPIPE`.
//! - When the host closes a stream, the pipe is closed: the writer gets `SIGPIPE`, as with a containerd FIFO whose reader
//!   has gone. A terminal is read on and its output dropped, because closing it would hang the process up.
//!
//! For input: the end of the host's stream closes the pipe. A terminal has no half close; its input just stays open, as
//! with containerd.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::stream::Stream;

/// How long other holders of an ended process's pipe may say nothing.
const QUIET: Duration = Duration::from_millis(200);
/// How long they may go on at all.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes copied at once.
const BUFFER_BYTES: usize = 16 << 10;

/// A stream the host has connected.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub stream: Stream,
    /// Bytes of the stream that came together with the header.
    pub early: Vec<u8>,
}

/// Copies output to the host, or to nowhere without `sink`, until the process has ended and its output is drained.
/// `is_terminal`: see the module.
pub async fn pump_output(
    source: Arc<Stream>,
    sink: Option<Connected>,
    mut ended: watch::Receiver<bool>,
    is_terminal: bool,
) {
    let mut sink = sink.map(|sink| sink.stream);
    // Set when the process has ended: bytes that must still be copied, and when to stop copying others.
    let mut rest: Option<(u64, Instant)> = None;
    loop {
        let read = match rest {
            None => tokio::select! {
                // Output first: the end is looked at only when there is none at hand.
                biased;
                read = source.read(BUFFER_BYTES) => read,
                _ = ended.wait_for(|ended| *ended) => {
                    rest = Some((source.readable_bytes().unwrap_or(0), Instant::now() + LINGER));
                    continue;
                }
            },
            Some((0, deadline)) => {
                match timeout_at(deadline.min(Instant::now() + QUIET), source.read(BUFFER_BYTES)).await {
                    Ok(read) => read,
                    Err(_quiet) => break,
                }
            }
            Some(_) => source.read(BUFFER_BYTES).await,
        };
        let Ok(chunk) = read else { break };
        if chunk.is_empty() {
            break;
        }
        if let Some((bytes, _)) = &mut rest {
            *bytes = bytes.saturating_sub(chunk.len() as u64);
        }
        if let Some(open) = &sink
            && open.write_all(&chunk).await.is_err()
        {
            sink = None;
            if !is_terminal {
                break;
            }
        }
    }
    if let Some(sink) = sink {
        sink.finish();
    }
}

/// Copies input from the host until it ends, the process does, or nobody reads it any more.
pub async fn pump_input(source: Connected, sink: Arc<Stream>, mut ended: watch::Receiver<bool>) {
    let copy = async {
        let mut chunk = source.early;
        while sink.write_all(&chunk).await.is_ok() {
            match source.stream.read(BUFFER_BYTES).await {
                Ok(next) if !next.is_empty() => chunk = next,
                _ => return,
            }
        }
    };
    tokio::select! {
        () = copy => {}
        _ = ended.wait_for(|ended| *ended) => {}
    }
}

#[cfg(test)]
mod tests;
