//! Groups that become others while they run.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tests::{pod::Pod, stage::Stage};

const STAY: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// Small enough for three of them in one size of group.
fn limits(cpu: &str) -> Value {
    json!({ "resources": { "limits": { "cpu": cpu, "memory": "128Mi" } } })
}

/// A container that stays, one that shows what is in a file, and what `more` adds.
fn pod(stage: &Stage, greeting: &str, more: impl FnOnce(Pod) -> Pod) -> Pod {
    let tools = stage.tools();
    let mut mounted = limits("150m");
    mounted["volumeMounts"] = json!([
        { "name": "kept", "mountPath": "/kept" },
        { "name": "labels", "mountPath": "/labels" },
    ]);
    let labels = json!({ "path": "team", "fieldRef": { "fieldPath": "metadata.labels['team']" } });
    let pod = Pod::new("changing")
        .label("team", "a")
        .with("restartPolicy", json!("Always"))
        .with(
            "volumes",
            json!([
                { "name": "kept", "emptyDir": {} },
                { "name": "labels", "downwardAPI": { "items": [labels] } },
            ]),
        )
        .container_with("stays", &tools, STAY, limits("200m"))
        .container_with(
            "changes",
            &tools,
            &format!("echo {greeting} >> /kept/log; trap 'exit 0' TERM; sleep 100000 & wait"),
            mounted,
        );
    more(pod)
}

fn restarts(group: &Value) -> Vec<(&str, Option<u64>)> {
    let containers = group["status"]["containers"].as_array();
    let containers = containers.into_iter().flatten();
    containers
        .map(|status| {
            (
                status["name"].as_str().unwrap_or_default(),
                status["restart_count"].as_u64(),
            )
        })
        .collect()
}

fn update(stage: &Stage, pod: &Pod) -> Result<String> {
    let arguments = ["update", pod.name(), "-f", "-"];
    let finished = stage.host.ecictl_with(&arguments, pod.manifest().as_bytes())?;
    let shown = finished.stderr.clone();
    finished.success()?;
    Ok(shown)
}

/// Waits until the containers that changed have written these lines.
fn wait_log(stage: &Stage, lines: &str) -> Result<()> {
    let script = format!("until [ \"$(cat /kept/log)\" = \"{lines}\" ]; do sleep 0.2; done");
    let seen = stage
        .host
        .exec("changing", "changes", &["/bin/sh", "-c", &script])?;
    seen.success().map(drop)
}

pub(crate) fn a_running_group_becomes_another_with_least_disruption(stage: &mut Stage) -> Result<()> {
    stage.host.create(&pod(stage, "one", |pod| pod))?;
    let before = stage.host.group("changing")?;
    // A container runs before its program has done anything.
    wait_log(stage, "one")?;

    // A container changes, another is added: the first runs on.
    let tools = stage.tools();
    let with_more = |pod: Pod| pod.container_with("more", &tools, STAY, limits("150m"));
    let next = pod(stage, "two", with_more);
    let shown = update(stage, &next)?;
    ensure!(shown.contains("What changes is ended: changes"), "{shown}");
    let group = stage.host.group("changing")?;
    ensure!(
        restarts(&group) == [("stays", Some(0)), ("changes", Some(1)), ("more", Some(0))],
        "{group}"
    );
    ensure!(group["status"]["ip"] == before["status"]["ip"], "{group}");
    wait_log(stage, "one\ntwo")?;
    stage.host.exec("changing", "more", &["/bin/true"])?.success()?;

    // The same again changes nothing, and what can't change is named, all of it.
    let shown = update(stage, &next)?;
    ensure!(shown.contains("already"), "{shown}");
    let other = Pod::new("elsewhere").container("stays", &tools, "true");
    let refused = stage
        .host
        .ecictl_with(&["update", "changing", "-f", "-"], other.manifest().as_bytes())?;
    ensure!(
        refused.stderr.contains("name: \"elsewhere\""),
        "{}",
        refused.stderr
    );

    // A killed agent goes on with an update that it has accepted, and a container that is gone is gone.
    let only = pod(stage, "three", |pod| pod);
    let arguments = ["update", "changing", "--no-wait", "-f", "-"];
    let accepted = stage.host.ecictl_with(&arguments, only.manifest().as_bytes())?;
    accepted.success()?;
    stage.host.kill_agent()?;
    stage.host.restart_agent()?;
    let group = stage.host.wait_group("changing", "the third form", |group| {
        restarts(group) == [("stays", Some(0)), ("changes", Some(2))]
            && group["status"]["containers"][1]["state"]["Running"].is_object()
    })?;
    ensure!(
        group["spec"]["containers"].as_array().map(Vec::len) == Some(2),
        "{group}"
    );
    wait_log(stage, "one\ntwo\nthree")?;

    // Another size is another sandbox, at the same address, with an empty volume.
    let larger = pod(stage, "four", |pod| {
        pod.container_with("large", &tools, STAY, limits("500m"))
    });
    let shown = update(stage, &larger)?;
    ensure!(shown.contains("in a new sandbox"), "{shown}");
    let group = stage.host.group("changing")?;
    ensure!(group["spec"]["size"] != before["spec"]["size"], "{group}");
    ensure!(group["status"]["ip"] == before["status"]["ip"], "{group}");
    wait_log(stage, "four")?;
    stage.host.remove("changing")
}
