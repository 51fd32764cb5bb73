//! Carries a running command over a WebSocket in the framing of Kubernetes: the first byte of a binary message names the
//! channel. Lossless in both directions: nothing is read from one side before the other took what came before.
//!
//! | channel | direction | content |
//! |---|---|---|
//! | 0 | in | stdin |
//! | 1, 2 | out | stdout, stderr |
//! | 3 | out | `metav1.Status` with the exit code, once, at the end |
//! | 4 | in | `{"Width":80,"Height":24}` |
//! | 255 | in | v5 only: the channel in the next byte is closed |

use std::{pin::Pin, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{
    SinkExt, StreamExt,
    future::OptionFuture,
    stream::{SplitSink, SplitStream},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Status, StatusCause, StatusDetails};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::{MissedTickBehavior, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::protocol::{CloseFrame, Message, frame::coding::CloseCode},
};

use crate::{
    engine::{ExecControl, ExecSession},
    error::Result,
};

pub(crate) const V5: &str = "v5.channel.k8s.io";
pub(super) const V4: &str = "v4.channel.k8s.io";

pub(crate) const STDIN: u8 = 0;
pub(crate) const STDOUT: u8 = 1;
pub(crate) const STDERR: u8 = 2;
pub(crate) const ERROR: u8 = 3;
pub(crate) const RESIZE: u8 = 4;
pub(crate) const CLOSE: u8 = 255;

const CHUNK_BYTES: usize = 32 * 1024;
/// Frames read from the command and not yet taken by the client.
const FRAMES_IN_FLIGHT: usize = 4;
/// A client that vanished is noticed by an unanswered write.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// How long the client may take to answer the closing handshake.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How frames look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// Channels, with half close.
    V5,
    /// Channels.
    V4,
    /// No channels: merged output out, stdin in. For clients that offer no protocol.
    Plain,
}

impl Framing {
    /// The framing of a chosen protocol.
    pub(super) fn of(protocol: Option<&str>) -> Self {
        match protocol {
            Some(V5) => Self::V5,
            Some(_) => Self::V4,
            None => Self::Plain,
        }
    }

    fn frame(self, channel: u8, data: &[u8]) -> Bytes {
        let mut frame = BytesMut::with_capacity(data.len() + 1);
        if self != Self::Plain {
            frame.put_u8(channel);
        }
        frame.put_slice(data);
        frame.freeze()
    }
}

/// A size of a terminal, as Kubernetes clients write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct TerminalSize {
    pub(crate) width: u16,
    pub(crate) height: u16,
}

/// Carries the session until the command ends or the client leaves, which kills the command.
pub(super) async fn carry<S>(socket: WebSocketStream<S>, session: ExecSession, framing: Framing)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let ExecSession {
        stdin,
        stdout,
        stderr,
        control,
        exit,
    } = session;
    let (sink, mut stream) = socket.split();
    let (frames, queue) = mpsc::channel(FRAMES_IN_FLIGHT);
    let mut writer = Box::pin(write_frames(sink, queue));

    let command = {
        let frames = frames.clone();
        async move {
            // Tells the client that the streams are open, as the kubelet does.
            let first = if stdout.is_some() { STDOUT } else { STDERR };
            if framing != Framing::Plain {
                let _ = frames.send(Message::Binary(framing.frame(first, &[]))).await;
            }
            let stdout: OptionFuture<_> = stdout
                .map(|stdout| read_output(stdout, STDOUT, framing, frames.clone()))
                .into();
            let stderr: OptionFuture<_> = stderr
                .map(|stderr| read_output(stderr, STDERR, framing, frames.clone()))
                .into();
            let (_, _, exit) = tokio::join!(stdout, stderr, exit);
            for message in last_messages(&exit, framing) {
                let _ = frames.send(message).await;
            }
        }
    };
    let client = read_client(&mut stream, stdin, control.as_ref(), framing);
    let pings = send_pings(frames.clone());
    let ended = tokio::select! {
        () = command => true,
        () = client => false,
        () = pings => false,
        () = writer.as_mut() => false,
    };
    if ended {
        drop(frames);
        // The rest of the output, then the client's own close, so that nothing is lost to a reset.
        writer.await;
        let _ = timeout(CLOSE_TIMEOUT, async {
            while let Some(Ok(_)) = stream.next().await {}
        })
        .await;
    }
}

/// Sends what is queued, in order; ends when the queue does or the client is gone.
async fn write_frames<S>(mut sink: SplitSink<WebSocketStream<S>, Message>, mut queue: mpsc::Receiver<Message>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = queue.recv().await {
        if sink.send(message).await.is_err() {
            return;
        }
    }
    let _ = sink.flush().await;
}

async fn read_output(
    mut output: Pin<Box<dyn AsyncRead + Send>>,
    channel: u8,
    framing: Framing,
    frames: mpsc::Sender<Message>,
) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match output.read(&mut buffer).await {
            Ok(0) => return,
            Ok(count) => {
                let frame = framing.frame(channel, &buffer[..count]);
                if frames.send(Message::Binary(frame)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!("Output of a command broke off: {error}");
                return;
            }
        }
    }
}

async fn send_pings(frames: mpsc::Sender<Message>) {
    let mut ticks = tokio::time::interval(PING_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        // A full queue is a client that takes its time; the frames before this one will show whether it lives.
        match frames.try_send(Message::Ping(Bytes::new())) {
            Err(mpsc::error::TrySendError::Closed(_)) => return,
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => {}
        }
    }
}

/// Takes what the client sends; returns when it leaves or breaks the protocol.
async fn read_client<S>(
    stream: &mut SplitStream<WebSocketStream<S>>,
    mut stdin: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    control: &dyn ExecControl,
    framing: Framing,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = stream.next().await {
        let (channel, data) = match (&message, framing) {
            (Message::Close(_), _) => return,
            (Message::Binary(data), Framing::Plain) => (STDIN, &data[..]),
            (Message::Text(text), Framing::Plain) => (STDIN, text.as_bytes()),
            (Message::Binary(data), _) => match data.split_first() {
                Some((channel, data)) => (*channel, data),
                None => continue,
            },
            _ => continue,
        };
        match channel {
            STDIN => {
                if let Some(input) = &mut stdin {
                    let written = async {
                        input.write_all(data).await?;
                        input.flush().await
                    };
                    // The command closed its stdin; the rest of the input has no reader.
                    if written.await.is_err() {
                        stdin = None;
                    }
                }
            }
            RESIZE => match serde_json::from_slice::<TerminalSize>(data) {
                Ok(size) => {
                    if let Err(error) = control.resize(size.height, size.width).await {
                        tracing::debug!("Failed to resize a terminal: {}", error.chain());
                    }
                }
                Err(error) => tracing::debug!("A client sent a terminal size that is none: {error}"),
            },
            CLOSE if framing == Framing::V5 && data == [STDIN] => {
                if let Some(mut input) = stdin.take() {
                    let _ = input.shutdown().await;
                }
            }
            _ => {}
        }
    }
}

/// How the client learns the end.
fn last_messages(exit: &Result<i32>, framing: Framing) -> Vec<Message> {
    let reason = match exit {
        Ok(code) => format!("exit code {code}"),
        Err(error) => {
            tracing::warn!("A command's end is not known: {}", error.chain());
            // A close reason holds at most 123 bytes.
            error.message.chars().take(40).collect()
        }
    };
    let close = Message::Close(Some(CloseFrame {
        code: CloseCode::Normal,
        reason: if framing == Framing::Plain {
            reason.into()
        } else {
            "".into()
        },
    }));
    if framing == Framing::Plain {
        return vec![close];
    }
    let status = serde_json::to_vec(&exit_status(exit)).unwrap_or_default();
    vec![Message::Binary(framing.frame(ERROR, &status)), close]
}

/// The end of a command as the kubelet reports it.
fn exit_status(exit: &Result<i32>) -> Status {
    match exit {
        Ok(0) => Status {
            status: Some("Success".into()),
            ..Status::default()
        },
        Ok(code) => Status {
            status: Some("Failure".into()),
            reason: Some("NonZeroExitCode".into()),
            message: Some(format!(
                "command terminated with non-zero exit code: exit code {code}"
            )),
            details: Some(StatusDetails {
                causes: Some(vec![StatusCause {
                    reason: Some("ExitCode".into()),
                    message: Some(code.to_string()),
                    field: None,
                }]),
                ..StatusDetails::default()
            }),
            ..Status::default()
        },
        Err(error) => Status {
            status: Some("Failure".into()),
            reason: Some("InternalError".into()),
            message: Some(error.message.clone()),
            code: Some(500),
            ..Status::default()
        },
    }
}

/// What a client learns from the last message of the error channel: the exit code, or why there is none.
pub(crate) fn parse_exit(status: &[u8]) -> std::result::Result<i32, String> {
    let status: Status = serde_json::from_slice(status)
        .map_err(|error| format!("the agent's last message is not valid: {error}"))?;
    if status.status.as_deref() == Some("Success") {
        return Ok(0);
    }
    let code = status.details.and_then(|details| {
        let causes = details.causes?;
        let cause = causes
            .iter()
            .find(|cause| cause.reason.as_deref() == Some("ExitCode"))?;
        cause.message.as_ref()?.parse().ok()
    });
    code.ok_or_else(|| {
        status
            .message
            .unwrap_or_else(|| "the command's end is not known".into())
    })
}

#[cfg(test)]
#[path = "exec_tests.rs"]
mod tests;
