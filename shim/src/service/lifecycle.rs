//! The service by which the agent follows the containers: the guest's, within bounds (`protocol/protos/guest.proto`).

use async_trait::async_trait;
use protocol::{
    guest::{ContainerRequest, Empty, GetEventsRequest, StopContainerRequest},
    guest_ttrpc::Lifecycle,
};
use ttrpc::r#async::TtrpcContext;

use super::status::to_ttrpc;
use crate::{
    error::{Error, ErrorKind},
    guest::{ContainerEnd, GuestNews},
    sandbox::SandboxHandle,
};

/// See the module.
pub(super) struct LifecycleService {
    sandbox: SandboxHandle,
}

impl LifecycleService {
    pub(super) fn new(sandbox: SandboxHandle) -> Self {
        Self { sandbox }
    }
}

#[async_trait]
impl Lifecycle for LifecycleService {
    async fn follow(&self, _: &TtrpcContext, request: GetEventsRequest) -> ttrpc::Result<GuestNews> {
        let guest = self.sandbox.guest().await.map_err(to_ttrpc)?;
        tokio::select! {
            news = guest.news(request.after) => news.map_err(|error| to_ttrpc(error.into())),
            ended = self.sandbox.ended() => {
                let why = ended.map_or("gone", |exit| exit.reason);
                let text = format!("the sandbox has ended: {why}");
                Err(to_ttrpc(Error::new(ErrorKind::Unavailable, text)))
            }
        }
    }

    async fn stop_container(&self, _: &TtrpcContext, request: StopContainerRequest) -> ttrpc::Result<Empty> {
        let guest = self.sandbox.guest().await.map_err(to_ttrpc)?;
        guest
            .stop_container(&request.container_id, request.grace_ms)
            .await
            .map_err(to_ttrpc)?;
        Ok(Empty::new())
    }

    async fn get_container_end(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerEnd> {
        let guest = self.sandbox.guest().await.map_err(to_ttrpc)?;
        guest.container_end(&request.container_id).await.map_err(to_ttrpc)
    }
}
