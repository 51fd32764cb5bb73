//! One life after the other, each with a kill one moment later, until a life has no such moment.

use std::thread;

use serde_json::{Value, json};

use crate::bench::{Bench, Victim};

const GROUP: &str = "g";

/// What is wanted of the group.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    First,
    /// The second container is another one, and what the file says that both have.
    Changed,
    /// And the group has twice the size.
    Large,
    /// And the guest has no such small limits.
    TooSmall,
}

fn manifest(restart_policy: &str, form: Form) -> String {
    let (cpu, memory) = match form {
        Form::Large => ("1", "2Gi"),
        Form::TooSmall => ("250m", "128Mi"),
        _ => ("500m", "512Mi"),
    };
    let container = |name: &str, command: Value| {
        let limits = json!({ "cpu": cpu, "memory": memory });
        let mounts = json!([{ "name": "words", "mountPath": "/words" }]);
        json!({
            "name": name, "image": "image", "command": command, "volumeMounts": mounts,
            "resources": { "limits": limits },
        })
    };
    let (beside, word) = if form != Form::First {
        (json!(["stay", "again"]), "two")
    } else {
        (json!(["stay"]), "one")
    };
    let file = json!({ "path": "word", "fieldRef": { "fieldPath": "metadata.annotations['word']" } });
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": GROUP, "annotations": { "word": word } },
        "spec": {
            "restartPolicy": restart_policy,
            "terminationGracePeriodSeconds": 1,
            "volumes": [{ "name": "words", "downwardAPI": { "items": [file] } }],
            "initContainers": [container("first", json!(["exit", "0"]))],
            "containers": [container("main", json!(["stay"])), container("beside", beside)],
        },
    })
    .to_string()
}

/// Asks until the agent answers; whether it was killed in between, in which case the wish may have been heard.
fn ask(bench: &Bench, method: &str, path: &str, body: &str) -> (u16, String, bool) {
    let mut repeated = false;
    loop {
        let generation = bench.wait_serving(0);
        match bench.ask(method, path, body) {
            Ok((status, text)) => return (status, text, repeated),
            Err(_) => {
                bench.wait_serving(generation);
                repeated = true;
            }
        }
    }
}

/// Follows the group until it fits, over the death of the agent. Nobody may forget it.
fn wait(bench: &Bench, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    loop {
        let generation = bench.wait_serving(0);
        if let Some(group) = bench.follow(GROUP, &fits) {
            return group;
        }
        match bench.ask("GET", &format!("/v1/groups/{GROUP}"), "") {
            Ok((404, text)) => panic!(
                "waiting for {what}, an acknowledged group is lost: {text}\n{}",
                bench.log()
            ),
            Ok(_) => {}
            Err(_) => {
                bench.wait_serving(generation);
            }
        }
    }
}

fn phase(group: &Value) -> &str {
    group["status"]["phase"].as_str().unwrap_or_default()
}

fn runs(group: &Value, index: usize) -> bool {
    group["status"]["containers"][index]["state"]["Running"].is_object()
}

fn died(group: &Value, index: usize) -> bool {
    group["status"]["containers"][index]["state"]["Terminated"]["reason"] == "SandboxDied"
}

fn all_run(group: &Value) -> bool {
    phase(group) == "Running" && runs(group, 0) && runs(group, 1)
}

/// What the documentation says a group may come to when its sandbox died under it.
fn is_documented(group: &Value, victim: Victim, restart_policy: &str) -> bool {
    let reason = group["status"]["reason"].as_str().unwrap_or_default();
    match (victim, restart_policy) {
        _ if all_run(group) => true,
        (Victim::Agent, _) => false,
        // The start of a sandbox broke off: it is tried again after a while.
        _ if phase(group) == "Pending" => reason == "SandboxStartFailed",
        // Its containers ran and are started again, in a new sandbox: after a while when it happened before.
        (_, "Always" | "OnFailure") => reason == "SandboxDied" && waits_again(group),
        // What an update begins anew runs, beside what died and is not started again.
        (_, _) if runs(group, 1) => died(group, 0),
        (_, _) => phase(group) == "Failed" && reason == "SandboxDied",
    }
}

fn waits_again(group: &Value) -> bool {
    let containers = group["status"]["containers"].as_array().into_iter().flatten();
    let mut reasons = containers.filter_map(|container| container["state"]["Waiting"]["reason"].as_str());
    reasons.any(|reason| reason == "CrashLoopBackOff")
}

/// A whole life; `true` when its agent came to the moment.
fn live(bench: &mut Bench, moment: u64, victim: Victim, restart_policy: &str) -> bool {
    bench.clear_log();
    bench.start(moment, victim);
    let of_group = format!("/v1/groups/{GROUP}");
    let (status, text, repeated) = ask(
        bench,
        "POST",
        "/v1/groups",
        &manifest(restart_policy, Form::First),
    );
    // Asked again after the agent was killed, it may be there already.
    assert!(
        status == 201 || (status == 409 && repeated),
        "create: {status} {text}"
    );
    let settled = wait(bench, "the start", |group| {
        is_documented(group, victim, restart_policy)
    });
    if all_run(&settled) {
        let code = bench.exec(GROUP, "main", &["exit", "3"]);
        assert!(
            code == 3 || bench.has_killed(),
            "exec ended with {code}\n{}",
            bench.log()
        );
        let runs = |group: &Value| group["status"]["containers"][0]["restart_count"].as_u64();
        let before = runs(&settled);
        let (status, text, _) = ask(bench, "POST", &format!("{of_group}/restart"), "");
        assert!(
            status == 200 || (status == 409 && victim != Victim::Agent && text.contains("Failed")),
            "restart: {status} {text}"
        );
        if status == 200 {
            let again = |group: &Value| {
                is_documented(group, victim, restart_policy) && (runs(group) > before || !all_run(group))
            };
            let settled = wait(bench, "the restart", again);
            if all_run(&settled)
                && let Some(settled) = update(bench, &settled, victim, restart_policy)
            {
                resize(bench, &settled, victim, restart_policy);
            }
        }
    }
    let (status, text, repeated) = ask(bench, "DELETE", &format!("{of_group}?grace=0"), "");
    assert!(
        status == 200 || (status == 404 && repeated),
        "delete: {status} {text}"
    );
    // Acknowledged: it ends without being asked again.
    loop {
        let generation = bench.wait_serving(0);
        let gone = |group: &Value| {
            assert!(phase(group) == "Terminating", "a deleted group is {group}");
            false
        };
        bench.follow(GROUP, gone);
        match bench.ask("GET", &of_group, "") {
            Ok((404, _)) => break,
            Ok(_) => {}
            Err(_) => {
                bench.wait_serving(generation);
            }
        }
    }
    let left = bench.leftovers();
    assert!(left.is_empty(), "left behind: {left:#?}\n{}", bench.log());
    bench.stop().0
}

/// Makes the second container another one, and changes a file that both have. What is acknowledged comes about, and the first
/// container is left alone.
fn update(bench: &Bench, before: &Value, victim: Victim, restart_policy: &str) -> Option<Value> {
    let path = format!("/v1/groups/{GROUP}/update");
    let (status, text, repeated) = ask(bench, "POST", &path, &manifest(restart_policy, Form::Changed));
    // Asked again after the agent was killed, it may be under way.
    let under_way = status == 409 && repeated && text.contains("Updating");
    let has_died = status == 409 && victim != Victim::Agent && text.contains("Failed");
    assert!(status == 200 || under_way || has_died, "update: {status} {text}");
    if has_died {
        return None;
    }
    let is_other = |group: &Value| group["spec"]["containers"][1]["command"] == json!(["stay", "again"]);
    let settled = wait(bench, "the update", |group| {
        is_other(group) && is_documented(group, victim, restart_policy)
    });
    let runs = |group: &Value, index: usize| group["status"]["containers"][index]["restart_count"].as_u64();
    if all_run(&settled) {
        assert!(runs(&settled, 1) > runs(before, 1), "{settled}");
    }
    if victim == Victim::Agent {
        assert_eq!(runs(&settled, 0), runs(before, 0), "{settled}");
    }
    if all_run(&settled) {
        let code = bench.exec(GROUP, "main", &["holds", "words", "word", "two"]);
        assert!(
            code == 0 || (code != 1 && bench.has_killed()),
            "the file is an old one, or exec failed: {code}\n{}",
            bench.log()
        );
    }
    all_run(&settled).then_some(settled)
}

/// The group becomes larger while it runs, and then is not made smaller than its guest can be.
fn resize(bench: &Bench, before: &Value, victim: Victim, restart_policy: &str) {
    let path = format!("/v1/groups/{GROUP}/update");
    let runs =
        |group: &Value| [0, 1].map(|index| group["status"]["containers"][index]["restart_count"].clone());
    let told = |group: &Value, reason: &str| {
        let events = group["status"]["events"].as_array().into_iter().flatten();
        events.into_iter().any(|event| event["reason"] == reason)
    };
    let ask = |form: Form| {
        let (status, text, repeated) = ask(bench, "POST", &path, &manifest(restart_policy, form));
        let under_way = status == 409 && repeated && text.contains("Updating");
        let has_died = status == 409 && victim != Victim::Agent && text.contains("Failed");
        assert!(status == 200 || under_way || has_died, "resize: {status} {text}");
        !has_died
    };
    if !ask(Form::Large) {
        return;
    }
    let large = |group: &Value| group["spec"]["size"]["cpu_milli"] == 2000;
    let settled = wait(bench, "the larger size", |group| {
        (large(group) || phase(group) == "Failed") && is_documented(group, victim, restart_policy)
    });
    if victim == Victim::Agent {
        assert_eq!(runs(&settled), runs(before), "{settled}");
        assert!(told(&settled, "Resized"), "{settled}");
    }
    if !all_run(&settled) || !ask(Form::TooSmall) {
        return;
    }
    let settled = wait(bench, "the end of what can't be", |group| {
        let is_renewed = !large(group) || phase(group) == "Failed";
        let is_over = told(group, "ResizeFailed") || (victim != Victim::Agent && is_renewed);
        is_over && phase(group) != "Updating" && is_documented(group, victim, restart_policy)
    });
    if victim == Victim::Agent {
        assert!(large(&settled), "{settled}");
        assert_eq!(runs(&settled), runs(before), "{settled}");
    }
}

/// Two at a time: odd moments on one bench, even ones on another.
fn every_moment(victim: Victim, restart_policy: &'static str) {
    let lives = |first: u64| {
        let mut bench = Bench::new();
        let mut moment = first;
        while live(&mut bench, moment, victim, restart_policy) {
            moment += 2;
        }
        moment
    };
    let ends = thread::scope(|scope| {
        let workers = [1, 2].map(|first| scope.spawn(move || lives(first)));
        workers.map(|worker| worker.join().unwrap())
    });
    println!("{victim:?}, {restart_policy}: lives with kills at moments up to {ends:?}");
    // Accepted, begun, run, restarted, ended, forgotten: each has a moment before and one after it.
    assert!(
        ends.iter().min() > Some(&20),
        "the store counted no more than {ends:?} moments"
    );
}

pub(crate) fn a_killed_agent_loses_nothing() {
    every_moment(Victim::Agent, "Always");
}

pub(crate) fn a_killed_shim_ends_a_group_that_is_not_restarted() {
    every_moment(Victim::Shim, "Never");
}

pub(crate) fn a_killed_vmm_ends_a_group_that_is_not_restarted() {
    every_moment(Victim::Vmm, "Never");
}

pub(crate) fn a_killed_vmm_is_a_failure_to_start_again_after() {
    every_moment(Victim::Vmm, "OnFailure");
}

pub(crate) fn a_killed_shim_costs_one_sandbox() {
    every_moment(Victim::Shim, "Always");
}

pub(crate) fn a_killed_vmm_costs_one_sandbox() {
    every_moment(Victim::Vmm, "Always");
}
