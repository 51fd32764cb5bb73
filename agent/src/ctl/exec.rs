//! `ecictl exec`

use std::{future::pending, io, thread};

use anyhow::{Context, bail};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::protocol::Message;

use super::{
    args::ExecArgs,
    client::{Client, group_path, query},
    terminal,
};
use crate::api::{self, TerminalSize};

const CHUNK_BYTES: usize = 16 * 1024;

pub(super) async fn run(client: &Client, args: ExecArgs) -> anyhow::Result<u8> {
    let raw = if args.tty && args.stdin {
        let raw = terminal::RawMode::enter().context("Failed to set the terminal's mode")?;
        if raw.is_none() {
            eprintln!(
                "ecictl: standard input is not a terminal; the command gets one, this side stays as it is"
            );
        }
        raw
    } else {
        None
    };
    let result = session(client, &args).await;
    // Before a message goes to the terminal.
    drop(raw);
    result
}

async fn session(client: &Client, args: &ExecArgs) -> anyhow::Result<u8> {
    let mut parameters = vec![
        ("stdin", args.stdin.to_string()),
        ("stdout", "true".into()),
        ("stderr", (!args.tty).to_string()),
        ("tty", args.tty.to_string()),
    ];
    if let Some(container) = &args.container {
        parameters.push(("container", container.clone()));
    }
    if args.tty
        && let Some((rows, columns)) = terminal::size()
    {
        parameters.push(("rows", rows.to_string()));
        parameters.push(("columns", columns.to_string()));
    }
    parameters.extend(args.command.iter().map(|word| ("command", word.clone())));
    let path = group_path(&args.group, &format!("/exec{}", query(parameters)));
    let (mut sink, mut frames) = client.websocket(&path, api::V5).await?.split();

    let mut input = args.stdin.then(read_input);
    let mut resizes = args
        .tty
        .then(|| signal(SignalKind::window_change()))
        .transpose()
        .context("Failed to watch for changes of the terminal's size")?;
    let mut interrupts = signal(SignalKind::interrupt()).context("Failed to watch for SIGINT")?;
    let mut terminations = signal(SignalKind::terminate()).context("Failed to watch for SIGTERM")?;

    // Input and output take turns on their own: neither waits for the other's reader.
    let send = async {
        loop {
            let message = tokio::select! {
                chunk = next_chunk(&mut input) => match chunk {
                    Some(chunk) => frame(api::STDIN, &chunk),
                    None => {
                        input = None;
                        Bytes::from_static(&[api::CLOSE, api::STDIN])
                    }
                },
                () = next_signal(&mut resizes) => match terminal::size() {
                    Some((height, width)) => {
                        let size = serde_json::to_vec(&TerminalSize { width, height })?;
                        frame(api::RESIZE, &size)
                    }
                    None => continue,
                },
            };
            if sink.send(Message::Binary(message)).await.is_err() {
                // The output says why.
                pending::<()>().await;
            }
        }
        #[allow(unreachable_code, reason = "gives the block its type")]
        anyhow::Ok(())
    };
    let receive = async {
        let mut stdout = tokio::io::stdout();
        let mut stderr = tokio::io::stderr();
        while let Some(message) = frames.next().await {
            let Message::Binary(data) = message.context("The connection to the agent broke off")? else {
                continue;
            };
            let Some((channel, data)) = data.split_first() else {
                continue;
            };
            match *channel {
                api::STDOUT => write(&mut stdout, data).await?,
                api::STDERR => write(&mut stderr, data).await?,
                api::ERROR => {
                    return match api::parse_exit(data) {
                        Ok(code) => Ok(exit_code(code)),
                        Err(reason) => bail!("{reason}"),
                    };
                }
                _ => {}
            }
        }
        bail!("The agent ended the session without the command's exit code")
    };
    tokio::select! {
        result = receive => result,
        result = send => result.map(|()| super::EXEC_FAILED),
        // Leaving ends the command; the codes are a shell's.
        _ = interrupts.recv() => Ok(130),
        _ = terminations.recv() => Ok(143),
    }
}

fn exit_code(code: i32) -> u8 {
    // Linux has no other.
    u8::try_from(code & 0xff).unwrap_or(super::EXEC_FAILED)
}

fn frame(channel: u8, data: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(data.len() + 1);
    frame.put_u8(channel);
    frame.put_slice(data);
    frame.freeze()
}

async fn write(output: &mut (impl AsyncWrite + Unpin), data: &[u8]) -> io::Result<()> {
    output.write_all(data).await?;
    output.flush().await
}

/// Reads standard input on a thread of its own, which may be left waiting when the command ends.
fn read_input() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(2);
    thread::spawn(move || {
        use io::Read;
        let mut input = io::stdin().lock();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    let chunk = Bytes::copy_from_slice(&buffer[..count]);
                    if sender.blocking_send(chunk).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

/// The next input; `None` once at its end, then never again.
async fn next_chunk(input: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match input {
        Some(input) => input.recv().await,
        None => pending().await,
    }
}

async fn next_signal(signals: &mut Option<Signal>) {
    match signals {
        Some(signals) => {
            signals.recv().await;
        }
        None => pending().await,
    }
}
