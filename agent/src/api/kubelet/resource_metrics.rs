//! `/metrics/resource`, as metrics-server reads it.

use std::sync::Arc;

use axum::{extract::State, response::Response};

use super::{
    KubeletDoor, Refusal,
    exposition::{Exposition, Kind, count, seconds},
};
use crate::{
    engine::{GroupStats, HostStats},
    group::status::Group,
};

pub(super) async fn serve(State(door): State<Arc<KubeletDoor>>) -> Result<Response, Refusal> {
    let host = door.host().await?;
    let groups = door.all_stats().await;
    Ok(super::exposition_response(render(&host, &groups)))
}

fn render(host: &HostStats, groups: &[(Group, Option<GroupStats>)]) -> String {
    let failed = groups.iter().any(|(_, stats)| stats.is_none());
    let known = || {
        groups
            .iter()
            .filter_map(|(group, stats)| Some((&group.spec, stats.as_ref()?)))
    };
    let containers = || {
        known().flat_map(|(spec, stats)| {
            stats.containers.iter().map(move |container| {
                let labels = [
                    ("container", container.name.as_str()),
                    ("namespace", spec.namespace.as_str()),
                    ("pod", spec.name.as_str()),
                ];
                (labels, container, stats.at_ms)
            })
        })
    };
    let mut text = Exposition::default();
    let mut metric = text.metric(
        "container_cpu_usage_seconds_total",
        Kind::Counter,
        "[STABLE] Cumulative cpu time consumed by the container in core-seconds",
    );
    for (labels, container, at_ms) in containers() {
        metric.sample(&labels, seconds(container.cpu_usage_us), Some(at_ms));
    }
    let mut metric = text.metric(
        "container_memory_working_set_bytes",
        Kind::Gauge,
        "[STABLE] Current working set of the container in bytes",
    );
    for (labels, container, at_ms) in containers() {
        metric.sample(&labels, count(container.memory_working_set_bytes), Some(at_ms));
    }
    let mut metric = text.metric(
        "container_start_time_seconds",
        Kind::Gauge,
        "[STABLE] Start time of the container since unix epoch in seconds",
    );
    for (labels, container, _) in containers() {
        metric.sample(&labels, seconds(container.started_at_ms * 1000), None);
    }
    text.metric(
        "node_cpu_usage_seconds_total",
        Kind::Counter,
        "[STABLE] Cumulative cpu time consumed by the node in core-seconds",
    )
    .sample(&[], seconds(host.cpu_usage_us), Some(host.at_ms));
    text.metric(
        "node_memory_working_set_bytes",
        Kind::Gauge,
        "[STABLE] Current working set of the node in bytes",
    )
    .sample(
        &[],
        count(
            host.memory_total_bytes
                .saturating_sub(host.memory_available_bytes),
        ),
        Some(host.at_ms),
    );
    let mut metric = text.metric(
        "pod_cpu_usage_seconds_total",
        Kind::Counter,
        "[STABLE] Cumulative cpu time consumed by the pod in core-seconds",
    );
    for (spec, stats) in known() {
        let labels = [
            ("namespace", spec.namespace.as_str()),
            ("pod", spec.name.as_str()),
        ];
        metric.sample(&labels, seconds(stats.guest_cpu_usage_us), Some(stats.at_ms));
    }
    let mut metric = text.metric(
        "pod_memory_working_set_bytes",
        Kind::Gauge,
        "[STABLE] Current working set of the pod in bytes",
    );
    for (spec, stats) in known() {
        let labels = [
            ("namespace", spec.namespace.as_str()),
            ("pod", spec.name.as_str()),
        ];
        metric.sample(&labels, count(stats.guest_memory_used_bytes), Some(stats.at_ms));
    }
    for (name, level) in [
        ("resource_scrape_error", "[STABLE]"),
        ("scrape_error", "[ALPHA] (Deprecated since 1.29.0)"),
    ] {
        text.metric(
            name,
            Kind::Gauge,
            &format!("{level} 1 if there was an error while getting container metrics, 0 otherwise"),
        )
        .sample(&[], if failed { 1.0 } else { 0.0 }, None);
    }
    text.into_text()
}
