//! `grpc.health.v1.Health/Check` over plain HTTP/2.
//!
//! A whole HTTP/2 library would be a good part of this program's memory. One call on a new connection needs little of the
//! protocol (RFC 9113): the request is written without compression, of the answer only the message is looked at. Header
//! blocks are passed over unread, so an error in the trailers is told as "no message".

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::check::connect;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest payload of a frame: the protocol's default, which we do not raise.
const MAX_FRAME_BYTES: usize = 16 << 10;
/// Most frames read before the answer is there.
const MAX_FRAMES: usize = 256;
/// Longest message taken.
const MAX_MESSAGE_BYTES: usize = 4096;
/// The one stream.
const STREAM: u32 = 1;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 0x1;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;

/// Asks the server for the health of `service`.
///
/// # Errors
/// Why it is not healthy, for people.
pub async fn check(at: SocketAddr, service: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("call the health service at {at}: {error}");
    let mut stream = connect(at).await?;
    stream.write_all(&request(at, service)).await.map_err(failed)?;
    match status(&answer(&mut stream).await?)? {
        1 => Ok(()),
        other => {
            let name = match other {
                0 => "UNKNOWN",
                2 => "NOT_SERVING",
                3 => "SERVICE_UNKNOWN",
                _ => "a status without a name",
            };
            Err(format!("service unhealthy (responded with {name:?})"))
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("our payloads are short");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A field of a header block that is not compressed (RFC 7541, 6.2.2): `index` is the name's in the static table, 0 for a
/// new name.
fn field(block: &mut Vec<u8>, index: u8, name: &str, value: &str) {
    match index {
        0 => {
            block.push(0);
            text(block, name);
        }
        1..15 => block.push(index),
        _ => block.extend([15, index - 15]),
    }
    text(block, value);
}

fn text(block: &mut Vec<u8>, text: &str) {
    // Lengths have a prefix of seven bits.
    match u8::try_from(text.len()) {
        Ok(length @ 0..127) => block.push(length),
        _ => {
            block.push(127);
            varint(block, text.len() - 127);
        }
    }
    block.extend(text.as_bytes());
}

fn varint(bytes: &mut Vec<u8>, mut value: usize) {
    while value >= 128 {
        bytes.push(value.to_le_bytes()[0] | 128);
        value /= 128;
    }
    bytes.push(value.to_le_bytes()[0]);
}

fn request(at: SocketAddr, service: &str) -> Vec<u8> {
    let mut block = vec![
        0x83, // :method POST
        0x86, // :scheme http
    ];
    field(&mut block, 4, ":path", "/grpc.health.v1.Health/Check");
    field(&mut block, 1, ":authority", &at.to_string());
    field(&mut block, 31, "content-type", "application/grpc");
    field(&mut block, 0, "te", "trailers");
    let mut message = Vec::new();
    if !service.is_empty() {
        // Field 1, length-delimited.
        message.push(0x0a);
        varint(&mut message, service.len());
        message.extend(service.as_bytes());
    }
    // Not compressed, and its length.
    let mut data = vec![0];
    data.extend(u32::try_from(message.len()).expect("a short name").to_be_bytes());
    data.extend(message);
    [
        PREFACE,
        &frame(SETTINGS, 0, 0, &[]),
        &frame(HEADERS, END_HEADERS, STREAM, &block),
        &frame(DATA, END_STREAM, STREAM, &data),
    ]
    .concat()
}

/// Reads frames until the message is complete.
async fn answer(stream: &mut TcpStream) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("read the health service's answer: {error}");
    let mut body = Vec::new();
    for _ in 0..MAX_FRAMES {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.map_err(failed)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (kind, flags) = (head[3], head[4]);
        let on = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
        if length > MAX_FRAME_BYTES {
            return Err(format!(
                "the health service sent a frame of {length} bytes: it may not speak HTTP/2"
            ));
        }
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await.map_err(failed)?;
        let mut ended = false;
        match kind {
            SETTINGS | PING if flags & ACK == 0 => {
                let payload = if kind == PING { payload.as_slice() } else { &[] };
                stream
                    .write_all(&frame(kind, ACK, 0, payload))
                    .await
                    .map_err(failed)?;
            }
            GOAWAY => return Err("the health service closed the connection".to_owned()),
            RST_STREAM if on == STREAM => return Err("the health service refused the call".to_owned()),
            DATA if on == STREAM => {
                body.extend_from_slice(unpadded(flags, &payload)?);
                ended = flags & END_STREAM != 0;
            }
            HEADERS | CONTINUATION if on == STREAM => ended = kind == HEADERS && flags & END_STREAM != 0,
            _ => {}
        }
        if let Some(message) = message(&body)? {
            return Ok(message.to_vec());
        }
        if ended {
            return Err(
                "the health service answered without a message: it may not know the service, or not offer health"
                    .to_owned(),
            );
        }
    }
    Err(format!(
        "the health service sent {MAX_FRAMES} frames without an answer"
    ))
}

fn unpadded(flags: u8, payload: &[u8]) -> Result<&[u8], String> {
    if flags & PADDED == 0 {
        return Ok(payload);
    }
    let padding = payload.first().copied().map(usize::from);
    padding
        .and_then(|padding| payload.get(1..payload.len().checked_sub(padding)?))
        .ok_or_else(|| "the health service sent a frame that is all padding".to_owned())
}

/// The message of an answer, if it is complete.
fn message(body: &[u8]) -> Result<Option<&[u8]>, String> {
    let Some((head, rest)) = body.split_at_checked(5) else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if head[0] != 0 || length > MAX_MESSAGE_BYTES {
        return Err("the health service sent a message that is compressed or too long".to_owned());
    }
    Ok(rest.get(..length))
}

/// Field 1 of a `HealthCheckResponse`: a number; the last one counts, none is 0.
fn status(message: &[u8]) -> Result<u64, String> {
    let malformed = || "the health service sent a malformed message".to_owned();
    let mut rest = message;
    let mut status = 0;
    while !rest.is_empty() {
        let key = read_varint(&mut rest).ok_or_else(malformed)?;
        let skip = match key & 7 {
            0 => {
                let value = read_varint(&mut rest).ok_or_else(malformed)?;
                if key >> 3 == 1 {
                    status = value;
                }
                0
            }
            1 => 8,
            2 => read_varint(&mut rest)
                .and_then(|length| usize::try_from(length).ok())
                .ok_or_else(malformed)?,
            5 => 4,
            _ => return Err(malformed()),
        };
        rest = rest.get(skip..).ok_or_else(malformed)?;
    }
    Ok(status)
}

fn read_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;

    /// Plays a server that answers with these bytes, once it has the whole request.
    async fn against(answer: Vec<u8>, service: &'static str) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; request(at, service).len()];
            stream.read_exact(&mut asked).await.unwrap();
            stream.write_all(&answer).await.unwrap();
            // Until the client has gone.
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
            asked
        });
        let result = check(at, service).await;
        assert_eq!(server.await.unwrap(), request(at, service));
        result
    }

    fn serving(status: u8) -> Vec<u8> {
        let data = [0, 0, 0, 0, 2, 0x08, status];
        [
            frame(SETTINGS, 0, 0, &[]),
            frame(PING, 0, 0, &[7; 8]),
            frame(HEADERS, END_HEADERS, STREAM, &[0x88]),
            frame(DATA, 0, STREAM, &data[..3]),
            frame(DATA, PADDED, STREAM, &[&[2], &data[3..], &[0, 0]].concat()),
        ]
        .concat()
    }

    #[tokio::test]
    async fn the_status_decides() {
        assert_eq!(against(serving(1), "").await, Ok(()));
        assert_eq!(against(serving(1), "a.Service").await, Ok(()));
        for (answer, expected) in [
            (serving(2), "NOT_SERVING"),
            (
                frame(HEADERS, END_HEADERS | END_STREAM, STREAM, &[0x88]),
                "without a message",
            ),
            (frame(RST_STREAM, 0, STREAM, &[0; 4]), "refused"),
            (frame(GOAWAY, 0, 0, &[0; 8]), "closed"),
            (
                b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
                "may not speak HTTP/2",
            ),
        ] {
            let error = against(answer, "").await.unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn requests_are_as_the_protocol_has_them() {
        let at = "10.0.0.2:50051".parse().unwrap();
        let bytes = request(at, "ab");
        assert!(bytes.starts_with(PREFACE));
        assert!(bytes.ends_with(&[
            0, 0, 9, DATA, END_STREAM, 0, 0, 0, 1, 0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b'
        ]));
        let mut block = Vec::new();
        field(&mut block, 31, "content-type", "x");
        field(&mut block, 0, "te", &"y".repeat(300));
        assert_eq!(block[..7], [0x0f, 0x10, 1, b'x', 0, 2, b't']);
        // RFC 7541, 5.1: 300 = 127 + 173, 173 = 0b1_0101101.
        assert_eq!(block[8..11], [127, 0b1010_1101, 1]);
    }

    proptest! {
        #[test]
        fn any_message_is_answered(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = status(&bytes);
            let _ = message(&bytes);
            for flags in [0, PADDED] {
                let _ = unpadded(flags, &bytes);
            }
        }
    }
}
