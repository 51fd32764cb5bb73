//! The guest API: ttrpc in, domain calls out. Generated types appear here only.

mod convert;
mod lifecycle;
mod status;
mod stdio;

#[cfg(any(test, fuzzing))]
pub(crate) use stdio::fuzz;

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use async_trait::async_trait;
use protocol::{
    guest::{
        AttachVolumeRequest, ConfigureSandboxRequest, ConfigureSandboxResponse, ContainerRequest,
        ContainerStatsResponse, CreateContainerRequest, CreateProcessRequest, Empty, GetEventsRequest,
        GetEventsResponse, ListProcessesResponse, ProcessRequest, PutFilesRequest, ResizeSandboxRequest,
        ResizeSandboxResponse, ResizeTerminalRequest, SandboxStatsResponse, ShutdownRequest,
        SignalProcessRequest, StartProcessResponse, UpdateContainerRequest, WaitProcessResponse,
    },
    guest_ttrpc::{Guest, create_guest, create_lifecycle},
};
use ttrpc::r#async::{Server, TtrpcContext};

use self::{status::status, stdio::StdioServer};
use crate::{
    boot,
    container::Container,
    containers::Containers,
    error::{Error, Result},
    resize,
    sandbox::Sandbox,
    stats,
};

/// Serves the guest API at the ttrpc address `api` and streams on the listening socket `stdio`, until the returned
/// server is dropped.
///
/// # Errors
/// When a listener cannot be used.
pub async fn serve(sandbox: Arc<Sandbox>, api: &str, stdio: OwnedFd) -> Result<Server> {
    StdioServer::start(Arc::clone(&sandbox), stdio)?;
    let lifecycle = lifecycle::service(Arc::clone(&sandbox));
    let service: Arc<dyn Guest + Send + Sync> = Arc::new(Service { sandbox });
    let failed = |error: ttrpc::Error| {
        Error::system(
            format!("serve the guest API at {api}"),
            std::io::Error::other(error.to_string()),
        )
    };
    let mut server = Server::new()
        .bind(api)
        .map_err(failed)?
        .register_service(create_guest(service))
        .register_service(create_lifecycle(lifecycle));
    server.start().await.map_err(failed)?;
    Ok(server)
}

struct Service {
    sandbox: Arc<Sandbox>,
}

impl Service {
    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.sandbox.containers()?.get(id)
    }
}

/// Runs `work` to its end even when the caller goes away: a request half done would leave half a container.
async fn shielded<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    let result = tokio::spawn(work).await;
    // A task that panicked has ended the guest.
    result
        .unwrap_or_else(|_| Err(Error::precondition("the guest is shutting down")))
        .map_err(status)
}

/// Does what blocks in a thread of its own, to its end.
async fn in_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> ttrpc::Result<T> {
    let result = tokio::task::spawn_blocking(work).await;
    // A thread that panicked has ended the guest.
    result
        .unwrap_or_else(|_| Err(Error::precondition("the guest is shutting down")))
        .map_err(status)
}

fn empty<T>(result: Result<T>) -> ttrpc::Result<Empty> {
    result.map(|_| Empty::new()).map_err(status)
}

#[async_trait]
impl Guest for Service {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: ConfigureSandboxRequest,
    ) -> ttrpc::Result<ConfigureSandboxResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let ids = shielded(async move { sandbox.configure(convert::identity(request)?).await }).await?;
        Ok(convert::configured(self.sandbox.ready_us(), ids))
    }

    async fn freeze(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        shielded(async move { sandbox.freeze().await }).await?;
        Ok(Empty::new())
    }

    async fn adopt_identity(
        &self,
        _: &TtrpcContext,
        request: ConfigureSandboxRequest,
    ) -> ttrpc::Result<ConfigureSandboxResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let ids = shielded(async move { sandbox.adopt(convert::identity(request)?).await }).await?;
        Ok(convert::configured(self.sandbox.ready_us(), ids))
    }

    async fn thaw(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        empty(self.sandbox.containers().and_then(Containers::thaw))
    }

    async fn put_files(&self, _: &TtrpcContext, request: PutFilesRequest) -> ttrpc::Result<Empty> {
        let (volume, gid) = (request.volume, request.gid);
        let files = convert::files(request.files);
        empty(
            self.sandbox
                .containers()
                .and_then(|containers| containers.put_files(&volume, &files, gid)),
        )
    }

    async fn attach_volume(&self, _: &TtrpcContext, request: AttachVolumeRequest) -> ttrpc::Result<Empty> {
        let attach = async {
            let containers = self.sandbox.containers()?;
            match convert::attached(request)? {
                convert::Attach::Slice(volume) => containers.attach(volume),
                convert::Attach::Nfs(volume) => containers.attach_nfs(volume).await,
            }
        };
        empty(attach.await)
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let create = async {
            let image = convert::slice("rootfs", request.rootfs.as_ref())?
                .ok_or_else(|| Error::invalid("rootfs is missing: give the slice of the image"))?;
            let spec = convert::json("spec", &request.spec)?;
            let lifecycle = lifecycle::parse(request.lifecycle.into_option())?;
            self.sandbox
                .containers()?
                .create(&request.container_id, image, spec, lifecycle)
                .await
        };
        empty(create.await)
    }

    async fn resize_sandbox(
        &self,
        _: &TtrpcContext,
        request: ResizeSandboxRequest,
    ) -> ttrpc::Result<ResizeSandboxResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let limit = request.memory_limit_bytes;
        let resize = move || resize::sandbox(&sandbox, request.n_vcpus, (limit != 0).then_some(limit));
        let resized = in_thread(resize).await?;
        Ok(ResizeSandboxResponse {
            n_vcpus: resized.n_vcpus,
            memory_total_bytes: resized.memory_total_bytes,
            ..Default::default()
        })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        let update = move || {
            let resources = convert::json("resources", &request.resources)?;
            container.cgroup.update(&resources)
        };
        in_thread(update).await?;
        Ok(Empty::new())
    }

    async fn create_process(&self, _: &TtrpcContext, request: CreateProcessRequest) -> ttrpc::Result<Empty> {
        let create = || {
            if request.exec_id.is_empty() {
                return Err(Error::invalid("exec_id is empty: that is the container's init"));
            }
            let process = convert::json("process", &request.process)?;
            self.container(&request.container_id)?
                .create_process(&request.exec_id, process)
        };
        empty(create())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<StartProcessResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let pid = shielded(async move {
            let containers = sandbox.containers()?;
            containers
                .start_process(&request.container_id, &request.exec_id)
                .await
        });
        Ok(StartProcessResponse {
            pid: pid.await?,
            ..Default::default()
        })
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let signal = || {
            let number = i32::try_from(request.signal)
                .ok()
                .filter(|number| (1..=64).contains(number))
                .ok_or_else(|| Error::invalid(format!("signal is {}: give 1 to 64", request.signal)))?;
            let container = self.container(&request.container_id)?;
            match (request.all, request.exec_id.is_empty()) {
                (true, true) => container.signal_all(number),
                (true, false) => Err(Error::invalid("all is set: exec_id must be empty")),
                (false, _) => container.signal(&request.exec_id, number),
            }
        };
        empty(signal())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let wait = async {
            let process = self.container(&request.container_id)?.process(&request.exec_id)?;
            process.wait().await
        };
        let ended = wait.await.map_err(status)?;
        Ok(WaitProcessResponse {
            exit_status: ended.exit.status,
            exited_at_ns: ended.exit.at_ns,
            oom_killed: ended.oom_killed,
            ..Default::default()
        })
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let resize = || {
            let size = |name: &str, value: u32| {
                u16::try_from(value)
                    .map_err(|_| Error::invalid(format!("{name} is {value}: give at most 65535")))
            };
            let process = self.container(&request.container_id)?.process(&request.exec_id)?;
            process.resize(size("rows", request.rows)?, size("columns", request.columns)?)
        };
        empty(resize())
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        if request.exec_id.is_empty() {
            let sandbox = Arc::clone(&self.sandbox);
            shielded(async move { sandbox.containers()?.delete(&request.container_id).await }).await?;
            return Ok(Empty::new());
        }
        empty(
            self.container(&request.container_id)
                .and_then(|it| it.delete_exec(&request.exec_id)),
        )
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let pids = self
            .container(&request.container_id)
            .and_then(|container| container.cgroup.processes());
        Ok(ListProcessesResponse {
            pids: pids.map_err(status)?,
            ..Default::default()
        })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        let container = self.container(&request.container_id).map_err(status)?;
        Ok(convert::container_stats(stats::container(&container.cgroup)))
    }

    async fn sandbox_stats(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<SandboxStatsResponse> {
        let sandbox = stats::sandbox(&self.sandbox.scratch()).map_err(status)?;
        // There are none before the sandbox is configured.
        let containers = self.sandbox.containers().map(Containers::all).unwrap_or_default();
        let layers = stats::writable_layers(&containers).await;
        Ok(convert::sandbox_stats(sandbox, layers))
    }

    async fn get_events(
        &self,
        _: &TtrpcContext,
        request: GetEventsRequest,
    ) -> ttrpc::Result<GetEventsResponse> {
        Ok(lifecycle::follow(&self.sandbox, request.after).await)
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        shielded(async move {
            sandbox.shut_down(Duration::from_millis(request.grace_ms)).await;
            boot::power_off();
            Ok(Empty::new())
        })
        .await
    }
}
