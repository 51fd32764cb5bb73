//! Talks to a guest init.

pub(crate) mod image;

use std::{path::PathBuf, time::Duration};

use protocol::{
    guest::{
        ConfigureSandboxRequest, ConfigureSandboxResponse, ContainerRequest, ContainerStatsResponse,
        CreateContainerRequest, CreateProcessRequest, Empty, ProcessRequest, ResizeTerminalRequest,
        SandboxStatsResponse, SignalProcessRequest, Slice, WaitProcessResponse,
    },
    guest_ttrpc::GuestClient,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};
use ttrpc::{Code, asynchronous::Client, context, proto::Status};

/// Nothing here takes longer, unless it hangs; an emulated machine is slow.
const DEADLINE: Duration = Duration::from_secs(120);

/// Stands for the kernel's log where the guest has no kernel of its own.
pub(crate) const KERNEL_LOG: &str = "kernel.log";

/// Runs one case, and removes what it left.
pub(crate) async fn run_case(guest: &Guest, case: impl AsyncFnOnce(&Guest)) {
    timeout(DEADLINE * 2, case(guest))
        .await
        .expect("the case ends in time");
    for id in ["c0", "c1", "c2"] {
        if guest.signal(id, "", 9, true).await.is_ok() {
            let _ = guest.wait(id, "").await;
        }
        let _ = guest.delete(id, "").await;
    }
}

/// A specification that runs `args` as root, with nothing taken away by the host.
pub(crate) fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "uts", "path": "/proc/1/ns/uts"},
            {"type": "network"}, {"type": "ipc"}, {"type": "cgroup"}]}
    })
}

/// A client of the guest API.
pub(crate) struct Guest {
    client: GuestClient,
    directory: PathBuf,
    /// What the guest init answered to its configuration.
    pub(crate) configured: ConfigureSandboxResponse,
}

fn code(error: ttrpc::Error) -> Code {
    status(error).code()
}

fn status(error: ttrpc::Error) -> Status {
    match error {
        ttrpc::Error::RpcStatus(status) => status,
        other => panic!("the guest init does not answer: {other}"),
    }
}

fn deadline() -> context::Context {
    context::with_duration(DEADLINE)
}

fn process(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

impl Guest {
    /// Connects to the sockets in `directory`.
    pub(crate) async fn attach(directory: &std::path::Path) -> Self {
        let address = format!("unix://{}", directory.join("api").display());
        Self {
            client: GuestClient::new(Client::connect(&address).await.unwrap()),
            directory: directory.to_owned(),
            configured: ConfigureSandboxResponse::new(),
        }
    }

    /// Connects to the sockets in `directory` and gives the guest its identity, and `n_vcpus` CPUs.
    pub(crate) async fn connect(directory: &std::path::Path, n_vcpus: u32) -> Self {
        let mut guest = Self::attach(directory).await;
        // Without an identity there are no containers.
        assert_eq!(
            guest.create("c1", &spec(&["true"])).await.unwrap_err(),
            Code::FAILED_PRECONDITION
        );
        assert_eq!(guest.freeze().await.unwrap_err(), Code::FAILED_PRECONDITION);
        let request = ConfigureSandboxRequest {
            hostname: "guest".into(),
            entropy: vec![1; 32],
            scratch: Some(Slice {
                disk: "vdb".into(),
                partition: 3,
                offset_bytes: image::SCRATCH_OFFSET,
                length_bytes: image::SCRATCH_BYTES,
                fs_type: "ext4".into(),
                ..Default::default()
            })
            .into(),
            n_vcpus,
            ..Default::default()
        };
        for (field, wrong) in [
            (
                "machine_id",
                ConfigureSandboxRequest {
                    machine_id: "x".into(),
                    ..Default::default()
                },
            ),
            (
                "n_vcpus",
                ConfigureSandboxRequest {
                    n_vcpus: 4000,
                    ..Default::default()
                },
            ),
        ] {
            let refused = guest.client.configure_sandbox(deadline(), &wrong).await;
            let refused = status(refused.unwrap_err());
            assert_eq!(refused.code(), Code::INVALID_ARGUMENT);
            assert!(refused.message().starts_with(field), "{refused}");
        }
        guest.configured = guest
            .client
            .configure_sandbox(deadline(), &request)
            .await
            .unwrap();
        assert!(guest.configured.ready_us > 0);
        let again = guest
            .client
            .configure_sandbox(deadline(), &request)
            .await
            .map_err(code);
        assert_eq!(again.unwrap_err(), Code::ALREADY_EXISTS);
        guest
    }

    pub(crate) async fn freeze(&self) -> Result<(), Code> {
        let response = self.client.freeze(deadline(), &Empty::new()).await;
        response.map(drop).map_err(code)
    }

    pub(crate) async fn thaw(&self) -> Result<(), Code> {
        let response = self.client.thaw(deadline(), &Empty::new()).await;
        response.map(drop).map_err(code)
    }

    pub(crate) async fn adopt(
        &self,
        request: &ConfigureSandboxRequest,
    ) -> Result<ConfigureSandboxResponse, Code> {
        self.client
            .adopt_identity(deadline(), request)
            .await
            .map_err(code)
    }

    /// Makes the kernel see a new VM generation id; false where that takes a restored VM.
    pub(crate) fn change_generation(&self) -> bool {
        let log = self.directory.join(KERNEL_LOG);
        let record = "5,1,1,-;random: crng reseeded due to virtual machine fork\n";
        log.exists()
            && std::fs::OpenOptions::new()
                .write(true)
                .open(log)
                .and_then(|mut log| std::io::Write::write_all(&mut log, record.as_bytes()))
                .is_ok()
    }

    /// What `script` prints in container `id`, which must run.
    pub(crate) async fn exec(&self, id: &str, script: &str) -> String {
        let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"]});
        self.create_process(id, "script", &process).await.unwrap();
        let mut out = self.stream(id, "script", "stdout").await;
        self.start(id, "script").await.unwrap();
        let text = out.text().await;
        self.wait(id, "script").await.unwrap();
        self.delete(id, "script").await.unwrap();
        text
    }

    pub(crate) async fn create(&self, id: &str, spec: &Value) -> Result<(), Code> {
        self.create_status(id, spec).await.map_err(|status| status.code())
    }

    pub(crate) async fn create_status(&self, id: &str, spec: &Value) -> Result<(), Status> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            rootfs: Some(Slice {
                disk: "vda".into(),
                partition: 7,
                offset_bytes: image::IMAGE_OFFSET,
                length_bytes: image::IMAGE_BYTES,
                fs_type: "erofs".into(),
                ..Default::default()
            })
            .into(),
            spec: spec.to_string().into_bytes(),
            ..Default::default()
        };
        self.client
            .create_container(deadline(), &request)
            .await
            .map(drop)
            .map_err(status)
    }

    pub(crate) async fn create_process(&self, id: &str, exec_id: &str, spec: &Value) -> Result<(), Code> {
        let request = CreateProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: spec.to_string().into_bytes(),
            ..Default::default()
        };
        self.client
            .create_process(deadline(), &request)
            .await
            .map(drop)
            .map_err(code)
    }

    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Status> {
        let response = self.client.start_process(deadline(), &process(id, exec_id)).await;
        response.map(|response| response.pid).map_err(status)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Result<WaitProcessResponse, Code> {
        self.client
            .wait_process(deadline(), &process(id, exec_id))
            .await
            .map_err(code)
    }

    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<(), Code> {
        let response = self
            .client
            .delete_process(deadline(), &process(id, exec_id))
            .await;
        response.map(drop).map_err(|error| {
            let status = status(error);
            eprintln!("delete {id} {exec_id}: {}", status.message());
            status.code()
        })
    }

    pub(crate) async fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Code> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
            all,
            ..Default::default()
        };
        self.client
            .signal_process(deadline(), &request)
            .await
            .map(drop)
            .map_err(code)
    }

    pub(crate) async fn resize(&self, id: &str, exec_id: &str, rows: u32, columns: u32) -> Result<(), Code> {
        let request = ResizeTerminalRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            rows,
            columns,
            ..Default::default()
        };
        self.client
            .resize_terminal(deadline(), &request)
            .await
            .map(drop)
            .map_err(code)
    }

    pub(crate) async fn pids(&self, id: &str) -> Vec<u32> {
        let request = ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .list_processes(deadline(), &request)
            .await
            .unwrap()
            .pids
    }

    pub(crate) async fn stats(&self, id: &str) -> ContainerStatsResponse {
        let request = ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client.container_stats(deadline(), &request).await.unwrap()
    }

    pub(crate) async fn sandbox_stats(&self) -> SandboxStatsResponse {
        self.client
            .sandbox_stats(deadline(), &Empty::new())
            .await
            .unwrap()
    }

    /// Waits for events after `after`: container and sequence number.
    pub(crate) async fn events(&self, after: u64) -> Vec<(String, u64)> {
        let request = protocol::guest::GetEventsRequest {
            after,
            ..Default::default()
        };
        let response = self.client.get_events(deadline(), &request).await.unwrap();
        response
            .events
            .into_iter()
            .map(|event| (event.container_id, event.sequence))
            .collect()
    }

    /// Number of the last event; 0 when there was none.
    pub(crate) async fn last_event(&self) -> u64 {
        let request = protocol::guest::GetEventsRequest::new();
        let brief = context::with_duration(Duration::from_millis(300));
        let response = self.client.get_events(brief, &request).await.unwrap_or_default();
        response.events.last().map_or(0, |event| event.sequence)
    }

    /// Connects a stream and waits for the acknowledgement.
    pub(crate) async fn stream(&self, id: &str, exec_id: &str, name: &str) -> Stream {
        let stream = self.try_stream(id, exec_id, name).await;
        stream.expect("the stream is acknowledged")
    }

    /// Connects a stream, unless the guest refuses it.
    pub(crate) async fn try_stream(&self, id: &str, exec_id: &str, name: &str) -> Option<Stream> {
        let mut stream = UnixStream::connect(self.directory.join("stdio")).await.unwrap();
        let header = json!({"container": id, "process": exec_id, "stream": name});
        stream.write_all(format!("{header}\n").as_bytes()).await.unwrap();
        let mut ack = [0];
        stream.read_exact(&mut ack).await.ok()?;
        assert_eq!(ack, [6]);
        Some(Stream {
            stream,
            seen: String::new(),
        })
    }

    /// Creates a container, runs it to its end with both outputs connected, and deletes it.
    pub(crate) async fn run_to_end(&self, id: &str, spec: &Value) -> (u32, String, String) {
        self.create_status(id, spec).await.unwrap();
        let (mut out, mut err) = (
            self.stream(id, "", "stdout").await,
            self.stream(id, "", "stderr").await,
        );
        self.start(id, "").await.unwrap();
        let (out, err, ended) = tokio::join!(out.text(), err.text(), self.wait(id, ""));
        self.delete(id, "").await.unwrap();
        (ended.unwrap().exit_status, out, err)
    }
}

/// A connected stream.
pub(crate) struct Stream {
    stream: UnixStream,
    seen: String,
}

impl Stream {
    pub(crate) async fn bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.stream.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    pub(crate) async fn text(&mut self) -> String {
        String::from_utf8(self.bytes().await).unwrap()
    }

    /// Reads until `text` was seen.
    pub(crate) async fn expect(&mut self, text: &str) {
        while !self.seen.contains(text) {
            let mut buffer = [0; 1024];
            let length = timeout(DEADLINE, self.stream.read(&mut buffer)).await;
            let length = length
                .unwrap_or_else(|_| panic!("{text:?} comes after {:?}", self.seen))
                .unwrap();
            assert!(length > 0, "{text:?} comes after {:?}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }

    /// The next line.
    #[allow(dead_code, reason = "each test program uses its part")]
    #[allow(dead_code, reason = "each test program uses its part")]
    pub(crate) async fn line(&mut self) -> String {
        if !self.seen.contains('\n') {
            self.expect("\n").await;
        }
        let end = self.seen.find('\n').expect("it was waited for");
        let rest = self.seen.split_off(end + 1);
        std::mem::replace(&mut self.seen, rest)
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn finish(&mut self) {
        self.stream.shutdown().await.unwrap();
    }
}
