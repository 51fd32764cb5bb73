//! Runs a command in a container: FIFOs to the shim, lossless to the last byte.
//!
//! The output FIFOs have a writer of ours until the shim's `Wait` has answered, which it does once all output was
//! written. So a reader sees the end exactly when there is nothing left, however early or late the shim opens its side.

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use futures_util::FutureExt;
use oci_spec::runtime::Spec;
use rustix::fs::{CWD, Mode, mkfifoat};
use tokio::{io::AsyncWrite, net::unix::pipe, sync::oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    bundle::Bundle,
    client::{SandboxConnection, Stdio},
    oci,
};
use crate::{
    engine::{ExecControl, ExecRequest, ExecSession},
    error::{Error, ErrorKind, Result},
};

/// Signal that nothing survives.
const SIGKILL: u32 = 9;

/// The FIFOs of one exec; removed when dropped.
#[derive(Debug, Default)]
struct Fifos {
    paths: Vec<PathBuf>,
}

impl Fifos {
    fn make(&mut self, path: PathBuf) -> Result<String> {
        mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).map_err(|error| {
            Error::with_source(
                ErrorKind::Internal,
                format!("make FIFO {}", path.display()),
                io::Error::from(error),
            )
        })?;
        let text = path.to_string_lossy().into_owned();
        self.paths.push(path);
        Ok(text)
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        for path in &self.paths {
            // The sandbox's directory may have gone already, with everything in it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Starts the command and hands out its streams.
///
/// # Errors
/// `InvalidArgument` for an empty command; what the shim answers, such as `NotFound` for an unknown program.
pub async fn exec(
    connection: SandboxConnection,
    bundle: &Bundle,
    container_id: &str,
    exec_id: String,
    request: &ExecRequest,
) -> Result<ExecSession> {
    if request.command.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "command is empty: give a program",
        ));
    }
    let config = bundle.container(container_id).join("config.json");
    let spec = Spec::load(&config).map_err(|error| {
        Error::with_source(ErrorKind::Internal, format!("read {}", config.display()), error)
    })?;
    let process = oci::exec_process(&spec, &request.command, request.tty)?;

    let mut fifos = Fifos::default();
    let mut stdio = Stdio {
        terminal: request.tty,
        ..Stdio::default()
    };
    let path = |stream: &str| bundle.fifo(&format!("{exec_id}-{stream}"));
    let mut stdin = None;
    let mut holds = Vec::new();
    let (mut stdout, mut stderr) = (None, None);
    if request.stdin {
        stdio.stdin = fifos.make(path("stdin"))?;
        stdin = Some(open_stdin(&path("stdin"))?);
    }
    if request.stdout {
        stdio.stdout = fifos.make(path("stdout"))?;
        stdout = Some(open_output(&path("stdout"), &mut holds)?);
    }
    if request.stderr && !request.tty {
        stdio.stderr = fifos.make(path("stderr"))?;
        stderr = Some(open_output(&path("stderr"), &mut holds)?);
    }

    let key = Key {
        connection,
        container_id: container_id.to_owned(),
        exec_id,
    };
    key.connection
        .exec(&key.container_id, &key.exec_id, &process, &stdio)
        .await?;
    // From here on the exec exists in the shim; the task ends it whatever happens to this call.
    let (exit_sender, exit) = oneshot::channel();
    let (started_sender, started) = oneshot::channel();
    let dropped = CancellationToken::new();
    let task = Task {
        key: key.clone(),
        fifos,
        holds,
        dropped: dropped.clone(),
        size: request.tty.then_some(request.size).flatten(),
    };
    tokio::spawn(task.run(started_sender, exit_sender));
    let guard = Arc::new(dropped.drop_guard());
    started
        .await
        .unwrap_or_else(|_| Err(gone("the exec ended before it started")))?;

    let stdin = stdin.map(|writer| {
        Box::pin(Stdin {
            writer: Some(writer),
            key: key.clone(),
            closing: None,
        }) as Pin<Box<dyn AsyncWrite + Send>>
    });
    let control = Box::new(Control {
        key,
        _guard: Arc::clone(&guard),
    });
    let exit = async move {
        let _guard = guard;
        exit.await.unwrap_or_else(|_| Err(gone("the exec was ended")))
    }
    .boxed();
    Ok(ExecSession {
        stdin,
        stdout: stdout.map(|stream| Box::pin(stream) as _),
        stderr: stderr.map(|stream| Box::pin(stream) as _),
        control,
        exit,
    })
}

fn gone(message: &str) -> Error {
    Error::new(ErrorKind::Unavailable, message)
}

fn open_failed(path: &Path, error: io::Error) -> Error {
    Error::with_source(
        ErrorKind::Internal,
        format!("open FIFO {}", path.display()),
        error,
    )
}

fn open_stdin(path: &Path) -> Result<pipe::Sender> {
    // Read and write: opening needs no reader yet, and a command that does not read can't break the pipe.
    pipe::OpenOptions::new()
        .read_write(true)
        .open_sender(path)
        .map_err(|error| open_failed(path, error))
}

fn open_output(path: &Path, holds: &mut Vec<pipe::Sender>) -> Result<pipe::Receiver> {
    let receiver = pipe::OpenOptions::new()
        .open_receiver(path)
        .map_err(|error| open_failed(path, error))?;
    let hold = pipe::OpenOptions::new()
        .open_sender(path)
        .map_err(|error| open_failed(path, error))?;
    holds.push(hold);
    Ok(receiver)
}

#[derive(Debug, Clone)]
struct Key {
    connection: SandboxConnection,
    container_id: String,
    exec_id: String,
}

/// Sees one exec to its end.
struct Task {
    key: Key,
    fifos: Fifos,
    holds: Vec<pipe::Sender>,
    dropped: CancellationToken,
    size: Option<(u16, u16)>,
}

impl Task {
    async fn run(self, started: oneshot::Sender<Result<()>>, exit: oneshot::Sender<Result<i32>>) {
        let Key {
            connection,
            container_id,
            exec_id,
        } = &self.key;
        if let Err(error) = connection.start(container_id, exec_id).await {
            self.remove().await;
            let _ = started.send(Err(error));
            return;
        }
        if let Some((rows, columns)) = self.size
            && let Err(error) = connection.resize(container_id, exec_id, rows, columns).await
        {
            tracing::debug!(error = %error.chain(), "the first terminal size was not set");
        }
        let _ = started.send(Ok(()));
        let wait = connection.wait(container_id, exec_id);
        tokio::pin!(wait);
        let result = tokio::select! {
            result = &mut wait => result,
            () = self.dropped.cancelled() => {
                if let Err(error) = connection.kill(container_id, exec_id, SIGKILL, false).await {
                    tracing::debug!(error = %error.chain(), "an abandoned exec was not killed");
                }
                wait.await
            }
        };
        // Now all output is in the FIFOs: without our writers the readers see its end.
        drop(self.holds);
        drop(self.fifos);
        let _ = exit.send(result.map(|exit| exit.status));
        if let Err(error) = connection.delete(container_id, exec_id).await {
            tracing::debug!(error = %error.chain(), "an ended exec was not removed");
        }
    }

    async fn remove(&self) {
        if let Err(error) = self
            .key
            .connection
            .delete(&self.key.container_id, &self.key.exec_id)
            .await
        {
            tracing::debug!(error = %error.chain(), "an exec that did not start was not removed");
        }
    }
}

/// The command's stdin. Shutting it down is a half close.
struct Stdin {
    writer: Option<pipe::Sender>,
    key: Key,
    closing: Option<futures_util::future::BoxFuture<'static, Result<()>>>,
}

impl Stdin {
    fn writer(&mut self) -> io::Result<Pin<&mut pipe::Sender>> {
        self.writer
            .as_mut()
            .map(Pin::new)
            .ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }
}

impl AsyncWrite for Stdin {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.writer()?.poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.closing.is_none() {
            // The shim reads what is in the FIFO to its end once no writer is left: ours goes here, its own by CloseIO.
            self.writer = None;
            let key = self.key.clone();
            let close = async move { key.connection.close_stdin(&key.container_id, &key.exec_id).await };
            self.closing = Some(close.boxed());
        }
        let closing = self.closing.as_mut().expect("it was set just above");
        match closing.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            // A command that has ended needs no end of input.
            Poll::Ready(Ok(())) => Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) if error.kind != ErrorKind::Unavailable => Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) => Poll::Ready(Err(io::Error::other(error))),
        }
    }
}

impl Drop for Stdin {
    fn drop(&mut self) {
        if self.closing.is_none() {
            let key = self.key.clone();
            self.writer = None;
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move {
                    // The command may have ended already.
                    let _ = key.connection.close_stdin(&key.container_id, &key.exec_id).await;
                });
            }
        }
    }
}

struct Control {
    key: Key,
    _guard: Arc<tokio_util::sync::DropGuard>,
}

#[async_trait]
impl ExecControl for Control {
    async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let Key {
            connection,
            container_id,
            exec_id,
        } = &self.key;
        connection.resize(container_id, exec_id, rows, columns).await
    }

    async fn signal(&self, signal: i32) -> Result<()> {
        let number = u32::try_from(signal)
            .ok()
            .filter(|number| (1..=64).contains(number));
        let number = number.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("signal is {signal}: give 1 to 64"),
            )
        })?;
        let Key {
            connection,
            container_id,
            exec_id,
        } = &self.key;
        connection.kill(container_id, exec_id, number, false).await
    }
}
