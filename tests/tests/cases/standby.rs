//! Sandboxes that stand by.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tests::{
    host::{Host, SECURITY_GROUP, Templates},
    pod::Pod,
    stage::Stage,
};

use super::{SAY_HELLO, network};

const STANDS_BY: &str = "a sandbox stands by";
/// What tells one group from another, read in it.
const IDENTITY: &str = "cat /etc/machine-id /etc/hostname /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid \
                        /sys/class/net/eth0/address; \
                        ip -6 -o addr show dev eth0 | grep -v fe80: | tr -s ' ' | cut -d ' ' -f 4";

fn create(host: &Host, stage: &Stage, name: &str) -> Result<()> {
    host.create(&Pod::new(name).container("main", &stage.tools(), SAY_HELLO))
}

fn identity(host: &Host, group: &str) -> Result<Vec<String>> {
    let text = host
        .exec(group, "main", &["/bin/sh", "-c", IDENTITY])?
        .success()?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// A group takes over what stands by, as itself; one that died meanwhile costs only the normal path; what a killed agent had
/// standing by is gone with the next.
pub(crate) fn a_group_takes_over_what_stands_by(stage: &mut Stage) -> Result<()> {
    stage.without_host(|stage| {
        let dir = stage.dir().join("standby");
        let registry = stage.registry.name();
        let mut host = Host::start(
            &stage.product,
            &dir,
            &dir.join("state"),
            &registry,
            Templates::WithStandby,
        )?;
        let result = with_standbys(&mut host, stage);
        result.with_context(|| format!("the agent's log:\n{}", host.last_log_lines(40)))?;
        host.stop()?;
        ensure!(!Path::new("/sys/class/net/ecitest0").exists(), "the bridge stays");
        Ok(())
    })
}

fn with_standbys(host: &mut Host, stage: &Stage) -> Result<()> {
    create(host, stage, "first")?;
    host.wait_log(STANDS_BY)?;
    // What was there before anybody asked is a member all the same.
    let second = Pod::new("second")
        .annotation("k8s.aliyun.com/eci-security-group", SECURITY_GROUP)
        .container("main", &stage.tools(), SAY_HELLO);
    host.create(&second)?;
    host.wait_log("start_kind=\"standby\"")?;
    network::ensure_only_member(host, "second", SECURITY_GROUP)?;
    let (first, second) = (identity(host, "first")?, identity(host, "second")?);
    ensure!(second[1] == "second", "its host name is {:?}", second[1]);
    let ip6 = second.get(5).map_or("", String::as_str);
    ensure!(ip6.starts_with("fd00:88::"), "its IPv6 address is {ip6:?}");
    for (a, b) in first.iter().zip(&second) {
        ensure!(a != b, "both have {a:?}: {first:?} {second:?}");
    }

    host.wait_log(STANDS_BY)?;
    let of_groups = BTreeSet::from([host.processes_of("first")?.vmm, host.processes_of("second")?.vmm]);
    let waiting: Vec<_> = host.vmms()?.difference(&of_groups).copied().collect();
    ensure!(waiting.len() == 1, "VMMs that wait: {waiting:?}");
    let waiting = Pid::from_raw(waiting[0]).context("a process id is 0")?;
    kill_process(waiting, Signal::KILL).context("kill the VMM that waits")?;
    create(host, stage, "third")?;
    host.wait_log("start_kind=\"template\"")?;

    host.wait_log(STANDS_BY)?;
    ensure!(host.vmms()?.len() == 4, "VMMs: {:?}", host.vmms()?);
    host.kill_agent()?;
    host.restart_agent()?;
    ensure!(host.vmms()?.len() == 3, "VMMs: {:?}", host.vmms()?);
    ensure!(
        identity(host, "second")?[..3] == second[..3],
        "another guest is in its place"
    );
    for group in ["first", "second", "third"] {
        host.remove(group)?;
    }
    Ok(())
}
