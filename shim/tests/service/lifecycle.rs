//! Sandboxes and processes: states, exit codes, and every way to die.

use std::time::{Duration, Instant};

use containerd_shim_protos::{
    api::{
        KillRequest, PidsRequest, ShutdownRequest, StateRequest, StatsRequest, Status, UpdateTaskRequest,
        WaitRequest,
    },
    cgroups_v2::metrics::Metrics,
    sandbox_api::{
        PingRequest, SandboxMetricsRequest, ShutdownSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
    },
};
use protobuf::{Message, well_known_types::any::Any};
use protocol::{
    guest::{File, PutFilesRequest, SandboxStatsResponse},
    sandbox::{AttachVolume, NfsDirectory},
};
use ttrpc::Code;
use vmm::config::{Extent, SliceDisk};

use crate::{
    bench::{Bench, SANDBOX_ID, code, soon},
    fake_vmm::Behaviour,
};

fn stop(timeout_secs: u32) -> StopSandboxRequest {
    StopSandboxRequest {
        sandbox_id: SANDBOX_ID.into(),
        timeout_secs,
        ..Default::default()
    }
}

async fn wait_sandbox(bench: &Bench) -> u32 {
    let request = WaitSandboxRequest {
        sandbox_id: SANDBOX_ID.into(),
        ..Default::default()
    };
    bench
        .sandbox
        .wait_sandbox(soon(), &request)
        .await
        .unwrap()
        .exit_status
}

pub(crate) async fn state(bench: &Bench, id: &str, exec_id: &str) -> (Status, u32) {
    let request = StateRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    };
    let state = bench.task.state(soon(), &request).await.unwrap();
    (state.status.unwrap(), state.exit_status)
}

async fn kill(bench: &Bench, id: &str, signal: u32) -> ttrpc::Result<()> {
    let request = KillRequest {
        id: id.into(),
        signal,
        ..Default::default()
    };
    bench.task.kill(soon(), &request).await.map(drop)
}

#[tokio::test]
async fn a_sandbox_from_create_to_shutdown() {
    let bench = Bench::new(Behaviour::Boots).await;
    assert_eq!(
        code(bench.start_sandbox().await.unwrap_err()).0,
        Code::FAILED_PRECONDITION
    );
    bench.create_sandbox().await;
    assert_eq!(bench.status().await.state, "SANDBOX_NOTREADY");
    bench.start_sandbox().await.unwrap();
    let status = bench.status().await;
    assert_eq!(
        (status.state.as_str(), status.info["phase"].as_str()),
        ("SANDBOX_READY", "ready")
    );
    assert_eq!(status.info["guest_ready_us"], "1234");

    let (config, n_fds) = bench.vm().started.lock().unwrap().clone().unwrap();
    assert_eq!((config.n_vcpus, config.memory_mib, n_fds), (2, 256, 5));
    assert!(config.kernel_args.ends_with(" debug"), "{}", config.kernel_args);
    let scratch = Extent {
        disk_offset_bytes: 1 << 20,
        file_offset_bytes: 0,
        length_bytes: 1 << 30,
    };
    assert_eq!(config.read_write_extents, [scratch]);
    let configured = bench.vm().guest.configured.lock().unwrap().clone().unwrap();
    assert_eq!(configured.hostname, "web");
    assert!(configured.entropy.len() >= 32 && configured.entropy.iter().any(|byte| *byte != 0));
    assert_eq!(
        (configured.scratch.disk.as_str(), configured.scratch.partition),
        ("vdb", 1)
    );

    let ping = PingRequest {
        sandbox_id: "other".into(),
        ..Default::default()
    };
    assert_eq!(
        code(bench.sandbox.ping_sandbox(soon(), &ping).await.unwrap_err()).0,
        Code::NOT_FOUND
    );
    let request = SandboxMetricsRequest {
        sandbox_id: SANDBOX_ID.into(),
        ..Default::default()
    };
    let metrics = bench
        .sandbox
        .sandbox_metrics(soon(), &request)
        .await
        .unwrap()
        .metrics
        .unwrap();
    assert_eq!(metrics.data.type_url, "eci.guest.v1.SandboxStatsResponse");
    let stats = SandboxStatsResponse::parse_from_bytes(&metrics.data.value).unwrap();
    assert_eq!(stats.memory_total_bytes, 99);

    bench.sandbox.stop_sandbox(soon(), &stop(5)).await.unwrap();
    assert_eq!(wait_sandbox(&bench).await, 0);
    let status = bench.status().await;
    assert_eq!(
        (status.state.as_str(), status.info["exit_reason"].as_str()),
        ("SANDBOX_NOTREADY", "shutdown")
    );
    let request = ShutdownSandboxRequest {
        sandbox_id: SANDBOX_ID.into(),
        ..Default::default()
    };
    bench.sandbox.shutdown_sandbox(soon(), &request).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), bench.handle.shutdown_asked())
        .await
        .unwrap();
}

#[tokio::test]
async fn processes_run_and_their_exit_codes_arrive() {
    let bench = Bench::started().await;
    bench.create_task(&bench.task_request("c1", "exit 3")).await;
    assert_eq!(state(&bench, "c1", "").await.0, Status::CREATED);
    bench.start_task("c1", "").await.unwrap();
    assert_eq!(bench.wait_task("c1", "").await, 3);
    assert_eq!(state(&bench, "c1", "").await, (Status::STOPPED, 3));
    // Wait may come later, and more than once.
    assert_eq!(bench.wait_task("c1", "").await, 3);
    assert_eq!(
        code(bench.start_task("c1", "").await.unwrap_err()).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(code(kill(&bench, "c1", 9).await.unwrap_err()).0, Code::NOT_FOUND);
    assert_eq!(bench.delete_task("c1", "").await.unwrap(), 3);
    assert_eq!(
        code(bench.delete_task("c1", "").await.unwrap_err()).0,
        Code::NOT_FOUND
    );

    bench.create_task(&bench.task_request("c2", "sleep 1000")).await;
    let again = bench.task.create(soon(), &bench.task_request("c2", "true")).await;
    assert_eq!(code(again.unwrap_err()).0, Code::ALREADY_EXISTS);
    let early = bench
        .task
        .exec(soon(), &bench.exec_request("c2", "e0", &["true"]))
        .await;
    assert_eq!(code(early.unwrap_err()).0, Code::FAILED_PRECONDITION);
    bench.start_task("c2", "").await.unwrap();
    assert_eq!(
        code(bench.delete_task("c2", "").await.unwrap_err()).0,
        Code::FAILED_PRECONDITION
    );
    bench
        .task
        .exec(soon(), &bench.exec_request("c2", "e1", &["sh", "-c", "exit 42"]))
        .await
        .unwrap();
    bench.start_task("c2", "e1").await.unwrap();
    assert_eq!(bench.wait_task("c2", "e1").await, 42);
    assert_eq!(bench.delete_task("c2", "e1").await.unwrap(), 42);
    bench
        .task
        .exec(soon(), &bench.exec_request("c2", "e2", &["/no/such/program"]))
        .await
        .unwrap();
    let (missing, message) = code(bench.start_task("c2", "e2").await.unwrap_err());
    assert_eq!(missing, Code::NOT_FOUND);
    assert!(message.contains("/no/such/program"), "{message}");
    assert_eq!(bench.wait_task("c2", "e2").await, 127);
    let request = PidsRequest {
        id: "c2".into(),
        ..Default::default()
    };
    assert!(
        !bench
            .task
            .pids(soon(), &request)
            .await
            .unwrap()
            .processes
            .is_empty()
    );
    let request = StatsRequest {
        id: "c2".into(),
        ..Default::default()
    };
    let stats = bench.task.stats(soon(), &request).await.unwrap().stats.unwrap();
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert_eq!((metrics.cpu.usage_usec, metrics.memory_events.oom_kill), (77, 2));
    kill(&bench, "c2", 15).await.unwrap();
    assert_eq!(bench.wait_task("c2", "").await, 143);
    assert_eq!(bench.delete_task("c2", "").await.unwrap(), 143);
}

#[tokio::test]
async fn the_same_image_is_mapped_once() {
    let bench = Bench::started().await;
    let requests: Vec<_> = (0..20)
        .map(|n| bench.task_request(&format!("c{n}"), "true"))
        .collect();
    let creates = requests.iter().map(|request| bench.create_task(request));
    futures_util::future::join_all(creates).await;
    let vm = bench.vm();
    assert_eq!(*vm.n_add_commands.lock().unwrap(), 1);
    let slices = vm.guest.slices.lock().unwrap().clone();
    assert!(slices.iter().all(|slice| *slice == slices[0]));
    assert_eq!((slices[0].partition, slices[0].length_bytes), (1, 4 * 4096));
    let mapped: Vec<_> = vm.extents.lock().unwrap().clone();
    let extent = |disk_offset_bytes| Extent {
        disk_offset_bytes,
        file_offset_bytes: 0,
        length_bytes: 8192,
    };
    let begin = slices[0].offset_bytes;
    assert_eq!(
        mapped,
        [
            (SliceDisk::ReadOnly, extent(begin)),
            (SliceDisk::ReadOnly, extent(begin + 8192))
        ]
    );

    let mut other = bench.task_request("other", "true");
    other.rootfs[0].options.clear();
    bench.create_task(&other).await;
    assert_eq!(vm.guest.slices.lock().unwrap().last().unwrap().partition, 2);
}

#[tokio::test]
async fn an_orderly_stop_ends_processes_first() {
    let bench = Bench::started().await;
    bench.create_task(&bench.task_request("c1", "sleep 1000")).await;
    bench.create_task(&bench.task_request("c2", "true")).await;
    bench.start_task("c1", "").await.unwrap();
    let request = stop(10);
    let (stopped, ended) = tokio::join!(
        bench.sandbox.stop_sandbox(soon(), &request),
        bench.wait_task("c1", "")
    );
    stopped.unwrap();
    assert_eq!(ended, 143);
    // Never started: it died with the VM.
    assert_eq!(bench.wait_task("c2", "").await, 137);
    assert_eq!(wait_sandbox(&bench).await, 0);
    assert_eq!(bench.delete_task("c1", "").await.unwrap(), 143);
    let (late, _) = code(
        bench
            .task
            .create(soon(), &bench.task_request("c3", "true"))
            .await
            .unwrap_err(),
    );
    assert_eq!(late, Code::UNAVAILABLE);
}

#[tokio::test]
async fn every_wait_returns_when_the_vmm_dies() {
    let bench = Bench::started().await;
    for id in ["c1", "c2"] {
        bench.create_task(&bench.task_request(id, "sleep 1000")).await;
    }
    bench.start_task("c1", "").await.unwrap();
    bench
        .task
        .exec(soon(), &bench.exec_request("c1", "e1", &["sleep", "1000"]))
        .await
        .unwrap();
    bench.start_task("c1", "e1").await.unwrap();
    bench.vm().crash();
    for (id, exec_id) in [("c1", ""), ("c1", "e1"), ("c2", "")] {
        assert_eq!(bench.wait_task(id, exec_id).await, 137, "{id} {exec_id}");
    }
    assert_eq!(wait_sandbox(&bench).await, 137);
    let status = bench.status().await;
    assert_eq!(status.info["exit_reason"], "vmm_crash");
    assert_eq!(state(&bench, "c1", "e1").await, (Status::STOPPED, 137));
    assert_eq!(bench.delete_task("c1", "").await.unwrap(), 137);
    assert_eq!(bench.delete_task("c2", "").await.unwrap(), 137);
}

#[tokio::test]
async fn a_vm_whose_guest_api_goes_is_killed() {
    let bench = Bench::started().await;
    bench.create_task(&bench.task_request("c1", "sleep 1000")).await;
    bench.start_task("c1", "").await.unwrap();
    bench.vm().cut_guest();
    assert_eq!(bench.wait_task("c1", "").await, 137);
    // Who learns that a process has ended learns why.
    assert_eq!(bench.status().await.state, "SANDBOX_NOTREADY");
    assert_eq!(wait_sandbox(&bench).await, 137);
    assert_eq!(bench.status().await.info["exit_reason"], "guest_lost");
}

#[tokio::test]
async fn a_failed_start_says_why_and_leaves_nothing() {
    for (behaviour, expected_code, expected) in [
        (
            Behaviour::RefusesStart,
            Code::UNAVAILABLE,
            ["start_failed: open /dev/kvm: no such thing", "Kernel panic"],
        ),
        (
            Behaviour::Panics,
            Code::UNAVAILABLE,
            ["guest_panic", "Kernel panic - not syncing: no init"],
        ),
        (
            Behaviour::NeverReady,
            Code::DEADLINE_EXCEEDED,
            ["not ready within 1 s", "Kernel panic"],
        ),
        (
            Behaviour::DeafGuest,
            Code::DEADLINE_EXCEEDED,
            ["not ready within 1 s", "Kernel panic"],
        ),
        (
            Behaviour::Hangs,
            Code::DEADLINE_EXCEEDED,
            ["not ready within 1 s", "Kernel panic"],
        ),
    ] {
        let bench = Bench::with(behaviour, Duration::from_secs(1), false, None).await;
        std::fs::write(
            bench.path("console.log"),
            "Kernel panic - not syncing: no init\r\n",
        )
        .unwrap();
        bench.create_sandbox().await;
        let (refused, message) = code(bench.start_sandbox().await.unwrap_err());
        assert_eq!(refused, expected_code, "{message}");
        for part in expected {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
        let status = bench.status().await;
        assert_eq!(status.info["phase"], "stopped");
        assert!(status.info["console"].contains("Kernel panic"));
        assert_eq!(wait_sandbox(&bench).await, 137);
        assert!(!bench.path("vmm.pid").exists());
    }
}

#[tokio::test]
async fn files_of_volumes_are_put_into_the_guest() {
    let bench = Bench::new(Behaviour::Boots).await;
    bench.create_sandbox().await;
    let files = PutFilesRequest {
        volume: "conf".into(),
        files: vec![File {
            path: "a".into(),
            mode: 0o600,
            content: b"x".to_vec(),
            ..Default::default()
        }],
        gid: Some(7),
        ..Default::default()
    };
    let update = |id: &str, type_url: &str, value: Vec<u8>| UpdateTaskRequest {
        id: id.into(),
        resources: protobuf::MessageField::some(Any {
            type_url: type_url.into(),
            value,
            ..Default::default()
        }),
        ..Default::default()
    };
    let good = update(
        SANDBOX_ID,
        protocol::PUT_FILES_TYPE_URL,
        files.write_to_bytes().unwrap(),
    );
    let early = code(bench.task.update(soon(), &good).await.unwrap_err());
    assert_eq!(early.0, Code::FAILED_PRECONDITION, "{}", early.1);
    bench.start_sandbox().await.unwrap();
    bench.task.update(soon(), &good).await.unwrap();
    assert_eq!(*bench.vm().guest.files.lock().unwrap(), [files]);
    for (request, expected) in [
        (
            update("c1", protocol::PUT_FILES_TYPE_URL, Vec::new()),
            Code::UNIMPLEMENTED,
        ),
        (update(SANDBOX_ID, "other", Vec::new()), Code::UNIMPLEMENTED),
        (
            update(SANDBOX_ID, protocol::PUT_FILES_TYPE_URL, vec![255]),
            Code::INVALID_ARGUMENT,
        ),
    ] {
        let (refused, message) = code(bench.task.update(soon(), &request).await.unwrap_err());
        assert_eq!(refused, expected, "{message}");
    }
}

#[tokio::test]
async fn a_volume_on_a_server_is_the_guests_and_is_not_captured() {
    let bench = Bench::started().await;
    let volume = AttachVolume {
        volume: "v".into(),
        nfs: Some(NfsDirectory {
            address: "10.0.0.1".into(),
            server: "nas".into(),
            path: "/a".into(),
            read_only: true,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let request = UpdateTaskRequest {
        id: SANDBOX_ID.into(),
        resources: protobuf::MessageField::some(Any {
            type_url: protocol::ATTACH_VOLUME_TYPE_URL.into(),
            value: volume.write_to_bytes().unwrap(),
            ..Default::default()
        }),
        ..Default::default()
    };
    bench.task.update(soon(), &request).await.unwrap();
    let vm = bench.vm();
    let told = vm.guest.volumes.lock().unwrap()[0].clone();
    let nfs = told.nfs.unwrap();
    assert_eq!(
        (
            told.volume.as_str(),
            nfs.address.as_str(),
            nfs.server.as_str(),
            nfs.path.as_str(),
            nfs.read_only
        ),
        ("v", "10.0.0.1", "nas", "/a", true)
    );
    assert!(
        told.slice.is_none()
            && vm
                .extents
                .lock()
                .unwrap()
                .iter()
                .all(|(disk, _)| *disk != SliceDisk::ReadWrite)
    );
    let directory = tempfile::tempdir().unwrap();
    let capture = containerd_shim_protos::api::CheckpointTaskRequest {
        id: SANDBOX_ID.into(),
        path: directory.path().to_str().unwrap().into(),
        ..Default::default()
    };
    let (refused, message) = code(bench.task.checkpoint(soon(), &capture).await.unwrap_err());
    assert!(
        refused == Code::FAILED_PRECONDITION && message.contains("not captured"),
        "{refused:?}: {message}"
    );
}

#[tokio::test]
async fn volumes_are_attached_once_and_grow() {
    let bench = Bench::started().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    let attach = |name: &str, path: &std::path::Path| {
        let volume = AttachVolume {
            volume: name.into(),
            path: path.to_str().unwrap().into(),
            gid: Some(7),
            is_device: name == "w",
            ..Default::default()
        };
        UpdateTaskRequest {
            id: SANDBOX_ID.into(),
            resources: protobuf::MessageField::some(Any {
                type_url: protocol::ATTACH_VOLUME_TYPE_URL.into(),
                value: volume.write_to_bytes().unwrap(),
                ..Default::default()
            }),
            ..Default::default()
        }
    };
    for length in [1 << 20, 1 << 20, 3 << 20] {
        file.set_len(length).unwrap();
        bench.task.update(soon(), &attach("v", &path)).await.unwrap();
    }
    let other = directory.path().join("other");
    std::fs::File::create(&other).unwrap().set_len(5000).unwrap();
    bench.task.update(soon(), &attach("w", &other)).await.unwrap();
    let vm = bench.vm();
    let slices: Vec<_> = vm
        .guest
        .volumes
        .lock()
        .unwrap()
        .iter()
        .map(|volume| {
            let slice = volume.slice.clone().unwrap();
            assert_eq!(
                (slice.disk.as_str(), slice.fs_type.as_str(), volume.gid),
                ("vdb", "ext4", Some(7))
            );
            (
                volume.volume.clone(),
                volume.is_device,
                slice.partition,
                slice.offset_bytes,
                slice.length_bytes,
            )
        })
        .collect();
    let (v, w) = (slices[0].3, slices[2].3);
    assert_eq!(
        slices,
        [
            ("v".to_owned(), false, 2, v, 1 << 20),
            ("v".to_owned(), false, 2, v, 3 << 20),
            ("w".to_owned(), true, 3, w, 4096),
        ]
    );
    // What has grown is mapped behind what was there.
    let extents: Vec<_> = vm
        .extents
        .lock()
        .unwrap()
        .iter()
        .map(|(_, extent)| {
            (
                extent.disk_offset_bytes,
                extent.file_offset_bytes,
                extent.length_bytes,
            )
        })
        .collect();
    for extent in [(v, 0, 1 << 20), (v + (1 << 20), 1 << 20, 2 << 20), (w, 0, 4096)] {
        assert!(extents.contains(&extent), "{extent:?} is not in {extents:?}");
    }
    let refused = [
        (attach("v", &other), Code::FAILED_PRECONDITION, "another file"),
        (
            attach("x", std::path::Path::new("relative")),
            Code::INVALID_ARGUMENT,
            "path",
        ),
        (
            attach("x", directory.path()),
            Code::INVALID_ARGUMENT,
            "not a file",
        ),
    ];
    for (request, expected, why) in refused {
        let (refused, message) = code(bench.task.update(soon(), &request).await.unwrap_err());
        assert!(
            refused == expected && message.contains(why),
            "{refused:?}: {message}"
        );
    }
    let capture = containerd_shim_protos::api::CheckpointTaskRequest {
        id: SANDBOX_ID.into(),
        path: directory.path().to_str().unwrap().into(),
        ..Default::default()
    };
    let (refused, message) = code(bench.task.checkpoint(soon(), &capture).await.unwrap_err());
    assert!(
        refused == Code::FAILED_PRECONDITION && message.contains("not captured"),
        "{message}"
    );
}

#[tokio::test]
async fn a_start_can_be_stopped() {
    let bench = Bench::new(Behaviour::NeverReady).await;
    bench.create_sandbox().await;
    let begun = Instant::now();
    let (started, stopped) = tokio::join!(bench.start_sandbox(), async {
        bench.sandbox.stop_sandbox(soon(), &stop(0)).await
    });
    stopped.unwrap();
    let (refused, message) = code(started.unwrap_err());
    assert_eq!(refused, Code::UNAVAILABLE, "{message}");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_guest_that_does_not_answer_holds_up_one_call_only() {
    let bench = Bench::with(Behaviour::Boots, Duration::from_secs(30), true, None).await;
    bench.create_sandbox().await;
    bench.start_sandbox().await.unwrap();
    bench.create_task(&bench.task_request("c1", "sleep 1000")).await;
    bench.start_task("c1", "").await.unwrap();
    let (hung, others) = tokio::join!(kill(&bench, "c1", 9), async {
        for n in 0..10 {
            bench
                .task
                .exec(soon(), &bench.exec_request("c1", &format!("e{n}"), &["true"]))
                .await
                .unwrap();
        }
    });
    let () = others;
    let (refused, message) = code(hung.unwrap_err());
    assert_eq!(refused, Code::UNAVAILABLE, "{message}");
    bench.sandbox.stop_sandbox(soon(), &stop(0)).await.unwrap();
    assert_eq!(bench.wait_task("c1", "").await, 137);
}

#[tokio::test]
async fn requests_are_refused_by_field() {
    let bench = Bench::new(Behaviour::Boots).await;
    let mut options = bench.options();
    options.memory_mib = 1;
    let (refused, message) = code(bench.create_sandbox_with(&options).await.unwrap_err());
    assert_eq!(refused, Code::INVALID_ARGUMENT);
    assert!(message.contains("memory_mib is 1"), "{message}");
    let mut options = bench.options();
    options.kernel_path = "/no/kernel".into();
    let (_, message) = code(bench.create_sandbox_with(&options).await.unwrap_err());
    assert!(message.contains("kernel_path is /no/kernel"), "{message}");
    bench.create_sandbox().await;
    let (twice, _) = code(bench.create_sandbox_with(&bench.options()).await.unwrap_err());
    assert_eq!(twice, Code::ALREADY_EXISTS);
    bench.start_sandbox().await.unwrap();

    let good = bench.task_request("c1", "true");
    let refuse = async |change: &dyn Fn(&mut containerd_shim_protos::api::CreateTaskRequest),
                        expected: &str| {
        let mut request = good.clone();
        change(&mut request);
        let (refused, message) = code(bench.task.create(soon(), &request).await.unwrap_err());
        assert!(
            matches!(refused, Code::INVALID_ARGUMENT | Code::NOT_FOUND),
            "{message}"
        );
        assert!(message.contains(expected), "{expected:?} is not in {message:?}");
    };
    refuse(&|request| request.id = "a/b".into(), "id is \"a/b\"").await;
    refuse(
        &|request| request.stdout = "/dev/null".into(),
        "stdout is \"/dev/null\"",
    )
    .await;
    refuse(&|request| request.stdout = "cri://x/0.log".into(), "cri:///path").await;
    refuse(&|request| request.rootfs.clear(), "0 mounts").await;
    refuse(
        &|request| request.rootfs[0].source = "/no/image".into(),
        "/no/image",
    )
    .await;
    refuse(
        &|request| request.terminal = true,
        "terminal is true in the request",
    )
    .await;
    refuse(
        &|request| request.bundle = "/no/bundle".into(),
        "/no/bundle/config.json",
    )
    .await;
    // A refused id is free.
    bench.create_task(&good).await;
}

#[tokio::test]
async fn a_caller_that_hangs_up_loses_nothing() {
    let bench = Bench::started().await;
    bench.create_task(&bench.task_request("c1", "sleep 1000")).await;
    bench.start_task("c1", "").await.unwrap();
    let address = format!("unix://{}", bench.text("socket"));
    let other = containerd_shim_protos::shim_async::TaskClient::new(
        containerd_shim_protos::shim_async::Client::connect(&address)
            .await
            .unwrap(),
    );
    let request = WaitRequest {
        id: "c1".into(),
        ..Default::default()
    };
    let short = ttrpc::context::with_duration(Duration::from_millis(100));
    other.wait(short, &request).await.unwrap_err();
    drop(other);
    kill(&bench, "c1", 9).await.unwrap();
    assert_eq!(bench.wait_task("c1", "").await, 137);
    // The Task service alone does not end a shim whose sandbox runs.
    bench
        .task
        .shutdown(soon(), &ShutdownRequest::new())
        .await
        .unwrap();
    assert_eq!(bench.status().await.info["phase"], "ready");
}

/// Starts a sandbox from a template with two more possible vCPUs; its status.
async fn started_from_template(behaviour: Behaviour) -> (Bench, std::collections::HashMap<String, String>) {
    let bench = Bench::new(behaviour).await;
    for file in ["state", "memory"] {
        std::fs::write(bench.path(file), "captured").unwrap();
    }
    let mut options = bench.options();
    options.template = protobuf::MessageField::some(protocol::sandbox::Template {
        directory: bench.text(""),
        n_possible_vcpus: 4,
        ..Default::default()
    });
    bench.create_sandbox_with(&options).await.unwrap();
    bench.start_sandbox().await.unwrap();
    let info = bench.status().await.info;
    (bench, info)
}

#[tokio::test]
async fn a_sandbox_goes_on_from_a_template() {
    let (bench, info) = started_from_template(Behaviour::Boots).await;
    assert_eq!(info["start_kind"], "template");
    let phases = info["start_phases_us"]
        .split(' ')
        .filter_map(|phase| phase.split('=').next());
    assert_eq!(
        phases.collect::<Vec<_>>(),
        ["open", "spawn", "vm", "connect", "identity"]
    );
    assert!(!info.contains_key("template_refused"));
    let (config, n_fds) = bench.vm().started.lock().unwrap().clone().unwrap();
    let is_snapshot = matches!(
        config.origin,
        vmm::config::Origin::Snapshot { with_written: false }
    );
    assert!(is_snapshot, "{:?}", config.origin);
    assert_eq!((config.n_vcpus, config.n_possible_vcpus, n_fds), (2, 4, 5));
    let configured = bench.vm().guest.configured.lock().unwrap().clone().unwrap();
    assert!(configured.is_clone);
    assert_eq!(configured.n_vcpus, 2);
}

#[tokio::test]
async fn a_template_that_is_of_no_use_costs_a_boot_only() {
    for (behaviour, why) in [
        (Behaviour::RefusesSnapshot, "another processor"),
        (Behaviour::DiesOfSnapshot, "guest_panic"),
    ] {
        let (bench, info) = started_from_template(behaviour).await;
        assert_eq!(info["start_kind"], "boot");
        assert!(info["template_refused"].contains(why), "{info:?}");
        let (config, _) = bench.vm().started.lock().unwrap().clone().unwrap();
        assert_eq!((config.n_vcpus, config.n_possible_vcpus), (2, 2));
        let configured = bench.vm().guest.configured.lock().unwrap().clone().unwrap();
        assert!(!configured.is_clone);
    }
}

#[tokio::test]
async fn a_guest_that_is_ready_is_captured() {
    let bench = Bench::new(Behaviour::Boots).await;
    let directory = bench.path("template");
    std::fs::create_dir(&directory).unwrap();
    let mut options = bench.options();
    options.capture_directory = directory.to_str().unwrap().to_owned();
    options.template = protobuf::MessageField::some(protocol::sandbox::Template {
        n_possible_vcpus: 4,
        ..Default::default()
    });
    bench.create_sandbox_with(&options).await.unwrap();
    bench.start_sandbox().await.unwrap();
    assert_eq!(std::fs::read_to_string(directory.join("state")).unwrap(), "state");
    assert_eq!(
        std::fs::read_to_string(directory.join("memory")).unwrap(),
        "memory"
    );
    let status = bench.status().await;
    assert_eq!(status.info["exit_reason"], "captured");
    let (config, _) = bench.vm().started.lock().unwrap().clone().unwrap();
    assert_eq!((config.n_vcpus, config.n_possible_vcpus), (1, 4));
    assert!(
        bench.vm().guest.configured.lock().unwrap().is_none(),
        "it got an identity"
    );
}
