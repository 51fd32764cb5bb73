//! containerd's Sandbox service.

use std::{collections::HashMap, time::Duration};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
        StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
        WaitSandboxResponse,
    },
    sandbox_async::Sandbox,
    types::platform::Platform,
};
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use super::{convert, status::to_ttrpc};
use crate::{
    error::{Error, ErrorKind},
    sandbox::{SandboxHandle, status::SandboxStatus},
    timestamp::from_unix_nanos,
};

/// State of a sandbox that takes containers, in CRI's words.
const READY: &str = "SANDBOX_READY";
/// Any other state.
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// See the module.
pub(super) struct SandboxService {
    id: String,
    sandbox: SandboxHandle,
}

impl SandboxService {
    pub(super) fn new(id: String, sandbox: SandboxHandle) -> Self {
        Self { id, sandbox }
    }

    fn check_id(&self, id: &str) -> ttrpc::Result<()> {
        if id == self.id {
            Ok(())
        } else {
            let text = format!("sandbox_id is {id:?}: this shim has sandbox {:?}", self.id);
            Err(to_ttrpc(Error::new(ErrorKind::NotFound, text)))
        }
    }
}

/// The verbose part of a status; keys as in sandbox.proto.
fn info(status: &SandboxStatus, console: String) -> HashMap<String, String> {
    let mut info = HashMap::from([
        ("phase".into(), status.state.name().into()),
        ("shim_pid".into(), std::process::id().to_string()),
    ]);
    let numbers = [
        ("vmm_pid", status.vmm_pid.map(u64::from)),
        ("guest_ready_us", status.guest_ready_us),
        ("start_us", status.start_us),
        ("pause_us", status.pause_us),
    ];
    let shape = status.shape.iter().flat_map(|shape| {
        [
            ("n_vcpus", u64::from(shape.n_online)),
            ("n_possible_vcpus", u64::from(shape.n_possible_vcpus)),
            ("memory_mib", shape.memory_mib),
            ("hotplug_mib", shape.hotplug_mib),
            ("plugged_mib", shape.plugged_mib),
            ("containers_memory_bytes", shape.containers_memory_bytes),
        ]
    });
    info.extend(shape.map(|(key, value)| (key.into(), value.to_string())));
    info.extend(
        numbers
            .into_iter()
            .filter_map(|(key, value)| Some((key.into(), value?.to_string()))),
    );
    if let Some(kind) = status.start_kind {
        info.insert("start_kind".into(), kind.into());
    }
    if let Some(phases) = &status.start_phases_us {
        info.insert("start_phases_us".into(), phases.clone());
    }
    if let Some(why) = &status.template_refused {
        info.insert("template_refused".into(), why.clone());
    }
    if let Some(exit) = &status.exit {
        info.insert("exit_reason".into(), exit.reason.into());
        info.insert("exit_message".into(), exit.message.clone());
        info.insert("console".into(), console);
    }
    info
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let spec = convert::sandbox_spec(request.options.as_ref()).map_err(to_ttrpc)?;
        let is_standby = spec.is_standby;
        self.sandbox.create(spec).await.map_err(to_ttrpc)?;
        if is_standby {
            self.sandbox.stand_by().await.map_err(to_ttrpc)?;
        }
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        self.sandbox.start().await.map_err(to_ttrpc)?;
        let status = self.sandbox.status();
        Ok(StartSandboxResponse {
            pid: status.vmm_pid.unwrap_or_default(),
            created_at: MessageField::some(convert::timestamp(status.created_at)),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.check_id(&request.sandbox_id)?;
        let platform = Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            ..Default::default()
        };
        Ok(PlatformResponse {
            platform: MessageField::some(platform),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let grace = Duration::from_secs(request.timeout_secs.into());
        self.sandbox.stop(grace).await.map_err(to_ttrpc)?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let exit = self.sandbox.ended().await.map_err(to_ttrpc)?;
        Ok(WaitSandboxResponse {
            exit_status: exit.exit_status,
            exited_at: MessageField::some(convert::timestamp(exit.exited_at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.check_id(&request.sandbox_id)?;
        let status = self.sandbox.status();
        let exited_at = status
            .exit
            .as_ref()
            .map(|exit| convert::timestamp(exit.exited_at));
        let info = if request.verbose {
            info(&status, self.sandbox.console_tail().await)
        } else {
            HashMap::new()
        };
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.vmm_pid.unwrap_or_default(),
            state: if self.sandbox.is_ready() { READY } else { NOT_READY }.into(),
            info,
            created_at: MessageField::some(convert::timestamp(status.created_at)),
            exited_at: exited_at.into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.check_id(&request.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        self.sandbox.shutdown().await.map_err(to_ttrpc)?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.check_id(&request.sandbox_id)?;
        let stats = self.sandbox.sandbox_stats().await.map_err(to_ttrpc)?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(convert::timestamp(from_unix_nanos(stats.timestamp_ns)));
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(convert::sandbox_metrics(stats).map_err(to_ttrpc)?);
        Ok(response)
    }
}
