//! Counters of containers, from their cgroups, and of the guest, from `/proc`.

use std::{fs, path::Path, sync::Arc, time::Duration};

use rustix::fs::statvfs;

use crate::{
    container::{
        Container,
        cgroup::{Cgroup, value_of},
    },
    error::{Context, Result},
};

/// Entries of a writable layer looked at in one turn of the event loop.
const ENTRIES_PER_TURN: usize = 512;
/// Most entries looked at; a larger layer is reported as what was counted.
const MAX_ENTRIES: usize = 200_000;

/// A container's counters; bytes, counts, microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the guest API")]
pub struct ContainerStats {
    pub cpu_usage_us: u64,
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_us: u64,
    pub memory_usage_bytes: u64,
    pub memory_limit_bytes: u64,
    pub memory_anon_bytes: u64,
    pub memory_file_bytes: u64,
    pub memory_inactive_file_bytes: u64,
    pub memory_page_faults: u64,
    pub memory_major_page_faults: u64,
    pub oom_kills: u64,
    pub pids: u64,
    pub pids_limit: u64,
    pub io_read_bytes: u64,
    pub io_write_bytes: u64,
    pub io_read_ops: u64,
    pub io_write_ops: u64,
}

/// Reads the counters of the container that has `cgroup`.
pub fn container(cgroup: &Cgroup) -> ContainerStats {
    // A controller the kernel does not have counts nothing.
    let read = |file: &str| cgroup.read(file).unwrap_or_default();
    // "max" is no limit.
    let number = |file: &str| read(file).trim().parse().unwrap_or(0);
    let (cpu, memory, io) = (read("cpu.stat"), read("memory.stat"), read("io.stat"));
    ContainerStats {
        cpu_usage_us: value_of(&cpu, "usage_usec"),
        cpu_user_us: value_of(&cpu, "user_usec"),
        cpu_system_us: value_of(&cpu, "system_usec"),
        cpu_periods: value_of(&cpu, "nr_periods"),
        cpu_throttled_periods: value_of(&cpu, "nr_throttled"),
        cpu_throttled_us: value_of(&cpu, "throttled_usec"),
        memory_usage_bytes: number("memory.current"),
        memory_limit_bytes: number("memory.max"),
        memory_anon_bytes: value_of(&memory, "anon"),
        memory_file_bytes: value_of(&memory, "file"),
        memory_inactive_file_bytes: value_of(&memory, "inactive_file"),
        memory_page_faults: value_of(&memory, "pgfault"),
        memory_major_page_faults: value_of(&memory, "pgmajfault"),
        oom_kills: cgroup.oom_kills(),
        pids: number("pids.current"),
        pids_limit: number("pids.max"),
        io_read_bytes: io_total(&io, "rbytes"),
        io_write_bytes: io_total(&io, "wbytes"),
        io_read_ops: io_total(&io, "rios"),
        io_write_ops: io_total(&io, "wios"),
    }
}

/// What a container has written to its root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the guest API")]
pub struct WritableLayer {
    pub container_id: String,
    pub used_bytes: u64,
    pub used_inodes: u64,
}

/// Measures the writable layers of `containers`.
pub async fn writable_layers(containers: &[Arc<Container>]) -> Vec<WritableLayer> {
    let mut layers = Vec::with_capacity(containers.len());
    for container in containers {
        let (used_bytes, used_inodes) = tree_size(&container.rootfs.upper).await;
        layers.push(WritableLayer {
            container_id: container.id.clone(),
            used_bytes,
            used_inodes,
        });
    }
    layers
}

/// Sums `key` over the devices of an `io.stat`: lines `254:0 rbytes=1 wbytes=2`.
fn io_total(text: &str, key: &str) -> u64 {
    text.split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

/// Bytes and inodes below `path`, without holding up other work.
async fn tree_size(path: &Path) -> (u64, u64) {
    let (mut bytes, mut inodes) = (0_u64, 0_usize);
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        // Files come and go meanwhile.
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries.flatten() {
            if inodes >= MAX_ENTRIES {
                return (bytes, inodes as u64);
            }
            inodes += 1;
            if inodes.is_multiple_of(ENTRIES_PER_TURN) {
                tokio::task::yield_now().await;
            }
            let Ok(metadata) = entry.metadata() else { continue };
            bytes =
                bytes.saturating_add(std::os::unix::fs::MetadataExt::blocks(&metadata).saturating_mul(512));
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    (bytes, inodes as u64)
}

/// Counters of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the guest API")]
pub struct SandboxStats {
    pub cpu_usage_us: u64,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
    pub networks: Vec<Network>,
    pub scratch_capacity_bytes: u64,
    pub scratch_used_bytes: u64,
    pub scratch_inodes: u64,
    pub scratch_used_inodes: u64,
    pub init_resident_bytes: u64,
}

/// Counters of a network interface: receive, then transmit; bytes, packets, errors, dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "see above")]
pub struct Network {
    pub name: String,
    pub rx: [u64; 4],
    pub tx: [u64; 4],
}

/// Reads the counters of the guest.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn sandbox(scratch: &Path) -> Result<SandboxStats> {
    let read = |path: &str| fs::read_to_string(path).context(|| format!("read {path}"));
    let memory = read("/proc/meminfo")?;
    let disk = statvfs(scratch).context(|| format!("get the size of {}", scratch.display()))?;
    let page_bytes = rustix::param::page_size() as u64;
    let resident_pages: u64 = read("/proc/self/statm")?
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0);
    Ok(SandboxStats {
        cpu_usage_us: cpu_usage(&read("/proc/stat")?),
        memory_total_bytes: memory_value(&memory, "MemTotal"),
        memory_available_bytes: memory_value(&memory, "MemAvailable"),
        networks: networks(&read("/proc/net/dev")?),
        scratch_capacity_bytes: disk.f_blocks.saturating_mul(disk.f_frsize),
        scratch_used_bytes: disk
            .f_blocks
            .saturating_sub(disk.f_bfree)
            .saturating_mul(disk.f_frsize),
        scratch_inodes: disk.f_files,
        scratch_used_inodes: disk.f_files.saturating_sub(disk.f_ffree),
        init_resident_bytes: resident_pages * page_bytes,
    })
}

/// Bytes of a line `MemTotal:  1024 kB`.
fn memory_value(text: &str, key: &str) -> u64 {
    let kib = text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(':')?
            .split_ascii_whitespace()
            .next()?
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Time not idle, of the first line of `/proc/stat`: user nice system idle iowait irq softirq steal, in hundredths of a
/// second (proc(5)).
fn cpu_usage(text: &str) -> u64 {
    const TICK: Duration = Duration::from_millis(10);
    let Some(line) = text.lines().next().and_then(|line| line.strip_prefix("cpu ")) else {
        return 0;
    };
    let ticks: u64 = line
        .split_ascii_whitespace()
        .take(7)
        .enumerate()
        .filter(|(column, _)| !matches!(column, 3 | 4))
        .filter_map(|(_, ticks)| ticks.parse::<u64>().ok())
        .sum();
    ticks.saturating_mul(u64::try_from(TICK.as_micros()).unwrap_or(0))
}

/// All interfaces but the loopback.
fn networks(text: &str) -> Vec<Network> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let mut counters = counters
                .split_ascii_whitespace()
                .map(|counter| counter.parse().unwrap_or(0));
            let rx = [
                counters.next()?,
                counters.next()?,
                counters.next()?,
                counters.next()?,
            ];
            // fifo, frame, compressed, multicast
            let tx = [
                counters.nth(4)?,
                counters.next()?,
                counters.next()?,
                counters.next()?,
            ];
            Some(Network {
                name: name.trim().to_owned(),
                rx,
                tx,
            })
        })
        .filter(|network| network.name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes\n\
            \x20   lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 100 2 3 4 0 0 0 0 500 6 7 8 0 0 0 0\n";
        assert_eq!(
            networks(text),
            [Network {
                name: "eth0".into(),
                rx: [100, 2, 3, 4],
                tx: [500, 6, 7, 8]
            }]
        );
        assert_eq!(cpu_usage("cpu  1 2 3 100 50 4 5 0 0 0\ncpu0 1\n"), 15 * 10_000);
        assert_eq!(
            memory_value("MemTotal:       2 kB\nMemFree: 1 kB\n", "MemTotal"),
            2048
        );
        assert_eq!(
            io_total("254:0 rbytes=10 wbytes=1\n254:16 rbytes=5 dbytes=0\n", "rbytes"),
            15
        );
    }

    #[tokio::test]
    async fn a_tree_is_measured() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("d")).unwrap();
        fs::write(directory.path().join("d/f"), vec![1; 100_000]).unwrap();
        let (bytes, inodes) = tree_size(directory.path()).await;
        assert_eq!(inodes, 2);
        assert!(bytes >= 100_000, "{bytes}");
    }
}
