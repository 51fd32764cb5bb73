//! Port 10250, the kubelet API, and port 10255, its read-only part for the host itself.
//!
//! | request | does |
//! |---|---|
//! | `GET /healthz` | `ok` |
//! | `GET /pods`, `/runningpods/` | `v1.PodList` |
//! | `GET /exec/{namespace}/{pod}[/{uid}]/{container}` | WebSocket, [`super::exec`] (10250 only) |
//! | `GET /containerLogs/{namespace}/{pod}/{container}` | log text (10250 only) |
//! | `GET /stats/summary` | `stats.v1alpha1.Summary` |
//! | `GET /metrics/resource` | Prometheus text, for metrics-server |
//! | `GET /metrics/cadvisor` | Prometheus text, more of each container and the network of each group |

mod auth;
mod cadvisor_metrics;
mod exposition;
mod resource_metrics;
mod streams;
mod summary;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    middleware,
    response::{IntoResponse, Response},
    routing::get,
};
use futures_util::{StreamExt, stream};
use http::{StatusCode, header};
use k8s_openapi::{List, api::core::v1::Pod};

pub(super) use self::auth::Tokens;
use super::{pod_view, status};
use crate::{
    engine::{Engine, GroupStats, HostStats},
    error::Error,
    group::status::{Group, Phase},
};

/// Groups asked for their statistics at once.
const CONCURRENT_STATS: usize = 8;
/// A guest has so long to answer.
const STATS_TIMEOUT: Duration = Duration::from_secs(5);

/// What handlers share.
pub(super) struct KubeletDoor {
    pub(super) engine: Arc<dyn Engine>,
    rates: summary::CpuRates,
}

type Shared = State<Arc<KubeletDoor>>;
type Answer = Result<Response, Refusal>;

/// An error as the kubelet writes it: plain text.
struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        if self.0.kind == crate::error::ErrorKind::Internal {
            tracing::error!("A request failed: {}", self.0.chain());
        }
        (status::of(self.0.kind), self.0.message).into_response()
    }
}

fn read_only_routes() -> Router<Arc<KubeletDoor>> {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/healthz/ping", get(|| async { "ok" }))
        .route("/pods", get(pods))
        .route("/pods/", get(pods))
        .route("/runningpods/", get(running_pods))
        .route("/stats/summary", get(summary::serve))
        .route("/metrics", get(metrics))
        .route("/metrics/resource", get(resource_metrics::serve))
        .route("/metrics/cadvisor", get(cadvisor_metrics::serve))
}

/// Port 10250: every request carries a credential.
pub(super) fn router(engine: Arc<dyn Engine>, tokens: Tokens) -> Router {
    let door = Arc::new(KubeletDoor::new(engine));
    read_only_routes()
        .route(
            "/exec/{namespace}/{pod}/{container}",
            get(streams::exec).post(streams::exec),
        )
        .route(
            "/exec/{namespace}/{pod}/{uid}/{container}",
            get(streams::exec_with_uid).post(streams::exec_with_uid),
        )
        .route("/containerLogs/{namespace}/{pod}/{container}", get(streams::logs))
        .fallback(|| async { (StatusCode::NOT_FOUND, "404 page not found\n") })
        .layer(middleware::from_fn_with_state(Arc::new(tokens), auth::require))
        .with_state(door)
}

/// Port 10255: reading only, without credentials.
pub(super) fn read_only_router(engine: Arc<dyn Engine>) -> Router {
    read_only_routes()
        .fallback(|| async { (StatusCode::NOT_FOUND, "404 page not found\n") })
        .with_state(Arc::new(KubeletDoor::new(engine)))
}

impl KubeletDoor {
    fn new(engine: Arc<dyn Engine>) -> Self {
        Self {
            engine,
            rates: summary::CpuRates::default(),
        }
    }

    /// Statistics of every running group; `None` where a group does not give them.
    async fn all_stats(&self) -> Vec<(Group, Option<GroupStats>)> {
        let mut groups = self.engine.list().await;
        groups.retain(|group| group.status.phase == Phase::Running);
        stream::iter(groups)
            .map(|group| async {
                let stats = tokio::time::timeout(STATS_TIMEOUT, self.engine.stats(&group.id)).await;
                let stats = match stats {
                    Ok(Ok(stats)) => Some(stats),
                    Ok(Err(error)) => {
                        tracing::debug!("No statistics of {}: {}", group.id, error.chain());
                        None
                    }
                    Err(_) => {
                        tracing::debug!("No statistics of {} in time", group.id);
                        None
                    }
                };
                (group, stats)
            })
            .buffered(CONCURRENT_STATS)
            .collect()
            .await
    }

    async fn host(&self) -> Result<HostStats, Error> {
        self.engine.host_stats().await
    }
}

/// The agent's own metrics.
async fn metrics(State(door): State<Arc<KubeletDoor>>) -> impl IntoResponse {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(http::header::CONTENT_TYPE, kind)], door.engine.metrics())
}

async fn pods(State(door): Shared) -> Answer {
    pod_list(&door, |_| true).await
}

async fn running_pods(State(door): Shared) -> Answer {
    pod_list(&door, |group| group.status.phase == Phase::Running).await
}

async fn pod_list(door: &KubeletDoor, wanted: impl Fn(&Group) -> bool) -> Answer {
    let node_name = door.host().await?.node_name;
    let groups = door.engine.list().await;
    let pods: Vec<Pod> = groups
        .iter()
        .filter(|group| wanted(group))
        .map(|group| pod_view::pod(group, &node_name))
        .collect();
    let list = List {
        items: pods,
        ..List::default()
    };
    Ok(Json(list).into_response())
}

/// Prometheus text as a response.
fn exposition_response(text: String) -> Response {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response()
}
