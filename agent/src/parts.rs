//! What a group's driver works with: the host's parts, each owned once.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::Semaphore;

use crate::{
    capacity::HostCapacity,
    cgroup::Cgroups,
    config::Config,
    disks::Disks,
    group::{images::Images, status::GroupId},
    network::Network,
    sandbox::{bundle::Bundle, shim::ShimProgram, standby::Standbys, templates::Templates},
    scratch::ScratchDisks,
    snapshots::Snapshots,
    store::Store,
};

/// The host's parts.
pub struct HostParts {
    /// Configuration, complete.
    pub config: Config,
    /// What the host has.
    pub capacity: HostCapacity,
    /// Durable state.
    pub store: Store,
    /// Network.
    pub network: Network,
    /// Images.
    pub images: Arc<dyn Images>,
    /// The shim.
    pub shim: ShimProgram,
    /// Turns of sandboxes that start.
    pub starts: Semaphore,
    /// How many of them there are.
    pub n_starts: usize,
    /// Sandboxes that wait for a group.
    pub standbys: Standbys,
    /// Guests to go on from instead of booting.
    pub templates: Templates,
    /// Groups as they were.
    pub snapshots: Snapshots,
    /// Disks that may outlive groups.
    pub disks: Disks,
    /// Scratch disks.
    pub scratch: ScratchDisks,
    /// cgroups.
    pub cgroups: Cgroups,
}

impl std::fmt::Debug for HostParts {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("HostParts").finish_non_exhaustive()
    }
}

impl HostParts {
    /// Where sandboxes have their bundles.
    pub fn bundles_dir(&self) -> PathBuf {
        self.config.bundles_dir()
    }

    /// The bundle of a group's sandbox.
    pub fn bundle(&self, id: &GroupId) -> Bundle {
        Bundle::new(self.bundles_dir().join(id.as_str()))
    }

    /// Where groups have their logs.
    pub fn logs_dir(&self) -> PathBuf {
        self.config.state_dir.join("logs")
    }

    /// The log directory of a container.
    pub fn log_dir(&self, id: &GroupId, container: &str) -> PathBuf {
        self.logs_dir().join(id.as_str()).join(container)
    }

    /// The log file of a container's run.
    pub fn log_file(&self, id: &GroupId, container: &str, run: u32) -> PathBuf {
        self.log_dir(id, container).join(format!("{run}.log"))
    }
}

/// Now, Unix milliseconds.
pub fn now_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
