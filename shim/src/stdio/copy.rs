//! Connects and copies the streams of one process.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    task::JoinSet,
    time::timeout,
};

use super::{Sink, StdioSpec, Stream, framing::Framer, log::LogFile};
use crate::{
    error::{Error, ErrorKind, Result},
    guest::ProcessKey,
    vmm::VmmClient,
};

/// Bytes read at once.
const CHUNK_BYTES: usize = 16 * 1024;
/// From the begin of a connection to the guest's acknowledgement.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// After its process has ended, a stream that moves no byte for so long is left behind: its reader does not read.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// First line of a stdio connection (guest.proto).
#[derive(Serialize)]
struct Header<'a> {
    container: &'a str,
    process: &'a str,
    stream: &'static str,
}

/// The running copies of one process. Dropping it ends them.
#[derive(Debug, Default)]
pub struct Streams {
    outputs: JoinSet<()>,
    stdin: JoinSet<()>,
    /// Our own writer, which keeps stdin from ending while callers come and go.
    stdin_hold: Option<pipe::Sender>,
    progress: Arc<AtomicU64>,
}

enum OpenSink {
    Fifo(pipe::Sender),
    Log {
        file: Arc<Mutex<LogFile>>,
        framer: Framer,
    },
}

impl Streams {
    /// Opens the host side of the streams, connects each to the guest, and begins to copy. The process must be created
    /// and not started.
    ///
    /// # Errors
    /// A FIFO or log cannot be opened, or the guest does not take a stream.
    pub async fn connect(key: &ProcessKey, spec: &StdioSpec, vmm: &VmmClient) -> Result<Self> {
        let mut streams = Self::default();
        let stdout = spec
            .stdout
            .as_ref()
            .map(|sink| open_sink(sink, Stream::Stdout, None))
            .transpose()?;
        let shared = match (&spec.stdout, &spec.stderr, &stdout) {
            (Some(out), Some(err), Some(OpenSink::Log { file, .. })) if out == err => Some(Arc::clone(file)),
            _ => None,
        };
        let stderr = spec
            .stderr
            .as_ref()
            .map(|sink| open_sink(sink, Stream::Stderr, shared))
            .transpose()?;
        if let Some(path) = &spec.stdin {
            let (receiver, hold) = open_stdin(path)?;
            let guest = attach(key, Stream::Stdin, vmm).await?;
            streams.stdin_hold = Some(hold);
            streams.stdin.spawn(copy_input(receiver, guest));
        }
        for (stream, sink) in [(Stream::Stdout, stdout), (Stream::Stderr, stderr)] {
            if let Some(sink) = sink {
                let guest = attach(key, stream, vmm).await?;
                streams
                    .outputs
                    .spawn(copy_output(guest, sink, Arc::clone(&streams.progress)));
            }
        }
        Ok(streams)
    }

    /// No more input comes from this side; stdin ends when other writers have closed too.
    pub fn close_stdin(&mut self) {
        self.stdin_hold = None;
    }

    /// Takes the output copies out, to wait for their end.
    pub fn take_outputs(&mut self) -> Outputs {
        Outputs {
            copies: std::mem::take(&mut self.outputs),
            progress: Arc::clone(&self.progress),
        }
    }
}

/// The output copies of a process.
#[derive(Debug)]
pub struct Outputs {
    copies: JoinSet<()>,
    progress: Arc<AtomicU64>,
}

impl Outputs {
    /// Waits until all output was written, or nobody takes it any more. In the second case the copies go on while
    /// `self` lives.
    pub async fn drain(&mut self) {
        let mut seen = self.progress.load(Ordering::Relaxed);
        loop {
            match timeout(STALL_TIMEOUT, self.copies.join_next()).await {
                Ok(None) => return,
                Ok(Some(_)) => {}
                Err(_) => {
                    let now = self.progress.load(Ordering::Relaxed);
                    if now == seen {
                        return;
                    }
                    seen = now;
                }
            }
        }
    }
}

fn open_sink(sink: &Sink, stream: Stream, shared: Option<Arc<Mutex<LogFile>>>) -> Result<OpenSink> {
    match sink {
        // Read and write: opening needs no reader, and a reader that leaves does not break the pipe.
        Sink::Fifo(path) => pipe::OpenOptions::new()
            .read_write(true)
            .open_sender(path)
            .map(OpenSink::Fifo)
            .map_err(|error| Error::io(format!("open {} FIFO {}", stream.name(), path.display()), error)),
        Sink::CriLog(path) => {
            let file = match shared {
                Some(file) => file,
                None => Arc::new(Mutex::new(LogFile::open(path)?)),
            };
            Ok(OpenSink::Log {
                file,
                framer: Framer::new(stream),
            })
        }
    }
}

fn open_stdin(path: &Path) -> Result<(pipe::Receiver, pipe::Sender)> {
    let failed = |error| Error::io(format!("open stdin FIFO {}", path.display()), error);
    let receiver = pipe::OpenOptions::new().open_receiver(path).map_err(failed)?;
    let hold = pipe::OpenOptions::new().open_sender(path).map_err(failed)?;
    Ok((receiver, hold))
}

async fn attach(key: &ProcessKey, stream: Stream, vmm: &VmmClient) -> Result<UnixStream> {
    let what = || format!("attach {} of {key}", stream.name());
    let header = Header {
        container: &key.container_id,
        process: &key.exec_id,
        stream: stream.name(),
    };
    let mut line = serde_json::to_vec(&header)
        .map_err(|error| Error::with_source(ErrorKind::Internal, what(), error))?;
    line.push(b'\n');
    if line.len() > protocol::STDIO_HEADER_MAX_BYTES {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{}: its ids are too long", what()),
        ));
    }
    let exchange = async {
        let mut guest = vmm.connect(protocol::STDIO_PORT).await?;
        let failed = |error| Error::with_source(ErrorKind::Unavailable, what(), error);
        guest.write_all(&line).await.map_err(failed)?;
        let answer = guest.read_u8().await.map_err(failed)?;
        if answer == protocol::STDIO_ACK {
            Ok(guest)
        } else {
            Err(Error::new(
                ErrorKind::Internal,
                format!("{}: the guest answered {answer:#04x}", what()),
            ))
        }
    };
    timeout(ATTACH_TIMEOUT, exchange).await.unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::DeadlineExceeded,
            format!(
                "{}: no acknowledgement within {} s",
                what(),
                ATTACH_TIMEOUT.as_secs()
            ),
        ))
    })
}

async fn copy_input(mut from: pipe::Receiver, mut guest: UnixStream) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let length = match from.read(&mut chunk).await {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) => {
                tracing::warn!(%error, "reading a stdin FIFO failed");
                break;
            }
        };
        if guest.write_all(&chunk[..length]).await.is_err() {
            // The process has closed its input; what is left has no reader.
            return;
        }
    }
    // Half close: the process sees end of file. An error means that it has gone.
    let _ = guest.shutdown().await;
    // Until the guest closes its end too; a reset would overtake bytes on their way.
    let _ = guest.read(&mut chunk).await;
}

async fn copy_output(mut guest: UnixStream, mut sink: OpenSink, progress: Arc<AtomicU64>) {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut framed = Vec::new();
    let failed = AtomicBool::new(false);
    // A broken sink must not stop the process: its output is read on and dropped.
    let warn_once = |error: std::io::Error| {
        if !failed.swap(true, Ordering::Relaxed) {
            tracing::error!(%error, "output of a process is lost from here on");
        }
    };
    loop {
        let length = guest.read(&mut chunk).await.unwrap_or_default();
        match &mut sink {
            OpenSink::Fifo(_) if length == 0 => return,
            OpenSink::Fifo(fifo) => {
                if let Err(error) = write_counted(fifo, &chunk[..length], &progress).await {
                    warn_once(error);
                }
            }
            OpenSink::Log { file, framer } => {
                if length == 0 {
                    framer.finish(SystemTime::now(), &mut framed);
                } else {
                    framer.push(SystemTime::now(), &chunk[..length], &mut framed);
                }
                let written;
                (written, framed) = append(Arc::clone(file), framed).await;
                if let Err(error) = written {
                    warn_once(error);
                }
                framed.clear();
                if length == 0 {
                    return;
                }
            }
        }
        progress.fetch_add(length as u64, Ordering::Relaxed);
    }
}

/// Like `write_all`, and tells of every step, so that a slow reader is not taken for one that has gone.
async fn write_counted(
    fifo: &mut pipe::Sender,
    mut bytes: &[u8],
    progress: &AtomicU64,
) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let written = fifo.write(bytes).await?;
        progress.fetch_add(1, Ordering::Relaxed);
        bytes = &bytes[written..];
    }
    Ok(())
}

/// File writes block, so they happen beside the shim's one thread.
async fn append(file: Arc<Mutex<LogFile>>, framed: Vec<u8>) -> (std::io::Result<()>, Vec<u8>) {
    if framed.is_empty() {
        return (Ok(()), framed);
    }
    let work = tokio::task::spawn_blocking(move || {
        let written = file
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .append(&framed);
        (written, framed)
    });
    work.await
        .unwrap_or_else(|error| (Err(std::io::Error::other(error)), Vec::new()))
}
