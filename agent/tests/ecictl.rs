//! The program `ecictl` against real doors with a recording engine behind them.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::Arc,
};

use agent::{api::Doors, config::Config};
// The fake is written for the library's own tests; these are the paths it uses.
use agent::{engine, error, group, snapshots};
use tokio_util::sync::CancellationToken;

#[allow(dead_code, reason = "these tests need a part of it")]
#[path = "../src/api/fake.rs"]
mod fake;

const ID: &str = "eci-aaaaaaaaaaaaaaaaaaa1";

struct Agent {
    socket: PathBuf,
    shutdown: CancellationToken,
    directory: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn start() -> Agent {
    let directory = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.admin.socket = directory.path().join("agent.sock");
    config.state_dir = directory.path().to_owned();
    config.eci.enabled = false;
    config.kubelet.enabled = false;
    config.readonly.enabled = false;
    let shutdown = CancellationToken::new();
    let (ready, wait) = std::sync::mpsc::channel();
    let (socket, stop) = (config.admin.socket.clone(), shutdown.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let engine = Arc::new(fake::FakeEngine::new(vec![fake::group(ID, "web", "default")]));
            let doors = Doors::bind(&config, engine).await.unwrap();
            ready.send(()).unwrap();
            doors.serve(stop).await;
        });
    });
    wait.recv().unwrap();
    Agent {
        socket,
        shutdown,
        directory,
    }
}

impl Agent {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ecictl"));
        command.arg("--socket").arg(&self.socket).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        outcome(self.command(args).stdin(Stdio::null()).output().unwrap())
    }
}

fn outcome(output: Output) -> (i32, String, String) {
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn exit_codes_of_commands_are_passed_back() {
    let agent = start();
    for code in [0, 1, 3, 127, 137, 255] {
        let (got, stdout, stderr) = agent.run(&["exec", "web", "--", "exit", &code.to_string()]);
        assert_eq!((got, stdout.as_str(), stderr.as_str()), (code, "", "bye\n"));
    }
    let (code, _, stderr) = agent.run(&["exec", "nope", "--", "true"]);
    assert_eq!(code, 125);
    assert!(
        stderr.contains("No container group is called \"nope\""),
        "{stderr}"
    );
    let (code, _, stderr) = agent.run(&["exec", "web", "-c", "x", "--", "true"]);
    assert_eq!(code, 125);
    assert!(stderr.contains("has no container \"x\"; it has c"), "{stderr}");
}

#[test]
fn a_hundred_thousand_lines_come_through_in_order() {
    let agent = start();
    let (code, stdout, _) = agent.run(&["exec", "web", "--", "lines", "100000"]);
    assert_eq!(code, 0);
    let expected: String = (0..100_000).map(|line| format!("line {line}\n")).collect();
    assert!(stdout == expected, "{} bytes", stdout.len());
}

#[test]
fn standard_input_is_passed_on_to_its_end() {
    let agent = start();
    let mut child = agent
        .command(&["exec", "-i", "web", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let input: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut stdin = child.stdin.take().unwrap();
    let copy = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&copy).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    assert!(output.stdout == input, "{} bytes", output.stdout.len());
}

#[test]
fn groups_are_created_shown_and_deleted() {
    let agent = start();
    let manifest = agent.directory.path().join("pod.yaml");
    std::fs::write(
        &manifest,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: db}\nspec: {containers: [{name: c, image: busybox}]}\n",
    )
    .unwrap();
    let file = manifest.to_str().unwrap();
    let (code, id, stderr) = agent.run(&["create", "-f", file]);
    assert_eq!(code, 0, "{stderr}");
    assert!(id.starts_with("eci-") && id.ends_with('\n'), "{id}");
    assert!(stderr.contains("Started it"), "{stderr}");
    let (_, list, _) = agent.run(&["ps"]);
    assert!(
        list.contains("default/db") && list.contains("default/web"),
        "{list}"
    );
    let (_, json, _) = agent.run(&["ps", "-o", "json"]);
    let parsed: Vec<agent::group::status::Group> = serde_json::from_str(&json).unwrap();
    assert_eq!(parsed.len(), 2);
    assert!(agent.run(&["describe", "db"]).1.contains("Container c"));
    assert!(agent.run(&["events", "db"]).1.contains("Pulled"));
    assert!(agent.run(&["top"]).1.contains("web"));
    assert_eq!(
        agent.run(&["logs", "db", "--tail", "3"]).1,
        "log 0\nlog 1\nlog 2\n"
    );
    assert_eq!(agent.run(&["rm", "db"]).0, 0);
    assert_eq!(agent.run(&["rm", "-f", "db"]).0, 0);
    let (code, _, stderr) = agent.run(&["rm", "db"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("\"db\""), "{stderr}");
}

/// Creates a group from standard input.
fn create(agent: &Agent, pod: &[u8]) -> (i32, String, String) {
    let mut child = agent
        .command(&["create", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(pod).unwrap();
    outcome(child.wait_with_output().unwrap())
}

#[test]
fn mistakes_of_a_manifest_are_shown() {
    let pod = b"apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec:\n  containers:\n  - {name: c, image: a}\n  - {name: c, image: a}\n";
    let (code, _, stderr) = create(&start(), pod);
    assert_eq!(code, 1);
    assert!(stderr.contains("spec.containers[1].name"), "{stderr}");
}

#[test]
fn a_setback_ends_the_wait_for_a_group_that_goes_on_trying() {
    let pod =
        b"apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {containers: [{name: c, image: missing}]}\n";
    let (code, stdout, stderr) = create(&start(), pod);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.contains("ImagePullFailed: No such image"), "{stderr}");
    assert!(stderr.contains("ecictl rm eci-"), "{stderr}");
}

#[test]
fn images_are_pulled_with_plain_lines() {
    let agent = start();
    let (code, stdout, stderr) = agent.run(&["image", "pull", "busybox"]);
    assert_eq!((code, stdout.as_str()), (0, "sha256:1\n"));
    assert!(stderr.contains("image: resolving"), "{stderr}");
    let (code, _, stderr) = agent.run(&["image", "pull", "missing"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("No such image"), "{stderr}");
    assert!(
        agent
            .run(&["image", "ls"])
            .1
            .contains("docker.io/library/busybox:latest")
    );
    assert_eq!(agent.run(&["image", "rm", "x"]).0, 0);
}

#[test]
fn an_agent_that_does_not_run_is_named() {
    let output = Command::new(env!("CARGO_BIN_EXE_ecictl"))
        .args(["--socket", "/nonexistent/agent.sock", "ps"])
        .output()
        .unwrap();
    let (code, _, stderr) = outcome(output);
    assert_eq!(code, 1);
    assert!(stderr.contains("/nonexistent/agent.sock"), "{stderr}");
}

#[test]
fn completion_scripts_are_printed() {
    let agent = start();
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, _) = agent.run(&["completion", shell]);
        assert!(code == 0 && script.contains("ecictl"), "{shell}");
    }
}
