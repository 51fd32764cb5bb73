//! The messages between whoever runs a command and the command server in the L1 host.
//!
//! One byte stream carries many sessions; a session is one command. A frame is a header of 12 bytes, all
//! little-endian: session (u32), kind (u32), payload length (u32); then the payload.
//!
//! ```text
//! runner                         server
//!   <- Ready                       once, session 0: the host is up
//!   -> Start(request)
//!   -> Stdin(bytes) ...            empty: end of input       <- Credit(Stdin, n)
//!   <- Output(stream, bytes) ...   -> Credit(stream, n)
//!   -> Signal(n), Kill, Close(stream)
//!   <- Exit(code) | Failed(code, text)                       the session is over
//! ```
//!
//! Credit keeps one session from blocking the others: a side sends no more data of a stream than the other side
//! has room for, [`WINDOW_BYTES`] at first.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// How much data of one stream may be under way before its receiver has taken any.
pub(crate) const WINDOW_BYTES: u32 = 256 * 1024;
/// The most data one frame carries.
pub(crate) const CHUNK_BYTES: usize = 16 * 1024;
/// The largest payload accepted; a start request holds a whole environment.
const MAX_PAYLOAD_BYTES: u32 = 4 * 1024 * 1024;
const HEADER_BYTES: usize = 12;

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) cwd: PathBuf,
}

/// The three standard streams, numbered as their descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stream {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
}

impl Stream {
    fn from_wire(byte: u8) -> Result<Self> {
        Ok(match byte {
            0 => Self::Stdin,
            1 => Self::Stdout,
            2 => Self::Stderr,
            other => bail!("stream {other} is none of 0, 1, 2"),
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// The L1 host takes commands from now on.
    Ready,
    Start(Request),
    Stdin(Vec<u8>),
    Output(Stream, Vec<u8>),
    Credit(Stream, u32),
    /// Nobody reads this output any more.
    Close(Stream),
    /// For the command's process group.
    Signal(i32),
    /// Ends every process of the session.
    Kill,
    /// The command's exit code, 128 + signal if a signal ended it.
    Exit(i32),
    /// The command did not start; the exit code to give, and why.
    Failed(i32, String),
    /// Turns the whole L1 host off.
    Shutdown,
}

/// A message as it travels: whoever only passes it on needs nothing but the session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) session: u32,
    kind: u32,
    payload: Vec<u8>,
}

impl Frame {
    pub(crate) fn new(session: u32, message: Message) -> Self {
        let (kind, payload) = match message {
            Message::Ready => (0, Vec::new()),
            Message::Start(request) => (
                1,
                serde_json::to_vec(&request).expect("strings and lists always have a JSON form"),
            ),
            Message::Stdin(bytes) => (2, bytes),
            Message::Output(Stream::Stderr, bytes) => (4, bytes),
            Message::Output(_, bytes) => (3, bytes),
            Message::Credit(stream, n_bytes) => {
                (5, [&[stream as u8][..], &n_bytes.to_le_bytes()[..]].concat())
            }
            Message::Close(stream) => (6, vec![stream as u8]),
            Message::Signal(number) => (7, number.to_le_bytes().to_vec()),
            Message::Kill => (8, Vec::new()),
            Message::Exit(code) => (9, code.to_le_bytes().to_vec()),
            Message::Failed(code, text) => (10, [&code.to_le_bytes()[..], text.as_bytes()].concat()),
            Message::Shutdown => (11, Vec::new()),
        };
        Self {
            session,
            kind,
            payload,
        }
    }

    /// True for the messages after which a session says nothing more.
    pub(crate) fn ends_session(&self) -> bool {
        matches!(self.kind, 9 | 10)
    }

    pub(crate) fn is_shutdown(&self) -> bool {
        self.kind == 11
    }

    pub(crate) fn into_message(self) -> Result<Message> {
        let payload = self.payload;
        Ok(match self.kind {
            0 => Message::Ready,
            1 => Message::Start(serde_json::from_slice(&payload).context("parse a start request")?),
            2 => Message::Stdin(payload),
            3 => Message::Output(Stream::Stdout, payload),
            4 => Message::Output(Stream::Stderr, payload),
            5 => {
                ensure!(
                    payload.len() == 5,
                    "a credit message of {} bytes instead of 5",
                    payload.len()
                );
                Message::Credit(
                    Stream::from_wire(payload[0])?,
                    u32::from_le_bytes(word(&payload[1..])?),
                )
            }
            6 => {
                ensure!(
                    payload.len() == 1,
                    "a close message of {} bytes instead of 1",
                    payload.len()
                );
                Message::Close(Stream::from_wire(payload[0])?)
            }
            7 => Message::Signal(i32::from_le_bytes(word(&payload)?)),
            8 => Message::Kill,
            9 => Message::Exit(i32::from_le_bytes(word(&payload)?)),
            10 => Message::Failed(
                i32::from_le_bytes(word(&payload)?),
                String::from_utf8_lossy(&payload[4..]).into_owned(),
            ),
            11 => Message::Shutdown,
            other => bail!("unknown message kind {other}"),
        })
    }

    /// The next frame; `None` if the stream ended between two frames.
    pub(crate) fn read(reader: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER_BYTES];
        let first = loop {
            match reader.read(&mut header) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if first == 0 {
            return Ok(None);
        }
        reader.read_exact(&mut header[first..])?;
        let field =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (session, kind, length) = (field(0), field(4), field(8));
        if length > MAX_PAYLOAD_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a frame of kind {kind} claims {length} bytes, more than {MAX_PAYLOAD_BYTES}"),
            ));
        }
        let mut payload = vec![0; length as usize];
        reader.read_exact(&mut payload)?;
        Ok(Some(Self {
            session,
            kind,
            payload,
        }))
    }

    /// Writes the frame in one piece.
    pub(crate) fn write(&self, writer: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.payload.len())
            .ok()
            .filter(|length| *length <= MAX_PAYLOAD_BYTES)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the request is too large"))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.payload.len());
        for field in [self.session, self.kind, length] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&self.payload);
        writer.write_all(&bytes)
    }
}

fn word(bytes: &[u8]) -> Result<[u8; 4]> {
    match bytes {
        [a, b, c, d, ..] => Ok([*a, *b, *c, *d]),
        short => bail!("a number of {} bytes instead of 4", short.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_message() -> Vec<Message> {
        let request = Request {
            argv: vec!["sh".into(), "-c".into(), "echo 'ä'".into()],
            env: vec![("PATH".into(), "/bin".into())],
            cwd: "/".into(),
        };
        vec![
            Message::Ready,
            Message::Start(request),
            Message::Stdin(b"in".to_vec()),
            Message::Stdin(Vec::new()),
            Message::Output(Stream::Stdout, b"out\0".to_vec()),
            Message::Output(Stream::Stderr, b"err".to_vec()),
            Message::Credit(Stream::Stdin, WINDOW_BYTES),
            Message::Close(Stream::Stdout),
            Message::Signal(15),
            Message::Kill,
            Message::Exit(-1),
            Message::Failed(127, "no such file".into()),
            Message::Shutdown,
        ]
    }

    #[test]
    fn every_message_survives_the_wire() {
        let mut bytes = Vec::new();
        for (session, message) in (7..).zip(every_message()) {
            Frame::new(session, message).write(&mut bytes).unwrap();
        }
        let mut reader = &bytes[..];
        for (session, message) in (7..).zip(every_message()) {
            let frame = Frame::read(&mut reader).unwrap().unwrap();
            assert_eq!(frame.session, session);
            assert_eq!(frame.into_message().unwrap(), message);
        }
        assert_eq!(Frame::read(&mut reader).unwrap(), None);
    }

    #[test]
    fn cut_and_oversized_frames_are_errors() {
        let mut bytes = Vec::new();
        Frame::new(1, Message::Signal(2)).write(&mut bytes).unwrap();
        for length in 1..bytes.len() {
            Frame::read(&mut &bytes[..length]).unwrap_err();
        }
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            Frame::read(&mut &bytes[..]).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn malformed_payloads_are_errors() {
        for (kind, payload) in [
            (1, vec![b'{']),
            (5, vec![1, 2]),
            (6, vec![3]),
            (7, vec![0; 3]),
            (99, vec![]),
        ] {
            Frame {
                session: 1,
                kind,
                payload,
            }
            .into_message()
            .unwrap_err();
        }
    }
}
