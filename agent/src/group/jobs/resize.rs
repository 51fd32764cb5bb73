//! The work of a resize: step after step, each of which may have been done before.

use std::{sync::Arc, time::Duration};

use protocol::sandbox::ResizeSandbox;
use tokio::time::{Instant, sleep, timeout};

use super::{END_NOTICE, Outcome, SANDBOX_READY};
use crate::{
    capacity,
    error::{Error, ErrorKind, Result},
    group::{
        resize::{Machine, Step, steps},
        spec::{GroupSpec, Size},
        status::GroupId,
    },
    parts::HostParts,
    sandbox::{client::SandboxConnection, oci, standby::Shape},
};

/// Between two looks at what a sandbox uses on the host.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// How a resize ended.
#[derive(Debug)]
pub(in crate::group) enum Resized {
    /// All is as it is to be.
    Done,
    /// The sandbox cannot come to have the size, and nothing was changed; why.
    Impossible(String),
    /// Some may have been changed; why not all.
    Failed(String),
    /// The sandbox has ended.
    Lost,
}

/// A resize to be done.
#[derive(Debug)]
pub(in crate::group) struct Resize {
    pub(in crate::group) parts: Arc<HostParts>,
    pub(in crate::group) group_id: GroupId,
    pub(in crate::group) from: Arc<GroupSpec>,
    pub(in crate::group) to: Arc<GroupSpec>,
    /// The ids of the containers that run, in the order of the group's.
    pub(in crate::group) running: Vec<Option<String>>,
    pub(in crate::group) connection: SandboxConnection,
}

impl Resize {
    /// Does it; `generation` is the sandbox's.
    pub(in crate::group) async fn run(self, generation: u32) -> Outcome {
        let resized = match self.possible().await {
            Ok(Ok(())) => self.all_steps().await.map(|()| Resized::Done),
            Ok(Err(why)) => Ok(Resized::Impossible(why)),
            Err(error) => Err(error),
        };
        let resized = match resized {
            Ok(resized) => resized,
            Err(error) if self.sandbox_has_ended(&error).await => Resized::Lost,
            Err(error) => Resized::Failed(error.chain()),
        };
        Outcome::Resized(generation, resized)
    }

    async fn possible(&self) -> Result<std::result::Result<(), String>> {
        if self.from.size == self.to.size {
            return Ok(Ok(()));
        }
        let (_, info) = self.connection.sandbox_status().await?;
        let Some(machine) = Machine::of(&info) else {
            return Ok(Err("its shim does not resize sandboxes".to_owned()));
        };
        let shape = Shape::of(self.to.size, &self.parts);
        Ok(machine.can_have(shape.n_vcpus, shape.memory_mib))
    }

    async fn all_steps(&self) -> Result<()> {
        for step in steps(&self.from, &self.to) {
            tracing::debug!(group_id = %self.group_id, ?step, "resizing");
            match step {
                Step::Host(size) => self.limit_on_host(size).await?,
                Step::Sandbox(size) => self.resize_sandbox(size).await?,
                Step::Container(index) => self.limit_container(index).await?,
            }
        }
        Ok(())
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.parts.config.resize.timeout_seconds)
    }

    async fn resize_sandbox(&self, size: Size) -> Result<()> {
        let shape = Shape::of(size, &self.parts);
        let target = ResizeSandbox {
            n_vcpus: shape.n_vcpus,
            memory_mib: shape.memory_mib.into(),
            containers_memory_bytes: size.memory_bytes,
            deadline_ms: u64::try_from(self.patience().as_millis()).unwrap_or(u64::MAX),
            ..ResizeSandbox::default()
        };
        self.connection.resize_sandbox(&target).await
    }

    async fn limit_container(&self, index: usize) -> Result<()> {
        let Some(id) = &self.running[index] else {
            // It begins with the limits that it is to have.
            return Ok(());
        };
        let limits = oci::limits(self.to.containers[index].size);
        match self.connection.limit_container(id, &limits).await {
            // It has ended since, and will begin so too.
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            limited => limited,
        }
    }

    /// Waits until what the sandbox uses is no more than it may: the kernel would end it otherwise.
    async fn limit_on_host(&self, size: Size) -> Result<()> {
        let memory_bytes = capacity::footprint(size, &self.parts.config.sandbox).memory_bytes;
        let deadline = Instant::now() + self.patience();
        loop {
            let (parts, id) = (Arc::clone(&self.parts), self.group_id.clone());
            let limit = tokio::task::spawn_blocking(move || {
                let used = parts.cgroups.memory_used(&id)?;
                if used > memory_bytes {
                    return Ok(Some(used));
                }
                parts.cgroups.limit_memory(&id, memory_bytes)?;
                parts.cgroups.limit_cpu(&id, size.cpu_milli)?;
                Ok(None)
            });
            let limited = limit.await.unwrap_or_else(|error| {
                let what = "limit a sandbox on the host";
                Err(Error::with_source(ErrorKind::Internal, what, error))
            });
            match limited? {
                None => return Ok(()),
                Some(used) if Instant::now() >= deadline => {
                    return Err(Error::new(
                        ErrorKind::DeadlineExceeded,
                        format!(
                            "the sandbox uses {used} bytes on the host, which can't be limited to {memory_bytes}"
                        ),
                    ));
                }
                Some(_) => sleep(LOOK_INTERVAL).await,
            }
        }
    }

    /// Whether it was for this that a step failed.
    async fn sandbox_has_ended(&self, error: &Error) -> bool {
        if error.kind == ErrorKind::Unavailable
            && timeout(END_NOTICE, self.connection.wait_sandbox()).await.is_ok()
        {
            return true;
        }
        let status = self.connection.sandbox_status().await;
        !matches!(status, Ok((state, _)) if state == SANDBOX_READY)
    }
}
