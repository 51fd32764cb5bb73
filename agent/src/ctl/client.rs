//! Requests on the agent's socket.

use std::path::PathBuf;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio_tungstenite::{WebSocketStream, tungstenite};

use crate::{api::admin::wire::Failure, group::status::Group};

/// Encoded in a part of a path.
const PART: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// Largest JSON reply.
const MAX_REPLY_BYTES: usize = 256 << 20;

/// The agent refused; its own words.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
pub(super) struct Refused(pub(super) Failure);

/// The agent.
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    async fn connect(&self) -> anyhow::Result<UnixStream> {
        UnixStream::connect(&self.socket).await.with_context(|| {
            format!(
                "Failed to reach the agent at {} (does eci-agent run? another place is given by --socket)",
                self.socket.display()
            )
        })
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> anyhow::Result<http::Response<Incoming>> {
        let stream = self.connect().await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .context("Failed to speak HTTP with the agent")?;
        tokio::spawn(connection);
        let response = sender
            .send_request(request)
            .await
            .context("The agent closed the connection before it answered")?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refused(response).await)
    }

    fn request(
        method: Method,
        path: &str,
        kind: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "agent")
            .header(header::CONTENT_TYPE, kind)
            .body(Full::new(Bytes::from(body)))
            .context("Failed to make the request")
    }

    /// Sends a request and reads the JSON reply.
    pub(super) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<T> {
        let response = self.send(Self::request(method, path, kind, body)?).await?;
        let limited = http_body_util::Limited::new(response.into_body(), MAX_REPLY_BYTES);
        let body = limited
            .collect()
            .await
            .map_err(|error| anyhow::anyhow!("The agent's reply broke off: {error}"))?;
        serde_json::from_slice(&body.to_bytes())
            .context("The agent's reply is not understood (are ecictl and the agent of the same version?)")
    }

    /// Reads a JSON object.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, "", Vec::new()).await
    }

    /// The group a person means.
    pub(super) async fn group(&self, text: &str) -> anyhow::Result<Group> {
        self.get(&group_path(text, "")).await
    }

    /// Sends a request whose reply is a stream of bytes.
    pub(super) async fn stream(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<ByteStream> {
        let response = self
            .send(Self::request(method, path, "application/json", body)?)
            .await?;
        Ok(ByteStream {
            body: response.into_body(),
        })
    }

    /// Sends a request whose reply is a stream of JSON lines.
    pub(super) async fn lines(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<LineStream> {
        Ok(LineStream {
            bytes: self.stream(method, path, body).await?,
            buffer: BytesMut::new(),
        })
    }

    /// Opens a WebSocket.
    pub(super) async fn websocket(
        &self,
        path: &str,
        protocol: &str,
    ) -> anyhow::Result<WebSocketStream<UnixStream>> {
        let stream = self.connect().await?;
        let request = Request::builder()
            .uri(format!("ws://agent{path}"))
            .header(header::HOST, "agent")
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(
                header::SEC_WEBSOCKET_KEY,
                tungstenite::handshake::client::generate_key(),
            )
            .header(header::SEC_WEBSOCKET_PROTOCOL, protocol)
            .body(())
            .context("Failed to make the request")?;
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => {
                let status = response.status();
                let body = response.into_body().unwrap_or_default();
                Err(failure(status, &body))
            }
            Err(error) => Err(error).context("Failed to open a WebSocket to the agent"),
        }
    }
}

async fn refused(response: http::Response<Incoming>) -> anyhow::Error {
    let status = response.status();
    match http_body_util::Limited::new(response.into_body(), 1 << 20)
        .collect()
        .await
    {
        Ok(body) => failure(status, &body.to_bytes()),
        Err(_) => failure(status, b""),
    }
}

fn failure(status: StatusCode, body: &[u8]) -> anyhow::Error {
    match serde_json::from_slice::<Failure>(body) {
        Ok(failure) => Refused(failure).into(),
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            anyhow::anyhow!("The agent answered {status}: {}", text.trim())
        }
    }
}

/// The path of a request about a group.
pub(super) fn group_path(group: &str, rest: &str) -> String {
    format!("/v1/groups/{}{rest}", utf8_percent_encode(group, PART))
}

/// The path of a request about a disk.
pub(super) fn disk_path(disk: &str) -> String {
    format!("/v1/disks/{}", utf8_percent_encode(disk, PART))
}

/// The path of a request about a snapshot.
pub(super) fn snapshot_path(snapshot: &str, rest: &str) -> String {
    format!("/v1/snapshots/{}{rest}", utf8_percent_encode(snapshot, PART))
}

/// A query string, with its question mark.
pub(super) fn query<N: AsRef<str>, V: AsRef<str>>(pairs: impl IntoIterator<Item = (N, V)>) -> String {
    let mut query = form_urlencoded::Serializer::new(String::from("?"));
    for (name, value) in pairs {
        query.append_pair(name.as_ref(), value.as_ref());
    }
    query.finish()
}

/// A streamed reply.
pub(super) struct ByteStream {
    body: Incoming,
}

impl ByteStream {
    /// The next piece; `None` at the end.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Bytes>> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.context("The agent's reply broke off")?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

/// A streamed reply of JSON lines.
pub(super) struct LineStream {
    bytes: ByteStream,
    buffer: BytesMut,
}

impl LineStream {
    /// The next object; `None` at the end.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                let object = serde_json::from_slice(&line).context(
                    "A line of the agent is not understood (are ecictl and the agent of the same version?)",
                )?;
                return Ok(Some(object));
            }
            match self.bytes.next().await? {
                Some(bytes) => self.buffer.extend_from_slice(&bytes),
                None if self.buffer.is_empty() => return Ok(None),
                None => bail!("The agent's reply broke off"),
            }
            if self.buffer.len() > MAX_REPLY_BYTES {
                bail!("The agent sent a line that does not end");
            }
        }
    }
}
