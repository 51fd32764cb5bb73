//! How a container is looked after, told to the guest through the shim, and what comes back.

use std::{path::Path, time::Duration};

use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};
use protocol::guest::{
    Cause as CauseMessage, ContainerLifecycle, ContainerRequest, GetEventsRequest, Handler as HandlerMessage,
    Probe as ProbeMessage, StopContainerRequest,
    event::Kind,
    handler::{Exec, Grpc, Header, HttpGet, Kind as HandlerKind, Sleep, TcpSocket},
};
use ttrpc::context::Context;

use super::client::{Rootfs, SandboxConnection, Stdio, from_ttrpc};
use crate::{
    error::{Error, ErrorKind, Result},
    group::lifecycle::{Handler, Lifecycle, Probe},
};

/// Why the guest ended a container by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Its liveness probe failed.
    Liveness,
    /// Its startup probe failed.
    Startup,
    /// Its postStart hook failed.
    PostStart,
}

/// What happened in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewsKind {
    /// A probe failed; how.
    Unhealthy(String),
    /// The guest ends the container.
    Killing(Cause),
    /// Its postStart hook failed; how.
    PostStartFailed(String),
    /// Its preStop hook failed; how.
    PreStopFailed(String),
}

/// What the guest tells of its containers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct News {
    /// The last event there is; what comes is after it.
    pub last: u64,
    /// Container ids, and what happened in them.
    pub events: Vec<(String, NewsKind)>,
    /// Container ids, whether each has started, and is ready.
    pub health: Vec<(String, bool, bool)>,
}

/// How a container ended, beside its exit code.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerEnd {
    /// The kernel killed one of its processes for memory.
    pub oom_killed: bool,
    /// The guest ended it by itself.
    pub cause: Option<Cause>,
    /// What it left, without control characters but line ends.
    pub message: String,
}

fn cause(cause: CauseMessage) -> Option<Cause> {
    match cause {
        CauseMessage::NONE => None,
        CauseMessage::LIVENESS_PROBE => Some(Cause::Liveness),
        CauseMessage::STARTUP_PROBE => Some(Cause::Startup),
        CauseMessage::POST_START_HOOK => Some(Cause::PostStart),
    }
}

/// Text of a guest, for people.
fn clean(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
        .collect()
}

impl SandboxConnection {
    /// Creates a container: nothing of it runs yet.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn create_task(
        &self,
        id: &str,
        bundle: &Path,
        rootfs: &Rootfs,
        stdio: &Stdio,
        lifecycle: &ContainerLifecycle,
    ) -> Result<()> {
        let options = Any {
            type_url: protocol::CONTAINER_LIFECYCLE_TYPE_URL.to_owned(),
            value: lifecycle.write_to_bytes().map_err(|error| {
                Error::with_source(ErrorKind::Internal, "encode the life of a container", error)
            })?,
            ..Any::default()
        };
        self.create(id, bundle, rootfs, stdio, String::new(), Some(options))
            .await
    }

    /// Waits for news after event `after`.
    ///
    /// # Errors
    /// `Unavailable` when sandbox or shim is gone.
    pub async fn follow(&self, after: u64) -> Result<News> {
        let request = GetEventsRequest {
            after,
            ..GetEventsRequest::default()
        };
        let answer = self
            .lifecycle
            .follow(Context::default(), &request)
            .await
            .map_err(|error| from_ttrpc("follow the containers of", self.id(), error))?;
        let mut news = News {
            last: after,
            ..News::default()
        };
        for event in answer.events {
            // A guest that counts backwards would have the same told again and again.
            if event.sequence <= news.last {
                continue;
            }
            news.last = event.sequence;
            let message = clean(&event.message);
            let kind = match event.kind.enum_value() {
                Ok(Kind::UNHEALTHY) => NewsKind::Unhealthy(message),
                Ok(Kind::KILLING) => match cause(event.cause.enum_value_or_default()) {
                    Some(cause) => NewsKind::Killing(cause),
                    None => continue,
                },
                Ok(Kind::POST_START_FAILED) => NewsKind::PostStartFailed(message),
                Ok(Kind::PRE_STOP_FAILED) => NewsKind::PreStopFailed(message),
                Ok(Kind::UNKNOWN | Kind::OOM | Kind::HEALTH) | Err(_) => continue,
            };
            news.events.push((event.container_id, kind));
        }
        let health = answer.health.into_iter();
        news.health = health
            .map(|health| (health.container_id, health.started, health.ready))
            .collect();
        Ok(news)
    }

    /// Has the guest begin to end a container: its hook, SIGTERM, and SIGKILL after `grace`.
    ///
    /// # Errors
    /// What the shim answers; `FailedPrecondition` when it does not run.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
            ..StopContainerRequest::default()
        };
        self.lifecycle
            .stop_container(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("stop container", id, error))?;
        Ok(())
    }

    /// How a container ended.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn container_end(&self, id: &str) -> Result<ContainerEnd> {
        let request = ContainerRequest {
            container_id: id.to_owned(),
            ..ContainerRequest::default()
        };
        let end = self
            .lifecycle
            .get_container_end(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("ask how container ended", id, error))?;
        Ok(ContainerEnd {
            oom_killed: end.oom_killed,
            cause: cause(end.cause.enum_value_or_default()),
            message: clean(&String::from_utf8_lossy(&end.termination_message)),
        })
    }
}

/// How a container of a group with this grace is looked after.
pub fn message(lifecycle: &Lifecycle, grace_seconds: u64) -> ContainerLifecycle {
    ContainerLifecycle {
        startup: lifecycle.startup.as_ref().map(probe).into(),
        liveness: lifecycle.liveness.as_ref().map(probe).into(),
        readiness: lifecycle.readiness.as_ref().map(probe).into(),
        post_start: lifecycle.post_start.as_ref().map(handler).into(),
        pre_stop: lifecycle.pre_stop.as_ref().map(handler).into(),
        grace_ms: grace_seconds.saturating_mul(1000),
        termination_message_path: lifecycle.termination_message_path.clone(),
        ..ContainerLifecycle::default()
    }
}

fn probe(probe: &Probe) -> ProbeMessage {
    ProbeMessage {
        handler: Some(handler(&probe.handler)).into(),
        initial_delay_s: probe.initial_delay_seconds,
        period_s: probe.period_seconds,
        timeout_s: probe.timeout_seconds,
        success_threshold: probe.success_threshold,
        failure_threshold: probe.failure_threshold,
        grace_ms: probe.grace_seconds.unwrap_or(0).saturating_mul(1000),
        ..ProbeMessage::default()
    }
}

fn handler(handler: &Handler) -> HandlerMessage {
    let host = |host: &Option<String>| host.clone().unwrap_or_default();
    let kind = match handler {
        Handler::Exec { command } => HandlerKind::Exec(Exec {
            command: command.clone(),
            ..Exec::default()
        }),
        Handler::HttpGet {
            is_https,
            host: name,
            port,
            path,
            headers,
        } => HandlerKind::HttpGet(HttpGet {
            is_https: *is_https,
            host: host(name),
            port: u32::from(*port),
            path: path.clone(),
            headers: headers
                .iter()
                .map(|(name, value)| Header {
                    name: name.clone(),
                    value: value.clone(),
                    ..Header::default()
                })
                .collect(),
            ..HttpGet::default()
        }),
        Handler::TcpSocket { host: name, port } => HandlerKind::TcpSocket(TcpSocket {
            host: host(name),
            port: u32::from(*port),
            ..TcpSocket::default()
        }),
        Handler::Grpc { port, service } => HandlerKind::Grpc(Grpc {
            port: u32::from(*port),
            service: service.clone(),
            ..Grpc::default()
        }),
        Handler::Sleep { seconds } => HandlerKind::Sleep(Sleep {
            seconds: *seconds,
            ..Sleep::default()
        }),
    };
    HandlerMessage {
        kind: Some(kind),
        ..HandlerMessage::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_arrive_as_they_are_wanted() {
        for is_https in [false, true] {
            let get = Handler::HttpGet {
                is_https,
                host: None,
                port: 8443,
                path: "/ready".into(),
                headers: vec![("A".into(), "b".into())],
            };
            let lifecycle = Lifecycle {
                pre_stop: Some(get),
                ..Lifecycle::default()
            };
            let message = message(&lifecycle, 1);
            let Some(HandlerKind::HttpGet(get)) = message.pre_stop.kind.clone() else {
                panic!("{message}");
            };
            assert_eq!(
                (get.is_https, get.port, get.path.as_str()),
                (is_https, 8443, "/ready")
            );
            assert_eq!(
                (get.headers[0].name.as_str(), get.headers[0].value.as_str()),
                ("A", "b")
            );
        }
    }
}
