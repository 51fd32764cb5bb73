//! The service by which the life of containers is followed, and its messages.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use protocol::{
    guest::{
        Cause as CauseMessage, ContainerEnd, ContainerHealth, ContainerLifecycle, ContainerRequest, Empty,
        Event as EventMessage, GetEventsRequest, GetEventsResponse, Handler as HandlerMessage,
        Probe as ProbeMessage, StopContainerRequest, event::Kind, handler::Kind as HandlerKind,
    },
    guest_ttrpc::Lifecycle as LifecycleService,
};
use ttrpc::r#async::TtrpcContext;

use super::status::status;
use crate::{
    care::{Cause, Lifecycle, check::Handler, http::HttpGet, probe::Probe},
    container::process::State,
    error::{Error, Result},
    events::{Event, EventKind},
    sandbox::Sandbox,
};

/// Serves [`LifecycleService`].
pub(super) fn service(sandbox: Arc<Sandbox>) -> Arc<dyn LifecycleService + Send + Sync> {
    Arc::new(Service { sandbox })
}

struct Service {
    sandbox: Arc<Sandbox>,
}

#[async_trait]
impl LifecycleService for Service {
    async fn follow(&self, _: &TtrpcContext, request: GetEventsRequest) -> ttrpc::Result<GetEventsResponse> {
        Ok(follow(&self.sandbox, request.after).await)
    }

    async fn stop_container(&self, _: &TtrpcContext, request: StopContainerRequest) -> ttrpc::Result<Empty> {
        let stop = || {
            let grace = Duration::from_millis(request.grace_ms);
            self.sandbox.containers()?.stop(&request.container_id, grace)
        };
        stop().map(|()| Empty::new()).map_err(status)
    }

    async fn get_container_end(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerEnd> {
        let end = || {
            let container = self.sandbox.containers()?.get(&request.container_id)?;
            let State::Ended(ended) = container.process("")?.state() else {
                return Err(Error::precondition("the container has not ended"));
            };
            Ok(ContainerEnd {
                oom_killed: ended.oom_killed,
                cause: cause(container.care.cause()).into(),
                termination_message: container.termination_message()?,
                ..Default::default()
            })
        };
        end().map_err(status)
    }
}

/// Waits for events, and tells how the containers are.
pub(super) async fn follow(sandbox: &Sandbox, after: u64) -> GetEventsResponse {
    let events = sandbox.events().after(after).await;
    let health = sandbox
        .containers()
        .map(|containers| containers.health())
        .unwrap_or_default();
    GetEventsResponse {
        events: events.into_iter().map(event).collect(),
        health: health
            .into_iter()
            .map(|(container_id, health)| ContainerHealth {
                container_id,
                started: health.started,
                ready: health.ready,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn cause(cause: Option<Cause>) -> CauseMessage {
    match cause {
        None => CauseMessage::NONE,
        Some(Cause::Liveness) => CauseMessage::LIVENESS_PROBE,
        Some(Cause::Startup) => CauseMessage::STARTUP_PROBE,
        Some(Cause::PostStart) => CauseMessage::POST_START_HOOK,
    }
}

fn event(event: Event) -> EventMessage {
    let kind = match event.kind {
        EventKind::Oom => Kind::OOM,
        EventKind::Unhealthy => Kind::UNHEALTHY,
        EventKind::Killing => Kind::KILLING,
        EventKind::PostStartFailed => Kind::POST_START_FAILED,
        EventKind::PreStopFailed => Kind::PRE_STOP_FAILED,
        EventKind::Health => Kind::HEALTH,
    };
    EventMessage {
        sequence: event.sequence,
        timestamp_ns: event.timestamp_ns,
        container_id: event.container_id,
        kind: kind.into(),
        message: event.message,
        cause: cause(event.cause).into(),
        ..Default::default()
    }
}

/// Checks how a container is to be looked after.
///
/// # Errors
/// `InvalidArgument` names the field.
pub(super) fn parse(message: Option<ContainerLifecycle>) -> Result<Lifecycle> {
    let Some(message) = message else {
        return Ok(Lifecycle::default());
    };
    let optional =
        |field: &str, probe: Option<ProbeMessage>| probe.map(|message| probe_of(field, message)).transpose();
    let hook = |field: &str, hook: Option<HandlerMessage>| {
        hook.map(|message| handler(&format!("lifecycle.{field}"), message))
            .transpose()
    };
    Ok(Lifecycle {
        startup: optional("startup", message.startup.into_option())?,
        liveness: optional("liveness", message.liveness.into_option())?,
        readiness: optional("readiness", message.readiness.into_option())?,
        post_start: hook("post_start", message.post_start.into_option())?,
        pre_stop: hook("pre_stop", message.pre_stop.into_option())?,
        grace: Duration::from_millis(message.grace_ms),
        termination_message_path: message.termination_message_path,
    })
}

fn probe_of(name: &str, message: ProbeMessage) -> Result<Probe> {
    let field = format!("lifecycle.{name}");
    let positive = |name: &str, value: u32| {
        if value == 0 {
            return Err(Error::invalid(format!("{field}.{name} is 0: give 1 or more")));
        }
        Ok(value)
    };
    let seconds = |value: u32| Duration::from_secs(value.into());
    let handler = message.handler.into_option().unwrap_or_default();
    Ok(Probe {
        handler: self::handler(&format!("{field}.handler"), handler)?,
        initial_delay: seconds(message.initial_delay_s),
        period: seconds(positive("period_s", message.period_s)?),
        timeout: seconds(positive("timeout_s", message.timeout_s)?),
        success_threshold: positive("success_threshold", message.success_threshold)?,
        failure_threshold: positive("failure_threshold", message.failure_threshold)?,
        grace: (message.grace_ms > 0).then(|| Duration::from_millis(message.grace_ms)),
    })
}

fn handler(field: &str, message: HandlerMessage) -> Result<Handler> {
    let port = |port: u32| {
        u16::try_from(port)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| Error::invalid(format!("{field}: port is {port}: give 1 to 65535")))
    };
    let host = |host: &str| {
        let parse = |host: &str| {
            host.parse().map_err(|_| {
                Error::invalid(format!("{field}: host is {host:?}: give an IP address, or none"))
            })
        };
        (!host.is_empty()).then(|| parse(host)).transpose()
    };
    // What is written into a request must not end a line of it.
    let line = |name: &str, text: &str| {
        if text.bytes().any(|byte| byte.is_ascii_control()) {
            return Err(Error::invalid(format!(
                "{field}: {name} is {text:?}: give text without control characters"
            )));
        }
        Ok(text.to_owned())
    };
    match message.kind {
        Some(HandlerKind::Exec(exec)) if !exec.command.is_empty() => Ok(Handler::Exec(exec.command)),
        Some(HandlerKind::HttpGet(get)) => {
            let path = line("path", &get.path)?;
            if !path.starts_with('/') || path.contains(' ') {
                return Err(Error::invalid(format!(
                    "{field}: path is {path:?}: give one that begins with \"/\" and has no spaces"
                )));
            }
            let headers = get.headers.iter();
            Ok(Handler::HttpGet(HttpGet {
                is_https: get.is_https,
                host: host(&get.host)?,
                port: port(get.port)?,
                path,
                headers: headers
                    .map(|header| Ok((line("name", &header.name)?, line("value", &header.value)?)))
                    .collect::<Result<_>>()?,
            }))
        }
        Some(HandlerKind::TcpSocket(socket)) => Ok(Handler::TcpSocket {
            host: host(&socket.host)?,
            port: port(socket.port)?,
        }),
        Some(HandlerKind::Grpc(grpc)) => Ok(Handler::Grpc {
            port: port(grpc.port)?,
            service: grpc.service,
        }),
        Some(HandlerKind::Sleep(sleep)) => Ok(Handler::Sleep(Duration::from_secs(sleep.seconds.into()))),
        _ => Err(Error::invalid(format!(
            "{field} does nothing: give exec with a command, http_get, tcp_socket, grpc or sleep"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use protocol::guest::handler::{Exec, HttpGet as HttpGetMessage};

    use super::*;

    fn probe(kind: Option<HandlerKind>, period_s: u32) -> ContainerLifecycle {
        let probe = ProbeMessage {
            handler: Some(HandlerMessage {
                kind,
                ..Default::default()
            })
            .into(),
            period_s,
            timeout_s: 1,
            success_threshold: 1,
            failure_threshold: 3,
            ..Default::default()
        };
        ContainerLifecycle {
            liveness: Some(probe).into(),
            ..Default::default()
        }
    }

    #[test]
    fn probes_are_checked() {
        let exec = || {
            Some(HandlerKind::Exec(Exec {
                command: vec!["true".into()],
                ..Default::default()
            }))
        };
        let get = |path: &str, port: u32| {
            Some(HandlerKind::HttpGet(HttpGetMessage {
                path: path.into(),
                port,
                ..Default::default()
            }))
        };
        let parsed = parse(Some(probe(exec(), 7))).unwrap();
        assert!(parsed.needs_care() && parsed.liveness.unwrap().period == Duration::from_secs(7));
        for (message, expected) in [
            (probe(exec(), 0), "lifecycle.liveness.period_s is 0"),
            (probe(None, 1), "lifecycle.liveness.handler does nothing"),
            (probe(get("/", 0), 1), "port is 0"),
            (probe(get("/\r\nX: y", 80), 1), "without control characters"),
            (probe(get("x", 80), 1), "begins with"),
        ] {
            let error = parse(Some(message)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
