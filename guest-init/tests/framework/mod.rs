//! Runs the guest init's service without a virtual machine, and talks to it.

mod image;
mod server;

use std::{path::PathBuf, sync::Mutex, time::Duration};

use protocol::{
    guest::{
        ConfigureSandboxRequest, ContainerRequest, ContainerStatsResponse, CreateContainerRequest,
        CreateProcessRequest, Empty, ProcessRequest, ResizeTerminalRequest, SandboxStatsResponse,
        SignalProcessRequest, Slice, WaitProcessResponse,
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

pub use self::server::serve;

/// Nothing here takes longer, unless it hangs.
const DEADLINE: Duration = Duration::from_secs(30);
/// One guest at a time: loop devices are few.
static TURN: Mutex<()> = Mutex::new(());

/// Runs `test` with a guest of its own; says so when this machine cannot have one.
pub fn run(test: impl AsyncFnOnce(Guest)) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(missing) = server::missing() {
        eprintln!("NOT RUN: this needs {missing}");
        return;
    }
    let server = server::Server::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let guest = Guest::connect(server.directory()).await;
        timeout(DEADLINE, test(guest))
            .await
            .expect("the test ends in time");
    });
}

/// A specification that runs `args` as root, with nothing taken away by the host.
pub fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "uts", "path": "/proc/1/ns/uts"},
            {"type": "network"}, {"type": "ipc"}, {"type": "cgroup"}]}
    })
}

/// A client of the guest API.
pub struct Guest {
    client: GuestClient,
    stdio: PathBuf,
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
    async fn connect(directory: &std::path::Path) -> Self {
        let address = format!("unix://{}", directory.join("api").display());
        let guest = Self {
            client: GuestClient::new(Client::connect(&address).await.unwrap()),
            stdio: directory.join("stdio"),
        };
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
            ..Default::default()
        };
        let response = guest
            .client
            .configure_sandbox(deadline(), &request)
            .await
            .unwrap();
        assert!(response.ready_us > 0);
        let again = guest
            .client
            .configure_sandbox(deadline(), &request)
            .await
            .map_err(code);
        assert_eq!(again.unwrap_err(), Code::ALREADY_EXISTS);
        guest
    }

    pub async fn create(&self, id: &str, spec: &Value) -> Result<(), Code> {
        self.create_status(id, spec).await.map_err(|status| status.code())
    }

    pub async fn create_status(&self, id: &str, spec: &Value) -> Result<(), Status> {
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

    pub async fn create_process(&self, id: &str, exec_id: &str, spec: &Value) -> Result<(), Code> {
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

    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Status> {
        let response = self.client.start_process(deadline(), &process(id, exec_id)).await;
        response.map(|response| response.pid).map_err(status)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<WaitProcessResponse, Code> {
        self.client
            .wait_process(deadline(), &process(id, exec_id))
            .await
            .map_err(code)
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(), Code> {
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

    pub async fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Code> {
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

    pub async fn resize(&self, id: &str, exec_id: &str, rows: u32, columns: u32) -> Result<(), Code> {
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

    pub async fn pids(&self, id: &str) -> Vec<u32> {
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

    pub async fn stats(&self, id: &str) -> ContainerStatsResponse {
        let request = ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client.container_stats(deadline(), &request).await.unwrap()
    }

    pub async fn sandbox_stats(&self) -> SandboxStatsResponse {
        self.client
            .sandbox_stats(deadline(), &Empty::new())
            .await
            .unwrap()
    }

    /// Waits for events after `after`: container and sequence number.
    pub async fn events(&self, after: u64) -> Vec<(String, u64)> {
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

    /// Connects a stream and waits for the acknowledgement.
    pub async fn stream(&self, id: &str, exec_id: &str, name: &str) -> Stream {
        let mut stream = UnixStream::connect(&self.stdio).await.unwrap();
        let header = json!({"container": id, "process": exec_id, "stream": name});
        stream.write_all(format!("{header}\n").as_bytes()).await.unwrap();
        let mut ack = [0];
        stream
            .read_exact(&mut ack)
            .await
            .expect("the stream is acknowledged");
        assert_eq!(ack, [6]);
        Stream {
            stream,
            seen: String::new(),
        }
    }

    /// Creates a container, runs it to its end with both outputs connected, and deletes it.
    pub async fn run_to_end(&self, id: &str, spec: &Value) -> (u32, String, String) {
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
pub struct Stream {
    stream: UnixStream,
    seen: String,
}

impl Stream {
    pub async fn bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.stream.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    pub async fn text(&mut self) -> String {
        String::from_utf8(self.bytes().await).unwrap()
    }

    /// Reads until `text` was seen.
    pub async fn expect(&mut self, text: &str) {
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

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub async fn finish(&mut self) {
        self.stream.shutdown().await.unwrap();
    }
}
