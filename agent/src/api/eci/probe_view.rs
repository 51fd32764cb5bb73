//! Probes in the words of DescribeContainerGroups; one that is not set is an empty object.

use serde_json::{Value, json};

use crate::group::lifecycle::{Handler, Probe};

/// A probe.
pub(super) fn probe(probe: Option<&Probe>) -> Value {
    let Some(probe) = probe else { return json!({}) };
    let mut object = json!({
        "Execs": [],
        "InitialDelaySeconds": probe.initial_delay_seconds,
        "PeriodSeconds": probe.period_seconds,
        "TimeoutSeconds": probe.timeout_seconds,
        "SuccessThreshold": probe.success_threshold,
        "FailureThreshold": probe.failure_threshold,
    });
    match &probe.handler {
        Handler::Exec { command } => object["Execs"] = json!(command),
        Handler::HttpGet {
            is_https, port, path, ..
        } => {
            let scheme = if *is_https { "HTTPS" } else { "HTTP" };
            object["HttpGet"] = json!({"Path": path, "Port": port, "Scheme": scheme});
        }
        Handler::TcpSocket { host, port } => {
            object["TcpSocket"] = json!({"Host": host.clone().unwrap_or_default(), "Port": port});
        }
        // ECI has none of these; they came by another door.
        Handler::Grpc { .. } | Handler::Sleep { .. } => {}
    }
    object
}
