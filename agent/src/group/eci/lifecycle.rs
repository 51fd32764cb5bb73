//! Probes and hooks of a container of CreateContainerGroup.

use super::params::Reader;
use crate::group::{
    lifecycle::{Handler, Lifecycle, Probe, Role, TERMINATION_MESSAGE_PATH},
    violation::ViolationKind,
};

/// What is said of the life of a container.
pub(super) fn convert(reader: &Reader<'_>, role: Role) -> Lifecycle {
    if role == Role::Init {
        for field in ["LivenessProbe", "ReadinessProbe"] {
            reader.refuse(field, "not for an init container, which runs to its end");
        }
    }
    let policies = [("File", false), ("FallbackToLogsOnError", true)];
    Lifecycle {
        role,
        startup: None,
        liveness: probe(reader, "LivenessProbe"),
        readiness: probe(reader, "ReadinessProbe"),
        post_start: hook(reader, "LifecyclePostStartHandler"),
        pre_stop: hook(reader, "LifecyclePreStopHandler"),
        termination_message_path: reader
            .word("TerminationMessagePath")
            .unwrap_or(TERMINATION_MESSAGE_PATH)
            .to_owned(),
        falls_back_to_logs: reader
            .choice("TerminationMessagePolicy", &policies)
            .unwrap_or(false),
    }
}

/// Old SDKs send empty objects for probes that are not set.
fn is_set(reader: &Reader<'_>, fields: &[&str]) -> bool {
    fields.iter().any(|field| reader.word(field).is_some())
}

fn probe(container: &Reader<'_>, field: &str) -> Option<Probe> {
    let reader = container.object(field);
    if !reader.is_given() {
        return None;
    }
    let exec = reader.object("Exec").texts("Command");
    let (get, socket) = (reader.object("HttpGet"), reader.object("TcpSocket"));
    let mut handlers = Vec::new();
    if !exec.is_empty() {
        handlers.push(Handler::Exec { command: exec });
    }
    if is_set(&get, &["Port", "Path"]) {
        handlers.push(Handler::HttpGet {
            is_https: is_https(&get, "Scheme"),
            host: None,
            port: port(&get, "Port"),
            path: get.word("Path").unwrap_or("/").to_owned(),
            headers: Vec::new(),
        });
    }
    if is_set(&socket, &["Port"]) {
        let port = port(&socket, "Port");
        handlers.push(Handler::TcpSocket { host: None, port });
    }
    let timing = [
        "InitialDelaySeconds",
        "PeriodSeconds",
        "TimeoutSeconds",
        "SuccessThreshold",
        "FailureThreshold",
    ];
    if handlers.is_empty() && !is_set(&reader, &timing) && !is_set(&get, &["Scheme"]) {
        return None;
    }
    let number = |field: &str, default: u32| {
        let number = reader.number(field, 0..=u64::from(u32::MAX));
        number
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(default)
    };
    let handler = one(container, field, handlers, "Exec, HttpGet or TcpSocket")?;
    Some(Probe {
        handler,
        initial_delay_seconds: number("InitialDelaySeconds", 0),
        period_seconds: number("PeriodSeconds", 10),
        timeout_seconds: number("TimeoutSeconds", 1),
        success_threshold: number("SuccessThreshold", 1),
        failure_threshold: number("FailureThreshold", 3),
        grace_seconds: None,
    })
}

/// A hook, whose fields have flat names: `LifecyclePreStopHandlerHttpGetPort`.
fn hook(reader: &Reader<'_>, prefix: &str) -> Option<Handler> {
    let name = |field: &str| format!("{prefix}{field}");
    let mut handlers = Vec::new();
    let exec = reader.texts(&name("Exec"));
    if !exec.is_empty() {
        handlers.push(Handler::Exec { command: exec });
    }
    let host = |field: &str| reader.word(&name(field)).map(str::to_owned);
    if is_set(
        reader,
        &[&name("HttpGetPort"), &name("HttpGetPath"), &name("HttpGetHost")],
    ) {
        let mut headers = Vec::new();
        for field in ["HttpGetHttpHeader", "HttpGetHttpHeaders"] {
            for item in reader.list(&name(field)) {
                headers.push((
                    item.required("Name"),
                    item.text("Value").unwrap_or_default().to_owned(),
                ));
            }
        }
        handlers.push(Handler::HttpGet {
            is_https: is_https(reader, &name("HttpGetScheme")),
            host: host("HttpGetHost"),
            port: port(reader, &name("HttpGetPort")),
            path: reader.word(&name("HttpGetPath")).unwrap_or("/").to_owned(),
            headers,
        });
    }
    if is_set(reader, &[&name("TcpSocketPort"), &name("TcpSocketHost")]) {
        handlers.push(Handler::TcpSocket {
            host: host("TcpSocketHost"),
            port: port(reader, &name("TcpSocketPort")),
        });
    }
    if handlers.is_empty() {
        return None;
    }
    one(reader, prefix, handlers, "Exec, HttpGet or TcpSocket")
}

fn one(reader: &Reader<'_>, field: &str, handlers: Vec<Handler>, valid: &str) -> Option<Handler> {
    let count = handlers.len();
    if count != 1 {
        let text = format!("{count} kinds are given; valid: one of {valid}");
        reader.note(ViolationKind::Invalid, field, "", &text);
    }
    handlers.into_iter().next()
}

/// A port that must be given; 1, when it is wrong and was said to be.
fn port(reader: &Reader<'_>, field: &str) -> u16 {
    if reader.word(field).is_none() {
        reader.required(field);
    }
    let number = reader.number(field, 1..=65_535);
    number.and_then(|number| u16::try_from(number).ok()).unwrap_or(1)
}

fn is_https(reader: &Reader<'_>, field: &str) -> bool {
    let schemes = [("HTTP", false), ("HTTPS", true)];
    reader.choice(field, &schemes).unwrap_or(false)
}
