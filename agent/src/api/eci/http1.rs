//! HTTP/1.1 for port 111. SDKs put all parameters into the request target, which may be several MiB long; the `http` crate
//! ends at 64 KiB, so the head is read here with `httparse`, and only what this API needs is supported: GET and POST,
//! Content-Length, keep-alive, and handing the connection over to a WebSocket.

use std::{sync::Arc, time::Duration};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};

/// Largest request head, target included.
const MAX_HEAD_BYTES: usize = 8 << 20;
/// Largest header fields, target not included.
const MAX_FIELD_BYTES: usize = 64 << 10;
/// Largest body.
const MAX_BODY_BYTES: usize = 8 << 20;
const MAX_HEADERS: usize = 100;
/// Requests up to this size need no part of the budget.
const FREE_BYTES: usize = 64 << 10;
/// An idle connection is closed after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A request has so long to arrive once it began.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Memory for large requests, all connections together.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<Semaphore>);

impl Budget {
    const UNIT_BYTES: usize = 64 << 10;

    pub(super) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes / Self::UNIT_BYTES)))
    }

    /// Waits until there is room for `bytes`.
    async fn reserve(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(Self::UNIT_BYTES)).ok()?;
        Arc::clone(&self.0).acquire_many_owned(units).await.ok()
    }
}

/// A request as it came.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) method: String,
    /// Path of the target.
    pub(super) path: String,
    /// Query of the target, encoded.
    pub(super) query: String,
    /// Names in lower case.
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
    keep_alive: bool,
    _memory: Option<OwnedSemaphorePermit>,
}

impl Request {
    /// The first value of a header; `name` in lower case.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(header, _)| header == name)?;
        Some(value)
    }

    /// The headers in the form of the `http` crate, as far as it accepts them.
    pub(super) fn header_map(&self) -> http::HeaderMap {
        let pairs = self.headers.iter().filter_map(|(name, value)| {
            let name = http::HeaderName::from_bytes(name.as_bytes()).ok()?;
            Some((name, http::HeaderValue::from_str(value).ok()?))
        });
        pairs.collect()
    }
}

/// A reply.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
}

/// Why a request can't be read. Each closes the connection.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum ReadError {
    #[error("the connection ended within a request")]
    Ended,
    #[error("the request took too long to arrive")]
    TooSlow,
    #[error(
        "the request head is larger than {MAX_HEAD_BYTES} bytes, or its header fields than {MAX_FIELD_BYTES}"
    )]
    HeadTooLarge,
    #[error("the request body is larger than {MAX_BODY_BYTES} bytes")]
    BodyTooLarge,
    #[error("the request is not valid HTTP/1.1: {0}")]
    Malformed(&'static str),
}

impl ReadError {
    /// Status of the answer, where one is due.
    pub(super) fn status(&self) -> Option<u16> {
        match self {
            Self::Ended => None,
            Self::TooSlow => Some(408),
            Self::HeadTooLarge => Some(414),
            Self::BodyTooLarge => Some(413),
            Self::Malformed(_) => Some(400),
        }
    }
}

/// A connection and what was read ahead of it.
pub(super) struct Connection<S> {
    stream: S,
    ahead: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            ahead: BytesMut::new(),
        }
    }

    /// The next request; `None` when the client is done.
    pub(super) async fn read(&mut self, budget: &Budget) -> Result<Option<Request>, ReadError> {
        if self.ahead.is_empty() {
            match timeout(IDLE_TIMEOUT, self.stream.read_buf(&mut self.ahead)).await {
                Ok(Ok(1..)) => {}
                _ => return Ok(None),
            }
        }
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        match timeout_at(deadline, self.read_request(budget)).await {
            Ok(result) => result.map(Some),
            Err(_) => Err(ReadError::TooSlow),
        }
    }

    async fn read_request(&mut self, budget: &Budget) -> Result<Request, ReadError> {
        let mut memory = None;
        let head_end = self.read_head(budget, &mut memory).await?;
        let (mut request, body_length) = parse_head(&self.ahead[..head_end])?;
        self.ahead.advance(head_end);
        if request
            .header("expect")
            .is_some_and(|value| value.eq_ignore_ascii_case("100-continue"))
        {
            self.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        if body_length > FREE_BYTES && memory.is_none() {
            memory = budget.reserve(MAX_BODY_BYTES).await;
        }
        while self.ahead.len() < body_length {
            self.read_more().await?;
        }
        request.body = self.ahead.split_to(body_length).to_vec();
        request._memory = memory;
        Ok(request)
    }

    /// Reads up to the end of the head; returns its length.
    async fn read_head(
        &mut self,
        budget: &Budget,
        memory: &mut Option<OwnedSemaphorePermit>,
    ) -> Result<usize, ReadError> {
        let mut searched: usize = 0;
        loop {
            let from = searched.saturating_sub(3);
            if let Some(at) = find(&self.ahead[from..], b"\r\n\r\n") {
                return Ok(from + at + 4);
            }
            searched = self.ahead.len();
            if searched > MAX_HEAD_BYTES {
                return Err(ReadError::HeadTooLarge);
            }
            if searched > FREE_BYTES && memory.is_none() {
                *memory = budget.reserve(MAX_HEAD_BYTES).await;
            }
            self.read_more().await?;
        }
    }

    async fn read_more(&mut self) -> Result<(), ReadError> {
        self.ahead.reserve(16 << 10);
        match self.stream.read_buf(&mut self.ahead).await {
            Ok(1..) => Ok(()),
            Ok(0) | Err(_) => Err(ReadError::Ended),
        }
    }

    async fn write_all(&mut self, bytes: &[u8]) -> Result<(), ReadError> {
        let written = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        match timeout(REQUEST_TIMEOUT, written).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(ReadError::Ended),
        }
    }

    /// Writes a reply; `false` when the connection is to be closed.
    pub(super) async fn write(&mut self, reply: &Reply, keep_alive: bool) -> bool {
        let reason = http::StatusCode::from_u16(reply.status)
            .ok()
            .and_then(|status| status.canonical_reason())
            .unwrap_or("Unknown");
        let mut head = format!("HTTP/1.1 {} {reason}\r\n", reply.status);
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if reply.status != 101 {
            head.push_str(&format!("content-length: {}\r\n", reply.body.len()));
            if !keep_alive {
                head.push_str("connection: close\r\n");
            }
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(&reply.body);
        self.write_all(&bytes).await.is_ok() && keep_alive
    }

    /// The stream and what was read ahead, for another protocol.
    pub(super) fn into_parts(self) -> (S, BytesMut) {
        (self.stream, self.ahead)
    }

    /// Ends the connection so that the last reply arrives: says so, then reads away what still comes.
    pub(super) async fn close(mut self) {
        let _ = self.stream.shutdown().await;
        let _ = timeout(Duration::from_secs(1), async {
            let mut rest = [0; 4096];
            while let Ok(1..) = self.stream.read(&mut rest).await {}
        })
        .await;
    }
}

impl Request {
    pub(super) fn keep_alive(&self) -> bool {
        self.keep_alive
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Parses a complete head; returns the request and the length of its body.
fn parse_head(head: &[u8]) -> Result<(Request, usize), ReadError> {
    let line_end = find(head, b"\r\n").unwrap_or(head.len());
    if head.len() - line_end > MAX_FIELD_BYTES {
        return Err(ReadError::HeadTooLarge);
    }
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut fields);
    match parsed.parse(head) {
        Ok(httparse::Status::Complete(end)) if end == head.len() => {}
        // Bare line feeds end a head for the parser, but not for us: what follows them would be lost, and a proxy before
        // us may take it for a request of its own.
        Ok(httparse::Status::Complete(_)) => return Err(ReadError::Malformed("line ends are not CR LF")),
        Ok(httparse::Status::Partial) => return Err(ReadError::Malformed("incomplete head")),
        Err(httparse::Error::TooManyHeaders) => return Err(ReadError::HeadTooLarge),
        Err(_) => return Err(ReadError::Malformed("malformed head")),
    }
    let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
        return Err(ReadError::Malformed("malformed request line"));
    };
    let mut headers = Vec::with_capacity(parsed.headers.len());
    for field in parsed.headers.iter() {
        let value =
            std::str::from_utf8(field.value).map_err(|_| ReadError::Malformed("a header is not UTF-8"))?;
        headers.push((field.name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut lengths = headers.iter().filter(|(name, _)| name == "content-length");
    let length = match (lengths.next(), lengths.next()) {
        (None, _) => 0,
        (Some((_, text)), None) if text.bytes().all(|byte| byte.is_ascii_digit()) => {
            text.parse().map_err(|_| ReadError::BodyTooLarge)?
        }
        _ => return Err(ReadError::Malformed("wrong Content-Length")),
    };
    if headers.iter().any(|(name, _)| name == "transfer-encoding") {
        return Err(ReadError::Malformed(
            "a chunked body is not supported; send Content-Length",
        ));
    }
    if length > MAX_BODY_BYTES {
        return Err(ReadError::BodyTooLarge);
    }
    // An absolute target, as sent to a proxy, names the same path.
    let target = match target.split_once("://") {
        Some((scheme, rest))
            if scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https") =>
        {
            rest.find(['/', '?']).map_or("/", |at| &rest[at..])
        }
        _ => target,
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let connection = headers.iter().find(|(name, _)| name == "connection");
    let says = |word: &str| connection.is_some_and(|(_, value)| value.to_ascii_lowercase().contains(word));
    let request = Request {
        method: method.to_owned(),
        path: if path.is_empty() {
            "/".into()
        } else {
            path.to_owned()
        },
        query: query.to_owned(),
        keep_alive: if version == 1 {
            !says("close")
        } else {
            says("keep-alive")
        },
        headers,
        body: Vec::new(),
        _memory: None,
    };
    Ok((request, length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::duplex;

    use super::*;

    async fn read(bytes: Vec<u8>) -> Vec<Result<Option<Request>, ReadError>> {
        let (mut client, server) = duplex(4096);
        let writer = tokio::spawn(async move {
            let _ = client.write_all(&bytes).await;
        });
        let mut connection = Connection::new(server);
        let budget = Budget::new(64 << 20);
        let mut results = Vec::new();
        loop {
            let result = connection.read(&budget).await;
            let last = !matches!(result, Ok(Some(_)));
            results.push(result);
            if last {
                break;
            }
        }
        drop(connection);
        writer.await.unwrap();
        results
    }

    #[tokio::test]
    async fn requests_follow_each_other() {
        let text = b"POST /?A=1&B=x%20y HTTP/1.1\r\nHost: h:111\r\nContent-Length: 3\r\n\r\nabc\
                     GET http://h:111/?C=2 HTTP/1.1\r\nHost:  h \r\nConnection: close\r\n\r\n";
        let results = read(text.to_vec()).await;
        let first = results[0].as_ref().unwrap().as_ref().unwrap();
        assert_eq!(
            (first.method.as_str(), first.path.as_str(), first.query.as_str()),
            ("POST", "/", "A=1&B=x%20y")
        );
        assert_eq!(
            (first.body.as_slice(), first.header("host")),
            (&b"abc"[..], Some("h:111"))
        );
        assert!(first.keep_alive());
        let second = results[1].as_ref().unwrap().as_ref().unwrap();
        assert_eq!((second.path.as_str(), second.query.as_str()), ("/", "C=2"));
        assert!(!second.keep_alive());
        assert!(matches!(results[2], Ok(None)));
    }

    #[tokio::test]
    async fn targets_of_several_mebibytes_are_read() {
        let value = "x".repeat(5 << 20);
        let results = read(format!("POST /?A={value} HTTP/1.1\r\nHost: h\r\n\r\n").into_bytes()).await;
        let request = results[0].as_ref().unwrap().as_ref().unwrap();
        assert_eq!(request.query.len(), value.len() + 2);
    }

    #[tokio::test]
    async fn limits_hold() {
        let long = "x".repeat(MAX_HEAD_BYTES + 20_000);
        for (text, expected) in [
            (format!("GET /?{long} HTTP/1.1\r\n\r\n"), ReadError::HeadTooLarge),
            (
                format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(MAX_FIELD_BYTES + 1)),
                ReadError::HeadTooLarge,
            ),
            (
                format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1)),
                ReadError::HeadTooLarge,
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n".into(),
                ReadError::BodyTooLarge,
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".into(),
                ReadError::Malformed("wrong Content-Length"),
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\nx".into(),
                ReadError::Malformed("wrong Content-Length"),
            ),
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
                ReadError::Malformed("a chunked body is not supported; send Content-Length"),
            ),
            ("nonsense\r\n\r\n".into(), ReadError::Malformed("malformed head")),
            (
                "GET / HTTP/1.1\nHost: h\n\nGET /hidden HTTP/1.1\r\n\r\n".into(),
                ReadError::Malformed("line ends are not CR LF"),
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nx".into(),
                ReadError::Ended,
            ),
        ] {
            let results = read(text.into_bytes()).await;
            assert_eq!(results[0].as_ref().unwrap_err(), &expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn slow_requests_end() {
        let (mut client, server) = duplex(4096);
        client.write_all(b"GET / HTT").await.unwrap();
        let result = Connection::new(server).read(&Budget::new(1 << 20)).await;
        assert_eq!(result.unwrap_err(), ReadError::TooSlow);
    }

    proptest! {
        #[test]
        fn any_head_is_answered(head in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_head(&head);
        }
    }
}
