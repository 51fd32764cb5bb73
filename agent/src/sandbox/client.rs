//! Speaks the shim protocol to one shim. Every call has a deadline but the waits, which end with the connection.

use std::{collections::HashMap, path::Path, time::Duration};

use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest,
        KillRequest, Mount, ResizePtyRequest, StartRequest, StateRequest, StatsRequest, UpdateTaskRequest,
        WaitRequest,
    },
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, MessageField, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, SandboxMetricsRequest, SandboxStatusRequest, ShutdownSandboxRequest,
        StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
    },
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
};
use oci_spec::runtime::Process;
use protocol::{
    guest::{PutFilesRequest, SandboxStatsResponse},
    guest_ttrpc::LifecycleClient,
    sandbox::{AttachVolume, ResizeSandbox, SandboxOptions},
};
use ttrpc::context::{self, Context};

use crate::error::{Error, ErrorKind, Result};

/// Type of the process specification in an exec request.
const PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// How long calls may take.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// Starting the sandbox.
    pub start: Duration,
    /// Any other call.
    pub request: Duration,
}

/// A container's root file system: files of one EROFS slice, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rootfs {
    /// The metadata file.
    pub metadata: String,
    /// The layer blobs.
    pub blobs: Vec<String>,
}

/// Where a process's streams lead; empty = /dev/null.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// FIFO.
    pub stdin: String,
    /// FIFO or `cri://` file.
    pub stdout: String,
    /// FIFO or `cri://` file.
    pub stderr: String,
    /// A TTY is allocated.
    pub terminal: bool,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: i32,
    /// Unix milliseconds, 0 when not told.
    pub at_ms: u64,
}

/// State of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// Created, not started.
    Created,
    /// Runs.
    Running,
    /// Ended.
    Stopped,
}

/// A connection to one shim. Clones share it.
#[derive(Clone)]
pub struct SandboxConnection {
    id: String,
    task: TaskClient,
    sandbox: SandboxClient,
    pub(super) lifecycle: LifecycleClient,
    deadlines: Deadlines,
}

impl std::fmt::Debug for SandboxConnection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("SandboxConnection")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl SandboxConnection {
    /// Connects to the shim of sandbox `id` at `address` (`unix:///...`).
    ///
    /// # Errors
    /// `Unavailable` when nobody listens there.
    pub async fn connect(id: &str, address: &str, deadlines: Deadlines) -> Result<Self> {
        let unavailable = |error: String| {
            Error::new(
                ErrorKind::Unavailable,
                format!("connect to the shim of {id} at {address}: {error}"),
            )
        };
        let client = tokio::time::timeout(deadlines.request, Client::connect(address))
            .await
            .map_err(|_| unavailable("timed out".to_owned()))?
            .map_err(|error| unavailable(error.to_string()))?;
        Ok(Self {
            id: id.to_owned(),
            task: TaskClient::new(client.clone()),
            sandbox: SandboxClient::new(client.clone()),
            lifecycle: LifecycleClient::new(client),
            deadlines,
        })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn request(&self) -> Context {
        context::with_duration(self.deadlines.request)
    }

    /// Creates and starts the sandbox.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn start_sandbox(&self, bundle: &Path, options: &SandboxOptions) -> Result<()> {
        self.create_sandbox(bundle, options).await?;
        let start = StartSandboxRequest {
            sandbox_id: self.id.clone(),
            ..StartSandboxRequest::default()
        };
        self.sandbox
            .start_sandbox(context::with_duration(self.deadlines.start), &start)
            .await
            .map_err(|error| from_ttrpc("start sandbox", &self.id, error))?;
        Ok(())
    }

    /// Tells the shim what the sandbox is to be.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn create_sandbox(&self, bundle: &Path, options: &SandboxOptions) -> Result<()> {
        let options = Any {
            type_url: protocol::SANDBOX_OPTIONS_TYPE_URL.to_owned(),
            value: options
                .write_to_bytes()
                .map_err(|error| Error::with_source(ErrorKind::Internal, "encode sandbox options", error))?,
            ..Any::default()
        };
        let create = CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: path_text(bundle),
            options: MessageField::some(options),
            ..CreateSandboxRequest::default()
        };
        self.sandbox
            .create_sandbox(context::with_duration(self.deadlines.start), &create)
            .await
            .map_err(|error| from_ttrpc("create sandbox", &self.id, error))?;
        Ok(())
    }

    /// The sandbox's state in the shim's words, and what it tells about it.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn sandbox_status(&self) -> Result<(String, HashMap<String, String>)> {
        let request = SandboxStatusRequest {
            sandbox_id: self.id.clone(),
            verbose: true,
            ..SandboxStatusRequest::default()
        };
        let answer = self
            .sandbox
            .sandbox_status(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("ask the status of sandbox", &self.id, error))?;
        Ok((answer.state, answer.info))
    }

    /// Waits until the sandbox has ended, or the shim has.
    ///
    /// # Errors
    /// `Unavailable` when the shim is gone.
    pub async fn wait_sandbox(&self) -> Result<Exit> {
        let request = WaitSandboxRequest {
            sandbox_id: self.id.clone(),
            ..WaitSandboxRequest::default()
        };
        let answer = self
            .sandbox
            .wait_sandbox(Context::default(), &request)
            .await
            .map_err(|error| from_ttrpc("wait for sandbox", &self.id, error))?;
        Ok(Exit {
            status: exit_status(answer.exit_status),
            at_ms: timestamp_ms(answer.exited_at.as_ref()),
        })
    }

    /// Stops the sandbox; `grace` is for the guest.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn stop_sandbox(&self, grace: Duration) -> Result<()> {
        let request = StopSandboxRequest {
            sandbox_id: self.id.clone(),
            timeout_secs: u32::try_from(grace.as_secs()).unwrap_or(u32::MAX),
            ..StopSandboxRequest::default()
        };
        self.sandbox
            .stop_sandbox(context::with_duration(self.deadlines.request + grace), &request)
            .await
            .map_err(|error| from_ttrpc("stop sandbox", &self.id, error))?;
        Ok(())
    }

    /// Ends the shim.
    ///
    /// # Errors
    /// What the shim answers; the connection may end before the answer.
    pub async fn shutdown_sandbox(&self) -> Result<()> {
        let request = ShutdownSandboxRequest {
            sandbox_id: self.id.clone(),
            ..ShutdownSandboxRequest::default()
        };
        self.sandbox
            .shutdown_sandbox(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("shut down the shim of", &self.id, error))?;
        Ok(())
    }

    /// Statistics of the guest.
    ///
    /// # Errors
    /// What the shim answers; `Internal` for a type that is not ours.
    pub async fn sandbox_metrics(&self) -> Result<SandboxStatsResponse> {
        let request = SandboxMetricsRequest {
            sandbox_id: self.id.clone(),
            ..SandboxMetricsRequest::default()
        };
        let answer = self
            .sandbox
            .sandbox_metrics(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("ask the metrics of sandbox", &self.id, error))?;
        let metrics = answer.metrics.unwrap_or_default();
        decode(&metrics.data.unwrap_or_default(), "SandboxStatsResponse")
    }

    /// Takes a snapshot of the sandbox, which goes on, into an empty directory.
    ///
    /// # Errors
    /// What the shim answers; the directory holds no snapshot then.
    pub async fn checkpoint(&self, directory: &Path, deadline: Duration) -> Result<()> {
        let request = CheckpointTaskRequest {
            id: self.id.clone(),
            path: path_text(directory),
            ..CheckpointTaskRequest::default()
        };
        self.task
            .checkpoint(context::with_duration(deadline), &request)
            .await
            .map_err(|error| from_ttrpc("take a snapshot of sandbox", &self.id, error))?;
        Ok(())
    }

    /// Puts the files of a volume into the guest; those there before go.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn put_files(&self, files: &PutFilesRequest) -> Result<()> {
        self.update(protocol::PUT_FILES_TYPE_URL, files, "put files into sandbox")
            .await
    }

    /// Gives the guest a volume that is a file of its own, or grows it when the file has grown.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn attach_volume(&self, volume: &AttachVolume) -> Result<()> {
        self.update(
            protocol::ATTACH_VOLUME_TYPE_URL,
            volume,
            "attach a volume to sandbox",
        )
        .await
    }

    /// Makes the running sandbox larger or smaller; its guest may take as long as `size` says.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn resize_sandbox(&self, size: &ResizeSandbox) -> Result<()> {
        let deadline = self.deadlines.request + Duration::from_millis(size.deadline_ms);
        let resources = packed(protocol::RESIZE_SANDBOX_TYPE_URL, size)?;
        self.update_task(&self.id, resources, deadline, "resize sandbox")
            .await
    }

    /// Gives a container other limits.
    ///
    /// # Errors
    /// What the shim answers; `FailedPrecondition` when the container uses more memory.
    pub async fn limit_container(&self, id: &str, resources: &serde_json::Value) -> Result<()> {
        let resources = Any {
            type_url: protocol::LINUX_RESOURCES_TYPE_URL.to_owned(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        };
        self.update_task(id, resources, self.deadlines.request, "limit container")
            .await
    }

    async fn update(&self, type_url: &str, message: &impl Message, what: &'static str) -> Result<()> {
        let resources = packed(type_url, message)?;
        self.update_task(&self.id, resources, self.deadlines.request, what)
            .await
    }

    async fn update_task(&self, id: &str, resources: Any, deadline: Duration, what: &str) -> Result<()> {
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: MessageField::some(resources),
            ..UpdateTaskRequest::default()
        };
        self.task
            .update(context::with_duration(deadline), &request)
            .await
            .map_err(|error| from_ttrpc(what, id, error))?;
        Ok(())
    }

    /// Takes over a container that the snapshot has from which the sandbox was made: it stands still.
    ///
    /// # Errors
    /// What the shim answers; `NotFound` when the snapshot has no such container.
    pub async fn adopt_task(&self, id: &str, bundle: &Path, rootfs: &Rootfs, stdio: &Stdio) -> Result<()> {
        let checkpoint = "captured".to_owned();
        self.create(id, bundle, rootfs, stdio, checkpoint, None).await
    }

    pub(super) async fn create(
        &self,
        id: &str,
        bundle: &Path,
        rootfs: &Rootfs,
        stdio: &Stdio,
        checkpoint: String,
        options: Option<Any>,
    ) -> Result<()> {
        let mount = Mount {
            type_: protocol::ROOTFS_MOUNT_TYPE.to_owned(),
            source: rootfs.metadata.clone(),
            options: rootfs.blobs.iter().map(|blob| format!("device={blob}")).collect(),
            ..Mount::default()
        };
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: path_text(bundle),
            rootfs: vec![mount],
            terminal: stdio.terminal,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            checkpoint,
            options: options.into(),
            ..CreateTaskRequest::default()
        };
        self.task
            .create(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("create container", id, error))?;
        Ok(())
    }

    /// Adds a process to a running container; it runs after [`Self::start`].
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn exec(&self, id: &str, exec_id: &str, process: &Process, stdio: &Stdio) -> Result<()> {
        let spec = Any {
            type_url: PROCESS_TYPE_URL.to_owned(),
            value: serde_json::to_vec(process)
                .map_err(|error| Error::with_source(ErrorKind::Internal, "encode the process", error))?,
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            terminal: stdio.terminal,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            spec: MessageField::some(spec),
            ..ExecProcessRequest::default()
        };
        self.task
            .exec(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("create a process in container", id, error))?;
        Ok(())
    }

    /// Starts a container's init (`exec_id` empty) or an exec.
    ///
    /// # Errors
    /// What the shim answers; the message names the program that could not be run.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<()> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..StartRequest::default()
        };
        self.task
            .start(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("start container", id, error))?;
        Ok(())
    }

    /// The state of a container.
    ///
    /// # Errors
    /// `NotFound` when the shim has none of this id.
    pub async fn state(&self, id: &str) -> Result<TaskState> {
        let request = StateRequest {
            id: id.to_owned(),
            ..StateRequest::default()
        };
        let answer = self
            .task
            .state(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("ask the state of container", id, error))?;
        Ok(match answer.status.value() {
            // containerd.v1.types.Status: CREATED = 1, RUNNING = 2, STOPPED = 3, PAUSED = 4, PAUSING = 5.
            1 => TaskState::Created,
            2 | 4 | 5 => TaskState::Running,
            _ => TaskState::Stopped,
        })
    }

    /// Waits until a process has ended and all its output was handed out.
    ///
    /// # Errors
    /// `Unavailable` when the shim is gone.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit> {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..WaitRequest::default()
        };
        let answer = self
            .task
            .wait(Context::default(), &request)
            .await
            .map_err(|error| from_ttrpc("wait for container", id, error))?;
        Ok(Exit {
            status: exit_status(answer.exit_status),
            at_ms: timestamp_ms(answer.exited_at.as_ref()),
        })
    }

    /// Sends a signal to a process, or with `all` to the whole container.
    ///
    /// # Errors
    /// What the shim answers; `NotFound` or `FailedPrecondition` when it has ended.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..KillRequest::default()
        };
        self.task
            .kill(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("send a signal to container", id, error))?;
        Ok(())
    }

    /// Removes an ended process; with `exec_id` empty the container.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<()> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..DeleteRequest::default()
        };
        self.task
            .delete(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("remove container", id, error))?;
        Ok(())
    }

    /// No more stdin comes.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn close_stdin(&self, id: &str, exec_id: &str) -> Result<()> {
        let request = CloseIORequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.task
            .close_io(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("close stdin of container", id, error))?;
        Ok(())
    }

    /// Sets the size of a TTY.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn resize(&self, id: &str, exec_id: &str, rows: u16, columns: u16) -> Result<()> {
        let request = ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width: u32::from(columns),
            height: u32::from(rows),
            ..ResizePtyRequest::default()
        };
        self.task
            .resize_pty(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("resize the terminal of container", id, error))?;
        Ok(())
    }

    /// A container's cgroup statistics.
    ///
    /// # Errors
    /// What the shim answers.
    pub async fn stats(&self, id: &str) -> Result<Metrics> {
        let request = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        let answer = self
            .task
            .stats(self.request(), &request)
            .await
            .map_err(|error| from_ttrpc("ask the statistics of container", id, error))?;
        decode(&answer.stats.unwrap_or_default(), "Metrics")
    }
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn exit_status(status: u32) -> i32 {
    i32::try_from(status).unwrap_or(255)
}

fn timestamp_ms(
    timestamp: Option<&containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp>,
) -> u64 {
    timestamp.map_or(0, |time| {
        u64::try_from(time.seconds).unwrap_or(0) * 1000 + u64::try_from(time.nanos).unwrap_or(0) / 1_000_000
    })
}

fn decode<M: Message>(any: &Any, expected: &str) -> Result<M> {
    if !any.type_url.ends_with(expected) {
        return Err(Error::new(
            ErrorKind::Internal,
            format!("the shim sent a {:?} where {expected} belongs", any.type_url),
        ));
    }
    M::parse_from_bytes(&any.value)
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("decode {expected}"), error))
}

fn packed(type_url: &str, message: &impl Message) -> Result<Any> {
    Ok(Any {
        type_url: type_url.to_owned(),
        value: message
            .write_to_bytes()
            .map_err(|error| Error::with_source(ErrorKind::Internal, format!("encode {type_url}"), error))?,
        ..Any::default()
    })
}

/// The one place where codes of the shim protocol become the engine's kinds.
pub(super) fn from_ttrpc(what: &str, object: &str, error: ttrpc::Error) -> Error {
    use ttrpc::Code;
    let (kind, cause) = match error {
        ttrpc::Error::RpcStatus(status) => {
            let kind = match status.code.enum_value_or_default() {
                Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => ErrorKind::InvalidArgument,
                Code::NOT_FOUND => ErrorKind::NotFound,
                Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
                Code::FAILED_PRECONDITION | Code::ABORTED => ErrorKind::FailedPrecondition,
                Code::RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
                Code::UNAVAILABLE => ErrorKind::Unavailable,
                Code::DEADLINE_EXCEEDED => ErrorKind::DeadlineExceeded,
                _ => ErrorKind::Internal,
            };
            (kind, status.message)
        }
        other => (ErrorKind::Unavailable, other.to_string()),
    };
    let kind = if cause.contains("timeout") && kind == ErrorKind::Unavailable {
        ErrorKind::DeadlineExceeded
    } else {
        kind
    };
    Error::new(kind, format!("{what} {object}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttrpc_codes_become_kinds() {
        let status = |code| ttrpc::Error::RpcStatus(ttrpc::get_status(code, "x"));
        for (code, kind) in [
            (ttrpc::Code::NOT_FOUND, ErrorKind::NotFound),
            (ttrpc::Code::RESOURCE_EXHAUSTED, ErrorKind::ResourceExhausted),
            (ttrpc::Code::UNKNOWN, ErrorKind::Internal),
        ] {
            assert_eq!(from_ttrpc("a", "b", status(code)).kind, kind);
        }
        assert_eq!(
            from_ttrpc("a", "b", ttrpc::Error::LocalClosed).kind,
            ErrorKind::Unavailable
        );
    }

    #[test]
    fn foreign_messages_are_refused() {
        let any = Any {
            type_url: "x.Other".into(),
            ..Any::default()
        };
        assert!(decode::<Metrics>(&any, "Metrics").is_err());
    }
}
