//! Containers that see each other's processes.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tests::{pod::Pod, stage::Stage};

/// Prints the ids of the processes with this command line, once there are any.
fn find(command: &str) -> String {
    let has_it = format!("[ \"$(tr '\\0' ' ' 2>/dev/null <$p/cmdline)\" = '{command} ' ]");
    let all = format!("for p in /proc/[0-9]*; do {has_it} && echo ${{p#/proc/}}; done");
    format!("until found=$({all}); [ -n \"$found\" ]; do sleep 0.2; done; echo $found")
}

fn restarts(group: &Value) -> [Option<u64>; 2] {
    [0, 1].map(|index| group["status"]["containers"][index]["restart_count"].as_u64())
}

pub(crate) fn containers_share_processes_with_each_other_and_clones_do(stage: &mut Stage) -> Result<()> {
    let tools = stage.tools();
    let host = &stage.host;
    let pod = Pod::new("common")
        .with("shareProcessNamespace", json!(true))
        .with("restartPolicy", json!("Always"))
        .container("a", &tools, "exec sleep 111111")
        .container("b", &tools, "(sleep 333333 &); exec sleep 222222");
    host.create(&pod)?;
    let run = |group: &str, container: &str, script: &str| {
        host.exec(group, container, &["/bin/sh", "-c", script])?.success()
    };
    let first = run(
        "common",
        "a",
        "cat /proc/1/comm; ls /proc/1/root 2>&1 | grep -c denied",
    )?;
    ensure!(first == "pause\n1\n", "process 1 is {first:?}");
    run("common", "b", &find("sleep 111111"))?;
    // One ends the other, whose other processes go with it, and which begins anew beside it.
    let old = run("common", "a", &find("sleep 333333"))?;
    run("common", "a", &format!("kill -9 $({})", find("sleep 222222")))?;
    host.wait_group("common", "another run of b", |group| {
        restarts(group) == [Some(0), Some(1)]
    })?;
    let new = run("common", "a", &find("sleep 333333"))?;
    ensure!(old != new, "process {old} outlived its container");
    ensure!(new.split_whitespace().count() == 1, "there are {new}");

    host.ecictl(&["fork", "--name", "twin", "common"])?.success()?;
    run("twin", "b", &format!("kill -9 $({})", find("sleep 111111")))?;
    host.wait_group("twin", "another run of a", |group| {
        restarts(group) == [Some(1), Some(1)]
    })?;
    run("twin", "b", &find("sleep 111111"))?;
    ensure!(
        restarts(&host.group("common")?) == [Some(0), Some(1)],
        "the parent noticed"
    );
    host.remove("twin")?;
    host.remove("common")
}
