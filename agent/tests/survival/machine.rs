//! A VMM process without a virtual machine: the control socket on one side, and on the other a guest that keeps books about
//! processes that do nothing. `exit N` ends at once with N, `holds VOLUME PATH TEXT` with 0 if the file in that volume has that
//! text; everything else runs until a signal ends it.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use futures_util::stream;
use protocol::{guest as api, guest_ttrpc};
use tokio::{runtime::Handle, sync::watch};
use ttrpc::{
    Code,
    r#async::{Server, TtrpcContext, transport::Listener},
    get_status,
};
use vmm::control::{Command, Event, ExitReason, VmmSocket};

/// What a container uses, so that it can't be limited to less.
const LEAST_MEMORY_BYTES: u64 = 256 << 20;

type Key = (String, String);

#[derive(Default)]
struct Process {
    args: Vec<String>,
    is_running: bool,
    ended: watch::Sender<Option<u32>>,
}

/// What the machine has, for its guest to see.
#[derive(Debug, Clone, Copy, Default)]
struct Size {
    n_vcpus: u32,
    plugged_mib: u64,
}

#[derive(Default)]
struct Guest {
    size: Mutex<Size>,
    processes: Mutex<HashMap<Key, Process>>,
    /// Kept open as long as their process lives.
    streams: Mutex<Vec<(Key, UnixStream)>>,
    /// By volume.
    files: Mutex<HashMap<String, Vec<api::File>>>,
    power_off: watch::Sender<bool>,
}

/// Obeys the control socket, descriptor 3, until it ends.
pub(crate) fn run() {
    let socket = Arc::new(VmmSocket::from(shim::sys::take_passed_descriptor().unwrap()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let guest = Arc::new(Guest::default());
    let mut power_off = guest.power_off.subscribe();
    let end = Arc::clone(&socket);
    runtime.spawn(async move {
        if power_off.wait_for(|off| *off).await.is_ok() {
            exit(&end, ExitReason::Shutdown);
        }
    });
    while let Ok((command, fds)) = socket.recv() {
        let done = |id| socket.send(&Event::Done { id }, &[]).unwrap();
        match command {
            Command::Start(config) => {
                guest.size.lock().unwrap().n_vcpus = config.n_vcpus;
                socket.send(&Event::Started, &[]).unwrap();
                let (_ours, theirs) = UnixStream::pair().unwrap();
                let port = protocol::READY_PORT;
                socket
                    .send(&Event::GuestConnected { port }, &[theirs.as_fd()])
                    .unwrap();
            }
            Command::Kill => exit(&socket, ExitReason::Killed),
            Command::Connect { id, port } => {
                let connection = fds.into_iter().next().unwrap();
                if port == protocol::STDIO_PORT {
                    let guest = Arc::clone(&guest);
                    std::thread::spawn(move || guest.take_stream(connection));
                } else {
                    serve(&guest, connection, runtime.handle());
                }
                done(id);
            }
            Command::AddExtents { id, .. }
            | Command::RemoveExtents { id, .. }
            | Command::Pause { id }
            | Command::Resume { id }
            | Command::FinishSnapshot { id }
            | Command::SetBalloon { id, .. }
            | Command::Snapshot { id } => done(id),
            Command::ResizeMemory { id, plugged_mib } => {
                guest.size.lock().unwrap().plugged_mib = plugged_mib;
                done(id);
            }
            Command::AddVcpus { id, n_vcpus } => {
                let mut size = guest.size.lock().unwrap();
                size.n_vcpus = size.n_vcpus.max(n_vcpus);
                done(id);
            }
            Command::Stats { id } => {
                let size = *guest.size.lock().unwrap();
                let counters = [
                    ("vcpus", u64::from(size.n_vcpus)),
                    ("mem_plugged_bytes", size.plugged_mib << 20),
                ];
                let counters = counters.map(|(name, value)| (name.to_owned(), value)).into();
                socket.send(&Event::Stats { id, counters }, &[]).unwrap();
            }
        }
    }
}

fn exit(socket: &VmmSocket, reason: ExitReason) -> ! {
    // The shim may be gone.
    let _ = socket.send(&Event::Exited(reason), &[]);
    std::process::exit(0)
}

fn serve(guest: &Arc<Guest>, connection: OwnedFd, runtime: &Handle) {
    let connection = UnixStream::from(connection);
    connection.set_nonblocking(true).unwrap();
    let guest = Arc::clone(guest);
    runtime.spawn(async move {
        let connection = tokio::net::UnixStream::from_std(connection).unwrap();
        let once = Listener::new(stream::iter([Ok(connection)]));
        let mut server = Server::new()
            .add_listener(once)
            .register_service(guest_ttrpc::create_guest(guest));
        server.start().await.unwrap();
        std::future::pending::<()>().await;
    });
}

fn key(request: &api::ProcessRequest) -> Key {
    (request.container_id.clone(), request.exec_id.clone())
}

fn args(process: &serde_json::Value) -> Vec<String> {
    serde_json::from_value(process["args"].clone()).unwrap()
}

fn refuse<T>(code: Code, message: &str) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(code, message)))
}

impl Guest {
    fn take_stream(&self, connection: OwnedFd) {
        let mut connection = UnixStream::from(connection);
        let mut line = String::new();
        BufReader::new(&connection).read_line(&mut line).unwrap();
        let header: HashMap<String, String> = serde_json::from_str(&line).unwrap();
        let key = (header["container"].clone(), header["process"].clone());
        // Under the lock: who reads the byte finds the stream.
        let mut streams = self.streams.lock().unwrap();
        connection.write_all(&[protocol::STDIO_ACK]).unwrap();
        streams.push((key, connection));
    }

    fn memory_total_bytes(&self) -> u64 {
        (512 + self.size.lock().unwrap().plugged_mib) << 20
    }

    fn end(&self, key: &Key, status: u32) -> ttrpc::Result<()> {
        let mut processes = self.processes.lock().unwrap();
        match processes.get_mut(key) {
            Some(process) if process.is_running => {
                process.is_running = false;
                self.streams.lock().unwrap().retain(|(of, _)| of != key);
                process.ended.send_replace(Some(status));
                Ok(())
            }
            Some(_) => refuse(Code::FAILED_PRECONDITION, "it does not run"),
            None => refuse(Code::NOT_FOUND, "no such process"),
        }
    }

    fn add(&self, key: Key, process: &[u8], of_spec: bool) {
        let spec: serde_json::Value = serde_json::from_slice(process).unwrap();
        let process = Process {
            args: args(if of_spec { &spec["process"] } else { &spec }),
            ..Process::default()
        };
        self.processes.lock().unwrap().insert(key, process);
    }
}

#[async_trait]
impl guest_ttrpc::Guest for Guest {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        _: api::ConfigureSandboxRequest,
    ) -> ttrpc::Result<api::ConfigureSandboxResponse> {
        Ok(api::ConfigureSandboxResponse::new())
    }

    async fn put_files(&self, _: &TtrpcContext, request: api::PutFilesRequest) -> ttrpc::Result<api::Empty> {
        self.files.lock().unwrap().insert(request.volume, request.files);
        Ok(api::Empty::new())
    }

    async fn resize_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ResizeSandboxRequest,
    ) -> ttrpc::Result<api::ResizeSandboxResponse> {
        Ok(api::ResizeSandboxResponse {
            n_vcpus: request.n_vcpus,
            memory_total_bytes: self.memory_total_bytes(),
            ..Default::default()
        })
    }

    async fn sandbox_stats(
        &self,
        _: &TtrpcContext,
        _: api::Empty,
    ) -> ttrpc::Result<api::SandboxStatsResponse> {
        Ok(api::SandboxStatsResponse {
            memory_total_bytes: self.memory_total_bytes(),
            ..Default::default()
        })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: api::UpdateContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let resources: serde_json::Value = serde_json::from_slice(&request.resources).unwrap();
        if resources["memory"]["limit"].as_u64() < Some(LEAST_MEMORY_BYTES) {
            return refuse(Code::FAILED_PRECONDITION, "it uses more than that");
        }
        let key = (request.container_id, String::new());
        match self.processes.lock().unwrap().contains_key(&key) {
            true => Ok(api::Empty::new()),
            false => refuse(Code::NOT_FOUND, "no such container"),
        }
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.add((request.container_id, String::new()), &request.spec, true);
        Ok(api::Empty::new())
    }

    async fn create_process(
        &self,
        _: &TtrpcContext,
        request: api::CreateProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.add((request.container_id, request.exec_id), &request.process, false);
        Ok(api::Empty::new())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::StartProcessResponse> {
        let key = key(&request);
        let args = {
            let mut processes = self.processes.lock().unwrap();
            let Some(process) = processes.get_mut(&key) else {
                return refuse(Code::NOT_FOUND, "no such process");
            };
            process.is_running = true;
            process.args.clone()
        };
        match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["exit", status] => self.end(&key, status.parse().unwrap())?,
            ["holds", volume, path, text] => {
                let files = self.files.lock().unwrap().get(volume).cloned();
                let mut files = files.unwrap_or_default().into_iter();
                let holds = files.any(|file| file.path == path && file.content == text.as_bytes());
                self.end(&key, u32::from(!holds))?;
            }
            _ => {}
        }
        Ok(api::StartProcessResponse {
            pid: 1,
            ..Default::default()
        })
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::WaitProcessResponse> {
        let Some(mut ended) = ({
            let processes = self.processes.lock().unwrap();
            let found = processes.get(&key(&request));
            found.map(|process| process.ended.subscribe())
        }) else {
            return refuse(Code::NOT_FOUND, "no such process");
        };
        let exit_status = match ended.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            Err(_) => return refuse(Code::NOT_FOUND, "the process was deleted"),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        Ok(api::WaitProcessResponse {
            exit_status,
            exited_at_ns: u64::try_from(now).unwrap(),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: api::SignalProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.end(&(request.container_id, request.exec_id), 128 + request.signal)?;
        Ok(api::Empty::new())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        match self.processes.lock().unwrap().remove(&key(&request)) {
            Some(_) => Ok(api::Empty::new()),
            None => refuse(Code::NOT_FOUND, "no such process"),
        }
    }

    async fn get_events(
        &self,
        _: &TtrpcContext,
        _: api::GetEventsRequest,
    ) -> ttrpc::Result<api::GetEventsResponse> {
        std::future::pending().await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> ttrpc::Result<api::Empty> {
        self.power_off.send_replace(true);
        Ok(api::Empty::new())
    }
}
