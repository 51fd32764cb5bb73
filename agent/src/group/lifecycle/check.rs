//! Finds what is wrong with probes and hooks, in the words of the door they came through.

use std::net::IpAddr;

use super::{Handler, Probe, Role};
use crate::group::{
    spec::ContainerSpec,
    violation::{FieldPath, ViolationKind, Violations},
};

/// Longest name of a gRPC service.
const MAX_SERVICE_BYTES: usize = 256;
/// Longest time of a hook that does nothing.
const MAX_SLEEP_SECONDS: u32 = 24 * 3600;

/// The probes of a container with their names in both doors.
fn probes(container: &ContainerSpec) -> [(&'static str, &'static str, Option<&Probe>); 3] {
    let lifecycle = &container.lifecycle;
    [
        ("startupProbe", "StartupProbe", lifecycle.startup.as_ref()),
        ("livenessProbe", "LivenessProbe", lifecycle.liveness.as_ref()),
        ("readinessProbe", "ReadinessProbe", lifecycle.readiness.as_ref()),
    ]
}

/// Checks how a container lives.
pub(in crate::group) fn check(container: &ContainerSpec, path: &FieldPath, found: &mut Violations) {
    let lifecycle = &container.lifecycle;
    let hooks = [
        (
            "lifecycle.postStart",
            "LifecyclePostStartHandler",
            &lifecycle.post_start,
        ),
        (
            "lifecycle.preStop",
            "LifecyclePreStopHandler",
            &lifecycle.pre_stop,
        ),
    ];
    for (pod, eci, probe) in probes(container) {
        let path = path.field(pod, eci);
        match probe {
            Some(_) if lifecycle.role == Role::Init => refuse_in_init(path, found),
            Some(probe) => check_probe(probe, pod == "readinessProbe", &path, found),
            None => {}
        }
    }
    for (pod, eci, hook) in hooks {
        let path = path.field(pod, eci);
        match hook {
            Some(_) if lifecycle.role == Role::Init => refuse_in_init(path, found),
            Some(hook) => check_handler(hook, &path, found),
            None => {}
        }
    }
    let message = &lifecycle.termination_message_path;
    let plain = message.split('/').all(|part| part != "..") && !message.contains('\0');
    if !message.starts_with('/') || message.ends_with('/') || !plain {
        found.invalid(
            path.field("terminationMessagePath", "TerminationMessagePath"),
            message,
            "valid: the absolute path of a file, without '..'",
        );
    }
}

fn refuse_in_init(path: FieldPath, found: &mut Violations) {
    let text = "not for an init container, which runs to its end; valid: in containers and sidecars";
    found.add(ViolationKind::Unsupported, path, "", text);
}

fn check_probe(probe: &Probe, may_succeed_later: bool, path: &FieldPath, found: &mut Violations) {
    check_handler(&probe.handler, path, found);
    for (pod, eci, value) in [
        ("periodSeconds", "PeriodSeconds", probe.period_seconds),
        ("timeoutSeconds", "TimeoutSeconds", probe.timeout_seconds),
        ("successThreshold", "SuccessThreshold", probe.success_threshold),
        ("failureThreshold", "FailureThreshold", probe.failure_threshold),
    ] {
        if value == 0 {
            found.invalid(path.field(pod, eci), value, "valid: 1 or more");
        }
    }
    if probe.success_threshold > 1 && !may_succeed_later {
        found.invalid(
            path.field("successThreshold", "SuccessThreshold"),
            probe.success_threshold,
            "valid: 1, but for readiness probes",
        );
    }
    if let Some(grace) = probe.grace_seconds {
        let field = path.field("terminationGracePeriodSeconds", "TerminationGracePeriodSeconds");
        if may_succeed_later {
            found.invalid(field, grace, "not for readiness probes, which end nothing");
        } else if !(1..=24 * 3600).contains(&grace) {
            found.invalid(field, grace, "valid: 1 to 86400");
        }
    }
}

fn check_handler(handler: &Handler, path: &FieldPath, found: &mut Violations) {
    let mut check_host = |host: &Option<String>, pod: &str, eci: &str| {
        if let Some(host) = host
            && host.parse::<IpAddr>().is_err()
        {
            let text = "valid: an IP address, or none for the group's own";
            found.invalid(path.field(pod, eci), host, text);
        }
    };
    match handler {
        Handler::Exec { command } => {
            let path = path.field("exec.command", "Exec.Command");
            if command.first().is_none_or(String::is_empty) {
                found.add(
                    ViolationKind::Missing,
                    path,
                    "",
                    "required; valid: a program and its arguments",
                );
            } else if let Some(text) = command.iter().find(|text| text.contains('\0')) {
                found.invalid(path, text, "contains a NUL byte");
            }
        }
        Handler::HttpGet {
            is_https: _,
            host,
            port,
            path: request,
            headers,
        } => {
            check_host(host, "httpGet.host", "HttpGet.Host");
            check_port(*port, path, ("httpGet.port", "HttpGet.Port"), found);
            if !request.starts_with('/') || request.bytes().any(|b| b.is_ascii_control() || b == b' ') {
                found.invalid(
                    path.field("httpGet.path", "HttpGet.Path"),
                    request,
                    "valid: text that begins with '/', without spaces and control characters",
                );
            }
            let list = path.field("httpGet.httpHeaders", "HttpGet.HttpHeader");
            for (index, (name, value)) in headers.iter().enumerate() {
                let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
                if name.is_empty() || !name.bytes().all(token) {
                    let path = list.item(index).field("name", "Name");
                    found.invalid(path, name, "valid: letters, digits and !#$%&'*+-.^_`|~");
                }
                if value.bytes().any(|b| b.is_ascii_control()) {
                    let path = list.item(index).field("value", "Value");
                    found.invalid(path, value, "contains control characters");
                }
            }
        }
        Handler::TcpSocket { host, port } => {
            check_host(host, "tcpSocket.host", "TcpSocket.Host");
            check_port(*port, path, ("tcpSocket.port", "TcpSocket.Port"), found);
        }
        Handler::Grpc { port, service } => {
            check_port(*port, path, ("grpc.port", "Grpc.Port"), found);
            if service.len() > MAX_SERVICE_BYTES || service.bytes().any(|b| b.is_ascii_control()) {
                found.invalid(
                    path.field("grpc.service", "Grpc.Service"),
                    service,
                    "valid: up to 256 characters",
                );
            }
        }
        Handler::Sleep { seconds } => {
            if *seconds > MAX_SLEEP_SECONDS {
                found.invalid(
                    path.field("sleep.seconds", "Sleep.Seconds"),
                    seconds,
                    "valid: 0 to 86400",
                );
            }
        }
    }
}

fn check_port(port: u16, path: &FieldPath, (pod, eci): (&str, &str), found: &mut Violations) {
    if port == 0 {
        let text = "valid: 1 to 65535, or the name of a port of the container";
        found.invalid(path.field(pod, eci), port, text);
    }
}
