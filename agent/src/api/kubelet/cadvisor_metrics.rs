//! `/metrics/cadvisor`, with the names and labels of a kubelet, which dashboards ask for. Containers have all six labels, the
//! network is the group's: its samples have no container.

use std::sync::Arc;

use axum::{extract::State, response::Response};

use super::{
    KubeletDoor, Refusal,
    exposition::{Exposition, Kind, count, seconds},
};
use crate::{
    api::pod_view,
    engine::{ContainerStats, GroupStats, NetworkStats},
    group::status::Group,
};

/// A counter or gauge of a container: name, kind, meaning, labels beyond the six, value.
struct OfContainer(
    &'static str,
    Kind,
    &'static str,
    &'static [(&'static str, &'static str)],
    fn(&ContainerStats) -> f64,
);

/// Samples of one name are neighbours.
const OF_CONTAINERS: [OfContainer; 21] = [
    OfContainer(
        "container_cpu_usage_seconds_total",
        Kind::Counter,
        "Cumulative cpu time consumed in seconds.",
        &[("cpu", "total")],
        |stats| seconds(stats.cpu_usage_us),
    ),
    OfContainer(
        "container_cpu_user_seconds_total",
        Kind::Counter,
        "Cumulative user cpu time consumed in seconds.",
        &[],
        |stats| seconds(stats.cpu_user_us),
    ),
    OfContainer(
        "container_cpu_system_seconds_total",
        Kind::Counter,
        "Cumulative system cpu time consumed in seconds.",
        &[],
        |stats| seconds(stats.cpu_system_us),
    ),
    OfContainer(
        "container_cpu_cfs_periods_total",
        Kind::Counter,
        "Number of elapsed enforcement period intervals.",
        &[],
        |stats| count(stats.cpu_periods),
    ),
    OfContainer(
        "container_cpu_cfs_throttled_periods_total",
        Kind::Counter,
        "Number of throttled period intervals.",
        &[],
        |stats| count(stats.cpu_throttled_periods),
    ),
    OfContainer(
        "container_cpu_cfs_throttled_seconds_total",
        Kind::Counter,
        "Total time duration the container has been throttled.",
        &[],
        |stats| seconds(stats.cpu_throttled_us),
    ),
    OfContainer(
        "container_memory_usage_bytes",
        Kind::Gauge,
        "Current memory usage in bytes, including all memory regardless of when it was accessed.",
        &[],
        |stats| count(stats.memory_usage_bytes),
    ),
    OfContainer(
        "container_memory_working_set_bytes",
        Kind::Gauge,
        "Current working set in bytes.",
        &[],
        |stats| count(stats.memory_working_set_bytes),
    ),
    OfContainer(
        "container_memory_rss",
        Kind::Gauge,
        "Size of RSS in bytes.",
        &[],
        |stats| count(stats.memory_rss_bytes),
    ),
    OfContainer(
        "container_memory_cache",
        Kind::Gauge,
        "Number of bytes of page cache memory.",
        &[],
        |stats| count(stats.memory_cache_bytes),
    ),
    OfContainer(
        "container_memory_failures_total",
        Kind::Counter,
        "Cumulative count of memory allocation failures.",
        &[("failure_type", "pgfault"), ("scope", "container")],
        |stats| count(stats.page_faults),
    ),
    OfContainer(
        "container_memory_failures_total",
        Kind::Counter,
        "Cumulative count of memory allocation failures.",
        &[("failure_type", "pgmajfault"), ("scope", "container")],
        |stats| count(stats.major_page_faults),
    ),
    OfContainer(
        "container_oom_events_total",
        Kind::Counter,
        "Count of out of memory events observed for the container.",
        &[],
        |stats| count(stats.oom_kills),
    ),
    OfContainer(
        "container_spec_memory_limit_bytes",
        Kind::Gauge,
        "Memory limit for the container.",
        &[],
        |stats| count(stats.memory_limit_bytes),
    ),
    OfContainer(
        "container_processes",
        Kind::Gauge,
        "Number of processes and threads running inside the container.",
        &[],
        |stats| count(stats.pids),
    ),
    OfContainer(
        "container_fs_reads_bytes_total",
        Kind::Counter,
        "Cumulative count of bytes read.",
        &[],
        |stats| count(stats.io_read_bytes),
    ),
    OfContainer(
        "container_fs_writes_bytes_total",
        Kind::Counter,
        "Cumulative count of bytes written.",
        &[],
        |stats| count(stats.io_write_bytes),
    ),
    OfContainer(
        "container_fs_reads_total",
        Kind::Counter,
        "Cumulative count of reads completed.",
        &[],
        |stats| count(stats.io_reads),
    ),
    OfContainer(
        "container_fs_writes_total",
        Kind::Counter,
        "Cumulative count of writes completed.",
        &[],
        |stats| count(stats.io_writes),
    ),
    OfContainer(
        "container_fs_usage_bytes",
        Kind::Gauge,
        "Number of bytes that are consumed by the container on this filesystem.",
        &[],
        |stats| count(stats.rootfs_used_bytes),
    ),
    OfContainer(
        "container_start_time_seconds",
        Kind::Gauge,
        "Start time of the container since unix epoch in seconds.",
        &[],
        |stats| seconds(stats.started_at_ms.saturating_mul(1000)),
    ),
];

/// A counter of a group's network: the end of its name, what it counts, value.
struct OfNetwork(&'static str, &'static str, fn(&NetworkStats) -> u64);

const OF_NETWORKS: [OfNetwork; 8] = [
    OfNetwork("receive_bytes", "bytes received", |stats| stats.rx_bytes),
    OfNetwork("receive_packets", "packets received", |stats| stats.rx_packets),
    OfNetwork(
        "receive_packets_dropped",
        "packets dropped while receiving",
        |stats| stats.rx_dropped,
    ),
    OfNetwork("receive_errors", "errors encountered while receiving", |stats| {
        stats.rx_errors
    }),
    OfNetwork("transmit_bytes", "bytes transmitted", |stats| stats.tx_bytes),
    OfNetwork("transmit_packets", "packets transmitted", |stats| {
        stats.tx_packets
    }),
    OfNetwork(
        "transmit_packets_dropped",
        "packets dropped while transmitting",
        |stats| stats.tx_dropped,
    ),
    OfNetwork(
        "transmit_errors",
        "errors encountered while transmitting",
        |stats| stats.tx_errors,
    ),
];

pub(super) async fn serve(State(door): State<Arc<KubeletDoor>>) -> Result<Response, Refusal> {
    let groups = door.all_stats().await;
    Ok(super::exposition_response(render(&groups)))
}

fn render(groups: &[(Group, Option<GroupStats>)]) -> String {
    let known: Vec<_> = groups
        .iter()
        .filter_map(|(group, stats)| {
            Some((
                group,
                format!("/kubepods/pod{}", pod_view::uid(group)),
                stats.as_ref()?,
            ))
        })
        .collect();
    let mut text = Exposition::default();
    for same_name in OF_CONTAINERS.chunk_by(|one, next| one.0 == next.0) {
        let OfContainer(name, kind, help, ..) = &same_name[0];
        let mut metric = text.metric(name, *kind, help);
        for (group, pod_id, stats) in &known {
            for container in &stats.containers {
                let run = group
                    .status
                    .containers
                    .iter()
                    .find(|run| run.name == container.name);
                let name = run
                    .and_then(|run| run.container_id.as_deref())
                    .unwrap_or_default();
                let spec = group
                    .spec
                    .containers
                    .iter()
                    .find(|spec| spec.name == container.name);
                let id = format!("{pod_id}/{name}");
                let labels = [
                    ("container", container.name.as_str()),
                    ("id", &id),
                    ("image", spec.map_or("", |spec| &spec.image)),
                    ("name", name),
                    ("namespace", &group.spec.namespace),
                    ("pod", &group.spec.name),
                ];
                for OfContainer(_, _, _, more, value) in same_name {
                    let labels = [&labels[..1], more, &labels[1..]].concat();
                    metric.sample(&labels, value(container), Some(stats.at_ms));
                }
            }
        }
    }
    for OfNetwork(name, what, value) in &OF_NETWORKS {
        let mut metric = text.metric(
            &format!("container_network_{name}_total"),
            Kind::Counter,
            &format!("Cumulative count of {what}."),
        );
        for (group, pod_id, stats) in &known {
            let labels = [
                ("id", pod_id.as_str()),
                ("interface", "eth0"),
                ("namespace", &group.spec.namespace),
                ("pod", &group.spec.name),
            ];
            metric.sample(&labels, count(value(&stats.network)), Some(stats.at_ms));
        }
    }
    text.into_text()
}
