//! A shim in this process, served on a real socket, and what a caller does with it.

use std::{
    fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, DeleteRequest, ExecProcessRequest, Mount, StartRequest, WaitRequest},
    sandbox_api::{CreateSandboxRequest, SandboxStatusRequest, SandboxStatusResponse, StartSandboxRequest},
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use protocol::sandbox::SandboxOptions;
use shim::{
    events::Publisher,
    persist::Bundle,
    run,
    sandbox::{SandboxHandle, steps::HostConfig},
};
use tempfile::TempDir;
use ttrpc::{Code, r#async::Server, context};

use crate::fake_vmm::{Behaviour, FakeVm, launcher};

pub(crate) const SANDBOX_ID: &str = "sandbox-1";

/// The bench. Field order is drop order.
pub(crate) struct Bench {
    pub(crate) handle: SandboxHandle,
    pub(crate) task: TaskClient,
    pub(crate) sandbox: SandboxClient,
    _server: Server,
    vm: Arc<Mutex<Option<Arc<FakeVm>>>>,
    pub(crate) dir: TempDir,
}

/// A generous deadline: nothing here takes long, and a shim that hangs must fail its test.
pub(crate) fn soon() -> context::Context {
    context::with_duration(Duration::from_secs(60))
}

pub(crate) fn code(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other:?}"),
    }
}

impl Bench {
    pub(crate) async fn new(behaviour: Behaviour) -> Self {
        Self::with(behaviour, Duration::from_secs(30), false, None).await
    }

    pub(crate) async fn with(
        behaviour: Behaviour,
        start_timeout: Duration,
        hang_signals: bool,
        events: Option<String>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for file in ["kernel", "initrd", "vmm", "image", "layer"] {
            fs::write(dir.path().join(file), vec![1; 5000]).unwrap();
        }
        fs::File::create(dir.path().join("scratch"))
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        let (launcher, vm) = launcher(behaviour, hang_signals);
        let host = HostConfig {
            kvm_path: "/dev/null".into(),
            start_timeout,
            launcher,
        };
        let publisher = Publisher::new(events, "ns".into());
        let handle = SandboxHandle::new(Bundle::new(dir.path()), host, publisher);
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = run::serve(SANDBOX_ID, listener, &handle).await.unwrap();
        let client = Client::connect(&format!("unix://{}", socket.display()))
            .await
            .unwrap();
        Self {
            handle,
            task: TaskClient::new(client.clone()),
            sandbox: SandboxClient::new(client),
            _server: server,
            vm,
            dir,
        }
    }

    /// With a sandbox that runs.
    pub(crate) async fn started() -> Self {
        let bench = Self::new(Behaviour::Boots).await;
        bench.create_sandbox().await;
        bench.start_sandbox().await.unwrap();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn vm(&self) -> Arc<FakeVm> {
        self.vm.lock().unwrap().clone().expect("a VM was launched")
    }

    pub(crate) fn options(&self) -> SandboxOptions {
        SandboxOptions {
            n_vcpus: 2,
            memory_mib: 256,
            hostname: "web".into(),
            scratch_path: self.text("scratch"),
            kernel_path: self.text("kernel"),
            initrd_path: self.text("initrd"),
            vmm_path: self.text("vmm"),
            kernel_args: "debug".into(),
            ..Default::default()
        }
    }

    pub(crate) async fn create_sandbox(&self) {
        self.create_sandbox_with(&self.options()).await.unwrap();
    }

    pub(crate) async fn create_sandbox_with(&self, options: &SandboxOptions) -> ttrpc::Result<()> {
        let packed = Any {
            type_url: protocol::SANDBOX_OPTIONS_TYPE_URL.into(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let request = CreateSandboxRequest {
            sandbox_id: SANDBOX_ID.into(),
            options: MessageField::some(packed),
            ..Default::default()
        };
        self.sandbox.create_sandbox(soon(), &request).await.map(drop)
    }

    pub(crate) async fn start_sandbox(&self) -> ttrpc::Result<()> {
        let request = StartSandboxRequest {
            sandbox_id: SANDBOX_ID.into(),
            ..Default::default()
        };
        self.sandbox.start_sandbox(soon(), &request).await.map(drop)
    }

    pub(crate) async fn status(&self) -> SandboxStatusResponse {
        let request = SandboxStatusRequest {
            sandbox_id: SANDBOX_ID.into(),
            verbose: true,
            ..Default::default()
        };
        self.sandbox.sandbox_status(soon(), &request).await.unwrap()
    }

    /// A FIFO of this name; its path.
    pub(crate) fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A task that runs `sh -c script`.
    pub(crate) fn task_request(&self, id: &str, script: &str) -> CreateTaskRequest {
        let bundle = self.path(&format!("bundle-{id}"));
        fs::create_dir_all(&bundle).unwrap();
        let config = serde_json::json!({"process": {"args": ["sh", "-c", script]}});
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        CreateTaskRequest {
            id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            rootfs: vec![Mount {
                type_: "erofs".into(),
                source: self.text("image"),
                options: vec![format!("device={}", self.text("layer"))],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    pub(crate) async fn create_task(&self, request: &CreateTaskRequest) {
        self.task.create(soon(), request).await.unwrap();
    }

    pub(crate) async fn start_task(&self, id: &str, exec_id: &str) -> ttrpc::Result<()> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.start(soon(), &request).await.map(drop)
    }

    pub(crate) async fn wait_task(&self, id: &str, exec_id: &str) -> u32 {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.wait(soon(), &request).await.unwrap().exit_status
    }

    pub(crate) async fn delete_task(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task
            .delete(soon(), &request)
            .await
            .map(|response| response.exit_status)
    }

    pub(crate) fn exec_request(&self, id: &str, exec_id: &str, args: &[&str]) -> ExecProcessRequest {
        let spec = serde_json::json!({"args": args});
        ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: MessageField::some(Any {
                value: spec.to_string().into_bytes(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// Reads a FIFO to its end.
pub(crate) fn read_fifo(path: impl AsRef<Path>) -> tokio::task::JoinHandle<Vec<u8>> {
    let path = path.as_ref().to_owned();
    tokio::task::spawn_blocking(move || fs::read(path).unwrap())
}
