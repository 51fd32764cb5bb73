//! The long work of a group's driver: each job runs beside the driver and ends with one [`Outcome`].

mod resize;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};

use super::{
    disk::DiskVolume,
    images::LocalImage,
    network,
    spec::{GroupSpec, ImagePullPolicy, VolumeSource},
    status::GroupId,
};
use crate::{
    error::{Error, ErrorKind, Result},
    logs,
    network::Addresses,
    parts::{HostParts, now_ms},
    profile::phase,
    sandbox::{
        assembly,
        client::{SandboxConnection, Stdio},
        files,
        lifecycle::{self, ContainerEnd, News},
        oci::{self, GroupFacts},
        volumes,
    },
    snapshots::SnapshotId,
};

pub(super) use resize::{Resize, Resized};

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;
/// After SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(20);
/// What a guest may take longer to end a container than its grace: at least 2 s are left after a hook.
const GUEST_MARGIN: Duration = Duration::from_secs(5);
/// Of a log that is a container's last message, as a kubelet takes them.
const MESSAGE_LINES: usize = 80;
/// As above, in bytes.
const MESSAGE_BYTES: usize = 2048;
/// The guest is asked for news no more often.
pub(super) const NEWS_INTERVAL: Duration = Duration::from_millis(100);
/// The guest is asked again that did not answer.
pub(super) const NEWS_RETRY: Duration = Duration::from_secs(10);
/// From the end of a container to what its watch finds out about it.
const END_MARGIN: Duration = Duration::from_secs(30);
/// From the end of a VM, which breaks calls to its guest off, to where its shim knows.
const END_NOTICE: Duration = Duration::from_secs(2);
/// Exit status of a process that SIGKILL ended.
const KILLED: i32 = 137;
/// State of a sandbox that takes containers, in the shim's words.
pub(super) const SANDBOX_READY: &str = "SANDBOX_READY";

/// How a job ended. Containers go by name: an update may have moved them by then.
#[derive(Debug)]
pub(super) enum Outcome {
    SandboxStarted(Result<SandboxConnection>),
    SandboxStopped(Result<()>),
    /// A running sandbox ended by itself; why.
    SandboxEnded(u32, String),
    /// And which image.
    Pulled(String, String, Result<LocalImage>),
    /// Since when it runs.
    Started(String, u32, Result<u64>),
    /// Its volumes can't be mounted: nothing of this run has begun.
    NotMounted(String, u32, Error),
    Ended(String, u32, Result<Ended>),
    /// Running containers have the files of this group.
    Refreshed(Arc<GroupSpec>, Result<()>),
    /// All was done that can be done to end it.
    Killed(String, u32),
    /// Of this sandbox.
    Resized(u32, Resized),
    /// What the guest of this sandbox told of its containers.
    News(u32, Result<News>),
    Released(Result<()>),
}

/// The end of a container.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) status: i32,
    pub(super) end: ContainerEnd,
    pub(super) at_ms: u64,
}

/// Who writes to the directories of a group, in threads that nothing can stop. What removes these directories waits for them.
#[derive(Debug, Clone)]
pub(super) struct Writers(Arc<Semaphore>);

impl Writers {
    /// More than a group has containers.
    const MOST: u32 = 64;

    /// None yet.
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(Self::MOST as usize)))
    }

    /// One more, until what is returned is dropped.
    async fn join(&self) -> Result<OwnedSemaphorePermit> {
        self.take(1).await
    }

    /// Waits until there are none, and keeps it so until what is returned is dropped.
    async fn keep_out(&self) -> Result<OwnedSemaphorePermit> {
        self.take(Self::MOST).await
    }

    async fn take(&self, n: u32) -> Result<OwnedSemaphorePermit> {
        let permits = Arc::clone(&self.0).acquire_many_owned(n).await;
        permits.map_err(|error| Error::with_source(ErrorKind::Internal, "wait for writers", error))
    }
}

/// One run of one container.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) parts: Arc<HostParts>,
    pub(super) group_id: GroupId,
    pub(super) spec: Arc<GroupSpec>,
    pub(super) index: usize,
    pub(super) run: u32,
    pub(super) ip: Option<Addresses>,
    pub(super) connection: SandboxConnection,
    /// It runs in the sandbox already, which was made from a snapshot.
    pub(super) is_captured: bool,
    /// See [`Writers`].
    pub(super) writers: Writers,
    /// The group is to end: servers of its volumes are not waited for.
    pub(super) ends: watch::Receiver<bool>,
}

/// The id of a container's run in its sandbox.
pub(super) fn container_id(name: &str, run: u32) -> String {
    format!("{name}-{run}")
}

impl Run {
    fn name(&self) -> &str {
        &self.spec.containers[self.index].name
    }

    fn id(&self) -> String {
        container_id(self.name(), self.run)
    }

    fn facts(&self) -> GroupFacts {
        GroupFacts {
            group_id: self.group_id.as_str().to_owned(),
            ips: self.ip.iter().flat_map(Addresses::texts).collect(),
            node_name: self.parts.config.node_name.clone(),
            host_ips: self.parts.network.gateways(),
            hostname: network::seen_hostname(&self.spec, &self.parts.config.network.cluster_domain),
        }
    }

    /// Creates and starts the container.
    pub(super) async fn start(mut self, image: Arc<LocalImage>) -> Outcome {
        if !self.is_captured
            && let Err(error) = self.mount().await
        {
            let name = self.name().to_owned();
            return if self.sandbox_has_ended(&error).await {
                Outcome::Ended(name, self.run, Err(error))
            } else {
                Outcome::NotMounted(name, self.run, error)
            };
        }
        let result = self.try_start(image).await;
        match result {
            // It is the sandbox that has ended, which has its own outcome with the reason.
            Err(error) if self.sandbox_has_ended(&error).await => {
                Outcome::Ended(self.name().to_owned(), self.run, Err(error))
            }
            result => Outcome::Started(self.name().to_owned(), self.run, result),
        }
    }

    /// Whether it was for this that a container did not start.
    async fn sandbox_has_ended(&self, error: &Error) -> bool {
        if error.kind == ErrorKind::Unavailable
            && timeout(END_NOTICE, self.connection.wait_sandbox()).await.is_ok()
        {
            return true;
        }
        let status = self.connection.sandbox_status().await;
        !matches!(status, Ok((state, _)) if state == SANDBOX_READY)
    }

    /// Gives the sandbox the volumes that the container mounts.
    async fn mount(&mut self) -> Result<()> {
        let container = &self.spec.containers[self.index];
        let attach = volumes::attach(
            &self.parts,
            &self.group_id,
            &self.spec,
            container,
            &self.connection,
        );
        tokio::select! {
            attached = phase("container_mount", attach) => attached,
            // An error means that the driver is gone.
            _ = self.ends.wait_for(|ends| *ends) => {
                Err(Error::new(ErrorKind::FailedPrecondition, "the group ends"))
            }
        }
    }

    async fn try_start(&self, image: Arc<LocalImage>) -> Result<u64> {
        let prepare = {
            let (run, image) = (self.clone(), Arc::clone(&image));
            let writes = self.writers.join().await?;
            tokio::task::spawn_blocking(move || {
                let prepared = run.prepare(&image);
                drop(writes);
                prepared
            })
        };
        let stdio = prepare.await.unwrap_or_else(|error| {
            Err(Error::with_source(
                ErrorKind::Internal,
                "prepare a container",
                error,
            ))
        })?;
        let id = self.id();
        let bundle = self.parts.bundle(&self.group_id).container(&id);
        if self.is_captured {
            let adopt = self.connection.adopt_task(&id, &bundle, &image.rootfs, &stdio);
            phase("container_adopt", adopt).await?;
        } else {
            for volume in files::of_container(&self.spec, &self.spec.containers[self.index], &self.facts())? {
                self.connection.put_files(&volume).await?;
            }
            let lifecycle = lifecycle::message(
                &self.spec.containers[self.index].lifecycle,
                self.spec.termination_grace_period_seconds,
            );
            let create = self
                .connection
                .create_task(&id, &bundle, &image.rootfs, &stdio, &lifecycle);
            phase("container_create", create).await?;
        }
        if let Err(error) = phase("container_start", self.connection.start(&id, "")).await {
            if let Err(error) = self.connection.delete(&id, "").await {
                tracing::debug!(error = %error.chain(), "a container that did not start was not removed");
            }
            return Err(error);
        }
        Ok(now_ms())
    }

    /// Writes `config.json` and makes room for logs. Blocks.
    fn prepare(&self, image: &LocalImage) -> Result<Stdio> {
        let container = &self.spec.containers[self.index];
        let facts = self.facts();
        let id = self.id();
        let resolved = (image.resolve)(container)?;
        let spec = oci::container_spec(&self.spec, container, &id, &resolved, &facts)?;
        let bundle = self.parts.bundle(&self.group_id);
        let dir = bundle.container(&id);
        let log = self.parts.log_file(&self.group_id, &container.name, self.run);
        let failed = |what: String| move |error| Error::with_source(ErrorKind::Internal, what, error);
        std::fs::create_dir_all(&dir).map_err(failed(format!("make {}", dir.display())))?;
        let config = dir.join("config.json");
        spec.save(&config).map_err(|error| {
            Error::with_source(ErrorKind::Internal, format!("write {}", config.display()), error)
        })?;
        let log_dir = self.parts.log_dir(&self.group_id, &container.name);
        std::fs::create_dir_all(&log_dir).map_err(failed(format!("make {}", log_dir.display())))?;
        self.drop_old_logs();
        let mut stdio = Stdio {
            terminal: container.tty,
            ..Stdio::default()
        };
        stdio.stdout = format!("{}{}", protocol::CRI_LOG_SCHEME, log.display());
        if !container.tty {
            stdio.stderr = stdio.stdout.clone();
        }
        if container.stdin {
            // The shim keeps a writer of its own, so stdin stays open without anybody attached.
            let fifo = bundle.fifo(&format!("{id}-stdin"));
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            match rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(failed(format!("make FIFO {}", fifo.display()))(error.into())),
            }
            stdio.stdin = fifo.to_string_lossy().into_owned();
        }
        Ok(stdio)
    }

    /// Keeps the logs of this run and the one before.
    fn drop_old_logs(&self) {
        if let Some(old) = self.run.checked_sub(2) {
            let path = self.parts.log_file(&self.group_id, self.name(), old);
            let mut rotated = path.clone().into_os_string();
            rotated.push(".1");
            // Both may be gone, or never have been.
            let _ = std::fs::remove_file(&path);
            let _ = std::fs::remove_file(rotated);
        }
    }

    /// Waits for the container's end, finds out its reason and removes it.
    pub(super) async fn watch(self) -> Outcome {
        let result = self.try_watch().await;
        Outcome::Ended(self.name().to_owned(), self.run, result)
    }

    async fn try_watch(&self) -> Result<Ended> {
        let id = self.id();
        let exit = self.connection.wait(&id, "").await?;
        if exit.status == KILLED {
            // What died with its VM, or of the OOM killer, looks the same as what was killed.
            let (state, _) = self.connection.sandbox_status().await?;
            if state != SANDBOX_READY {
                return Err(Error::new(ErrorKind::Unavailable, "the sandbox has ended"));
            }
        }
        let end = self.end(&id, exit.status).await;
        if let Err(error) = self.connection.delete(&id, "").await {
            // A sandbox that is stopping takes what is in it along.
            match self.connection.sandbox_status().await {
                Ok((state, _)) if state == SANDBOX_READY => {
                    tracing::warn!(group_id = %self.group_id, error = %error.chain(), "an ended container was not removed");
                }
                _ => tracing::debug!(error = %error.chain(), "an ended container goes with its sandbox"),
            }
        }
        Ok(Ended {
            status: exit.status,
            end,
            at_ms: if exit.at_ms == 0 { now_ms() } else { exit.at_ms },
        })
    }

    /// What there is to know of its end.
    async fn end(&self, id: &str, status: i32) -> ContainerEnd {
        let mut end = match self.connection.container_end(id).await {
            Ok(end) => end,
            Err(error) => {
                tracing::debug!(group_id = %self.group_id, error = %error.chain(), "nothing is known of an end");
                ContainerEnd::default()
            }
        };
        let falls_back = self.spec.containers[self.index].lifecycle.falls_back_to_logs;
        if falls_back && status != 0 && end.message.is_empty() {
            let path = self.parts.log_file(&self.group_id, self.name(), self.run);
            let read =
                tokio::task::spawn_blocking(move || logs::last_text(&path, MESSAGE_LINES, MESSAGE_BYTES));
            match read.await.map_err(std::io::Error::other).flatten() {
                Ok(text) => end.message = text,
                Err(error) => tracing::debug!(group_id = %self.group_id, %error, "no last lines of a log"),
            }
        }
        end
    }

    /// The guest's way to end it: its hook, SIGTERM, grace, SIGKILL. Without grace, SIGKILL. Done here where the guest does
    /// not do it.
    pub(super) async fn kill(self, grace: Duration) -> Outcome {
        let id = self.id();
        let signal = async |signal: u32, all: bool| {
            if let Err(error) = self.connection.kill(&id, "", signal, all).await {
                // It may have ended in between.
                tracing::debug!(error = %error.chain(), "a signal was not sent");
            }
        };
        let mut patience = grace;
        if !grace.is_zero() {
            match self.connection.stop_container(&id, grace).await {
                Ok(()) => patience += GUEST_MARGIN,
                Err(error) => {
                    tracing::debug!(error = %error.chain(), "the guest does not stop a container");
                    signal(SIGTERM, false).await;
                }
            }
        }
        if grace.is_zero() || timeout(patience, self.connection.wait(&id, "")).await.is_err() {
            signal(SIGKILL, true).await;
            if timeout(KILL_DEADLINE, self.connection.wait(&id, ""))
                .await
                .is_err()
            {
                tracing::warn!(group_id = %self.group_id, container_id = id, "SIGKILL did not end a container");
                return Outcome::Killed(self.name().to_owned(), self.run);
            }
        }
        // Its watch tells how it ended; this is only for when that is lost.
        tokio::time::sleep(END_MARGIN).await;
        Outcome::Killed(self.name().to_owned(), self.run)
    }
}

/// Puts the files that these runs mount into their sandbox, each volume once.
pub(super) async fn refresh(spec: Arc<GroupSpec>, runs: Vec<Run>) -> Outcome {
    let mut known = BTreeSet::new();
    let put = async {
        for run in &runs {
            for volume in files::of_container(&spec, &spec.containers[run.index], &run.facts())? {
                if known.insert(volume.volume.clone()) {
                    run.connection.put_files(&volume).await?;
                }
            }
        }
        Ok(())
    };
    let result = put.await;
    Outcome::Refreshed(spec, result)
}

/// Waits for a sandbox's own end and finds out its reason.
pub(super) async fn watch_sandbox(
    parts: Arc<HostParts>,
    id: GroupId,
    generation: u32,
    connection: SandboxConnection,
) -> Outcome {
    let why = match connection.wait_sandbox().await {
        Ok(_) => match connection.sandbox_status().await {
            Ok((_, info)) => {
                let get = |key: &str| info.get(key).map(String::as_str).unwrap_or_default();
                let text = format!("{} {}", get("exit_reason"), get("exit_message"));
                let mut text = text.trim().to_owned();
                if let Some(line) = get("console").lines().rev().find(|line| !line.trim().is_empty()) {
                    let line: String = line.chars().filter(|c| !c.is_control()).take(200).collect();
                    text = format!("{text}; last console line: {line}");
                }
                text
            }
            Err(error) => error.chain(),
        },
        Err(error) => {
            let words = parts.bundle(&id).last_words();
            format!("the shim is gone ({}); {words}", error.chain())
        }
    };
    let host_oom = parts.cgroups.oom_kills(&id);
    let why = if host_oom > 0 {
        format!("the host's OOM killer ended the VMM: the group outgrew its memory limit; {why}")
    } else {
        why
    };
    Outcome::SandboxEnded(generation, why)
}

/// Waits for news of a sandbox's containers.
pub(super) async fn follow(
    generation: u32,
    connection: SandboxConnection,
    after: u64,
    delay: Duration,
) -> Outcome {
    tokio::time::sleep(delay).await;
    Outcome::News(generation, connection.follow(after).await)
}

/// Removes what outlives the sandbox: logs, disks that go with the group, address, record.
pub(super) async fn release(
    parts: Arc<HostParts>,
    id: GroupId,
    spec: Arc<GroupSpec>,
    ip: Option<Addresses>,
) -> Outcome {
    // Removed before its start began.
    if let Some(standby) = parts.standbys.assigned(&id) {
        let connection = Some(standby.resources.connection);
        if let Err(error) = assembly::take_apart(&parts, &id, ip, connection).await {
            return Outcome::Released(Err(error));
        }
    }
    let work = {
        let parts = Arc::clone(&parts);
        tokio::task::spawn_blocking(move || {
            let logs = parts.logs_dir().join(id.as_str());
            match std::fs::remove_dir_all(&logs) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %logs.display(), %error, "logs of a removed group stay");
                }
                _ => {}
            }
            // Before the record, which names them: those that are to go do so whenever the agent ends.
            for volume in &spec.volumes {
                if let VolumeSource::Disk(DiskVolume {
                    id: Some(disk),
                    delete_with_group: true,
                    ..
                }) = &volume.source
                {
                    parts.disks.remove(disk)?;
                    parts.store.forget_disk(disk)?;
                }
            }
            parts.store.remove(&id)
        })
    };
    let result = work
        .await
        .unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "release a group", error)));
    if let (Ok(()), Some(ip)) = (&result, ip) {
        parts.network.release(ip);
    }
    Outcome::Released(result)
}

/// Starts the sandbox.
pub(super) async fn start_sandbox(
    parts: Arc<HostParts>,
    id: GroupId,
    spec: Arc<GroupSpec>,
    ip: Option<Addresses>,
    restores: Option<SnapshotId>,
) -> Outcome {
    Outcome::SandboxStarted(assembly::put_together(&parts, &id, &spec, ip, restores.as_ref()).await)
}

/// Stops the sandbox.
pub(super) async fn stop_sandbox(
    parts: Arc<HostParts>,
    id: GroupId,
    ip: Option<Addresses>,
    connection: Option<SandboxConnection>,
    writers: Writers,
) -> Outcome {
    let stopped = match writers.keep_out().await {
        Ok(_nobody_writes) => assembly::take_apart(&parts, &id, ip, connection).await,
        Err(error) => Err(error),
    };
    Outcome::SandboxStopped(stopped)
}

/// Pulls a container's image.
pub(super) async fn pull(
    parts: Arc<HostParts>,
    spec: Arc<GroupSpec>,
    index: usize,
    is_captured: bool,
) -> Outcome {
    let container = &spec.containers[index];
    // What runs already has its image.
    let policy = if is_captured {
        ImagePullPolicy::IfNotPresent
    } else {
        container.image_pull_policy
    };
    let pull = parts
        .images
        .pull(&container.image, policy, &spec.registry_credentials, None);
    let result = phase("image", pull).await;
    Outcome::Pulled(container.name.clone(), container.image.clone(), result)
}
