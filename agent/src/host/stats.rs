//! Statistics of groups and of the host.

use std::{fs, path::Path};

use containerd_shim_protos::cgroups_v2::metrics::{IOEntry, Metrics};
use futures_util::future::join_all;

use crate::{
    capacity::HostCapacity,
    engine::{ContainerStats, GroupStats, HostStats, NetworkStats},
    error::{Error, ErrorKind, Result},
    group::status::{ContainerState, ContainerStatus, Group},
    parts::{HostParts, now_ms},
    sandbox::client::SandboxConnection,
};

const KIB: u64 = 1024;
/// The group's interface in the guest.
const INTERFACE: &str = "eth0";

/// CPUs and memory of this host.
pub(super) fn host_capacity() -> Result<HostCapacity> {
    let n_cpus =
        std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    Ok(HostCapacity {
        n_cpus,
        memory_bytes: memory()?.0,
    })
}

/// Total and available memory, bytes.
fn memory() -> Result<(u64, u64)> {
    let text = read("/proc/meminfo")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .map(|kib| kib * KIB)
            .ok_or_else(|| Error::new(ErrorKind::Internal, format!("/proc/meminfo has no {name}")))
    };
    Ok((field("MemTotal")?, field("MemAvailable")?))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path)
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("read {path}"), error))
}

/// Busy time of all CPUs since boot, microseconds, from /proc/stat's first line (proc_stat(5)).
fn cpu_usage_us(stat: &str, ticks_per_second: u64) -> u64 {
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user already.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| fields.get(*at)).sum();
    busy.saturating_mul(1_000_000) / ticks_per_second.max(1)
}

pub(super) fn host_stats(parts: &HostParts, started_at_ms: u64) -> Result<HostStats> {
    let (memory_total_bytes, memory_available_bytes) = memory()?;
    let state_dir = &parts.config.state_dir;
    let fs = rustix::fs::statvfs(state_dir).map_err(|error| {
        Error::with_source(
            ErrorKind::Internal,
            format!("ask for the size of {}", state_dir.display()),
            std::io::Error::from(error),
        )
    })?;
    Ok(HostStats {
        at_ms: now_ms(),
        node_name: parts.config.node_name.clone(),
        started_at_ms,
        cpu_usage_us: cpu_usage_us(&read("/proc/stat")?, rustix::param::clock_ticks_per_second()),
        memory_total_bytes,
        memory_available_bytes,
        fs_capacity_bytes: fs.f_blocks * fs.f_frsize,
        fs_available_bytes: fs.f_bavail * fs.f_frsize,
    })
}

pub(super) async fn group_stats(
    parts: &HostParts,
    group: &Group,
    connection: &SandboxConnection,
) -> Result<GroupStats> {
    let running =
        group
            .status
            .containers
            .iter()
            .filter_map(|status| match (&status.state, &status.container_id) {
                (ContainerState::Running { started_at_ms }, Some(id)) => Some((status, *started_at_ms, id)),
                _ => None,
            });
    let containers = join_all(running.map(async |(status, started_at_ms, id)| {
        match connection.stats(id).await {
            Ok(metrics) => {
                let logs_used_bytes = size_of_dir(&parts.log_dir(&group.id, &status.name));
                let stats = container_stats(status, started_at_ms, &metrics, logs_used_bytes);
                Some((id.clone(), stats))
            }
            Err(error) => {
                // It may have ended since.
                tracing::debug!(group_id = %group.id, error = %error.chain(), "no statistics of a container");
                None
            }
        }
    }));
    let (containers, sandbox) = tokio::join!(containers, connection.sandbox_metrics());
    let sandbox = sandbox?;
    let mut containers: Vec<_> = containers.into_iter().flatten().collect();
    for (id, stats) in &mut containers {
        let layer = sandbox
            .writable_layers
            .iter()
            .find(|layer| layer.container_id == *id);
        if let Some(layer) = layer {
            stats.rootfs_used_bytes = layer.used_bytes;
            stats.rootfs_used_inodes = layer.used_inodes;
        }
    }
    let interface = sandbox
        .networks
        .iter()
        .find(|network| network.name == INTERFACE)
        .cloned()
        .unwrap_or_default();
    Ok(GroupStats {
        at_ms: now_ms(),
        containers: containers.into_iter().map(|(_, stats)| stats).collect(),
        network: NetworkStats {
            rx_bytes: interface.rx_bytes,
            rx_packets: interface.rx_packets,
            rx_dropped: interface.rx_dropped,
            rx_errors: interface.rx_errors,
            tx_bytes: interface.tx_bytes,
            tx_packets: interface.tx_packets,
            tx_dropped: interface.tx_dropped,
            tx_errors: interface.tx_errors,
        },
        scratch_capacity_bytes: sandbox.scratch_capacity_bytes,
        scratch_used_bytes: sandbox.scratch_used_bytes,
        guest_cpu_usage_us: sandbox.cpu_usage_us,
        guest_memory_used_bytes: sandbox
            .memory_total_bytes
            .saturating_sub(sandbox.memory_available_bytes),
    })
}

fn container_stats(
    status: &ContainerStatus,
    started_at_ms: u64,
    metrics: &Metrics,
    logs_used_bytes: u64,
) -> ContainerStats {
    let memory = metrics.memory.clone().unwrap_or_default();
    let cpu = metrics.cpu.clone().unwrap_or_default();
    let of_all_disks = |counter: fn(&IOEntry) -> u64| {
        let entries = metrics.io.iter().flat_map(|io| &io.usage);
        entries.map(counter).fold(0_u64, u64::saturating_add)
    };
    ContainerStats {
        name: status.name.clone(),
        started_at_ms,
        cpu_usage_us: cpu.usage_usec,
        cpu_user_us: cpu.user_usec,
        cpu_system_us: cpu.system_usec,
        cpu_periods: cpu.nr_periods,
        cpu_throttled_periods: cpu.nr_throttled,
        cpu_throttled_us: cpu.throttled_usec,
        memory_usage_bytes: memory.usage,
        memory_working_set_bytes: memory.usage.saturating_sub(memory.inactive_file),
        memory_rss_bytes: memory.anon,
        memory_cache_bytes: memory.file,
        // "max" in the cgroup.
        memory_limit_bytes: if memory.usage_limit == u64::MAX {
            0
        } else {
            memory.usage_limit
        },
        page_faults: memory.pgfault,
        major_page_faults: memory.pgmajfault,
        pids: metrics.pids.as_ref().map_or(0, |pids| pids.current),
        logs_used_bytes,
        io_read_bytes: of_all_disks(|entry| entry.rbytes),
        io_write_bytes: of_all_disks(|entry| entry.wbytes),
        io_reads: of_all_disks(|entry| entry.rios),
        io_writes: of_all_disks(|entry| entry.wios),
        oom_kills: metrics.memory_events.as_ref().map_or(0, |events| events.oom_kill),
        // The writable layer is the sandbox's to tell.
        ..ContainerStats::default()
    }
}

fn size_of_dir(dir: &Path) -> u64 {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_leaves_out_idle_and_guest() {
        let stat = "cpu  10 1 20 1000 500 3 4 5 600 700\ncpu0 1 1 1\n";
        assert_eq!(cpu_usage_us(stat, 100), 430_000);
        assert_eq!(cpu_usage_us("", 100), 0);
    }

    #[test]
    fn this_host_has_memory_and_cpus() {
        let capacity = host_capacity().unwrap();
        assert!(capacity.n_cpus > 0 && capacity.memory_bytes > 1 << 20);
    }
}
