//! The server's half of a WebSocket handshake (RFC 6455, section 4.2) on any HTTP listener here.

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::derive_accept_key,
        protocol::{Role, WebSocketConfig},
    },
};

/// Largest message from a client.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// The read buffer of a WebSocket: exec sessions are many and mostly idle.
const READ_BUFFER_BYTES: usize = 16 * 1024;

/// A checked upgrade request, not answered yet.
#[derive(Debug)]
pub(super) struct Handshake {
    accept_key: String,
    protocols: Vec<String>,
    upgrade: Option<OnUpgrade>,
}

/// Why a request is no WebSocket upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("This address speaks WebSocket only: {0}")]
pub(super) struct NotWebSocket(&'static str);

impl Handshake {
    /// Checks the head of a request.
    pub(super) fn parse(method: &Method, headers: &HeaderMap) -> Result<Self, NotWebSocket> {
        if method != Method::GET {
            return Err(NotWebSocket("the method is not GET"));
        }
        if !has_token(headers, &header::UPGRADE, "websocket")
            || !has_token(headers, &header::CONNECTION, "upgrade")
        {
            return Err(NotWebSocket("there is no Upgrade: websocket header"));
        }
        if headers
            .get(header::SEC_WEBSOCKET_VERSION)
            .map(HeaderValue::as_bytes)
            != Some(b"13")
        {
            return Err(NotWebSocket("Sec-WebSocket-Version is not 13"));
        }
        let key = headers
            .get(header::SEC_WEBSOCKET_KEY)
            .ok_or(NotWebSocket("there is no Sec-WebSocket-Key header"))?;
        let protocols = headers
            .get_all(header::SEC_WEBSOCKET_PROTOCOL)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(|name| name.trim().to_owned())
            .filter(|name| !name.is_empty())
            .collect();
        Ok(Self {
            accept_key: derive_accept_key(key.as_bytes()),
            protocols,
            upgrade: None,
        })
    }

    /// Checks a request of a hyper server and takes its connection.
    pub(super) fn from_request<B>(request: &mut Request<B>) -> Result<Self, NotWebSocket> {
        let mut handshake = Self::parse(request.method(), request.headers())?;
        handshake.upgrade = Some(hyper::upgrade::on(request));
        Ok(handshake)
    }

    /// The first protocol of `ours` that the client offers. A client that offers none gets none.
    pub(super) fn choose<'a>(&self, ours: &[&'a str]) -> Option<&'a str> {
        ours.iter()
            .find(|ours| self.protocols.iter().any(|offered| offered == *ours))
            .copied()
    }

    /// Whether the client offers any protocol.
    pub(super) fn offers_any(&self) -> bool {
        !self.protocols.is_empty()
    }

    /// The 101 response.
    pub(super) fn response<B: Default>(&self, protocol: Option<&str>) -> Response<B> {
        let mut response = Response::new(B::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        if let Ok(key) = HeaderValue::from_str(&self.accept_key) {
            headers.insert(header::SEC_WEBSOCKET_ACCEPT, key);
        }
        if let Some(Ok(protocol)) = protocol.map(HeaderValue::from_str) {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
        }
        response
    }

    /// The WebSocket, once the response went out.
    pub(super) async fn socket(self) -> Option<WebSocketStream<TokioIo<Upgraded>>> {
        match self.upgrade?.await {
            Ok(upgraded) => Some(server_socket(TokioIo::new(upgraded)).await),
            Err(error) => {
                tracing::debug!("The client left during the WebSocket upgrade: {error}");
                None
            }
        }
    }
}

/// A server-side WebSocket on a connection whose handshake is done.
pub(super) async fn server_socket<S>(stream: S) -> WebSocketStream<S>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    server_socket_after(stream, Vec::new()).await
}

/// As [`server_socket`], where `ahead` was read from the connection already.
pub(super) async fn server_socket_after<S>(stream: S, ahead: Vec<u8>) -> WebSocketStream<S>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES))
        .read_buffer_size(READ_BUFFER_BYTES)
        // Each frame goes out by itself; the stream below holds no data back.
        .write_buffer_size(0);
    WebSocketStream::from_partially_read(stream, ahead, Role::Server, Some(config)).await
}

fn has_token(headers: &HeaderMap, name: &header::HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|part| part.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    header::HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn the_example_of_the_rfc() {
        let headers = headers(&[
            ("upgrade", "WebSocket"),
            ("connection", "keep-alive, Upgrade"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "v5.channel.k8s.io, v4.channel.k8s.io"),
        ]);
        let handshake = Handshake::parse(&Method::GET, &headers).unwrap();
        assert_eq!(handshake.accept_key, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(
            handshake.choose(&["v4.channel.k8s.io"]),
            Some("v4.channel.k8s.io")
        );
        assert_eq!(handshake.choose(&["x"]), None);
        assert!(Handshake::parse(&Method::POST, &headers).is_err());
    }

    #[test]
    fn plain_requests_are_refused() {
        assert!(Handshake::parse(&Method::GET, &headers(&[])).is_err());
        let old = headers(&[
            ("upgrade", "websocket"),
            ("connection", "upgrade"),
            ("sec-websocket-version", "8"),
            ("sec-websocket-key", "x"),
        ]);
        assert!(Handshake::parse(&Method::GET, &old).is_err());
    }
}
