//! Snapshots of a running sandbox, and sandboxes that go on from one.

use std::path::Path;

use containerd_shim_protos::api::{CheckpointTaskRequest, CreateTaskRequest, Status};
use ttrpc::Code;

use crate::{
    bench::{Bench, SANDBOX_ID, code, soon},
    fake_vmm::Behaviour,
    lifecycle::state,
};

async fn checkpoint(bench: &Bench, id: &str, directory: &Path) -> ttrpc::Result<()> {
    let request = CheckpointTaskRequest {
        id: id.into(),
        path: directory.to_str().unwrap().into(),
        ..Default::default()
    };
    bench.task.checkpoint(soon(), &request).await.map(drop)
}

/// A sandbox in which two containers run.
async fn two_containers() -> Bench {
    let bench = Bench::started().await;
    for id in ["c1", "c2"] {
        bench.create_task(&bench.task_request(id, "sleep 1000")).await;
        bench.start_task(id, "").await.unwrap();
    }
    bench
}

fn captured_task(bench: &Bench, id: &str) -> CreateTaskRequest {
    CreateTaskRequest {
        checkpoint: "yes".into(),
        rootfs: Vec::new(),
        ..bench.task_request(id, "")
    }
}

#[tokio::test]
async fn a_running_sandbox_is_captured_and_goes_on() {
    let bench = two_containers().await;
    let directory = tempfile::tempdir().unwrap();
    checkpoint(&bench, SANDBOX_ID, directory.path()).await.unwrap();
    for (file, content) in [("state", "state"), ("memory", "memory")] {
        let written = std::fs::read_to_string(directory.path().join(file)).unwrap();
        assert_eq!(written, content);
    }
    let scratch = std::fs::metadata(directory.path().join("scratch")).unwrap();
    assert_eq!(scratch.len(), 1 << 30);
    let freezer = || bench.vm().guest.freezer.lock().unwrap().clone();
    assert_eq!(freezer(), ["freeze", "thaw"]);
    assert!(bench.status().await.info.contains_key("pause_us"));
    assert_eq!(state(&bench, "c1", "").await.0, Status::RUNNING);

    // What is refused leaves everything running.
    for (id, path, why) in [
        ("c1", directory.path(), "give \"sandbox-1\""),
        (SANDBOX_ID, Path::new("relative"), "absolute path"),
        (SANDBOX_ID, directory.path(), "exists"),
    ] {
        let (_, message) = code(checkpoint(&bench, id, path).await.unwrap_err());
        assert!(message.contains(why), "{message}");
    }
    assert_eq!(freezer(), ["freeze", "thaw"]);
    let empty = tempfile::tempdir().unwrap();
    bench.create_task(&bench.task_request("c3", "true")).await;
    let (refused, message) = code(checkpoint(&bench, SANDBOX_ID, empty.path()).await.unwrap_err());
    assert_eq!(refused, Code::FAILED_PRECONDITION);
    assert!(message.contains("\"c3\" is created"), "{message}");
}

#[tokio::test]
async fn a_clone_goes_on_once_each_captured_container_was_started() {
    let parent = two_containers().await;
    let directory = tempfile::tempdir().unwrap();
    checkpoint(&parent, SANDBOX_ID, directory.path()).await.unwrap();
    let clone = Bench::new(Behaviour::Boots).await;
    let mut options = parent.options();
    options.snapshot_directory = directory.path().to_str().unwrap().into();
    options.hostname = "clone".into();
    clone.create_sandbox_with(&options).await.unwrap();
    clone.start_sandbox().await.unwrap();
    assert_eq!(clone.status().await.info["start_kind"], "snapshot");
    let (config, n_fds) = clone.vm().started.lock().unwrap().clone().unwrap();
    let is_snapshot = matches!(
        config.origin,
        vmm::config::Origin::Snapshot { with_written: false }
    );
    assert!(is_snapshot, "{:?}", config.origin);
    // Image and layer; with kvm, state, memory, console and scratch.
    assert_eq!((config.read_only_extents.len(), n_fds), (2, 7));
    let guest = std::sync::Arc::clone(&clone.vm().guest);
    let configured = guest.configured.lock().unwrap().clone().unwrap();
    assert_eq!(
        (configured.hostname.as_str(), configured.is_clone),
        ("clone", true)
    );
    assert!(configured.scratch.is_none(), "it has one");

    let early = clone
        .task
        .create(soon(), &clone.task_request("new", "true"))
        .await
        .unwrap_err();
    assert_eq!(code(early).0, Code::FAILED_PRECONDITION);
    let unknown = clone
        .task
        .create(soon(), &captured_task(&clone, "c9"))
        .await
        .unwrap_err();
    assert_eq!(code(unknown).0, Code::NOT_FOUND);
    for id in ["c1", "c2"] {
        clone.create_task(&captured_task(&clone, id)).await;
        assert_eq!(guest.freezer.lock().unwrap().clone(), ["adopt"], "before {id}");
        clone.start_task(id, "").await.unwrap();
    }
    assert_eq!(guest.freezer.lock().unwrap().clone(), ["adopt", "thaw"]);
    assert_eq!(state(&clone, "c1", "").await.0, Status::RUNNING);
    assert_eq!(*clone.vm().n_add_commands.lock().unwrap(), 0, "mapped twice");
    // From here on it is a sandbox as any other.
    clone.create_task(&clone.task_request("new", "exit 3")).await;
    clone.start_task("new", "").await.unwrap();
    assert_eq!(clone.wait_task("new", "").await, 3);
}

#[tokio::test]
async fn a_snapshot_that_does_not_fit_is_refused_and_nothing_boots() {
    let parent = two_containers().await;
    let directory = tempfile::tempdir().unwrap();
    checkpoint(&parent, SANDBOX_ID, directory.path()).await.unwrap();
    let larger = protocol::sandbox::SandboxOptions {
        snapshot_directory: directory.path().to_str().unwrap().into(),
        memory_mib: 512,
        ..parent.options()
    };
    let refused = |options: protocol::sandbox::SandboxOptions, behaviour| async move {
        let clone = Bench::new(behaviour).await;
        clone.create_sandbox_with(&options).await.unwrap();
        let (_, message) = code(clone.start_sandbox().await.unwrap_err());
        message
    };
    let message = refused(larger.clone(), Behaviour::Boots).await;
    assert!(message.contains("256 MiB of memory, 512 are wanted"), "{message}");
    let same = protocol::sandbox::SandboxOptions {
        memory_mib: 256,
        ..larger
    };
    let message = refused(same.clone(), Behaviour::RefusesSnapshot).await;
    assert!(message.contains("another processor"), "{message}");
    std::fs::remove_file(directory.path().join("sandbox.json")).unwrap();
    let message = refused(same, Behaviour::Boots).await;
    assert!(message.contains("no snapshot's record"), "{message}");
}
