//! A running sandbox becomes larger and smaller.

use std::sync::atomic::Ordering;

use containerd_shim_protos::api::UpdateTaskRequest;
use protobuf::{Message, MessageField, well_known_types::any::Any};
use protocol::sandbox::{ResizeSandbox, SandboxOptions};
use ttrpc::Code;

use crate::{
    bench::{Bench, SANDBOX_ID, code, soon},
    fake_vmm::{Behaviour, Size},
};

const MIB: u64 = 1 << 20;

async fn sandbox() -> Bench {
    let bench = Bench::new(Behaviour::Boots).await;
    let options = SandboxOptions {
        n_vcpus: 1,
        n_possible_vcpus: 4,
        hotplug_mib: 512,
        ..bench.options()
    };
    bench.create_sandbox_with(&options).await.unwrap();
    bench.start_sandbox().await.unwrap();
    bench
}

async fn update(bench: &Bench, id: &str, type_url: &str, value: Vec<u8>) -> ttrpc::Result<()> {
    let resources = Any {
        type_url: type_url.into(),
        value,
        ..Default::default()
    };
    let request = UpdateTaskRequest {
        id: id.into(),
        resources: MessageField::some(resources),
        ..Default::default()
    };
    bench.task.update(soon(), &request).await.map(drop)
}

async fn resize(bench: &Bench, n_vcpus: u32, memory_mib: u64) -> ttrpc::Result<()> {
    let target = ResizeSandbox {
        n_vcpus,
        memory_mib,
        containers_memory_bytes: (memory_mib - 64) * MIB,
        deadline_ms: 200,
        ..Default::default()
    };
    let value = target.write_to_bytes().unwrap();
    update(bench, SANDBOX_ID, protocol::RESIZE_SANDBOX_TYPE_URL, value).await
}

async fn told(bench: &Bench) -> [String; 4] {
    let info = bench.status().await.info;
    ["n_vcpus", "memory_mib", "plugged_mib", "containers_memory_bytes"].map(|key| info[key].clone())
}

#[tokio::test]
async fn a_sandbox_grows_shrinks_and_is_limited_below_what_it_began_with() {
    let bench = sandbox().await;
    let (config, _) = bench.vm().started.lock().unwrap().clone().unwrap();
    assert_eq!(
        (config.n_vcpus, config.n_possible_vcpus, config.hotplug_mib),
        (1, 4, 512)
    );
    let size = || *bench.vm().size.lock().unwrap();
    let resized = || std::mem::take(&mut *bench.vm().guest.resized.lock().unwrap());

    resize(&bench, 3, 512).await.unwrap();
    let large = Size {
        n_vcpus: 3,
        plugged_mib: 256,
    };
    assert_eq!(size(), large);
    assert_eq!(resized(), [(3, 0)]);
    assert_eq!(told(&bench).await, ["3", "256", "256", "0"]);

    // What the containers may use is limited before memory is taken away, and not after.
    resize(&bench, 2, 384).await.unwrap();
    let smaller = Size {
        n_vcpus: 3,
        plugged_mib: 128,
    };
    assert_eq!(size(), smaller);
    assert_eq!(resized(), [(2, 320 * MIB), (2, 0)]);

    resize(&bench, 1, 128).await.unwrap();
    assert_eq!(size().plugged_mib, 0);
    assert_eq!(resized().last(), Some(&(1, 64 * MIB)));
    assert_eq!(told(&bench).await, ["1", "256", "0", "67108864"]);
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_a_guest_that_keeps_its_memory_is_told_of() {
    let bench = sandbox().await;
    for (n_vcpus, memory_mib, why) in [(5, 256, "1 to 4"), (1, 769, "up to 768")] {
        let (kind, message) = code(resize(&bench, n_vcpus, memory_mib).await.unwrap_err());
        assert_eq!(kind, Code::INVALID_ARGUMENT);
        assert!(message.contains(why), "{message}");
    }
    resize(&bench, 1, 512).await.unwrap();
    bench.vm().stuck_mib.store(200, Ordering::Relaxed);
    let (kind, message) = code(resize(&bench, 1, 256).await.unwrap_err());
    assert_eq!(kind, Code::DEADLINE_EXCEEDED);
    assert!(message.contains("200 MiB plugged of 0"), "{message}");
    assert_eq!(told(&bench).await, ["1", "256", "200", "0"]);
    // It can be made whole again.
    resize(&bench, 1, 512).await.unwrap();
    assert_eq!(told(&bench).await, ["1", "256", "256", "0"]);
}

#[tokio::test]
async fn a_container_is_given_other_limits() {
    let bench = sandbox().await;
    bench.create_task(&bench.task_request("c", "sleep 60")).await;
    let update = |id: &'static str, json: &'static str| {
        update(&bench, id, protocol::LINUX_RESOURCES_TYPE_URL, json.into())
    };
    let limits = r#"{"memory":{"limit":7}}"#;
    update("c", limits).await.unwrap();
    let updated = bench.vm().guest.updated.lock().unwrap().clone();
    assert_eq!(updated, [("c".to_owned(), limits.to_owned())]);
    let (kind, _) = code(update("nobody", limits).await.unwrap_err());
    assert_eq!(kind, Code::NOT_FOUND);
    let (kind, _) = code(update("c", "7").await.unwrap_err());
    assert_eq!(kind, Code::INVALID_ARGUMENT);
}
