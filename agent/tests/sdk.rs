//! Clients of others against the real doors with a recording engine behind them: the official ECI SDKs on port 111, the
//! Kubernetes client on port 10250. `ECI_SDK_PYTHON` names a Python that has them installed; by default it is the one that
//! `make sdks` makes.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

// The fake is written for the library's own tests; these are the paths it uses.
use agent::{
    api::{Addresses, Doors},
    config::{AccessKey, Config, Secret},
    engine, error, group, snapshots,
};
use tokio_util::sync::CancellationToken;

#[allow(dead_code, reason = "these tests need a part of it")]
#[path = "../src/api/fake.rs"]
mod fake;

struct Host {
    addresses: Addresses,
    shutdown: CancellationToken,
    _directory: tempfile::TempDir,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn start() -> Host {
    let directory = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.admin.socket = directory.path().join("agent.sock");
    config.state_dir = directory.path().to_owned();
    config.eci.listen = "127.0.0.1:0".parse().unwrap();
    config.eci.access_keys = vec![AccessKey {
        id: "testid".into(),
        secret: Secret("testsecret".into()),
    }];
    config.kubelet.listen = "127.0.0.1:0".parse().unwrap();
    config.kubelet.bearer_tokens = vec![Secret("s3cret".into())];
    config.readonly.enabled = false;
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let (ready, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let web = fake::group("eci-aaaaaaaaaaaaaaaaaaa1", "web", "shop");
            let engine = Arc::new(fake::FakeEngine::new(vec![web]));
            let doors = Doors::bind(&config, engine).await.unwrap();
            ready.send(doors.addresses()).unwrap();
            doors.serve(stop).await;
        });
    });
    Host {
        addresses: wait.recv().unwrap(),
        shutdown,
        _directory: directory,
    }
}

/// Runs a script of `tests/sdk`; its output is shown when it fails.
fn run(script: &str, arguments: &[&str]) {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = std::env::var_os("ECI_SDK_PYTHON")
        .map_or_else(|| project.join("target/sdk/bin/python"), std::path::PathBuf::from);
    assert!(
        python.exists(),
        "there is no {}: run `make sdks`, or name a Python with the SDKs in ECI_SDK_PYTHON",
        python.display()
    );
    let script = project.join("tests/sdk").join(script);
    let output = Command::new(python)
        .arg(script)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_official_eci_sdks_work_unchanged() {
    let host = start();
    let endpoint = host.addresses.eci.unwrap().to_string();
    run(
        "eci_sdk.py",
        &[
            "--endpoint",
            &endpoint,
            "--key",
            "testid",
            "--secret",
            "testsecret",
            "--fake",
        ],
    );
}

#[test]
fn the_kubernetes_client_reads_and_runs() {
    let host = start();
    let server = format!("https://{}", host.addresses.kubelet.unwrap());
    run(
        "kubelet_client.py",
        &[
            "--server",
            &server,
            "--token",
            "s3cret",
            "--namespace",
            "shop",
            "--pod",
            "web",
            "--container",
            "c",
            "--fake",
        ],
    );
}
