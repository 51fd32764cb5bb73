//! The life cycle of containers in a group.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::{host::Host, pod::Pod, stage::Stage};

/// A volume all containers of a group write down in what they do.
fn shared() -> Value {
    json!([{ "name": "shared", "emptyDir": {} }])
}

/// Its mount, with further fields.
fn with_shared(mut fields: Value) -> Value {
    fields["volumeMounts"] = json!([{ "name": "shared", "mountPath": "/shared" }]);
    fields
}

fn status<'a>(group: &'a Value, container: &str) -> Result<&'a Value> {
    let containers = group["status"]["containers"].as_array();
    let mut containers = containers.into_iter().flatten();
    containers
        .find(|status| status["name"] == container)
        .with_context(|| format!("no container {container} in {group}"))
}

fn has_ended(group: &Value, container: &str) -> bool {
    status(group, container).is_ok_and(|status| status["state"]["Terminated"].is_object())
}

fn phase_is(phase: &'static str) -> impl Fn(&Value) -> bool {
    move |group| group["status"]["phase"] == phase
}

/// What the containers wrote down, from the log of one that shows it.
fn log(host: &Host, group: &str, container: &str) -> Result<String> {
    host.ecictl(&["logs", group, "-c", container])?.success()
}

/// Says when it is told to end.
fn until_ended(name: &str) -> String {
    format!(
        "echo {name} begins >> /shared/log; trap 'echo {name} ends >> /shared/log; exit 0' TERM; while :; do sleep 0.1; done"
    )
}

fn in_turns(stage: &Stage, name: &str, outer: &str) -> Pod {
    let tools = stage.tools();
    let sidecar = || with_shared(json!({ "restartPolicy": "Always" }));
    Pod::new(name)
        .with("volumes", shared())
        .with("terminationGracePeriodSeconds", json!(60))
        .init_container(
            "first",
            &tools,
            "echo first >> /shared/log",
            with_shared(json!({})),
        )
        .init_container("outer", &tools, outer, sidecar())
        .init_container("inner", &tools, &until_ended("inner"), sidecar())
        .init_container("last", &tools, "echo last >> /shared/log", with_shared(json!({})))
}

pub(crate) fn init_containers_and_sidecars_take_turns(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    // It is seen by the outer sidecar, which ends last, what all the others did.
    let show = "trap 'echo outer ends >> /shared/log; cat /shared/log; exit 0' TERM; \
                echo outer begins >> /shared/log; while :; do sleep 0.1; done";
    let pod = in_turns(stage, "turns", show).container_with(
        "main",
        &stage.tools(),
        "echo main >> /shared/log; until [ -e /shared/go ]; do sleep 0.1; done",
        with_shared(json!({})),
    );
    host.create(&pod)?;
    let group = host.wait_group("turns", "the work to begin", phase_is("Running"))?;
    ensure!(has_ended(&group, "first") && has_ended(&group, "last"), "{group}");
    for sidecar in ["outer", "inner"] {
        ensure!(status(&group, sidecar)?["ready"] == true, "{group}");
    }
    let listed = host.ecictl(&["ps"])?.success()?;
    ensure!(listed.contains("3/3"), "ps says:\n{listed}");
    host.exec("turns", "main", &["/bin/touch", "/shared/go"])?
        .success()?;
    let group = host.wait_group("turns", "its end", phase_is("Succeeded"))?;
    let shown = log(host, "turns", "outer")?;
    let lines: Vec<&str> = shown.lines().filter(|line| !line.ends_with("begins")).collect();
    ensure!(
        lines == ["first", "last", "main", "inner ends", "outer ends"],
        "the order was {lines:?}"
    );
    ensure!(status(&group, "inner")?["restart_count"] == 0, "{group}");
    host.remove("turns")
}

pub(crate) fn a_restarted_group_begins_anew_in_order(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let pod = in_turns(stage, "again", &until_ended("outer")).container_with(
        "main",
        &stage.tools(),
        "trap 'exit 0' TERM; echo main >> /shared/log; cat /shared/log; sleep 100000 & wait",
        with_shared(json!({})),
    );
    host.create(&pod)?;
    host.wait_group("again", "the work to begin", phase_is("Running"))?;
    host.ecictl(&["restart", "again"])?.success()?;
    let group = host.wait_group("again", "the second beginning", |group| {
        group["status"]["phase"] == "Running"
            && status(group, "main")
                .is_ok_and(|main| main["restart_count"] == 1 && main["state"]["Running"].is_object())
    })?;
    for container in ["first", "last", "outer", "inner"] {
        ensure!(status(&group, container)?["restart_count"] == 1, "{group}");
    }
    let mut shown = host.follow("again", "main")?;
    let mut lines = Vec::new();
    let mut mains = 0;
    shown.wait_line("the second main", |line| {
        // A sidecar's first word may come late: it has started when it runs.
        if !line.ends_with("begins") {
            lines.push(line.to_owned());
        }
        mains += usize::from(line == "main");
        mains == 2
    })?;
    ensure!(
        lines[2..] == ["main", "inner ends", "outer ends", "first", "last", "main"],
        "the order was {lines:?}"
    );
    drop(shown);
    host.remove("again")
}

pub(crate) fn a_group_fails_with_its_init_container_and_at_its_deadline(stage: &mut Stage) -> Result<()> {
    let (host, tools) = (&stage.host, stage.tools());
    let pod = Pod::new("unready")
        .init_container("bad", &tools, "exit 7", json!({}))
        .container("main", &tools, "echo never");
    host.try_create(&pod)?;
    let group = host.wait_group("unready", "its failure", phase_is("Failed"))?;
    ensure!(group["status"]["reason"] == "InitContainerFailed", "{group}");
    let message = group["status"]["message"].as_str().unwrap_or_default();
    ensure!(message.contains("bad ended with exit code 7"), "{message}");
    ensure!(
        status(&group, "main")?["state"]["Waiting"]["reason"] == "PodInitializing",
        "{group}"
    );
    host.remove("unready")?;

    // Under OnFailure it is tried again: the first end at once.
    let retried = "[ -e /shared/tried ] || { touch /shared/tried; exit 1; }";
    let pod = Pod::new("late")
        .with("volumes", shared())
        .with("restartPolicy", json!("OnFailure"))
        .with("activeDeadlineSeconds", json!(30))
        .init_container("retried", &tools, retried, with_shared(json!({})))
        .container("main", &tools, "exec sleep 100000");
    host.create(&pod)?;
    let group = host.wait_group("late", "the work to begin", phase_is("Running"))?;
    ensure!(status(&group, "retried")?["restart_count"] == 1, "{group}");
    let group = host.wait_group("late", "its deadline", phase_is("Failed"))?;
    ensure!(group["status"]["reason"] == "DeadlineExceeded", "{group}");
    ensure!(
        status(&group, "main")?["state"]["Terminated"]["exit_code"] == 137,
        "{group}"
    );
    let described = host.ecictl(&["describe", "late"])?.success()?;
    ensure!(
        described.contains("DeadlineExceeded"),
        "describe has:\n{described}"
    );
    host.remove("late")
}
