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
//!
//! Clones: a clone's host has none of the streams the captured VM had. So while a sandbox is held ([`Hold`]), a stream
//! that fails is lost, not closed: pipes stay open, output waits in them, and the host can connect the stream again. Bytes
//! handed to the kernel before the capture are the captured VM's; all others go to whoever is connected next.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    error::{Context, Error, ErrorKind, Result},
    stream::Stream,
};

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

/// Whether the sandbox's streams are held because the VM may be captured.
#[derive(Debug, Clone, Default)]
pub struct Hold(Arc<AtomicBool>);

impl Hold {
    /// Holds the streams, or lets go.
    pub fn set(&self, on: bool) {
        self.0.store(on, Ordering::Relaxed);
    }

    /// Whether they are held.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Answer to the first line of a connection (`protocol/protos/guest.proto`).
const ACK: u8 = 0x06;

impl Connected {
    /// Tells the host that the stream is attached.
    ///
    /// # Errors
    /// When the host has gone.
    pub fn acknowledge(&self) -> Result<()> {
        // One byte on a new connection always fits.
        self.stream
            .try_write(&[ACK])
            .map(drop)
            .context(|| "acknowledge the stream")
    }
}

/// What becomes of a stream whose host has gone for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forsaken {
    /// It ends.
    Closed,
    /// Nobody reads it.
    Dropped,
}

/// The host's end of a standard stream of a process that was started.
///
/// ```text
/// Connected ──fails──▶ Closed, or Nobody
///  │     ▲ ▲             ▲          │
/// in a   │ └─connect─────│──────────┘
/// clone  └─connect─┐     │ the process or the stream ends
///  └─────────────▶ Lost ─┴─given up─▶ Nobody
/// ```
#[derive(Debug)]
pub struct Line {
    end: watch::Sender<End>,
    forsaken: Forsaken,
    hold: Hold,
}

#[derive(Debug, Clone)]
enum End {
    Connected(Arc<Connected>),
    /// Gone with the VM this one was cloned from.
    Lost,
    Nobody,
    Closed,
}

impl Line {
    /// A line to `connected`, or to nobody.
    #[must_use]
    pub fn new(connected: Option<Connected>, forsaken: Forsaken, hold: Hold) -> Self {
        let end = connected.map_or(End::Nobody, |connected| End::Connected(Arc::new(connected)));
        Self {
            end: watch::Sender::new(end),
            forsaken,
            hold,
        }
    }

    /// Connects the host again, and tells it so.
    ///
    /// # Errors
    /// `AlreadyExists` when it is connected, `FailedPrecondition` when the stream has ended.
    pub fn connect(&self, connected: Connected) -> Result<()> {
        match &*self.end.borrow() {
            End::Lost | End::Nobody => {}
            End::Connected(_) => {
                return Err(Error::new(
                    ErrorKind::AlreadyExists,
                    "the stream is connected already",
                ));
            }
            End::Closed => return Err(Error::precondition("the stream has ended")),
        }
        connected.acknowledge()?;
        self.end.send_replace(End::Connected(Arc::new(connected)));
        Ok(())
    }

    /// This is a clone: the host does not have the stream any more.
    pub fn lose(&self) {
        self.replace_if(|end| matches!(end, End::Connected(_)), End::Lost);
    }

    /// A lost stream is not waited for any longer.
    pub fn give_up(&self) {
        self.replace_if(|end| matches!(end, End::Lost), End::Nobody);
    }

    /// The stream ends.
    fn close(&self) {
        if let End::Connected(connected) = self.end.send_replace(End::Closed) {
            connected.stream.finish();
        }
    }

    /// The connection to the host has failed.
    fn failed(&self, failed: &Arc<Connected>) {
        let next = match self.forsaken {
            _ if self.hold.is_on() => End::Lost,
            Forsaken::Dropped => End::Nobody,
            Forsaken::Closed => End::Closed,
        };
        self.replace_if(
            |end| matches!(end, End::Connected(connected) if Arc::ptr_eq(connected, failed)),
            next,
        );
    }

    fn replace_if(&self, condition: impl FnOnce(&End) -> bool, next: End) {
        self.end.send_if_modified(|end| {
            let replace = condition(end);
            if replace {
                *end = next;
            }
            replace
        });
    }

    /// Waits while the host is lost.
    async fn found(&self) {
        // The sender is `self`.
        let _ = self
            .end
            .subscribe()
            .wait_for(|end| !matches!(end, End::Lost))
            .await;
    }

    /// Hands all of `bytes` to the host; false when the stream has ended.
    async fn deliver(&self, mut bytes: &[u8]) -> bool {
        let mut ends = self.end.subscribe();
        while !bytes.is_empty() {
            let end = ends.borrow_and_update().clone();
            match end {
                End::Connected(connected) => tokio::select! {
                    biased;
                    written = connected.stream.write(bytes) => match written {
                        Ok(written) => bytes = &bytes[written..],
                        Err(_) => self.failed(&connected),
                    },
                    _ = ends.changed() => {}
                },
                End::Lost => {
                    let _ = ends.changed().await;
                }
                End::Nobody => return true,
                End::Closed => return false,
            }
        }
        true
    }
}

/// Copies output to the host until the process has ended and its output is drained.
pub async fn pump_output(source: Arc<Stream>, line: Arc<Line>, mut ended: watch::Receiver<bool>) {
    // Set when the process has ended: bytes that must still be copied, and when to stop copying others.
    let mut rest: Option<(u64, Instant)> = None;
    loop {
        line.found().await;
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
        if !line.deliver(&chunk).await {
            break;
        }
    }
    line.close();
}

/// Copies input from the host until it ends, the process does, or nobody reads it any more.
pub async fn pump_input(line: Arc<Line>, sink: Arc<Stream>, mut ended: watch::Receiver<bool>) {
    let copy = async {
        let mut ends = line.end.subscribe();
        loop {
            let end = ends.borrow_and_update().clone();
            match end {
                End::Connected(connected) => {
                    if sink.write_all(&connected.early).await.is_err() {
                        return;
                    }
                    if !copy_from(&line, &connected, &sink, &mut ends).await {
                        return;
                    }
                }
                End::Lost | End::Nobody => {
                    let _ = ends.changed().await;
                }
                End::Closed => return,
            }
        }
    };
    tokio::select! {
        () = copy => {}
        _ = ended.wait_for(|ended| *ended) => {}
    }
    line.close();
}

/// Copies input until the host's end of the line changes; false when the input has ended.
async fn copy_from(
    line: &Line,
    connected: &Arc<Connected>,
    sink: &Stream,
    ends: &mut watch::Receiver<End>,
) -> bool {
    loop {
        tokio::select! {
            biased;
            read = connected.stream.read(BUFFER_BYTES) => match read {
                Ok(chunk) if chunk.is_empty() => return false,
                Ok(chunk) => {
                    if sink.write_all(&chunk).await.is_err() {
                        return false;
                    }
                }
                Err(_) => {
                    line.failed(connected);
                    return true;
                }
            },
            _ = ends.changed() => return true,
        }
    }
}

#[cfg(test)]
mod tests;
