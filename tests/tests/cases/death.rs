//! What dies, dies alone, and has a reason.

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::{host::Host, pod::Pod, stage::Stage};

use super::SAY_HELLO;

/// How one of a group's containers ended.
fn end_of(group: &Value, index: usize) -> &Value {
    &group["status"]["containers"][index]["state"]["Terminated"]
}

fn ensure_answers(host: &Host, group: &str, container: &str) -> Result<()> {
    let said = host.exec(group, container, &["/bin/echo", "here"])?.success()?;
    ensure!(said == "here\n", "{container} of {group} said {said:?}");
    Ok(())
}

pub(crate) fn a_container_out_of_memory_dies_alone(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let small = json!({ "resources": { "limits": { "cpu": "250m", "memory": "64Mi" } } });
    // Once told to, it reads more into memory than it may have.
    let greedy =
        "until [ -e /tmp/go ]; do sleep 1; done; dd if=/dev/zero of=/dev/null bs=256M count=1; exit 1";
    let pod = Pod::new("mixed")
        .container("steady", &stage.tools(), SAY_HELLO)
        .container_with("greedy", &stage.tools(), &format!("exec sh -c '{greedy}'"), small);
    host.create(&pod)?;
    let before = host.group("mixed")?;
    host.exec("mixed", "greedy", &["/bin/touch", "/tmp/go"])?
        .success()?;
    let group = host.wait_group("mixed", "the end of one container", |group| {
        end_of(group, 1).is_object()
    })?;
    let end = end_of(&group, 1);
    ensure!(
        end["reason"] == "OOMKilled" && end["exit_code"] == 137,
        "it ended so: {end}"
    );
    let message = end["message"].as_str().unwrap_or_default();
    ensure!(message.contains("memory limit"), "it is told so: {message:?}");
    ensure!(
        group["status"]["phase"] == "Running",
        "the group is {}",
        group["status"]["phase"]
    );
    ensure!(
        group["status"]["containers"][0] == before["status"]["containers"][0],
        "the other container was touched"
    );
    ensure_answers(host, "mixed", "steady")?;
    let described = host.ecictl(&["describe", "mixed"])?.success()?;
    ensure!(described.contains("OOMKilled"), "describe has:\n{described}");
    host.remove("mixed")
}

/// Creates two groups, kills a process of one, and sees what becomes of both.
fn ensure_dies_alone(
    stage: &Stage,
    victim: impl FnOnce(&Host) -> Result<i32>,
    reason: &[&str],
) -> Result<()> {
    let host = &stage.host;
    for name in ["doomed", "bystander"] {
        host.create(&Pod::new(name).container("main", &stage.tools(), SAY_HELLO))?;
    }
    let before = host.group("bystander")?;
    let pid = Pid::from_raw(victim(host)?).context("read a process id")?;
    kill_process(pid, Signal::KILL).context("kill it")?;
    let group = host.wait_group("doomed", "the end of the group", |group| {
        group["status"]["phase"] == "Failed"
    })?;
    let status = &group["status"];
    ensure!(
        status["reason"] == "SandboxDied",
        "the group's reason is {}",
        status["reason"]
    );
    let message = status["message"].as_str().unwrap_or_default();
    for word in reason {
        ensure!(
            message.contains(word),
            "expected {word:?} in the message: {message}"
        );
    }
    let end = end_of(&group, 0);
    ensure!(
        end["reason"] == "SandboxDied" && end["exit_code"] == 137,
        "the container ended so: {end}"
    );
    let events = host.ecictl(&["events", "doomed"])?.success()?;
    ensure!(events.contains("SandboxDied"), "the events are:\n{events}");
    host.exec("doomed", "main", &["/bin/true"])?
        .refused(125, &["does not run", "SandboxDied"])?;
    // Its log outlives it.
    let log = host.ecictl(&["logs", "doomed"])?.success()?;
    ensure!(log == "hello\n", "the log of the dead group is {log:?}");
    ensure_answers(host, "bystander", "main")?;
    ensure!(
        host.group("bystander")?["status"] == before["status"],
        "the other group was touched"
    );
    host.remove("doomed")?;
    host.remove("bystander")
}

pub(crate) fn a_killed_vmm_ends_one_group(stage: &mut Stage) -> Result<()> {
    ensure_dies_alone(
        stage,
        |host| Ok(host.processes_of("doomed")?.vmm),
        &["vmm_crash", "signal: 9"],
    )
}

pub(crate) fn a_killed_shim_ends_one_group(stage: &mut Stage) -> Result<()> {
    ensure_dies_alone(
        stage,
        |host| Ok(host.processes_of("doomed")?.shim),
        &["the shim is gone"],
    )
}
