//! `/stats/summary`, the kubelet's `stats.v1alpha1.Summary`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{KubeletDoor, Refusal};
use crate::{
    api::pod_view,
    engine::{ContainerStats, GroupStats, HostStats},
    group::status::Group,
};

/// The CPU counters seen last, to make rates of.
#[derive(Debug, Default)]
pub(super) struct CpuRates(Mutex<HashMap<String, Sample>>);

#[derive(Debug, Clone, Copy)]
struct Sample {
    at_ms: u64,
    cpu_us: u64,
    nano_cores: u64,
}

impl CpuRates {
    /// The rate of a counter since it was seen last, in billionths of a core.
    fn rate(&self, name: &str, at_ms: u64, cpu_us: u64) -> u64 {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = known.get(name).copied();
        let nano_cores = match before {
            Some(before) if at_ms > before.at_ms && cpu_us >= before.cpu_us => {
                let used = u128::from(cpu_us - before.cpu_us) * 1_000_000;
                u64::try_from(used / u128::from(at_ms - before.at_ms)).unwrap_or(u64::MAX)
            }
            // Asked twice in a moment: what was true then.
            Some(before) if at_ms == before.at_ms => before.nano_cores,
            _ => 0,
        };
        let sample = Sample {
            at_ms,
            cpu_us,
            nano_cores,
        };
        known.insert(name.to_owned(), sample);
        nano_cores
    }

    /// Forgets all but these.
    fn retain(&self, names: &dyn Fn(&str) -> bool) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|name, _| names(name));
    }
}

pub(super) async fn serve(State(door): State<Arc<KubeletDoor>>) -> Result<Response, Refusal> {
    let host = door.host().await?;
    let groups = door.all_stats().await;
    let ids: Vec<_> = groups.iter().map(|(group, _)| group.id.to_string()).collect();
    door.rates
        .retain(&|name| name == "node" || ids.iter().any(|id| name.starts_with(id.as_str())));
    Ok(Json(render(&host, &groups, &door.rates)).into_response())
}

fn render(host: &HostStats, groups: &[(Group, Option<GroupStats>)], rates: &CpuRates) -> Value {
    let pods: Vec<_> = groups
        .iter()
        .filter_map(|(group, stats)| Some(pod(group, stats.as_ref()?, rates)))
        .collect();
    let used = host
        .memory_total_bytes
        .saturating_sub(host.memory_available_bytes);
    json!({
        "node": {
            "nodeName": host.node_name,
            "startTime": time(host.started_at_ms),
            "cpu": cpu(host.at_ms, host.cpu_usage_us, rates.rate("node", host.at_ms, host.cpu_usage_us)),
            "memory": {
                "time": time(host.at_ms),
                "availableBytes": host.memory_available_bytes,
                "usageBytes": used,
                "workingSetBytes": used,
            },
            "fs": {
                "time": time(host.at_ms),
                "availableBytes": host.fs_available_bytes,
                "capacityBytes": host.fs_capacity_bytes,
                "usedBytes": host.fs_capacity_bytes.saturating_sub(host.fs_available_bytes),
            },
        },
        "pods": pods,
    })
}

fn time(at_ms: u64) -> Value {
    json!(pod_view::time(at_ms))
}

fn cpu(at_ms: u64, cpu_us: u64, nano_cores: u64) -> Value {
    json!({
        "time": time(at_ms),
        "usageNanoCores": nano_cores,
        "usageCoreNanoSeconds": cpu_us.saturating_mul(1000),
    })
}

fn pod(group: &Group, stats: &GroupStats, rates: &CpuRates) -> Value {
    let id = group.id.as_str();
    let network = &stats.network;
    let interface = json!({
        "name": "eth0",
        "rxBytes": network.rx_bytes,
        "rxErrors": network.rx_errors,
        "txBytes": network.tx_bytes,
        "txErrors": network.tx_errors,
    });
    let mut pod_network = interface.clone();
    pod_network["time"] = time(stats.at_ms);
    pod_network["interfaces"] = json!([interface]);
    let containers: Vec<_> = stats
        .containers
        .iter()
        .map(|stats_of| container(id, stats_of, stats, rates))
        .collect();
    let total = group.spec.size.memory_bytes;
    let processes: u64 = stats.containers.iter().map(|container| container.pids).sum();
    json!({
        "podRef": {
            "name": group.spec.name,
            "namespace": group.spec.namespace,
            "uid": pod_view::uid(group),
        },
        "startTime": time(group.status.started_at_ms.unwrap_or(group.status.created_at_ms)),
        "containers": containers,
        "cpu": cpu(
            stats.at_ms,
            stats.guest_cpu_usage_us,
            rates.rate(id, stats.at_ms, stats.guest_cpu_usage_us),
        ),
        "memory": {
            "time": time(stats.at_ms),
            "availableBytes": total.saturating_sub(stats.guest_memory_used_bytes),
            "usageBytes": stats.guest_memory_used_bytes,
            "workingSetBytes": stats.guest_memory_used_bytes,
            "rssBytes": stats.containers.iter().map(|container| container.memory_rss_bytes).sum::<u64>(),
        },
        "network": pod_network,
        "ephemeral-storage": {
            "time": time(stats.at_ms),
            "availableBytes": stats.scratch_capacity_bytes.saturating_sub(stats.scratch_used_bytes),
            "capacityBytes": stats.scratch_capacity_bytes,
            "usedBytes": stats.scratch_used_bytes,
        },
        "process_stats": {"process_count": processes},
    })
}

fn container(group: &str, container: &ContainerStats, stats: &GroupStats, rates: &CpuRates) -> Value {
    let at_ms = stats.at_ms;
    let mut memory = json!({
        "time": time(at_ms),
        "usageBytes": container.memory_usage_bytes,
        "workingSetBytes": container.memory_working_set_bytes,
        "rssBytes": container.memory_rss_bytes,
        "pageFaults": container.page_faults,
        "majorPageFaults": container.major_page_faults,
    });
    if container.memory_limit_bytes > 0 {
        let available = container
            .memory_limit_bytes
            .saturating_sub(container.memory_working_set_bytes);
        memory["availableBytes"] = json!(available);
    }
    let free = stats
        .scratch_capacity_bytes
        .saturating_sub(stats.scratch_used_bytes);
    let name = format!("{group}/{}", container.name);
    json!({
        "name": container.name,
        "startTime": time(container.started_at_ms),
        "cpu": cpu(at_ms, container.cpu_usage_us, rates.rate(&name, at_ms, container.cpu_usage_us)),
        "memory": memory,
        "rootfs": {
            "time": time(at_ms),
            "availableBytes": free,
            "capacityBytes": stats.scratch_capacity_bytes,
            "usedBytes": container.rootfs_used_bytes,
            "inodesUsed": container.rootfs_used_inodes,
        },
        "logs": {
            "time": time(at_ms),
            "availableBytes": free,
            "capacityBytes": stats.scratch_capacity_bytes,
            "usedBytes": container.logs_used_bytes,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::CpuRates;

    #[test]
    fn rates_are_between_two_looks() {
        let rates = CpuRates::default();
        assert_eq!(rates.rate("a", 1000, 5_000_000), 0);
        // Half a core for two seconds.
        assert_eq!(rates.rate("a", 3000, 6_000_000), 500_000_000);
        assert_eq!(rates.rate("a", 3000, 6_000_000), 500_000_000);
        // The counter began again.
        assert_eq!(rates.rate("a", 4000, 0), 0);
        rates.retain(&|name| name != "a");
        assert_eq!(rates.rate("a", 5000, 9), 0);
    }
}
