//! An agent that dies and comes back.

use anyhow::{Context, Result, ensure};
use tests::{host::Host, pod::Pod, stage::Stage};

const GROUP: &str = "ticker";
const COUNT: &str = "i=0; while :; do i=$((i + 1)); echo \"tick $i\"; sleep 1; done";
/// Lines to wait for before the agent is killed, and again after it came back.
const TICKS: usize = 3;

fn tick(line: &str) -> Option<usize> {
    line.strip_prefix("tick ")?.parse().ok()
}

/// What tells a container apart from one that was started again: its first process, and the kernel it runs in.
fn identity(host: &Host) -> Result<String> {
    let script = "awk '{print $1, $2, $22}' /proc/1/stat; cat /proc/sys/kernel/random/boot_id";
    host.exec(GROUP, "main", &["/bin/sh", "-c", script])?.success()
}

pub(crate) fn a_killed_agent_finds_its_groups_as_they_were(stage: &mut Stage) -> Result<()> {
    let pod = Pod::new(GROUP).container("main", &stage.tools(), COUNT);
    stage.host.create(&pod)?;
    let mut log = stage.host.follow(GROUP, "main")?;
    let line = log.wait_line("some ticks", |line| tick(line) >= Some(TICKS))?;
    let before = tick(&line).context("read a tick")?;
    let (group, alive) = (stage.host.group(GROUP)?, identity(&stage.host)?);

    stage.host.kill_agent()?;
    let (code, _) = log.wait_end()?;
    ensure!(code != 0, "a log that broke off ended as if it were complete");
    stage.host.restart_agent()?;

    let host = &stage.host;
    let table = host.ecictl(&["ps"])?.success()?;
    let running = |line: &str| line.contains(GROUP) && line.contains("Running") && line.contains("1/1");
    ensure!(table.lines().any(running), "ps shows:\n{table}");
    let again = host.group(GROUP)?;
    for part in ["containers", "ip", "started_at_ms", "phase"] {
        let (was, is) = (&group["status"][part], &again["status"][part]);
        ensure!(was == is, "{part} was {was} and is {is}");
    }
    ensure!(identity(host)? == alive, "the container was started again");

    let mut log = host.follow(GROUP, "main")?;
    let mut expected = 1;
    log.wait_line(
        "ticks from before, during and after the agent's absence",
        |line| {
            let as_expected = tick(line) == Some(expected);
            expected += usize::from(as_expected);
            !as_expected || expected > before + 2 * TICKS
        },
    )
    .and_then(|line| {
        ensure!(
            tick(&line) == Some(expected - 1),
            "after tick {} the log has {line:?}",
            expected - 1
        );
        Ok(())
    })?;
    // And it can still be ended by an agent that did not start it.
    host.remove(GROUP)
}
