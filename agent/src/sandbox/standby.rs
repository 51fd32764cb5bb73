//! Sandboxes that stand by: made before anybody asked, with all that a group needs (shim, VMM, tap, address, cgroup, scratch disk)
//! and a guest that went on from its template and waits for an identity. A new group of the same shape takes one over, id
//! and address included, so nothing is renamed; without one it takes the normal path.
//!
//! They are made when no group has been started for a moment, for the shapes that were asked for last. None outlives its
//! agent: what one that was killed leaves behind belongs to no group and is cleared away as an orphan.

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, task::AbortHandle};

use super::{assembly, client::SandboxConnection, templates::Class};
use crate::{
    capacity::HostCapacity,
    config::{Config, StandbyConfig},
    error::Result,
    group::{spec::Size, status::GroupId},
    network::{Addresses, Attachment},
    parts::HostParts,
    profile,
};

const MIB: u64 = 1 << 20;
/// Memory that can be plugged is a multiple of this (protos/sandbox.proto).
const HOTPLUG_ALIGN_MIB: u64 = 128;
/// Most vCPUs a guest knows of.
const MAX_VCPUS: u32 = 64;
/// No group was started for so long: the host has time.
const QUIET: Duration = Duration::from_millis(250);
/// Between looks at a template that is not ready yet.
const TEMPLATE_WAIT: Duration = Duration::from_secs(1);
/// After one could not be made.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// What groups must have in common to use the same sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// vCPUs.
    pub n_vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// vCPUs that it may come to have while it runs.
    pub n_possible_vcpus: u32,
    /// Memory that it may come to have beside while it runs.
    pub hotplug_mib: u64,
}

impl Shape {
    /// The machine for a group of that size.
    pub fn of(size: Size, parts: &HostParts) -> Self {
        Self::on(parts.capacity, size, &parts.config)
    }

    fn on(host: HostCapacity, size: Size, config: &Config) -> Self {
        let memory_mib = size.memory_bytes.div_ceil(MIB) + u64::from(config.sandbox.guest_overhead_mib);
        let memory_mib = u32::try_from(memory_mib).unwrap_or(u32::MAX);
        let n_vcpus = size.cpu_milli.div_ceil(1000).max(1);
        let resize = &config.resize;
        let most_vcpus = n_vcpus.next_power_of_two().saturating_mul(resize.vcpu_factor);
        let memory = u64::from(memory_mib);
        let host_mib = (host.memory_bytes / MIB).next_multiple_of(HOTPLUG_ALIGN_MIB);
        let hotplug_mib = (memory * (u64::from(resize.memory_factor) - 1)).min(host_mib);
        Self {
            n_vcpus,
            memory_mib,
            n_possible_vcpus: most_vcpus.min(MAX_VCPUS).max(n_vcpus),
            hotplug_mib: hotplug_mib.next_multiple_of(HOTPLUG_ALIGN_MIB),
        }
    }

    /// The template it can go on from.
    pub fn class(self, has_network: bool, config: &Config) -> Option<Class> {
        Class::of(self, has_network, &config.template)
    }
}

/// What a sandbox is made of, on the host.
#[derive(Debug, Clone)]
pub struct Resources {
    /// To its shim.
    pub connection: SandboxConnection,
    /// Its disk.
    pub scratch: PathBuf,
    /// Its cgroup.
    pub cgroup: Option<PathBuf>,
    /// Its place in the network.
    pub attachment: Option<Attachment>,
}

/// A sandbox that stands by.
#[derive(Debug)]
pub struct Standby {
    /// The id of the group that takes it.
    pub id: GroupId,
    /// The address of that group: an IPv4 one, whatever the group will have beside.
    pub ip: Option<Addresses>,
    /// What it is made of.
    pub resources: Resources,
    /// Where its template is.
    pub template: protocol::sandbox::Template,
    shape: Shape,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Standby>,
    /// Taken by groups whose start has not begun.
    taken: HashMap<GroupId, Standby>,
    /// Shapes asked for, the last one first.
    wanted: VecDeque<Shape>,
}

/// All that stand by on this host.
#[derive(Debug)]
pub struct Standbys {
    config: StandbyConfig,
    state: Mutex<State>,
    changed: Notify,
    /// Held while one is made or taken away, which is not to be broken off.
    at_work: tokio::sync::Mutex<()>,
}

impl Standbys {
    /// None yet.
    pub fn new(config: StandbyConfig) -> Self {
        Self {
            config,
            state: Mutex::default(),
            changed: Notify::new(),
            at_work: tokio::sync::Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One for a new group of this shape, if there is one; more of the shape will be made.
    pub fn take(&self, shape: Shape) -> Option<Standby> {
        if self.config.per_shape == 0 {
            return None;
        }
        let mut state = self.lock();
        state.wanted.retain(|wanted| *wanted != shape);
        state.wanted.push_front(shape);
        state
            .wanted
            .truncate((self.config.max / self.config.per_shape).max(1));
        let found = state.ready.iter().position(|standby| standby.shape == shape);
        let standby = found.and_then(|index| state.ready.remove(index));
        self.note(&state);
        profile::standby(if standby.is_some() { "hit" } else { "miss" });
        self.changed.notify_one();
        standby
    }

    /// Back among those that stand by: the group did not come to be.
    pub fn put_back(&self, standby: Standby) {
        let mut state = self.lock();
        state.ready.push_back(standby);
        self.note(&state);
    }

    /// The group of this id exists, and its start will take over.
    pub fn assign(&self, standby: Standby) {
        self.lock().taken.insert(standby.id.clone(), standby);
    }

    /// What was assigned to a group.
    pub fn assigned(&self, id: &GroupId) -> Option<Standby> {
        self.lock().taken.remove(id)
    }

    fn note(&self, state: &State) {
        profile::standbys(state.ready.len());
    }

    /// The shape to make one of, if any.
    fn missing(&self) -> Option<Shape> {
        let state = self.lock();
        let count = |shape| {
            state
                .ready
                .iter()
                .filter(|standby| standby.shape == shape)
                .count()
        };
        let missing = |shape: &Shape| count(*shape) < self.config.per_shape;
        let wanted = state.wanted.iter().copied().find(missing);
        wanted.filter(|_| state.ready.len() < self.config.max)
    }

    /// One that nobody asks for any more.
    fn take_unwanted(&self) -> Option<Standby> {
        let mut state = self.lock();
        let State { ready, wanted, .. } = &mut *state;
        let index = ready
            .iter()
            .position(|standby| !wanted.contains(&standby.shape))?;
        let unwanted = ready.remove(index);
        self.note(&state);
        unwanted
    }

    /// Ends their keeper and takes all away, for the end of the agent.
    pub async fn dismiss_all(&self, parts: &Arc<HostParts>, keeper: &AbortHandle) {
        let _at_work = self.at_work.lock().await;
        keeper.abort();
        let all: Vec<_> = {
            let mut state = self.lock();
            state.wanted.clear();
            let taken = std::mem::take(&mut state.taken);
            state.ready.drain(..).chain(taken.into_values()).collect()
        };
        futures_util::future::join_all(all.into_iter().map(|standby| dismiss(parts, standby))).await;
    }
}

/// Takes a sandbox that stands by apart.
pub async fn dismiss(parts: &Arc<HostParts>, standby: Standby) {
    let Standby {
        id, ip, resources, ..
    } = standby;
    // What stays was told, and is an orphan to the next agent.
    let gone = assembly::take_apart(parts, &id, ip, Some(resources.connection)).await;
    if let (Ok(()), Some(ip)) = (gone, ip) {
        parts.network.release(ip);
    }
}

/// Makes sandboxes stand by, for as long as the host lives.
pub async fn keep(parts: Arc<HostParts>) {
    let standbys = &parts.standbys;
    loop {
        standbys.changed.notified().await;
        while let Some(shape) = standbys.missing() {
            wait_until_quiet(&parts).await;
            let at_work = standbys.at_work.lock().await;
            while let Some(unwanted) = standbys.take_unwanted() {
                dismiss(&parts, unwanted).await;
            }
            let Some(class) = shape.class(parts.network.is_enabled(), &parts.config) else {
                standbys.lock().wanted.retain(|wanted| *wanted != shape);
                continue;
            };
            let Some(template) = parts.templates.find(class) else {
                drop(at_work);
                tokio::time::sleep(TEMPLATE_WAIT).await;
                continue;
            };
            match make(&parts, shape, template).await {
                Ok(standby) => standbys.put_back(standby),
                Err(error) => {
                    drop(at_work);
                    tracing::warn!(error = %error.chain(), "no sandbox stands by: groups take the normal path");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }
}

/// Returns when no group was asked for or started for [`QUIET`].
async fn wait_until_quiet(parts: &HostParts) {
    loop {
        let changed = tokio::time::timeout(QUIET, parts.standbys.changed.notified()).await;
        if changed.is_err() && parts.starts.available_permits() == parts.n_starts {
            return;
        }
    }
}

async fn make(
    parts: &Arc<HostParts>,
    shape: Shape,
    template: protocol::sandbox::Template,
) -> Result<Standby> {
    let id = crate::random::group_id()?;
    let ip = parts.network.reserve()?.map(|v4| Addresses { v4, v6: None });
    let made = assembly::stand_by(parts, &id, ip, shape, &template).await;
    match made {
        Ok(resources) => {
            tracing::info!(group_id = %id, ?shape, "a sandbox stands by");
            Ok(Standby {
                id,
                ip,
                resources,
                template,
                shape,
            })
        }
        Err(error) => {
            let gone = assembly::take_apart(parts, &id, ip, None).await;
            if let (Ok(()), Some(ip)) = (gone, ip) {
                parts.network.release(ip);
            }
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_room_to_grow_within_what_the_host_has() {
        let mut config = Config::default();
        config.sandbox.guest_overhead_mib = 64;
        let host = HostCapacity {
            n_cpus: 8,
            memory_bytes: 8000 * MIB,
        };
        let shape = |cpu_milli, mib, config: &Config| {
            let size = Size {
                cpu_milli,
                memory_bytes: mib * MIB,
            };
            let shape = Shape::on(host, size, config);
            (
                shape.n_vcpus,
                shape.n_possible_vcpus,
                shape.memory_mib,
                shape.hotplug_mib,
            )
        };
        assert_eq!(shape(250, 512, &config), (1, 2, 576, 1792));
        assert_eq!(shape(3000, 4096, &config), (3, 8, 4160, 8064));
        assert_eq!(shape(64_000, 4096, &config).1, 64);
        config.resize.vcpu_factor = 1;
        config.resize.memory_factor = 1;
        assert_eq!(shape(3000, 4096, &config), (3, 4, 4160, 0));
    }
}
