//! The engine behind the doors: owns the host's parts and one driver for each group.

mod disks;
mod images;
mod network;
mod snapshots;
mod stats;
mod update;

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{
    FutureExt, StreamExt,
    future::join_all,
    stream::{self, BoxStream},
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
};

pub use images::StoreImages;

use crate::{
    capacity::{self, HostCapacity},
    cgroup::Cgroups,
    config::Config,
    disks::Disks,
    engine::{
        CloneRequest, DiskInfo, Engine, ExecRequest, ExecSession, Forked, GroupStats, HostStats, ImageInfo,
        LogOptions, PullStatus, SnapshotInfo,
    },
    error::{Error, ErrorKind, Result},
    group::{
        disk::DiskId,
        driver::{Driver, GroupHandle, Published},
        images::Images,
        network::wants_ipv6,
        rules::Rules,
        size::SizeTable,
        spec::{Door, GroupSpec, ImagePullPolicy, RegistryCredential, Size},
        status::{ContainerState, Group, GroupId, GroupStatus},
        view,
    },
    logs,
    parts::{HostParts, now_ms},
    profile, random,
    sandbox::{
        client::Deadlines,
        exec,
        shim::ShimProgram,
        standby::{self, Shape, Standbys},
        templates::Templates,
    },
    scratch::ScratchDisks,
    snapshots::{Snapshot, SnapshotId, Snapshots},
    store::{ContainerRecord, Moments, Record, Store},
};

/// The engine of this host.
#[derive(Debug)]
pub struct Host {
    parts: Arc<HostParts>,
    capacity: HostCapacity,
    rules: Rules,
    started_at_ms: u64,
    groups: Arc<Mutex<BTreeMap<GroupId, GroupHandle>>>,
    /// One acceptance at a time: names, tokens and capacity are checked and taken as one step.
    accepting: tokio::sync::Mutex<()>,
    drivers: Mutex<JoinSet<()>>,
    /// Makes sandboxes stand by.
    keeper: AbortHandle,
}

impl Host {
    /// Opens the store, makes what the groups share, adopts what runs and clears what belongs to nobody.
    ///
    /// # Errors
    /// The part that could not be set up, with what to do about it.
    pub async fn open(config: Config, images: Arc<dyn Images>) -> Result<Self> {
        for dir in [&config.state_dir, &config.run_dir] {
            make_private_dir(dir)?;
        }
        let store = Store::open(&config.state_dir.join("store.redb"))?.counting(Moments::from_environment()?);
        let records = store.records()?;
        let network = network::open(&config, &records).await?;
        let scratch = {
            let (dir, size_gib) = (config.state_dir.join("scratch"), config.sandbox.scratch_gib);
            tokio::task::spawn_blocking(move || ScratchDisks::open(dir, size_gib))
                .await
                .map_err(|error| {
                    Error::with_source(ErrorKind::Internal, "make the scratch template", error)
                })??
        };
        let cgroups = Cgroups::open(&config.sandbox.cgroup_root)?;
        let deadlines = Deadlines {
            start: Duration::from_secs(config.sandbox.start_timeout_seconds),
            request: Duration::from_secs(config.sandbox.request_timeout_seconds),
        };
        let shim = ShimProgram::new(config.files.shim.clone(), deadlines);
        let templates = Templates::open(&config, shim.clone(), scratch.clone())?;
        let snapshots = {
            let (directory, kernel) = (config.state_dir.join("snapshots"), config.files.kernel.clone());
            let in_use: Vec<_> = records
                .iter()
                .filter_map(|record| record.restores.clone())
                .collect();
            Snapshots::open(directory, kernel, |id| !in_use.contains(id))?
        };
        let capacity = stats::host_capacity()?;
        let n_starts = concurrent_starts(config.sandbox.max_concurrent_starts, capacity.n_cpus);
        let disks = Disks::open(config.state_dir.join("disks"))?;
        let rules = Rules {
            sizes: SizeTable::default(),
            allow: config.allow.clone(),
        };
        let parts = Arc::new(HostParts {
            disks,
            starts: Semaphore::new(n_starts),
            n_starts,
            standbys: Standbys::new(config.standby.clone()),
            config,
            capacity,
            templates,
            snapshots,
            store,
            network,
            images,
            shim,
            scratch,
            cgroups,
        });
        let host = Self {
            keeper: tokio::spawn(standby::keep(Arc::clone(&parts))).abort_handle(),
            capacity,
            rules,
            parts,
            started_at_ms: now_ms(),
            groups: Arc::default(),
            accepting: tokio::sync::Mutex::new(()),
            drivers: Mutex::new(JoinSet::new()),
        };
        let known: Vec<GroupId> = records.iter().map(|record| record.group.id.clone()).collect();
        host.remove_orphans(&known).await;
        let mut recovered = Vec::new();
        for record in records {
            recovered.push(async {
                let (mut driver, handle) = Driver::new(Arc::clone(&host.parts), record);
                driver.recover().await;
                (driver, handle)
            });
        }
        for (driver, handle) in join_all(recovered).await {
            host.drive(driver, handle);
        }
        Ok(host)
    }

    /// Ends all drivers; the groups live on without an agent.
    pub async fn shutdown(&self) {
        self.parts.standbys.dismiss_all(&self.parts, &self.keeper).await;
        let mut drivers = {
            let mut drivers = self.drivers.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *drivers)
        };
        drivers.shutdown().await;
        let empty = self.lock_groups().is_empty();
        if empty && let Err(error) = self.parts.network.cleanup().await {
            tracing::warn!(error = %error.chain(), "the network stays set up");
        }
    }

    fn lock_groups(&self) -> std::sync::MutexGuard<'_, BTreeMap<GroupId, GroupHandle>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drive(&self, driver: Driver, handle: GroupHandle) {
        let id = handle.now().group.id.clone();
        self.lock_groups().insert(id.clone(), handle);
        let groups = Arc::clone(&self.groups);
        let mut drivers = self.drivers.lock().unwrap_or_else(PoisonError::into_inner);
        // Forget drivers that have ended.
        while drivers.try_join_next().is_some() {}
        drivers.spawn(async move {
            let published = driver.run().await;
            groups.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            // Followers learn of the end only once the group can't be found any more.
            drop(published);
        });
    }

    /// Clears bundles, taps, cgroups, scratch disks and logs that belong to no group. Failures are told and passed over:
    /// the next start tries again.
    async fn remove_orphans(&self, known: &[GroupId]) {
        let parts = &self.parts;
        let ids_in = |dir: &std::path::Path| -> Vec<GroupId> {
            let listing = std::fs::read_dir(dir).into_iter().flatten().flatten();
            listing
                .filter_map(|entry| GroupId::parse(entry.file_name().to_str()?))
                .filter(|id| !known.contains(id))
                .collect()
        };
        let told = |what: &str, result: Result<usize>| match result {
            Ok(0) => {}
            Ok(n) => tracing::info!(n, what, "orphans removed"),
            Err(error) => tracing::warn!(error = %error.chain(), what, "orphans stay"),
        };
        for id in ids_in(&parts.bundles_dir()) {
            let bundle = parts.bundle(&id);
            told("shim", parts.shim.bury(id.as_str(), &bundle).await.map(|()| 1));
            if let Err(error) = tokio::fs::remove_dir_all(bundle.dir()).await {
                tracing::warn!(path = %bundle.dir().display(), %error, "an orphan bundle stays");
            }
        }
        for id in ids_in(&parts.logs_dir()) {
            let dir = parts.logs_dir().join(id.as_str());
            if let Err(error) = tokio::fs::remove_dir_all(&dir).await {
                tracing::warn!(path = %dir.display(), %error, "orphan logs stay");
            }
        }
        told("cgroup", parts.cgroups.remove_orphans(known));
        told(
            "tap",
            parts.network.remove_orphans(known).await.map(|taps| taps.len()),
        );
        told("scratch disk", parts.scratch.remove_orphans(known));
    }

    fn handle(&self, id: &GroupId) -> Result<GroupHandle> {
        self.lock_groups().get(id).cloned().ok_or_else(|| no_group(id))
    }

    fn published(&self, id: &GroupId) -> Result<Arc<Published>> {
        Ok(self.handle(id)?.now())
    }

    fn all(&self) -> Vec<Arc<Published>> {
        self.lock_groups().values().map(GroupHandle::now).collect()
    }

    /// Takes a group on; with a snapshot it goes on from that.
    async fn accept(
        &self,
        mut spec: GroupSpec,
        client_token: Option<String>,
        snapshot: Option<&Snapshot>,
    ) -> Result<GroupId> {
        let _one = self.accepting.lock().await;
        let now = now_ms();
        if let Some(token) = &client_token {
            let (store, token) = (self.parts.store.clone(), token.clone());
            let known = tokio::task::spawn_blocking(move || store.token(&token, now)).await;
            if let Some(id) =
                known.map_err(|error| Error::with_source(ErrorKind::Internal, "read a token", error))??
            {
                return Ok(id);
            }
        }
        self.admit(&spec)?;
        self.choose_disks(&mut spec)?;
        // CNI plugins want to know the group.
        let standby = match snapshot {
            Some(_) => None,
            None if self.parts.network.uses_cni() => None,
            None => self.parts.standbys.take(Shape::of(spec.size, &self.parts)),
        };
        let (id, ip) = match &standby {
            Some(standby) => (standby.id.clone(), standby.ip.map(|ip| ip.v4)),
            None => (random::group_id()?, self.parts.network.reserve()?),
        };
        let ip = ip.map(|ip| self.parts.network.addresses(ip, wants_ipv6(&spec)));
        let mut status = GroupStatus::new(&spec, now);
        status.show_addresses(ip);
        let mut containers = vec![ContainerRecord::default(); spec.containers.len()];
        if let Some(snapshot) = snapshot {
            status.initialized = true;
            containers = snapshots::records(snapshot);
            for ((status, captured), record) in status
                .containers
                .iter_mut()
                .zip(&snapshot.containers)
                .zip(&containers)
            {
                if record.done {
                    status.clone_from(captured);
                }
            }
        }
        let record = Record {
            ip: ip.map(|ip| ip.v4),
            ip6: ip.and_then(|ip| ip.v6),
            deleting: None,
            sandbox_running: false,
            restarting: None,
            update: None,
            refreshing: false,
            resizing: None,
            failed: false,
            ending_since_ms: None,
            news_after: Some(0),
            restores: snapshot.map(|snapshot| snapshot.id.clone()),
            containers,
            group: Group { id, status, spec },
        };
        let written = {
            let (store, record) = (self.parts.store.clone(), record.clone());
            let write = tokio::task::spawn_blocking(move || {
                store.put_with_token(&record, client_token.as_deref(), now)
            });
            profile::phase("accept", write).await
        };
        let written = written
            .unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "write a group", error)));
        if let Err(error) = written {
            match (standby, ip) {
                (Some(standby), _) => self.parts.standbys.put_back(standby),
                (None, Some(ip)) => self.parts.network.release(ip),
                (None, None) => {}
            }
            return Err(error);
        }
        if let Some(standby) = standby {
            self.parts.standbys.assign(standby);
        }
        let id = record.group.id.clone();
        tracing::info!(group_id = %id, name = record.group.spec.name, "group accepted");
        let (driver, handle) = Driver::new(Arc::clone(&self.parts), record);
        self.drive(driver, handle);
        Ok(id)
    }

    /// Refuses what this host can't take.
    fn admit(&self, spec: &GroupSpec) -> Result<()> {
        let groups = self.all();
        if spec.door == Door::Pod {
            let same = |published: &&Arc<Published>| {
                let other = &published.group.spec;
                other.door == Door::Pod && other.name == spec.name && other.namespace == spec.namespace
            };
            if let Some(other) = groups.iter().find(same) {
                return Err(Error::new(
                    ErrorKind::AlreadyExists,
                    format!(
                        "a container group {}/{} exists already ({}): choose another name or remove it",
                        spec.namespace, spec.name, other.group.id
                    ),
                ));
            }
        }
        self.admit_to_network(spec, None)?;
        let running: Vec<Size> = groups.iter().filter_map(|group| group.reserved()).collect();
        let config = &self.parts.config;
        capacity::admit(
            self.capacity,
            &config.capacity,
            &config.sandbox,
            &running,
            spec.size,
        )
    }
}

/// How many sandboxes may start at once, when so many are configured.
fn concurrent_starts(configured: usize, n_cpus: u32) -> usize {
    let wanted = match configured {
        0 => usize::try_from(n_cpus).unwrap_or(usize::MAX).saturating_mul(2),
        configured => configured,
    };
    wanted.clamp(1, Semaphore::MAX_PERMITS)
}

fn no_group(id: &GroupId) -> Error {
    Error::new(ErrorKind::NotFound, format!("no container group {id}"))
}

fn make_private_dir(dir: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(dir)
        .map_err(|error| {
            Error::with_source(
                ErrorKind::Internal,
                format!("make directory {}", dir.display()),
                error,
            )
        })
}

/// Where a container is in its group: by name, or the first.
fn container_index(group: &Group, name: Option<&str>) -> Result<usize> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Ok(0);
    };
    let names = || {
        let names: Vec<&str> = group
            .spec
            .containers
            .iter()
            .map(|spec| spec.name.as_str())
            .collect();
        names.join(", ")
    };
    group
        .spec
        .containers
        .iter()
        .position(|spec| spec.name == name)
        .ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "container group {} has no container {name:?}: it has {}",
                    group.id,
                    names()
                ),
            )
        })
}

#[async_trait]
impl Engine for Host {
    fn rules(&self) -> &Rules {
        &self.rules
    }

    async fn create(&self, spec: GroupSpec, client_token: Option<String>) -> Result<GroupId> {
        self.accept(spec, client_token, None).await
    }

    async fn check(&self, spec: &GroupSpec) -> Result<()> {
        self.admit(spec)
    }

    async fn snapshot(&self, id: &GroupId) -> Result<SnapshotInfo> {
        Ok(self.take_snapshot(id, false).await?.info())
    }

    async fn disks(&self) -> Result<Vec<DiskInfo>> {
        self.list_disks().await
    }

    async fn remove_disk(&self, id: &DiskId) -> Result<()> {
        self.remove_kept_disk(id).await
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        self.list_snapshots().await
    }

    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<()> {
        self.remove_snapshot_files(id).await
    }

    async fn restore(&self, id: &SnapshotId, request: CloneRequest) -> Result<Vec<GroupId>> {
        self.restore_snapshot(id, &request).await
    }

    async fn fork(&self, id: &GroupId, request: CloneRequest) -> Result<Forked> {
        self.fork_group(id, &request).await
    }

    async fn list(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = self
            .all()
            .iter()
            .map(|published| published.group.clone())
            .collect();
        groups.sort_by(|a, b| (a.status.created_at_ms, &a.id).cmp(&(b.status.created_at_ms, &b.id)));
        groups
    }

    async fn get(&self, id: &GroupId) -> Result<Group> {
        Ok(self.published(id)?.group.clone())
    }

    async fn wait_change(&self, id: &GroupId, seen: &Group) -> Result<Group> {
        let mut follow = self.handle(id)?.follow();
        let published = follow
            .wait_for(|published| published.group != *seen)
            .await
            .map_err(|_| no_group(id))?;
        Ok(published.group.clone())
    }

    async fn delete(&self, id: &GroupId, grace_seconds: Option<u64>, wait: bool) -> Result<()> {
        let handle = self.handle(id)?;
        if !handle.delete(grace_seconds).await {
            return Err(no_group(id));
        }
        if wait {
            let mut follow = handle.follow();
            while follow.changed().await.is_ok() {}
        }
        Ok(())
    }

    async fn restart(&self, id: &GroupId) -> Result<()> {
        self.handle(id)?.restart().await
    }

    async fn update(&self, id: &GroupId, base: &GroupSpec, spec: GroupSpec) -> Result<bool> {
        self.update_group(id, base, spec).await
    }

    async fn resize_volume(&self, id: &GroupId, volume: &str, gib: u32) -> Result<()> {
        self.grow_disk(id, volume, gib).await
    }

    async fn exec(&self, id: &GroupId, request: ExecRequest) -> Result<ExecSession> {
        let published = self.published(id)?;
        let group = &published.group;
        let index = container_index(group, request.container.as_deref())?;
        let status = &group.status.containers[index];
        let running = matches!(status.state, ContainerState::Running { .. });
        let (Some(connection), Some(container_id), true) =
            (&published.connection, &status.container_id, running)
        else {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "container {} of {id} does not run: {}",
                    status.name,
                    state_text(&status.state)
                ),
            ));
        };
        let bundle = self.parts.bundle(id);
        let exec_id = random::text(16)?;
        exec::exec(connection.clone(), &bundle, container_id, exec_id, &request).await
    }

    async fn logs(&self, id: &GroupId, options: LogOptions) -> Result<BoxStream<'static, io::Result<Bytes>>> {
        let handle = self.handle(id)?;
        let group = handle.now().group.clone();
        let index = container_index(&group, options.container.as_deref())?;
        let status = &group.status.containers[index];
        let run = if options.previous {
            status.restart_count.checked_sub(1).ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!(
                        "container {} of {id} was not restarted: it has no previous log",
                        status.name
                    ),
                )
            })?
        } else {
            status.restart_count
        };
        let path = self.parts.log_file(id, &status.name, run);
        let mut follow = handle.follow();
        // The end of this run: it ended, another began, or the group is gone.
        let ended = async move {
            let over = |published: &Arc<Published>| {
                let status = &published.group.status.containers[index];
                let waits_again = match &status.state {
                    ContainerState::Waiting { reason, .. } => {
                        status.previous.is_some() && reason != view::CREATING
                    }
                    ContainerState::Running { .. } => false,
                    ContainerState::Terminated { .. } => true,
                };
                status.restart_count != run || waits_again
            };
            // An error means that the group is gone.
            let _ = follow.wait_for(over).await;
        };
        logs::stream(path.clone(), &options, ended.boxed()).map_err(|error| {
            Error::with_source(ErrorKind::Internal, format!("read log {}", path.display()), error)
        })
    }

    async fn stats(&self, id: &GroupId) -> Result<GroupStats> {
        let published = self.published(id)?;
        let connection = published.connection.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "container group {id} does not run: its phase is {:?}",
                    published.group.status.phase
                ),
            )
        })?;
        stats::group_stats(&self.parts, &published.group, connection).await
    }

    fn metrics(&self) -> String {
        profile::render()
    }

    async fn host_stats(&self) -> Result<HostStats> {
        stats::host_stats(&self.parts, self.started_at_ms)
    }

    async fn pull_image(
        &self,
        reference: String,
        policy: ImagePullPolicy,
        credentials: Option<RegistryCredential>,
    ) -> BoxStream<'static, Result<PullStatus>> {
        let (sender, receiver) = mpsc::channel(32);
        let images = Arc::clone(&self.parts.images);
        let progress = sender.clone();
        let pull = async move {
            let credentials: Vec<RegistryCredential> = credentials.into_iter().collect();
            images
                .pull(&reference, policy, &credentials, Some(progress))
                .await
        };
        // Ends with the reader: dropping the stream stops the pull.
        let last = pull
            .map(|result| {
                result.map(|image| PullStatus {
                    phase: "done".to_owned(),
                    layer: None,
                    done_bytes: 0,
                    total_bytes: 0,
                    digest: Some(image.digest),
                })
            })
            .into_stream();
        drop(sender);
        let steps = stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|status| (Ok(status), receiver))
        });
        stream::select(steps, last).boxed()
    }

    async fn list_images(&self) -> Result<Vec<ImageInfo>> {
        self.parts.images.list().await
    }

    async fn remove_image(&self, reference: &str) -> Result<()> {
        self.parts.images.remove(reference).await
    }
}

fn state_text(state: &ContainerState) -> String {
    match state {
        ContainerState::Waiting { reason, message } if message.is_empty() => format!("it waits ({reason})"),
        ContainerState::Waiting { reason, message } => format!("it waits ({reason}: {message})"),
        ContainerState::Running { .. } => "its sandbox is not ready".to_owned(),
        ContainerState::Terminated {
            exit_code, reason, ..
        } => format!("it ended with {exit_code} ({reason})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_at_once_follow_the_processors_unless_configured() {
        assert_eq!(concurrent_starts(0, 1), 2);
        assert_eq!(concurrent_starts(0, 64), 128);
        assert_eq!(concurrent_starts(5, 64), 5);
        assert_eq!(concurrent_starts(usize::MAX, 1), Semaphore::MAX_PERMITS);
    }
}
