//! Probes and hooks of a container as Kubernetes writes them.

use k8s_openapi::{
    api::core::v1::{
        ExecAction, GRPCAction, HTTPGetAction, HTTPHeader, Lifecycle as PodLifecycle, LifecycleHandler,
        Probe as PodProbe, SleepAction, TCPSocketAction,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::group::lifecycle::{Handler, Lifecycle, Probe};

fn number(value: u32) -> Option<i32> {
    Some(i32::try_from(value).unwrap_or(i32::MAX))
}

fn port(port: u16) -> IntOrString {
    IntOrString::Int(port.into())
}

/// A probe.
pub(super) fn probe(probe: &Probe) -> PodProbe {
    let mut pod = PodProbe {
        initial_delay_seconds: (probe.initial_delay_seconds > 0)
            .then(|| number(probe.initial_delay_seconds))
            .flatten(),
        period_seconds: number(probe.period_seconds),
        timeout_seconds: number(probe.timeout_seconds),
        success_threshold: number(probe.success_threshold),
        failure_threshold: number(probe.failure_threshold),
        termination_grace_period_seconds: probe.grace_seconds.and_then(|grace| i64::try_from(grace).ok()),
        ..PodProbe::default()
    };
    match &probe.handler {
        Handler::Grpc { port, service } => {
            pod.grpc = Some(GRPCAction {
                port: (*port).into(),
                service: (!service.is_empty()).then(|| service.clone()),
            });
        }
        other => {
            let handler = handler(other);
            (pod.exec, pod.http_get, pod.tcp_socket) = (handler.exec, handler.http_get, handler.tcp_socket);
        }
    }
    pod
}

/// The hooks, if there are any.
pub(super) fn hooks(lifecycle: &Lifecycle) -> Option<PodLifecycle> {
    let hooks = PodLifecycle {
        post_start: lifecycle.post_start.as_ref().map(handler),
        pre_stop: lifecycle.pre_stop.as_ref().map(handler),
        stop_signal: None,
    };
    (hooks != PodLifecycle::default()).then_some(hooks)
}

fn handler(handler: &Handler) -> LifecycleHandler {
    let mut pod = LifecycleHandler::default();
    match handler {
        Handler::Exec { command } => {
            pod.exec = Some(ExecAction {
                command: Some(command.clone()),
            });
        }
        Handler::HttpGet {
            is_https,
            host,
            port: number,
            path,
            headers,
        } => {
            let headers: Vec<_> = headers
                .iter()
                .map(|(name, value)| HTTPHeader {
                    name: name.clone(),
                    value: value.clone(),
                })
                .collect();
            pod.http_get = Some(HTTPGetAction {
                host: host.clone(),
                http_headers: (!headers.is_empty()).then_some(headers),
                path: Some(path.clone()),
                port: port(*number),
                scheme: Some(if *is_https { "HTTPS" } else { "HTTP" }.into()),
            });
        }
        Handler::TcpSocket { host, port: number } => {
            pod.tcp_socket = Some(TCPSocketAction {
                host: host.clone(),
                port: port(*number),
            });
        }
        Handler::Sleep { seconds } => {
            pod.sleep = Some(SleepAction {
                seconds: (*seconds).into(),
            });
        }
        // Of probes only.
        Handler::Grpc { .. } => {}
    }
    pod
}
