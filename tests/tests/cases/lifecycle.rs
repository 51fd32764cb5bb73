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
        .with("activeDeadlineSeconds", json!(90))
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

fn is_ready(group: &Value, container: &str) -> bool {
    status(group, container).is_ok_and(|status| status["ready"] == true)
}

fn condition(group: &Value, kind: &str) -> Result<bool> {
    let conditions = group["status"]["conditions"].as_array();
    let mut conditions = conditions.into_iter().flatten();
    let found = conditions.find(|condition| condition["kind"] == kind);
    found
        .and_then(|condition| condition["holds"].as_bool())
        .with_context(|| format!("no condition {kind} in {group}"))
}

/// The messages of a group's events of this reason.
fn events(group: &Value, reason: &str) -> Vec<String> {
    let events = group["status"]["events"].as_array();
    let events = events.into_iter().flatten();
    events
        .filter(|event| event["reason"] == reason)
        .filter_map(|event| event["message"].as_str().map(str::to_owned))
        .collect()
}

/// What a gRPC server says that is asked for its health and serves: settings, the head of the answer, the message.
const SERVING: &str = r"\0\0\0\4\0\0\0\0\0\0\0\1\1\4\0\0\0\1\210\0\0\7\0\0\0\0\0\1\0\0\0\0\2\10\1";

pub(crate) fn probes_decide_whether_a_container_is_ready(stage: &mut Stage) -> Result<()> {
    let (host, tools) = (&stage.host, stage.tools());
    let every_second = |mut handler: Value| {
        for (field, value) in [("periodSeconds", 1), ("timeoutSeconds", 10)] {
            handler[field] = json!(value);
        }
        json!({ "readinessProbe": handler })
    };
    let serve = "mkdir /www; echo > /www/ready; exec busybox httpd -f -p 8080 -h /www";
    let listen = "while :; do nc -l -p 8081 < /dev/null > /dev/null; done";
    let call = format!("while :; do printf '{SERVING}' | nc -l -p 8082 > /dev/null; done");
    let pod = Pod::new("probed")
        .container_with(
            "web",
            &tools,
            serve,
            every_second(json!({ "httpGet": { "path": "/ready", "port": 8080 } })),
        )
        .container_with(
            "socket",
            &tools,
            listen,
            every_second(json!({ "tcpSocket": { "port": 8081 } })),
        )
        .container_with(
            "rpc",
            &tools,
            &call,
            every_second(json!({ "grpc": { "port": 8082 } })),
        )
        .container_with(
            "command",
            &tools,
            "touch /tmp/ready; exec sleep 100000",
            every_second(json!({ "exec": { "command": ["/bin/sh", "-c", "test -e /tmp/ready || { echo nothing; exit 4; }"] } })),
        );
    host.create(&pod)?;
    let all = ["web", "socket", "rpc", "command"];
    let ready = |group: &Value| all.iter().all(|container| is_ready(group, container));
    let group = host.wait_group("probed", "all to be ready", ready)?;
    ensure!(condition(&group, "Ready")?, "{group}");
    host.exec("probed", "web", &["/bin/rm", "/www/ready"])?
        .success()?;
    host.exec("probed", "command", &["/bin/rm", "/tmp/ready"])?
        .success()?;
    let group = host.wait_group("probed", "two to be unready", |group| {
        !is_ready(group, "web") && !is_ready(group, "command")
    })?;
    ensure!(
        !condition(&group, "Ready")? && !condition(&group, "ContainersReady")?,
        "{group}"
    );
    let unhealthy = events(&group, "Unhealthy").join("\n");
    for words in ["statuscode: 404", "Readiness probe failed: nothing"] {
        ensure!(unhealthy.contains(words), "{words:?} is not in:\n{unhealthy}");
    }
    ensure!(status(&group, "web")?["restart_count"] == 0, "{group}");
    host.exec("probed", "web", &["/bin/touch", "/www/ready"])?
        .success()?;
    host.exec("probed", "command", &["/bin/touch", "/tmp/ready"])?
        .success()?;
    host.wait_group("probed", "all to be ready again", ready)?;
    host.remove("probed")
}

pub(crate) fn an_unhealthy_container_is_ended_and_started_again(stage: &mut Stage) -> Result<()> {
    let (host, tools) = (&stage.host, stage.tools());
    let exec = |script: &str| json!({ "exec": { "command": ["/bin/sh", "-c", script] } });
    let probe = |script: &str, failures: u32| {
        let mut probe = exec(script);
        probe["periodSeconds"] = json!(1);
        probe["timeoutSeconds"] = json!(10);
        probe["failureThreshold"] = json!(failures);
        probe
    };
    let patient = "trap 'echo last words > /dev/termination-log; exit 0' TERM; echo main begins >> /shared/log; \
                   while :; do sleep 0.1; done";
    let pod = Pod::new("sick")
        .with("volumes", shared())
        .with("restartPolicy", json!("OnFailure"))
        .with("terminationGracePeriodSeconds", json!(60))
        .init_container(
            "slow",
            &tools,
            "trap 'exit 0' TERM; sleep 3; echo slow has started >> /shared/log; touch /tmp/started; while :; do sleep 0.1; done",
            with_shared(json!({ "restartPolicy": "Always", "startupProbe": probe("test -e /tmp/started", 60) })),
        )
        .container_with(
            "main",
            &tools,
            patient,
            with_shared(json!({
                "livenessProbe": probe("test ! -e /tmp/sick", 2),
                "lifecycle": {
                    "postStart": exec("echo hook at start >> /shared/log"),
                    "preStop": exec("echo hook at end >> /shared/log"),
                },
            })),
        );
    host.create(&pod)?;
    host.wait_group("sick", "the start", |group| is_ready(group, "main"))?;
    host.exec("sick", "main", &["/bin/touch", "/tmp/sick"])?
        .success()?;
    let group = host.wait_group("sick", "the second run", |group| {
        status(group, "main").is_ok_and(|main| main["restart_count"] == 1 && main["ready"] == true)
    })?;
    let before = &status(&group, "main")?["previous"]["Terminated"];
    ensure!(
        before["exit_code"] == 0 && before["message"] == "last words\n",
        "it ended so: {before}"
    );
    ensure!(!events(&group, "Unhealthy").is_empty(), "{group}");
    let killing = events(&group, "Killing").join("\n");
    ensure!(killing.contains("main failed liveness probe"), "{killing}");
    let shown = host
        .exec("sick", "main", &["/bin/cat", "/shared/log"])?
        .success()?;
    let lines: Vec<&str> = shown.lines().collect();
    ensure!(lines[0] == "slow has started", "main did not wait: {lines:?}");
    let count = |line: &str| lines.iter().filter(|other| **other == line).count();
    ensure!(
        (count("main begins"), count("hook at start"), count("hook at end")) == (2, 2, 1),
        "{lines:?}"
    );
    host.remove("sick")
}

pub(crate) fn failed_hooks_and_last_lines_are_told(stage: &mut Stage) -> Result<()> {
    let (host, tools) = (&stage.host, stage.tools());
    let hook = |name: &str, script: &str| {
        let handler = json!({ "exec": { "command": ["/bin/sh", "-c", script] } });
        json!({ "lifecycle": { name: handler } })
    };
    // It is to hear SIGTERM: a hook that is slow to start here must not run out of time.
    let patient = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
    let pod = Pod::new("hooks")
        .with("terminationGracePeriodSeconds", json!(60))
        .container_with("early", &tools, patient, hook("postStart", "echo no; exit 5"))
        .container_with(
            "late",
            &tools,
            "until [ -e /tmp/go ]; do sleep 0.1; done; echo one; echo two; exit 3",
            json!({ "terminationMessagePolicy": "FallbackToLogsOnError" }),
        )
        .container_with("stubborn", &tools, patient, hook("preStop", "exit 6"));
    host.try_create(&pod)?;
    let group = host.wait_group("hooks", "the end of one", |group| has_ended(group, "early"))?;
    let failed = events(&group, "FailedPostStartHook").join("\n");
    ensure!(failed.contains("PostStartHook failed: no"), "{group}");
    host.exec("hooks", "late", &["/bin/touch", "/tmp/go"])?
        .success()?;
    let group = host.wait_group("hooks", "the end of another", |group| has_ended(group, "late"))?;
    let end = &status(&group, "late")?["state"]["Terminated"];
    ensure!(
        end["exit_code"] == 3 && end["message"] == "one\ntwo",
        "it ended so: {end}"
    );
    host.ecictl(&["restart", "hooks"])?.success()?;
    let group = host.wait_group("hooks", "the hook's failure", |group| {
        !events(group, "FailedPreStopHook").is_empty()
    })?;
    let failed = events(&group, "FailedPreStopHook").join("\n");
    ensure!(failed.contains("exited with 6"), "{failed}");
    host.remove("hooks")
}
