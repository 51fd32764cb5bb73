//! The WebSocket of an asynchronous ExecContainerCommand: a one-time token names the command, which starts when the client
//! connects.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http::Method;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::{
    EciDoor,
    error::ApiError,
    http1::{Connection, Reply, Request},
};
use crate::{
    api::{
        exec::{self, Framing},
        status, websocket,
    },
    engine::ExecRequest,
    group::status::GroupId,
};

/// A token is good for so long, and once.
const TOKEN_LIFE: Duration = Duration::from_secs(30);
/// Most commands that wait for their client.
const MOST: usize = 1000;

/// Commands that wait for their client.
#[derive(Debug, Default)]
pub(super) struct PendingExecs(Mutex<HashMap<String, PendingExec>>);

#[derive(Debug)]
struct PendingExec {
    group: GroupId,
    request: ExecRequest,
    until: Instant,
}

impl PendingExecs {
    /// Keeps a command; returns its token.
    pub(super) fn add(&self, group: GroupId, request: ExecRequest) -> Result<String, ApiError> {
        let mut random = [0; 32];
        SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| ApiError::new(500, "InternalError", "The host has no random numbers"))?;
        let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let now = Instant::now();
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pending.retain(|_, exec| exec.until > now);
        if pending.len() >= MOST {
            return Err(ApiError::new(
                400,
                "Throttling",
                "Too many commands wait for their client",
            ));
        }
        let exec = PendingExec {
            group,
            request,
            until: now + TOKEN_LIFE,
        };
        pending.insert(token.clone(), exec);
        Ok(token)
    }

    fn take(&self, token: &str) -> Option<PendingExec> {
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pending.remove(token).filter(|exec| exec.until > Instant::now())
    }
}

/// Whether a request is for the WebSocket.
pub(super) fn is_exec(request: &Request) -> bool {
    request.path == "/exec/" || request.path == "/exec"
}

/// Serves the WebSocket to its end.
pub(super) async fn serve<S>(mut connection: Connection<S>, request: &Request, door: &EciDoor)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (handshake, session) = match open(request, door).await {
        Ok(opened) => opened,
        Err((status, message)) => {
            let reply = Reply {
                status,
                headers: vec![("content-type", "text/plain;charset=utf-8".into())],
                body: format!("{message}\n").into_bytes(),
            };
            connection.write(&reply, false).await;
            return connection.close().await;
        }
    };
    let protocol = handshake.choose(&[exec::V5, exec::V4]);
    let response = handshake.response::<()>(protocol);
    let reply = Reply {
        status: response.status().as_u16(),
        headers: [
            ("upgrade", http::header::UPGRADE),
            ("connection", http::header::CONNECTION),
            ("sec-websocket-accept", http::header::SEC_WEBSOCKET_ACCEPT),
            ("sec-websocket-protocol", http::header::SEC_WEBSOCKET_PROTOCOL),
        ]
        .into_iter()
        .filter_map(|(name, header)| {
            let value = response.headers().get(header)?.to_str().ok()?;
            Some((name, value.to_owned()))
        })
        .collect(),
        body: Vec::new(),
    };
    if connection.write(&reply, true).await {
        let (stream, ahead) = connection.into_parts();
        let socket = websocket::server_socket_after(stream, ahead.to_vec()).await;
        exec::carry(socket, session, Framing::of(protocol)).await;
    }
}

async fn open(
    request: &Request,
    door: &EciDoor,
) -> Result<(websocket::Handshake, crate::engine::ExecSession), (u16, String)> {
    let method =
        Method::from_bytes(request.method.as_bytes()).map_err(|_| (400, "malformed method".to_owned()))?;
    let handshake = websocket::Handshake::parse(&method, &request.header_map())
        .map_err(|error| (400, error.to_string()))?;
    if handshake.offers_any() && handshake.choose(&[exec::V5, exec::V4]).is_none() {
        let message = format!(
            "None of the offered protocols is supported; valid: {}, {}",
            exec::V5,
            exec::V4
        );
        return Err((400, message));
    }
    let token = super::decode(request.query.as_bytes())
        .into_iter()
        .find(|(name, _)| name == "s")
        .map(|(_, value)| value);
    let pending = token.and_then(|token| door.execs.take(&token)).ok_or_else(|| {
        (
            403,
            "The token is unknown, used or older than 30 seconds".to_owned(),
        )
    })?;
    let session = door
        .engine
        .exec(&pending.group, pending.request)
        .await
        .map_err(|error| (status::of(error.kind).as_u16(), error.message))?;
    Ok((handshake, session))
}
