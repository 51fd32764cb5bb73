//! The life of groups, and what it leaves behind.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use tests::{
    leftovers::Snapshot,
    pod::Pod,
    process::{self, Background},
    stage::Stage,
};

use super::SAY_HELLO;

const RUNS: usize = 20;
/// Descriptors the agent may have more of after many runs: connections to it that are being closed, files of its store.
const SPARE_DESCRIPTORS: usize = 4;

pub(crate) fn twenty_runs_leave_nothing_behind(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let before = Snapshot::take(host)?;
    let mut descriptors = None;
    for run in 1..=RUNS {
        let name = format!("run-{run}");
        let pod = Pod::new(&name).container("main", &stage.tools(), SAY_HELLO);
        let once = || -> Result<()> {
            host.create(&pod)?;
            let said = host
                .exec(&name, "main", &["/bin/echo", "run", &run.to_string()])?
                .success()?;
            ensure!(said == format!("run {run}\n"), "exec printed {said:?}");
            let log = host.ecictl(&["logs", &name])?.success()?;
            ensure!(log == "hello\n", "the log is {log:?}");
            // Both ways to end one: at once, and with the time it gives itself.
            if run % 2 == 0 {
                host.remove(&name)
            } else {
                host.ecictl(&["rm", &name])?.success().map(|_| ())
            }
        };
        once()
            .and_then(|()| before.ensure_same(host))
            .with_context(|| format!("run {run}"))?;
        let now = host.agent_descriptors()?;
        let first = *descriptors.get_or_insert(now);
        ensure!(
            now <= first + SPARE_DESCRIPTORS,
            "the agent had {first} descriptors after the first run and has {now} after run {run}"
        );
    }
    Ok(())
}

/// Tests the comparison that all cases rely on.
pub(crate) fn leftovers_of_every_kind_are_seen(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let before = Snapshot::take(host)?;
    let [state, ..] = host.dirs();
    let (state, cgroups) = (state.display(), host.cgroup_root());
    let cgroups = cgroups.display();
    for (kind, make, remove) in [
        (
            "network interface eci-leftover",
            "ip tuntap add eci-leftover mode tap".to_owned(),
            "ip link delete eci-leftover".to_owned(),
        ),
        (
            "firewall line table inet leftover",
            "nft add table inet leftover".to_owned(),
            "nft delete table inet leftover".to_owned(),
        ),
        (
            "cgroup",
            format!("mkdir {cgroups}/leftover"),
            format!("rmdir {cgroups}/leftover"),
        ),
        (
            "mount of this namespace",
            format!("mount -t tmpfs tmpfs {state}"),
            format!("umount {state}"),
        ),
        (
            "file",
            format!("touch {state}/leftover"),
            format!("rm {state}/leftover"),
        ),
    ] {
        let shell = |script: &str| process::run(Command::new("sh").args(["-ec", script]), b"")?.success();
        shell(&make)?;
        let seen = Snapshot::take(host).map(|now| before.compare(&now));
        shell(&remove)?;
        ensure_seen(seen?, kind)?;
        before.ensure_same(host)?;
    }
    // A program of ours that nobody knows of.
    let program = stage.dir().join("eci-vmm");
    fs::copy("/bin/sleep", &program).context("copy a program")?;
    let stray = Background::start(Command::new(&program).arg("1000"))?;
    // It has its name a moment after it was started.
    let mut seen = Ok(());
    for _ in 0..20 {
        seen = before.compare(&Snapshot::take(host)?);
        if seen.is_err() {
            break;
        }
    }
    drop(stray);
    ensure_seen(seen, "process")
}

fn ensure_seen(seen: Result<()>, kind: &str) -> Result<()> {
    let message = seen.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(
        message.contains(&format!("left behind: {kind}")),
        "a leftover {kind} is not seen, but: {message}"
    );
    Ok(())
}
