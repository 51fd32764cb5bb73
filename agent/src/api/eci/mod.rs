//! Port 111, the ECI OpenAPI (product `Eci`, version 2018-08-08): RPC style, one path, the action by name. Parameters of
//! query and form body are merged; every request is signed.

mod actions;
mod error;
mod exec_socket;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod http1;
mod nonces;
mod probe_view;
mod reply;
mod signing;
#[cfg(test)]
mod tests;
mod view;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde_json::{Map, Value};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    error::ApiError,
    exec_socket::PendingExecs,
    http1::{Budget, Connection, Reply, Request},
    nonces::Nonces,
    reply::Format,
    signing::Signed,
};
use super::listener;
use crate::{config::EciConfig, engine::Engine, group::eci::params::Params};

const VERSION: &str = "2018-08-08";
const MAX_CONNECTIONS: usize = 512;
const LARGE_REQUEST_BYTES: usize = 128 << 20;
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);

/// The door's state.
pub(super) struct EciDoor {
    engine: Arc<dyn Engine>,
    config: EciConfig,
    nonces: Mutex<Nonces>,
    execs: PendingExecs,
}

/// What an action gets.
pub(super) struct Call<'a> {
    door: &'a EciDoor,
    params: Params,
    /// The host the client called, with its port.
    host: String,
}

/// Fields of a successful reply.
type Fields = Map<String, Value>;
type ActionResult = Result<Fields, ApiError>;

impl EciDoor {
    pub(super) fn new(engine: Arc<dyn Engine>, config: EciConfig) -> Self {
        Self {
            engine,
            config,
            nonces: Mutex::default(),
            execs: PendingExecs::default(),
        }
    }

    /// Answers a request other than a WebSocket upgrade.
    async fn answer(&self, request: &Request) -> Reply {
        let request_id = uuid::Uuid::new_v4().to_string().to_uppercase();
        let host = request.header("host").unwrap_or("localhost").to_owned();
        let query = decode(request.query.as_bytes());
        let is_form = request.header("content-type").is_some_and(|kind| {
            kind.to_ascii_lowercase()
                .starts_with("application/x-www-form-urlencoded")
        });
        let form = if is_form {
            decode(&request.body)
        } else {
            Vec::new()
        };
        let format = Format::of(find(&query, &form, "Format"));
        let action = find(&query, &form, "Action")
            .or_else(|| request.header("x-acs-action"))
            .unwrap_or_default()
            .to_owned();
        let result = self.perform(request, query, form, &action, host.clone()).await;
        if let Err(error) = &result {
            tracing::debug!(
                action,
                request_id,
                "Request refused: {} {}: {}",
                error.status,
                error.code,
                error.message
            );
        }
        reply::reply(format, &action, &request_id, &host, result)
    }

    async fn perform(
        &self,
        request: &Request,
        query: Vec<(String, String)>,
        form: Vec<(String, String)>,
        action: &str,
        host: String,
    ) -> ActionResult {
        if request.path != "/" {
            return Err(ApiError::new(
                404,
                "InvalidAction.NotFound",
                "There is nothing but the path /",
            ));
        }
        if !["GET", "POST"].contains(&request.method.as_str()) {
            return Err(ApiError::new(
                400,
                "UnsupportedHTTPMethod",
                format!("Method {} is not supported; valid: GET, POST", request.method),
            ));
        }
        self.authenticate(request, &query, &form)?;
        for (parameter, header) in [("Action", "x-acs-action"), ("Version", "x-acs-version")] {
            if let (Some(said), Some(header_said)) = (find(&query, &form, parameter), request.header(header))
                && said != header_said
            {
                return Err(ApiError::invalid(format!(
                    "{parameter} is {said:?} and the header {header} is {header_said:?}; valid: the same"
                )));
            }
        }
        let version = find(&query, &form, "Version").or_else(|| request.header("x-acs-version"));
        if version != Some(VERSION) {
            return Err(ApiError::new(
                400,
                "InvalidVersion",
                format!("Version is {:?}; valid: {VERSION}", version.unwrap_or_default()),
            ));
        }
        if action.is_empty() {
            return Err(ApiError::missing("Action"));
        }
        let perform = actions::find(action).ok_or_else(|| {
            ApiError::new(
                404,
                "InvalidAction.NotFound",
                format!("Specified api is not found: {action:?} is not an action of this host"),
            )
        })?;
        let params = Params::parse(query.into_iter().chain(form))
            .map_err(|error| ApiError::invalid(error.to_string()))?;
        let call = Call {
            door: self,
            params,
            host,
        };
        perform(&call).await
    }

    fn authenticate(
        &self,
        request: &Request,
        query: &[(String, String)],
        form: &[(String, String)],
    ) -> Result<(), ApiError> {
        let now = SystemTime::now();
        let signed = Signed {
            method: &request.method,
            path: &request.path,
            query,
            form,
            headers: &request.headers,
            body: &request.body,
        };
        let secret_of = |id: &str| {
            let key = self.config.access_keys.iter().find(|key| key.id == id)?;
            Some(key.secret.0.as_str())
        };
        let caller = signing::verify(&signed, secret_of, now)?;
        let mut nonces = self.nonces.lock().unwrap_or_else(PoisonError::into_inner);
        nonces.take(&caller, now)?;
        Ok(())
    }
}

fn decode(encoded: &[u8]) -> Vec<(String, String)> {
    form_urlencoded::parse(encoded).into_owned().collect()
}

fn find<'a>(query: &'a [(String, String)], form: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let mut all = query.iter().chain(form);
    let (_, value) = all.find(|(parameter, _)| parameter == name)?;
    Some(value)
}

/// Serves the door until `shutdown`.
pub(super) async fn serve(
    tcp: TcpListener,
    tls: Option<TlsAcceptor>,
    door: Arc<EciDoor>,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let budget = Budget::new(LARGE_REQUEST_BYTES);
    let tasks = TaskTracker::new();
    loop {
        let slot = Arc::clone(&slots).acquire_owned();
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = async { (slot.await, tcp.accept().await) } => accepted,
        };
        let (Ok(slot), Ok((stream, _))) = accepted else {
            // Out of descriptors: only time helps.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        listener::prepare(&stream);
        let (door, budget, tls) = (Arc::clone(&door), budget.clone(), tls.clone());
        let stop = shutdown.clone();
        tasks.spawn(async move {
            let _slot = slot;
            serve_stream(stream, tls, &door, &budget, &stop).await;
        });
    }
    drop(tcp);
    tasks.close();
    let _ = timeout(DRAIN_TIMEOUT, tasks.wait()).await;
}

async fn serve_stream(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    door: &EciDoor,
    budget: &Budget,
    stop: &CancellationToken,
) {
    match tls {
        None => serve_connection(stream, door, budget, stop).await,
        Some(acceptor) => match timeout(TLS_TIMEOUT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => serve_connection(stream, door, budget, stop).await,
            Ok(Err(error)) => tracing::debug!("TLS handshake failed: {error}"),
            Err(_) => tracing::debug!("TLS handshake took too long"),
        },
    }
}

async fn serve_connection<S>(stream: S, door: &EciDoor, budget: &Budget, stop: &CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut connection = Connection::new(stream);
    loop {
        let request = tokio::select! {
            request = connection.read(budget) => request,
            () = stop.cancelled() => return,
        };
        match request {
            Ok(None) => return,
            Ok(Some(request)) if exec_socket::is_exec(&request) => {
                return exec_socket::serve(connection, &request, door).await;
            }
            Ok(Some(request)) => {
                let reply = door.answer(&request).await;
                let keep_alive = request.keep_alive() && !stop.is_cancelled();
                // Frees the request's share of the memory before the client is waited for.
                drop(request);
                if !connection.write(&reply, keep_alive).await {
                    return connection.close().await;
                }
            }
            Err(error) => {
                tracing::debug!("A request on port 111 can't be read: {error}");
                if let Some(status) = error.status() {
                    let reply = reply::reply(
                        Format::Json,
                        "",
                        &uuid::Uuid::new_v4().to_string().to_uppercase(),
                        "",
                        Err(ApiError::new(status, "InvalidParameter", error.to_string())),
                    );
                    connection.write(&reply, false).await;
                    connection.close().await;
                }
                return;
            }
        }
    }
}
