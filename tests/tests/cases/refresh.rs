//! Files that change while containers run.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tests::{host::Host, pod::Pod, stage::Stage};

/// Tells each time that a file which is always in the volume is not there.
const WATCH: &str =
    "while :; do [ -s /config/word ] || echo missing; [ -e /end ] && echo over && exec sleep 100000; done";

fn manifest(stage: &Stage, team: &str, data: &Value) -> String {
    let pod = Pod::new("fresh")
        .label("team", team)
        .with("restartPolicy", json!("Always"))
        .with(
            "volumes",
            json!([
                { "name": "config", "configMap": { "name": "config" } },
                { "name": "pod", "downwardAPI": { "items": [
                    { "path": "team", "fieldRef": { "fieldPath": "metadata.labels['team']" } }] } },
            ]),
        )
        .container_with(
            "main",
            &stage.tools(),
            WATCH,
            json!({ "volumeMounts": [
                { "name": "config", "mountPath": "/config" },
                { "name": "config", "mountPath": "/fixed", "subPath": "word" },
                { "name": "pod", "mountPath": "/pod" },
            ] }),
        );
    let config =
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "config" }, "data": data });
    format!("{}\n---\n{config}\n", pod.manifest())
}

fn show(host: &Host) -> Result<String> {
    let script = "cat /config/word /fixed /pod/team; echo; ls /config";
    host.exec("fresh", "main", &["/bin/sh", "-c", script])?.success()
}

fn update(host: &Host, manifest: &str, more: &[&str]) -> Result<String> {
    let arguments = [&["update", "fresh", "-f", "-"], more].concat();
    let finished = host.ecictl_with(&arguments, manifest.as_bytes())?;
    let shown = finished.stderr.clone();
    finished.success()?;
    Ok(shown)
}

pub(crate) fn changed_files_come_into_running_containers(stage: &mut Stage) -> Result<()> {
    let first = manifest(stage, "a", &json!({ "word": "one\n", "gone": "x" }));
    stage
        .host
        .ecictl_with(&["create", "-f", "-"], first.as_bytes())?
        .success()?;
    ensure!(show(&stage.host)? == "one\none\na\ngone\nword\n");

    // All that an acknowledged update says is there once it is told to be done; a part of a volume stays what it was.
    let second = manifest(stage, "b", &json!({ "word": "two\n", "more": "y" }));
    let shown = update(&stage.host, &second, &[])?;
    ensure!(shown.contains("No container is restarted"), "{shown}");
    let seen = show(&stage.host)?;
    ensure!(seen == "two\none\nb\nmore\nword\n", "{seen}");

    // A killed agent goes on with what it has accepted.
    let third = manifest(stage, "c", &json!({ "word": "three\n" }));
    update(&stage.host, &third, &["--no-wait"])?;
    stage.host.kill_agent()?;
    stage.host.restart_agent()?;
    stage.host.wait_group("fresh", "the third form", |group| {
        group["status"]["phase"] == "Running" && group["spec"]["labels"]["team"] == "c"
    })?;
    let seen = show(&stage.host)?;
    ensure!(seen == "three\none\nc\nword\n", "{seen}");

    // It never was away, and the container is the one that was begun.
    let host = &stage.host;
    host.exec("fresh", "main", &["/bin/touch", "/end"])?.success()?;
    host.follow("fresh", "main")?
        .wait_line("the end of the watch", |line| line.contains("over"))?;
    let log = host.ecictl(&["logs", "fresh"])?.success()?;
    ensure!(log == "over\n", "the file was missing:\n{log}");
    let group = host.group("fresh")?;
    ensure!(group["status"]["containers"][0]["restart_count"] == 0, "{group}");
    host.remove("fresh")
}
