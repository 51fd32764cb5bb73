//! Groups that become larger and smaller while they run.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::{host::Host, pod::Pod, stage::Stage};

const GROUP: &str = "sizing";
/// Counts in memory.
const COUNTER: &str = "n=0; while :; do n=$((n+1)); echo count $n; sleep 0.2; done";
/// Needs more memory than the whole guest has before it is made larger (576 MiB).
const NEED_A_LOT: &str = "dd if=/dev/zero of=/dev/null bs=900M count=1";
const MIB: u64 = 1 << 20;

/// Sizes of the two containers: vCPU and memory.
type Sizes = [(&'static str, &'static str); 2];

/// 0.25 vCPU / 0.5 GiB: a group that goes on from a template.
const SMALL: Sizes = [("100m", "128Mi"), ("150m", "256Mi")];
/// 2 vCPU / 2 GiB.
const LARGE: Sizes = [("500m", "256Mi"), ("1500m", "1536Mi")];
/// More than the host has.
const HUGE: Sizes = [("500m", "256Mi"), ("3500m", "31Gi")];
/// More vCPUs than the sandbox knows of; the host may promise them.
const WIDE: Sizes = [("500m", "256Mi"), ("2500m", "3Gi")];

fn pod(stage: &Stage, sizes: Sizes) -> Pod {
    let limits =
        |(cpu, memory): (&str, &str)| json!({ "resources": { "limits": { "cpu": cpu, "memory": memory } } });
    let tools = stage.tools();
    Pod::new(GROUP)
        .container_with("counts", &tools, COUNTER, limits(sizes[0]))
        .container_with("works", &tools, "exec sleep 100000", limits(sizes[1]))
}

fn update(stage: &Stage, sizes: Sizes, more: &[&str]) -> Result<tests::process::Finished> {
    let arguments = [&["update", GROUP, "-f", "-"], more].concat();
    stage
        .host
        .ecictl_with(&arguments, pod(stage, sizes).manifest().as_bytes())
}

fn shell(host: &Host, group: &str, container: &str, script: &str) -> Result<String> {
    let text = host
        .exec(group, container, &["/bin/sh", "-c", script])?
        .success()?;
    Ok(text.trim().to_owned())
}

/// CPUs that are online, and MiB of memory, as the guest sees them.
fn seen(host: &Host, group: &str) -> Result<(u64, u64)> {
    let script = "nproc; awk '/^MemTotal:/ {print int($2/1024)}' /proc/meminfo";
    let text = shell(host, group, "works", script)?;
    let mut lines = text
        .lines()
        .map(|line| line.parse::<u64>().context(line.to_owned()));
    let mut next = || lines.next().context("the guest shows nothing").flatten();
    Ok((next()?, next()?))
}

/// What tells whether the counter is still the same process.
fn process(host: &Host, group: &str) -> Result<String> {
    shell(
        host,
        group,
        "counts",
        "cut -d ' ' -f 1,22 /proc/1/stat; readlink /proc/1/ns/pid",
    )
}

/// A number in the group's cgroup on the host.
fn on_host(stage: &Stage, file: &str) -> Result<u64> {
    let group = stage.host.group(GROUP)?;
    let id = group["id"].as_str().context("a group has no id")?;
    let path = stage.host.cgroup_root().join(id).join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    text.trim()
        .parse()
        .with_context(|| format!("{} is {text:?}", path.display()))
}

fn ensure_never_restarted(group: &Value) -> Result<()> {
    for status in group["status"]["containers"].as_array().context("containers")? {
        ensure!(status["restart_count"] == 0, "{status}");
        ensure!(status["state"]["Running"].is_object(), "{status}");
    }
    Ok(())
}

fn size_of(group: &Value) -> (u64, u64) {
    let size = &group["spec"]["size"];
    (
        size["cpu_milli"].as_u64().unwrap_or(0),
        size["memory_bytes"].as_u64().unwrap_or(0) / MIB,
    )
}

/// Every number was counted once, in order, and counting goes on.
fn ensure_counts_on(host: &Host) -> Result<()> {
    let mut log = host.follow(GROUP, "counts")?;
    let before = host
        .ecictl(&["logs", "-c", "counts", GROUP])?
        .success()?
        .lines()
        .count();
    for at in 1..=before + 5 {
        let line = log.wait_line("count", |line| line.starts_with("count"))?;
        ensure!(line == format!("count {at}"), "{line:?} is number {at}");
    }
    Ok(())
}

pub(crate) fn a_running_group_grows_and_shrinks_and_nothing_of_it_is_restarted(
    stage: &mut Stage,
) -> Result<()> {
    stage.host.create(&pod(stage, SMALL))?;
    let small = stage.host.group(GROUP)?;
    ensure!(size_of(&small) == (250, 512), "{small}");
    let counter = process(&stage.host, GROUP)?;
    let (n_cpus, total_before) = seen(&stage.host, GROUP)?;
    ensure!(
        n_cpus == 1 && total_before < 576,
        "{n_cpus} CPUs, {total_before} MiB"
    );
    let limit_before = on_host(stage, "memory.max")?;

    // What the host can't give is refused, by reason, before anything changes.
    update(stage, HUGE, &[])?.refused(1, &["MiB of memory", "are free on this host"])?;
    ensure!(size_of(&stage.host.group(GROUP)?) == (250, 512), "it changed");

    // Larger, and usable at once.
    let shown = update(stage, LARGE, &[])?;
    ensure!(
        shown.stderr.contains("while the containers run"),
        "{}",
        shown.stderr
    );
    ensure!(
        shown
            .stderr
            .contains("From 0.25 vCPU / 0.5 GiB to 2 vCPU / 2 GiB"),
        "{}",
        shown.stderr
    );
    shown.success()?;
    let large = stage.host.group(GROUP)?;
    ensure!(size_of(&large) == (2000, 2048), "{large}");
    ensure_never_restarted(&large)?;
    ensure!(large["status"]["ip"] == small["status"]["ip"], "{large}");
    let (n_cpus, total) = seen(&stage.host, GROUP)?;
    ensure!(n_cpus == 2, "{n_cpus} CPUs are online");
    ensure!(total == total_before + 1536, "{total_before} MiB became {total}");
    shell(&stage.host, GROUP, "works", NEED_A_LOT)?;
    let used = on_host(stage, "memory.peak")?;
    ensure!(
        used > 900 * MIB && used > limit_before,
        "{used} bytes were used on the host"
    );
    ensure!(
        process(&stage.host, GROUP)? == counter,
        "the counter is another process"
    );
    ensure_counts_on(&stage.host)?;
    let described = stage.host.ecictl(&["describe", GROUP])?.success()?;
    ensure!(described.contains("2 vCPU / 2 GiB"), "{described}");
    let limit = shell(
        &stage.host,
        GROUP,
        "works",
        "cat /sys/fs/cgroup$(cut -d : -f 3 /proc/self/cgroup)/memory.max",
    )?;
    ensure!(
        limit == (1536 * MIB).to_string(),
        "the container's limit is {limit}"
    );

    // A fork of it has all it has, and counts on from where it was.
    stage
        .host
        .ecictl(&["fork", "-n", "1", "--name", "twin", GROUP])?
        .success()?;
    ensure!(
        seen(&stage.host, "twin")? == (2, total),
        "the fork has {:?}",
        seen(&stage.host, "twin")?
    );
    shell(&stage.host, "twin", "works", NEED_A_LOT)?;
    ensure!(
        process(&stage.host, "twin")? == counter,
        "the fork's counter is another process"
    );
    stage.host.remove("twin")?;

    // Smaller: what it had more goes back to the host. The agent is killed in the midst of it.
    update(stage, SMALL, &["--no-wait"])?.success()?;
    stage.host.kill_agent()?;
    stage.host.restart_agent()?;
    let again = stage.host.wait_group(GROUP, "the smaller size", |group| {
        size_of(group) == (250, 512) && group["status"]["phase"] == "Running"
    })?;
    ensure_never_restarted(&again)?;
    ensure!(
        seen(&stage.host, GROUP)? == (1, total_before),
        "it has {:?}",
        seen(&stage.host, GROUP)?
    );
    ensure!(
        on_host(stage, "memory.max")? == limit_before,
        "the host allows another amount"
    );
    let held = on_host(stage, "memory.current")?;
    ensure!(held <= limit_before, "{held} bytes are held on the host");

    // A container that uses more than it is to have keeps what it has, and the group its size.
    update(stage, LARGE, &[])?.success()?;
    shell(
        &stage.host,
        GROUP,
        "works",
        "dd if=/dev/zero of=/dev/shm/kept bs=1M count=40",
    )?;
    let tight = [("100m", "128Mi"), ("150m", "16Mi")];
    update(stage, tight, &[])?.refused(1, &["The group keeps its size", "can't be limited to"])?;
    let kept = stage.host.group(GROUP)?;
    ensure!(size_of(&kept) == (2000, 2048), "{kept}");
    ensure_never_restarted(&kept)?;
    let events = stage.host.ecictl(&["events", GROUP])?.success()?;
    ensure!(events.contains("ResizeFailed"), "{events}");
    ensure!(
        seen(&stage.host, GROUP)? == (2, total),
        "it has {:?}",
        seen(&stage.host, GROUP)?
    );
    ensure!(
        process(&stage.host, GROUP)? == counter,
        "the counter is another process"
    );
    ensure_counts_on(&stage.host)?;

    // What the sandbox can't have is another sandbox, and the reason is told.
    let shown = update(stage, WIDE, &[])?;
    ensure!(
        shown
            .stderr
            .contains("in a new sandbox: the sandbox can have at most 2 vCPUs"),
        "{}",
        shown.stderr
    );
    shown.success()?;
    ensure!(
        seen(&stage.host, GROUP)?.0 == 3 || seen(&stage.host, GROUP)?.0 == 4,
        "it did not grow"
    );
    stage.host.remove(GROUP)
}
