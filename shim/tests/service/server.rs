//! The process around the services: start, delete, and events for containerd.

use std::{
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Output},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{DeleteResponse, Empty},
    events::task::{TaskExit, TaskOOM},
    sandbox_api::{PingRequest, ShutdownSandboxRequest},
    sandbox_async::SandboxClient,
    shim::events::ForwardRequest,
    shim_async::{Client, Events, create_events},
};
use protobuf::Message;
use shim::persist::{Bundle, ProcessId, SHIM_PID_FILE};
use tokio::sync::watch;
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use crate::{
    bench::{Bench, soon},
    fake_vmm::Behaviour,
};

fn shim(bundle: &Path, sockets: &Path, action: &str) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_containerd-shim-eci-v2"))
        .args([
            "-namespace",
            "ns",
            "-id",
            "s1",
            "-address",
            "/run/containerd/containerd.sock",
            "-socket-dir",
        ])
        .arg(sockets)
        .arg(action)
        .current_dir(bundle)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

async fn gone(process: ProcessId) {
    let ended = async {
        while process.is_alive() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended)
        .await
        .expect("the process ends");
}

#[tokio::test]
async fn start_leaves_a_server_that_shutdown_ends_without_a_trace() {
    let (bundle_dir, sockets) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let address = String::from_utf8(shim(bundle_dir.path(), sockets.path(), "start").stdout).unwrap();
    let bundle = Bundle::new(bundle_dir.path());
    assert_eq!(bundle.read_address(), Some(address.clone()));
    let process = bundle.read_process(SHIM_PID_FILE).unwrap();
    // A second start finds the first one's server.
    assert_eq!(
        shim(bundle_dir.path(), sockets.path(), "start").stdout,
        address.as_bytes()
    );
    let client = SandboxClient::new(Client::connect(&address).await.unwrap());
    let ping = PingRequest {
        sandbox_id: "s1".into(),
        ..Default::default()
    };
    client.ping_sandbox(soon(), &ping).await.unwrap();
    let request = ShutdownSandboxRequest {
        sandbox_id: "s1".into(),
        ..Default::default()
    };
    client.shutdown_sandbox(soon(), &request).await.unwrap();
    gone(process).await;
    let left: Vec<_> = std::fs::read_dir(bundle_dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["shim.log"]);
    assert_eq!(std::fs::read_dir(sockets.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn delete_cleans_up_after_a_killed_shim() {
    let (bundle_dir, sockets) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    shim(bundle_dir.path(), sockets.path(), "start");
    let process = Bundle::new(bundle_dir.path())
        .read_process(SHIM_PID_FILE)
        .unwrap();
    for _ in 0..2 {
        let output = shim(bundle_dir.path(), sockets.path(), "delete");
        let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(response.exit_status, 137);
        assert!(!process.is_alive());
        assert_eq!(std::fs::read_dir(sockets.path()).unwrap().count(), 0);
    }
}

#[derive(Clone, Default)]
struct Containerd {
    seen: Arc<Mutex<Vec<ForwardRequest>>>,
    count: watch::Sender<usize>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.seen.lock().unwrap().push(request);
        self.count.send_modify(|count| *count += 1);
        Ok(Empty::new())
    }
}

#[tokio::test]
async fn events_arrive_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events");
    let containerd = Containerd::default();
    let listener = Listener::try_from(UnixListener::bind(&path).unwrap()).unwrap();
    let service = create_events(Arc::new(containerd.clone()));
    let mut server = Server::new().add_listener(listener).register_service(service);
    server.start().await.unwrap();
    // As containerd gives it: a path without a scheme.
    let address = path.to_str().unwrap().to_owned();
    let bench = Bench::with(Behaviour::Boots, Duration::from_secs(30), false, Some(address)).await;
    bench.create_sandbox().await;
    bench.start_sandbox().await.unwrap();
    bench
        .create_task(&bench.task_request("c1", "read x; exit 4"))
        .await;
    bench.start_task("c1", "").await.unwrap();
    bench.wait_task("c1", "").await;
    bench.delete_task("c1", "").await.unwrap();
    bench.create_task(&bench.task_request("c2", "sleep 1000")).await;
    bench.start_task("c2", "").await.unwrap();
    bench
        .task
        .exec(soon(), &bench.exec_request("c2", "e1", &["true"]))
        .await
        .unwrap();
    bench.start_task("c2", "e1").await.unwrap();
    bench.wait_task("c2", "e1").await;
    bench.delete_task("c2", "e1").await.unwrap();
    // One of a container that is not there is dropped.
    bench
        .vm()
        .guest
        .oom
        .send_modify(|kills| kills.extend(["nobody".into(), "c2".into()]));
    let expected = [
        "create",
        "start",
        "exit",
        "delete",
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "delete",
        "oom",
    ];
    let mut count = containerd.count.subscribe();
    let all = count.wait_for(|count| *count >= expected.len());
    tokio::time::timeout(Duration::from_secs(20), all)
        .await
        .unwrap()
        .unwrap();
    let seen = containerd.seen.lock().unwrap();
    let topics: Vec<&str> = seen
        .iter()
        .map(|request| request.envelope.topic.strip_prefix("/tasks/").unwrap())
        .collect();
    assert_eq!(topics, expected);
    let exit = &seen[2].envelope;
    assert_eq!(
        (exit.namespace.as_str(), exit.event.type_url.as_str()),
        ("ns", "containerd.events.TaskExit")
    );
    let exit = TaskExit::parse_from_bytes(&exit.event.value).unwrap();
    assert_eq!(
        (exit.container_id.as_str(), exit.id.as_str(), exit.exit_status),
        ("c1", "c1", 4)
    );
    let oom = TaskOOM::parse_from_bytes(&seen[10].envelope.event.value).unwrap();
    assert_eq!(oom.container_id, "c2");
}
