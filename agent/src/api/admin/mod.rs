//! The local door: HTTP and JSON on a unix socket, for `ecictl`. Whoever may open it may do everything.
//!
//! | request | does |
//! |---|---|
//! | `GET /v1/version` | the agent's version |
//! | `GET /v1/host` | what the host has and uses |
//! | `GET /v1/metrics` | the agent's own metrics, in the Prometheus text format |
//! | `GET /v1/groups`, `POST /v1/groups` | list; create from a Pod (YAML or JSON) or an ECI request as JSON |
//! | `GET /v1/groups/{group}`, `DELETE` | one; delete (`grace`, `wait`) |
//! | `GET /v1/groups/{group}/watch` | the group now and after each change, a JSON line each, until it is gone |
//! | `GET /v1/groups/{group}/exec` | WebSocket, [`super::exec`] |
//! | `GET /v1/groups/{group}/logs`, `/stats` | log text as a stream; statistics |
//! | `POST /v1/groups/{group}/restart`, `/resize` | end all containers and start them again; grow a disk (`volume`, `gib`) |
//! | `POST /v1/groups/{group}/update` | make it what a Pod or an ECI request says; `changed` tells whether it was something else |
//! | `POST /v1/groups/{group}/snapshot`, `/fork` | take a snapshot of a running group; make groups that go on from it |
//! | `GET /v1/snapshots`, `DELETE /v1/snapshots/{id}` | list; remove |
//! | `GET /v1/disks`, `DELETE /v1/disks/{id}` | list; remove one that no group has |
//! | `POST /v1/snapshots/{id}/restore` | make groups that go on from a snapshot |
//! | `GET /v1/images`, `DELETE /v1/images?reference=` | list; remove |
//! | `POST /v1/images/pull` | progress, a JSON line each |
//!
//! `{group}` is an id, a unique beginning of one, a name, or `namespace/name`, percent-encoded.

mod disks;
mod groups;
mod images;
pub(crate) mod peer;
mod snapshots;
#[cfg(test)]
mod tests;
pub mod wire;

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use http::{StatusCode, header};
use tokio::net::UnixListener;

pub(crate) use self::groups::ECI_JSON;
use self::{peer::AllowedPeers, wire::Failure};
use super::{
    listener::{ListenError, Listener},
    status,
};
use crate::{
    config::Config,
    engine::Engine,
    error::{Error, Result},
};

/// Largest request body: a manifest.
const MAX_BODY_BYTES: usize = 4 << 20;

/// An engine error as a response of this door.
pub(super) struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (status::of(self.0.kind), Json(Failure::of(&self.0))).into_response()
    }
}

/// The engine, as handlers get it.
pub(super) type Shared = State<Arc<dyn Engine>>;

/// All requests of this door.
pub(super) fn router(engine: Arc<dyn Engine>) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/host", get(host))
        .route("/v1/metrics", get(metrics))
        .route("/v1/groups", get(groups::list).post(groups::create))
        .route("/v1/groups/{group}", get(groups::get).delete(groups::delete))
        .route("/v1/groups/{group}/resize", post(groups::resize))
        .route("/v1/groups/{group}/restart", post(groups::restart))
        .route("/v1/groups/{group}/update", post(groups::update))
        .route("/v1/groups/{group}/watch", get(groups::watch))
        .route("/v1/groups/{group}/exec", get(groups::exec))
        .route("/v1/groups/{group}/logs", get(groups::logs))
        .route("/v1/groups/{group}/stats", get(groups::stats))
        .route("/v1/groups/{group}/snapshot", post(snapshots::take))
        .route("/v1/groups/{group}/fork", post(snapshots::fork))
        .route("/v1/snapshots", get(snapshots::list))
        .route("/v1/snapshots/{snapshot}", delete(snapshots::remove))
        .route("/v1/snapshots/{snapshot}/restore", post(snapshots::restore))
        .route("/v1/disks", get(disks::list))
        .route("/v1/disks/{disk}", delete(disks::remove))
        .route("/v1/images", get(images::list).delete(images::remove))
        .route("/v1/images/pull", post(images::pull))
        .fallback(|| async {
            (
                StatusCode::NOT_FOUND,
                Json(Failure {
                    kind: "NotFound".into(),
                    message: "The agent has no such request".into(),
                }),
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(engine)
}

/// Answers everything with a refusal.
pub(super) fn refusing_router(message: String) -> Router {
    Router::new().fallback(move || async move {
        let failure = Failure {
            kind: "PermissionDenied".into(),
            message,
        };
        (
            StatusCode::FORBIDDEN,
            [(header::CONNECTION, "close")],
            Json(failure),
        )
    })
}

/// Makes the socket. One left behind by an agent that was killed is replaced; one in use is not.
pub(super) fn bind(config: &Config) -> std::result::Result<Listener, ListenError> {
    let path = &config.admin.socket;
    let allowed = match config.admin.group.as_str() {
        "" => AllowedPeers::root_only(),
        group => AllowedPeers::with_group(group).ok_or_else(|| ListenError::Group {
            group: group.to_owned(),
        })?,
    };
    let failed = |step| {
        let path = path.clone();
        move |source| ListenError::Unix { step, path, source }
    };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed("create the directory of the socket"))?;
    }
    remove_stale(path).map_err(failed("replace the socket"))?;
    let listener = UnixListener::bind(path).map_err(failed("listen on the socket"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))
        .map_err(failed("set the mode of the socket"))?;
    if let Some(gid) = allowed.gid() {
        chown(path, None, Some(gid)).map_err(failed("set the group of the socket"))?;
    }
    Ok(Listener::Unix(listener, allowed))
}

fn remove_stale(path: &Path) -> io::Result<()> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another agent answers on it",
        )),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

async fn version() -> Json<wire::Version> {
    Json(wire::Version {
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

async fn metrics(State(engine): Shared) -> String {
    engine.metrics()
}

async fn host(State(engine): Shared) -> std::result::Result<Response, Refusal> {
    Ok(Json(engine.host_stats().await?).into_response())
}

/// A stream of JSON lines as a response.
fn json_lines<T, S>(lines: S) -> Response
where
    T: serde::Serialize + 'static,
    S: futures_util::Stream<Item = T> + Send + 'static,
{
    use futures_util::StreamExt;
    let lines = lines.map(|line| {
        serde_json::to_vec(&line)
            .map(|mut text| {
                text.push(b'\n');
                bytes::Bytes::from(text)
            })
            .map_err(io::Error::other)
    });
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        axum::body::Body::from_stream(lines),
    )
        .into_response()
}

type Answer = std::result::Result<Response, Refusal>;

fn json<T: serde::Serialize>(result: Result<T>) -> Answer {
    Ok(Json(result?).into_response())
}
