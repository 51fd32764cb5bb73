//! containerd's Task service.

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::Task,
};
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use super::{convert, status::to_ttrpc};
use crate::{
    error::{Error, ErrorKind},
    guest::ProcessKey,
    sandbox::{SandboxHandle, status::ProcessPhase},
};

/// See the module.
pub(super) struct TaskService {
    sandbox_id: String,
    sandbox: SandboxHandle,
}

impl TaskService {
    pub(super) fn new(sandbox_id: String, sandbox: SandboxHandle) -> Self {
        Self { sandbox_id, sandbox }
    }
}

fn key(container_id: String, exec_id: String) -> ProcessKey {
    ProcessKey {
        container_id,
        exec_id,
    }
}

fn unimplemented<T>(what: &str) -> ttrpc::Result<T> {
    Err(to_ttrpc(Error::new(
        ErrorKind::Unimplemented,
        format!("{what} is not offered by this runtime"),
    )))
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let spec = convert::container_spec(request).map_err(to_ttrpc)?;
        let pid = self.sandbox.create_container(spec).await.map_err(to_ttrpc)?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self
            .sandbox
            .start_process(key(request.id, request.exec_id))
            .await
            .map_err(to_ttrpc)?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let deleted = self
            .sandbox
            .delete_process(key(request.id, request.exec_id))
            .await;
        let (pid, end) = deleted.map_err(to_ttrpc)?;
        Ok(DeleteResponse {
            pid,
            exit_status: end.exit_status,
            exited_at: MessageField::some(convert::timestamp(end.exited_at)),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, mut request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let key = key(
            std::mem::take(&mut request.id),
            std::mem::take(&mut request.exec_id),
        );
        let spec = convert::exec_spec(request).map_err(to_ttrpc)?;
        self.sandbox.create_exec(key, spec).await.map_err(to_ttrpc)?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let key = key(request.id, request.exec_id);
        self.sandbox
            .signal_process(key, request.signal, request.all)
            .await
            .map_err(to_ttrpc)?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let end = self
            .sandbox
            .wait_process(key(request.id, request.exec_id))
            .await
            .map_err(to_ttrpc)?;
        Ok(WaitResponse {
            exit_status: end.exit_status,
            exited_at: MessageField::some(convert::timestamp(end.exited_at)),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let key = key(request.id, request.exec_id);
        let status = self.sandbox.process_status(key.clone()).await.map_err(to_ttrpc)?;
        let (state, end) = match status.phase {
            ProcessPhase::Created => (Status::CREATED, None),
            ProcessPhase::Running => (Status::RUNNING, None),
            ProcessPhase::Ended(end) => (Status::STOPPED, Some(end)),
        };
        Ok(StateResponse {
            id: key.container_id,
            exec_id: key.exec_id,
            bundle: status.bundle,
            pid: status.pid,
            status: convert::known(state),
            stdin: convert::stdin_text(&status.stdio),
            stdout: convert::sink_text(status.stdio.stdout.as_ref()),
            stderr: convert::sink_text(status.stdio.stderr.as_ref()),
            terminal: status.stdio.terminal,
            exit_status: end.map_or(0, |end| end.exit_status),
            exited_at: end.map(|end| convert::timestamp(end.exited_at)).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.sandbox.list_processes(request.id).await.map_err(to_ttrpc)?;
        let process = |pid| ProcessInfo {
            pid,
            ..Default::default()
        };
        Ok(PidsResponse {
            processes: pids.into_iter().map(process).collect(),
            ..Default::default()
        })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let key = key(request.id, request.exec_id);
        self.sandbox
            .resize_terminal(key, request.height, request.width)
            .await
            .map_err(to_ttrpc)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.sandbox
                .close_stdin(key(request.id, request.exec_id))
                .await
                .map_err(to_ttrpc)?;
        }
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.sandbox.container_stats(request.id).await.map_err(to_ttrpc)?;
        let packed = convert::container_metrics(&stats).map_err(to_ttrpc)?;
        Ok(StatsResponse {
            stats: MessageField::some(packed),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.sandbox.status().vmm_pid.unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        if request.now {
            self.sandbox.shutdown().await.map_err(to_ttrpc)?;
        } else {
            self.sandbox.shutdown_if_idle().await.map_err(to_ttrpc)?;
        }
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> ttrpc::Result<Empty> {
        unimplemented("Pause")
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<Empty> {
        unimplemented("Resume")
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        if request.id != self.sandbox_id {
            return Err(to_ttrpc(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "id is {:?}: give {:?}, for containers are captured all at once, with their sandbox",
                    request.id, self.sandbox_id
                ),
            )));
        }
        self.sandbox
            .checkpoint(request.path.into())
            .await
            .map_err(to_ttrpc)?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = request.resources.into_option().unwrap_or_default();
        if request.id != self.sandbox_id {
            if resources.type_url != protocol::LINUX_RESOURCES_TYPE_URL {
                return unimplemented("Update");
            }
            let json = convert::resources(resources.value).map_err(to_ttrpc)?;
            let updated = self.sandbox.update_container(request.id, json).await;
            return updated.map_err(to_ttrpc).map(|()| Empty::new());
        }
        let updated = match resources.type_url.as_str() {
            protocol::PUT_FILES_TYPE_URL => {
                let files = convert::files(&resources.value).map_err(to_ttrpc)?;
                self.sandbox.put_files(files).await
            }
            protocol::ATTACH_VOLUME_TYPE_URL => {
                let volume = convert::volume(&resources.value).map_err(to_ttrpc)?;
                self.sandbox.attach_volume(volume).await
            }
            protocol::RESIZE_SANDBOX_TYPE_URL => {
                let target = convert::target(&resources.value).map_err(to_ttrpc)?;
                self.sandbox.resize(target).await
            }
            _ => return unimplemented("Update"),
        };
        updated.map_err(to_ttrpc)?;
        Ok(Empty::new())
    }
}
