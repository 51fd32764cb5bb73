//! A guest init that runs its containers' processes on this machine, without any isolation: what the shim sees of a
//! guest, and no more.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::fake_vmm::Size;
use async_trait::async_trait;
use protocol::{guest as api, guest_ttrpc};
use tokio::{io::AsyncReadExt, net::UnixStream, sync::watch};
use ttrpc::{Code, r#async::TtrpcContext, get_status};

type Key = (String, String);

#[derive(Default)]
struct Process {
    args: Vec<String>,
    pid: Option<u32>,
    ended: watch::Sender<Option<u32>>,
}

/// What the guest init of one fake VM knows.
#[derive(Default)]
pub(crate) struct FakeGuest {
    processes: Mutex<HashMap<Key, Process>>,
    streams: Mutex<HashMap<(String, String, String), UnixStream>>,
    /// Image slices of containers, in the order of their creation.
    pub(crate) slices: Mutex<Vec<api::Slice>>,
    pub(crate) configured: Mutex<Option<api::ConfigureSandboxRequest>>,
    /// Volumes of files, in the order they were put.
    pub(crate) files: Mutex<Vec<api::PutFilesRequest>>,
    /// Volumes with slices, in the order they were attached and grown.
    pub(crate) volumes: Mutex<Vec<api::AttachVolumeRequest>>,
    /// Kills to report as OOM kills, by container.
    pub(crate) oom: watch::Sender<Vec<String>>,
    /// Set by Shutdown: the VM powers off.
    pub(crate) power_off: watch::Sender<bool>,
    /// Calls that stop and free all containers, in order.
    pub(crate) freezer: Mutex<Vec<&'static str>>,
    /// Its machine's.
    size: Arc<Mutex<Size>>,
    /// Sizes that it was told, CPUs and limit of its containers.
    pub(crate) resized: Mutex<Vec<(u32, u64)>>,
    /// Limits of containers, in the order they were told.
    pub(crate) updated: Mutex<Vec<(String, String)>>,
    calls: AtomicU64,
    /// Calls of SignalProcess are never answered.
    pub(crate) hang_signals: bool,
}

fn refuse<T>(code: Code, message: impl Into<String>) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(code, message.into())))
}

impl FakeGuest {
    pub(crate) fn new(hang_signals: bool, size: Arc<Mutex<Size>>) -> Self {
        Self {
            hang_signals,
            size,
            ..Default::default()
        }
    }

    /// Takes a stdio connection.
    pub(crate) fn stream(self: &Arc<Self>, socket: OwnedFd) {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true).unwrap();
        let mut socket = UnixStream::from_std(socket).unwrap();
        let guest = Arc::clone(self);
        tokio::spawn(async move {
            let mut line = Vec::new();
            while !line.ends_with(b"\n") {
                line.push(socket.read_u8().await.unwrap());
            }
            let header: HashMap<String, String> = serde_json::from_slice(&line).unwrap();
            let key = (
                header["container"].clone(),
                header["process"].clone(),
                header["stream"].clone(),
            );
            // One byte on a new connection always fits. Under the lock: who reads it finds the stream.
            let mut streams = guest.streams.lock().unwrap();
            assert_eq!(socket.try_write(&[protocol::STDIO_ACK]).unwrap(), 1);
            streams.insert(key, socket);
        });
    }

    fn memory_total_bytes(&self) -> u64 {
        99 + (self.size.lock().unwrap().plugged_mib << 20)
    }

    /// Ends every process at once, as the end of a VM does.
    pub(crate) fn kill_all(&self) {
        for process in self.processes.lock().unwrap().values() {
            if process.ended.borrow().is_none()
                && let Some(pid) = process.pid
            {
                kill(pid, rustix::process::Signal::KILL);
            }
        }
        self.streams.lock().unwrap().clear();
    }

    fn take_stream(&self, key: &Key, name: &str) -> Stdio {
        let found = self
            .streams
            .lock()
            .unwrap()
            .remove(&(key.0.clone(), key.1.clone(), name.into()));
        match found {
            Some(stream) => {
                let stream = stream.into_std().unwrap();
                stream.set_nonblocking(false).unwrap();
                Stdio::from(OwnedFd::from(stream))
            }
            None => Stdio::null(),
        }
    }
}

fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

fn args_of(process: &serde_json::Value) -> Vec<String> {
    process["args"]
        .as_array()
        .unwrap()
        .iter()
        .map(|arg| arg.as_str().unwrap().to_owned())
        .collect()
}

fn key_of(request: &api::ProcessRequest) -> Key {
    (request.container_id.clone(), request.exec_id.clone())
}

#[async_trait]
impl guest_ttrpc::Guest for FakeGuest {
    async fn put_files(&self, _: &TtrpcContext, request: api::PutFilesRequest) -> ttrpc::Result<api::Empty> {
        self.files.lock().unwrap().push(request);
        Ok(api::Empty::new())
    }

    async fn attach_volume(
        &self,
        _: &TtrpcContext,
        request: api::AttachVolumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.volumes.lock().unwrap().push(request);
        Ok(api::Empty::new())
    }

    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ConfigureSandboxRequest,
    ) -> ttrpc::Result<api::ConfigureSandboxResponse> {
        *self.configured.lock().unwrap() = Some(request);
        Ok(api::ConfigureSandboxResponse {
            ready_us: 1234,
            ..Default::default()
        })
    }

    async fn freeze(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        self.freezer.lock().unwrap().push("freeze");
        Ok(api::Empty::new())
    }

    async fn thaw(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        self.freezer.lock().unwrap().push("thaw");
        Ok(api::Empty::new())
    }

    async fn adopt_identity(
        &self,
        _: &TtrpcContext,
        request: api::ConfigureSandboxRequest,
    ) -> ttrpc::Result<api::ConfigureSandboxResponse> {
        self.freezer.lock().unwrap().push("adopt");
        *self.configured.lock().unwrap() = Some(request);
        // What every snapshot of these tests has running.
        for id in ["c1", "c2"] {
            let key = (id.to_owned(), String::new());
            self.processes.lock().unwrap().insert(key, Process::default());
        }
        Ok(api::ConfigureSandboxResponse::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.slices.lock().unwrap().push(request.rootfs.unwrap());
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
        let process = Process {
            args: args_of(&spec["process"]),
            ..Default::default()
        };
        self.processes
            .lock()
            .unwrap()
            .insert((request.container_id, String::new()), process);
        Ok(api::Empty::new())
    }

    async fn create_process(
        &self,
        _: &TtrpcContext,
        request: api::CreateProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let process = Process {
            args: args_of(&serde_json::from_slice(&request.process).unwrap()),
            ..Default::default()
        };
        self.processes
            .lock()
            .unwrap()
            .insert((request.container_id, request.exec_id), process);
        Ok(api::Empty::new())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::StartProcessResponse> {
        let key = key_of(&request);
        let args = self.processes.lock().unwrap()[&key].args.clone();
        let child = tokio::process::Command::new(&args[0])
            .args(&args[1..])
            .stdin(self.take_stream(&key, "stdin"))
            .stdout(self.take_stream(&key, "stdout"))
            .stderr(self.take_stream(&key, "stderr"))
            .kill_on_drop(true)
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => return refuse(Code::NOT_FOUND, format!("{}: {error}", args[0])),
        };
        let pid = child.id().unwrap();
        let ended = {
            let mut processes = self.processes.lock().unwrap();
            let process = processes.get_mut(&key).unwrap();
            process.pid = Some(pid);
            process.ended.clone()
        };
        tokio::spawn(async move {
            use std::os::unix::process::ExitStatusExt;
            let status = child.wait().await.unwrap();
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
            ended.send_replace(Some(u32::try_from(code).unwrap()));
        });
        Ok(api::StartProcessResponse {
            pid,
            ..Default::default()
        })
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::WaitProcessResponse> {
        let mut ended = self.processes.lock().unwrap()[&key_of(&request)]
            .ended
            .subscribe();
        let exit_status = ended.wait_for(Option::is_some).await.unwrap().unwrap();
        let exited_at_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        Ok(api::WaitProcessResponse {
            exit_status,
            exited_at_ns: u64::try_from(exited_at_ns).unwrap(),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: api::SignalProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        if self.hang_signals {
            std::future::pending::<()>().await;
        }
        let pid = self.processes.lock().unwrap()[&(request.container_id, request.exec_id)].pid;
        let signal = i32::try_from(request.signal).unwrap();
        match pid {
            Some(pid) => kill(pid, rustix::process::Signal::from_named_raw(signal).unwrap()),
            None => return refuse(Code::FAILED_PRECONDITION, "not started"),
        }
        Ok(api::Empty::new())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        match self.processes.lock().unwrap().remove(&key_of(&request)) {
            Some(_) => Ok(api::Empty::new()),
            None => refuse(Code::NOT_FOUND, "no such process"),
        }
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::ListProcessesResponse> {
        let processes = self.processes.lock().unwrap();
        let of_container = processes.iter().filter(|(key, _)| key.0 == request.container_id);
        let pids = of_container.filter_map(|(_, process)| process.pid).collect();
        Ok(api::ListProcessesResponse {
            pids,
            ..Default::default()
        })
    }

    async fn resize_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ResizeSandboxRequest,
    ) -> ttrpc::Result<api::ResizeSandboxResponse> {
        let told = (request.n_vcpus, request.memory_limit_bytes);
        self.resized.lock().unwrap().push(told);
        Ok(api::ResizeSandboxResponse {
            n_vcpus: request.n_vcpus,
            memory_total_bytes: self.memory_total_bytes(),
            ..Default::default()
        })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: api::UpdateContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let resources = String::from_utf8(request.resources).unwrap();
        self.updated
            .lock()
            .unwrap()
            .push((request.container_id, resources));
        Ok(api::Empty::new())
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        _: api::ContainerRequest,
    ) -> ttrpc::Result<api::ContainerStatsResponse> {
        Ok(api::ContainerStatsResponse {
            cpu_usage_us: 77,
            oom_kills: 2,
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

    async fn get_events(
        &self,
        _: &TtrpcContext,
        request: api::GetEventsRequest,
    ) -> ttrpc::Result<api::GetEventsResponse> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let after = usize::try_from(request.after).unwrap();
        let mut oom = self.oom.subscribe();
        let kills = oom.wait_for(|kills| kills.len() > after).await.unwrap().clone();
        let event = |(at, container_id): (usize, String)| api::Event {
            sequence: at as u64 + 1,
            container_id,
            kind: api::event::Kind::OOM.into(),
            ..Default::default()
        };
        let events = kills.into_iter().enumerate().skip(after).map(event).collect();
        Ok(api::GetEventsResponse {
            events,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> ttrpc::Result<api::Empty> {
        let running: Vec<_> = {
            let processes = self.processes.lock().unwrap();
            let running = processes.values().filter(|process| process.pid.is_some());
            running
                .map(|process| (process.pid.unwrap(), process.ended.clone()))
                .collect()
        };
        let deadline = tokio::time::Instant::now() + Duration::from_millis(request.grace_ms);
        for (pid, ended) in running {
            if ended.borrow().is_none() {
                kill(pid, rustix::process::Signal::TERM);
            }
            let mut seen = ended.subscribe();
            if tokio::time::timeout_at(deadline, seen.wait_for(Option::is_some))
                .await
                .is_err()
            {
                kill(pid, rustix::process::Signal::KILL);
                let _ = seen.wait_for(Option::is_some).await;
            }
        }
        self.power_off.send_replace(true);
        Ok(api::Empty::new())
    }
}
