//! Connections that carry standard streams.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use protocol::STDIO_HEADER_MAX_BYTES;
use serde::Deserialize;
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    container::{process::StreamName, stdio::Connected},
    error::{Context, Error, Result},
    sandbox::Sandbox,
    stream::Stream,
};

/// How long the first line of a connection may take.
const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// Most connections whose first line has not come yet.
const MAX_PENDING: usize = 256;

/// The first line of a connection.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    container: String,
    process: String,
    stream: StreamName,
}

/// Accepts connections and gives them to their processes.
#[derive(Debug, Clone)]
pub(super) struct StdioServer {
    sandbox: Arc<Sandbox>,
    listener: Arc<Stream>,
    /// Places for connections whose first line has not come yet.
    places: Arc<Semaphore>,
}

impl StdioServer {
    pub(super) fn start(sandbox: Arc<Sandbox>, listener: OwnedFd) -> Result<()> {
        let listener = Arc::new(Stream::new(listener).context(|| "watch the listener of the streams")?);
        let server = Self {
            sandbox,
            listener,
            places: Arc::new(Semaphore::new(MAX_PENDING)),
        };
        tokio::spawn(async move {
            loop {
                match server.listener.accept().await {
                    Ok(connection) => server.receive(connection),
                    Err(error) => {
                        crate::log::error(&format!("accept a stream: {error}"));
                        // Out of descriptors, most likely: let others finish first.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(())
    }

    fn receive(&self, connection: OwnedFd) {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            crate::log::error("refuse a stream: too many connections without a first line");
            return;
        };
        let server = self.clone();
        tokio::spawn(async move {
            let result = match timeout(HEADER_DEADLINE, server.connect(connection)).await {
                Ok(result) => result,
                Err(_) => Err(Error::invalid(format!(
                    "no first line within {HEADER_DEADLINE:?}"
                ))),
            };
            if let Err(error) = result {
                crate::log::failure("connect a stream", &error);
            }
            drop(place);
        });
    }

    async fn connect(&self, connection: OwnedFd) -> Result<()> {
        let stream = Stream::new(connection).context(|| "watch a stream")?;
        let mut received = Vec::new();
        let (header, early) = loop {
            if let Some(split) = split_header(&received)? {
                break split;
            }
            let more = stream
                .read(STDIO_HEADER_MAX_BYTES - received.len())
                .await
                .context(|| "read the first line")?;
            if more.is_empty() {
                return Err(Error::invalid("the connection ended before its first line did"));
            }
            received.extend(more);
        };
        let process = self
            .sandbox
            .containers()?
            .get(&header.container)?
            .process(&header.process)?;
        process.connect(header.stream, Connected { stream, early })
    }
}

/// The header and the bytes after it, once the line is complete.
fn split_header(received: &[u8]) -> Result<Option<(Header, Vec<u8>)>> {
    let Some(end) = received.iter().position(|byte| *byte == b'\n') else {
        if received.len() >= STDIO_HEADER_MAX_BYTES {
            return Err(Error::invalid(format!(
                "the first line is longer than {STDIO_HEADER_MAX_BYTES} bytes"
            )));
        }
        return Ok(None);
    };
    let header = serde_json::from_slice(&received[..end])
        .map_err(|error| Error::invalid(format!("the first line of the connection: {error}")))?;
    Ok(Some((header, received[end + 1..].to_vec())))
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz {
    //! Fuzz target of the first line of a connection.

    use super::{STDIO_HEADER_MAX_BYTES, split_header};

    /// The bytes of a connection, as they are at its end and at any time before.
    ///
    /// # Panics
    /// When a byte behind the line is lost, or a line is accepted before it has ended.
    pub fn stdio_preface(data: &[u8]) {
        let line_end = data.iter().position(|byte| *byte == b'\n');
        for length in 0..=data.len().min(STDIO_HEADER_MAX_BYTES) {
            let received = &data[..length];
            match split_header(received) {
                Ok(Some((_, early))) => {
                    let end = line_end.expect("there is no header without a line");
                    assert_eq!(received[end + 1..], early);
                }
                Ok(None) => assert!(line_end.is_none_or(|end| end >= length)),
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINE: &[u8] = b"{\"container\":\"c\",\"process\":\"\",\"stream\":\"stdin\"}\n";

    #[test]
    fn the_header_ends_with_its_line() {
        let mut bytes = LINE.to_vec();
        assert!(split_header(&bytes[..bytes.len() - 1]).unwrap().is_none());
        bytes.extend(b"data\nmore");
        let (header, early) = split_header(&bytes).unwrap().unwrap();
        assert_eq!(
            header,
            Header {
                container: "c".into(),
                process: String::new(),
                stream: StreamName::Stdin
            }
        );
        assert_eq!(early, b"data\nmore");
    }

    #[test]
    fn long_and_wrong_lines_are_refused() {
        assert!(split_header(&[b'x'; STDIO_HEADER_MAX_BYTES]).is_err());
        assert!(split_header(b"{\"container\":\"c\",\"process\":\"\",\"stream\":\"stdmud\"}\n").is_err());
        assert!(split_header(b"{}\n").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(Some((_, early))) = split_header(&bytes) {
                prop_assert!(bytes.ends_with(&early));
            }
        }

        #[test]
        fn what_follows_the_line_is_kept(tail in prop::collection::vec(any::<u8>(), 0..100)) {
            let bytes = [LINE, &tail].concat();
            prop_assert_eq!(split_header(&bytes).unwrap().unwrap().1, tail);
        }
    }
}
