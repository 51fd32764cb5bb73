//! What the doors ask of the engine. The doors know only this trait; `crate::host::Host` is its real form, door tests use
//! a recording fake.

use std::{pin::Pin, time::SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{future::BoxFuture, stream::BoxStream};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    error::Result,
    group::{
        disk::DiskId,
        rules::Rules,
        spec::{GroupSpec, ImagePullPolicy, RegistryCredential},
        status::{Group, GroupId},
    },
    snapshots::SnapshotId,
};

/// The engine behind all doors.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// What groups are held against before they come here.
    fn rules(&self) -> &Rules;
    /// Accepts a checked group; it is durable when this returns, and starts in the background.
    ///
    /// With a `client_token` seen before, returns the group of that time.
    async fn create(&self, spec: GroupSpec, client_token: Option<String>) -> Result<GroupId>;
    /// Whether a checked group would be accepted now, as far as that can be told without taking anything for it.
    async fn check(&self, spec: &GroupSpec) -> Result<()>;
    /// All groups, by creation time.
    async fn list(&self) -> Vec<Group>;
    /// One group.
    async fn get(&self, id: &GroupId) -> Result<Group>;
    /// Waits until the group's status differs from `seen` or the group is gone (then `NotFound`).
    async fn wait_change(&self, id: &GroupId, seen: &Group) -> Result<Group>;
    /// Asks for the end of a group: SIGTERM, grace, SIGKILL, removal. Returns once the wish is durable; `wait` returns
    /// only when everything of the group is gone. `grace_seconds` overrides the spec's.
    async fn delete(&self, id: &GroupId, grace_seconds: Option<u64>, wait: bool) -> Result<()>;
    /// Ends all containers of a pending or running group, and starts them again in order, in the same sandbox. Returns once
    /// the wish is durable.
    async fn restart(&self, id: &GroupId) -> Result<()>;
    /// Makes a pending or running group what `spec` says, which was made from `base`, the group as it was. Ends and begins
    /// anew what that takes and no more ([`crate::group::update`]). Returns once the wish is durable; `false` when `spec` says
    /// what the group is already. `InvalidArgument` names all that can't be changed, `FailedPrecondition` when the group is
    /// something else than `base` by now.
    async fn update(&self, id: &GroupId, base: &GroupSpec, spec: GroupSpec) -> Result<bool>;
    /// Grows a disk volume of a running group to so many GiB, and its file system with it. As many as it has grows the file
    /// system alone. `NotFound` when the group has no such volume, `InvalidArgument` when the volume is no disk or larger.
    async fn resize_volume(&self, id: &GroupId, volume: &str, gib: u32) -> Result<()>;
    /// Takes a snapshot of a running group, which goes on.
    async fn snapshot(&self, id: &GroupId) -> Result<SnapshotInfo>;
    /// All snapshots, oldest first.
    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>>;
    /// The disks on this host, those of groups and those that were kept.
    async fn disks(&self) -> Result<Vec<DiskInfo>>;
    /// Removes a disk for good; `FailedPrecondition` names the group that has it, `DiskNotFound` when there is none.
    async fn remove_disk(&self, id: &DiskId) -> Result<()>;
    /// Removes a snapshot; `FailedPrecondition` while a group is being made from it.
    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<()>;
    /// Makes groups that go on from a snapshot, each with an identity of its own; all or none. They start in the background.
    async fn restore(&self, id: &SnapshotId, request: CloneRequest) -> Result<Vec<GroupId>>;
    /// Makes groups that go on from where a running group is now, which goes on too.
    async fn fork(&self, id: &GroupId, request: CloneRequest) -> Result<Forked>;
    /// Runs a command in a running container.
    async fn exec(&self, id: &GroupId, request: ExecRequest) -> Result<ExecSession>;
    /// The container's log as the kubelet would stream it.
    async fn logs(
        &self,
        id: &GroupId,
        options: LogOptions,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>>;
    /// Statistics of a running group.
    async fn stats(&self, id: &GroupId) -> Result<GroupStats>;
    /// The agent's own metrics, in the Prometheus text format.
    fn metrics(&self) -> String;
    /// What the host has and uses.
    async fn host_stats(&self) -> Result<HostStats>;
    /// Pulls an image; the stream ends with the last progress or an error.
    async fn pull_image(
        &self,
        reference: String,
        policy: ImagePullPolicy,
        credentials: Option<RegistryCredential>,
    ) -> BoxStream<'static, Result<PullStatus>>;
    /// Images on this host.
    async fn list_images(&self) -> Result<Vec<ImageInfo>>;
    /// Removes an image; `FailedPrecondition` while a group uses it.
    async fn remove_image(&self, reference: &str) -> Result<()>;
}

/// A snapshot, without what its groups hold secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its id.
    pub id: SnapshotId,
    /// The group it was taken of.
    pub group_id: GroupId,
    /// That group's name.
    pub name: String,
    /// Its namespace, the owner.
    pub namespace: String,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// How long the group's containers stood still, microseconds.
    pub pause_us: u64,
    /// Disk space, bytes.
    pub size_bytes: u64,
}

/// Groups to be made from a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneRequest {
    /// Name of the one group, or what the names of several begin with: `NAME-1`...; the parent's name and `-clone` when not
    /// given.
    #[serde(default)]
    pub name: Option<String>,
    /// The namespace they are expected in, which must be the parent's.
    #[serde(default)]
    pub namespace: Option<String>,
    /// How many, 1 to 1000.
    #[serde(default = "one")]
    pub count: u32,
}

fn one() -> u32 {
    1
}

/// What a fork made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forked {
    /// The new groups.
    pub groups: Vec<GroupId>,
    /// How long the parent's containers stood still, microseconds.
    pub pause_us: u64,
}

/// A command to run in a container.
#[derive(Debug, Clone)]
pub struct ExecRequest {
    /// Container name; the first container when `None`.
    pub container: Option<String>,
    /// Program and arguments, not empty.
    pub command: Vec<String>,
    /// Allocate a TTY (then there is no stderr stream).
    pub tty: bool,
    /// stdin is wanted.
    pub stdin: bool,
    /// stdout is wanted.
    pub stdout: bool,
    /// stderr is wanted.
    pub stderr: bool,
    /// First size of the TTY: rows, columns.
    pub size: Option<(u16, u16)>,
}

/// A running command. Dropping it kills the command.
pub struct ExecSession {
    /// Writes to the command's stdin; shutting it down is a half close.
    pub stdin: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    /// The command's output, to the end.
    pub stdout: Option<Pin<Box<dyn AsyncRead + Send>>>,
    /// The command's errors, to the end.
    pub stderr: Option<Pin<Box<dyn AsyncRead + Send>>>,
    /// Resize and signals.
    pub control: Box<dyn ExecControl>,
    /// The exit code (128 + signal), once all output was handed out.
    pub exit: BoxFuture<'static, Result<i32>>,
}

impl std::fmt::Debug for ExecSession {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ExecSession").finish_non_exhaustive()
    }
}

/// Control of a running command.
#[async_trait]
pub trait ExecControl: Send + Sync {
    /// Sets the TTY's size.
    async fn resize(&self, rows: u16, columns: u16) -> Result<()>;
    /// Sends a signal.
    async fn signal(&self, signal: i32) -> Result<()>;
}

/// Which part of a log, and in which form.
#[derive(Debug, Clone, Default)]
pub struct LogOptions {
    /// Container name; the first container when `None`.
    pub container: Option<String>,
    /// Go on as lines are written, until the container ends or is removed.
    pub follow: bool,
    /// The run before the last restart.
    pub previous: bool,
    /// Only the last lines.
    pub tail_lines: Option<u64>,
    /// Stop after so many bytes.
    pub limit_bytes: Option<u64>,
    /// Only lines written at or after this time.
    pub since: Option<SystemTime>,
    /// Put the RFC 3339 time and a space before each line.
    pub timestamps: bool,
}

/// Statistics of a group at one moment.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GroupStats {
    /// When, Unix milliseconds.
    pub at_ms: u64,
    /// One per running container.
    pub containers: Vec<ContainerStats>,
    /// The group's network interface `eth0`.
    pub network: NetworkStats,
    /// Size and use of the scratch slice.
    pub scratch_capacity_bytes: u64,
    /// Used bytes of it.
    pub scratch_used_bytes: u64,
    /// CPU used by the guest, microseconds.
    pub guest_cpu_usage_us: u64,
    /// Guest memory in use (total less available), bytes.
    pub guest_memory_used_bytes: u64,
}

/// Statistics of a container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ContainerStats {
    /// Name.
    pub name: String,
    /// Unix milliseconds.
    pub started_at_ms: u64,
    /// CPU time, microseconds.
    pub cpu_usage_us: u64,
    /// Of it in user mode.
    pub cpu_user_us: u64,
    /// Of it in the kernel.
    pub cpu_system_us: u64,
    /// Periods in which its limit of CPU time was looked at.
    pub cpu_periods: u64,
    /// Of them those in which it was stopped.
    pub cpu_throttled_periods: u64,
    /// For how long in all, microseconds.
    pub cpu_throttled_us: u64,
    /// Memory charged, bytes.
    pub memory_usage_bytes: u64,
    /// Usage less inactive file pages, bytes.
    pub memory_working_set_bytes: u64,
    /// Anonymous memory, bytes.
    pub memory_rss_bytes: u64,
    /// Page cache, bytes.
    pub memory_cache_bytes: u64,
    /// 0 = no limit.
    pub memory_limit_bytes: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Writable layer, bytes.
    pub rootfs_used_bytes: u64,
    /// Writable layer, inodes.
    pub rootfs_used_inodes: u64,
    /// Log files, bytes.
    pub logs_used_bytes: u64,
    /// Bytes read from disks.
    pub io_read_bytes: u64,
    /// Bytes written to disks.
    pub io_write_bytes: u64,
    /// Reads from disks.
    pub io_reads: u64,
    /// Writes to disks.
    pub io_writes: u64,
    /// OOM kills in it.
    pub oom_kills: u64,
}

/// Counters of a network interface.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct NetworkStats {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Packets dropped that came.
    pub rx_dropped: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets dropped that were to be sent.
    pub tx_dropped: u64,
    /// Send errors.
    pub tx_errors: u64,
}

/// What the host has and uses.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostStats {
    /// Unix milliseconds.
    pub at_ms: u64,
    /// Host name (Kubernetes node name).
    pub node_name: String,
    /// When the agent started, Unix milliseconds.
    pub started_at_ms: u64,
    /// CPU time used since boot, microseconds.
    pub cpu_usage_us: u64,
    /// Memory, bytes.
    pub memory_total_bytes: u64,
    /// Available memory, bytes.
    pub memory_available_bytes: u64,
    /// Size of the file system of the state directory.
    pub fs_capacity_bytes: u64,
    /// Free there.
    pub fs_available_bytes: u64,
}

/// Progress of a pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullStatus {
    /// `resolving`, `downloading`, `converting`, `done`.
    pub phase: String,
    /// Layer digest, where it is about a layer.
    pub layer: Option<String>,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all, 0 if unknown.
    pub total_bytes: u64,
    /// With `done`: the manifest digest.
    pub digest: Option<String>,
}

/// An image on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Normalised reference.
    pub reference: String,
    /// Manifest digest.
    pub digest: String,
    /// Bytes on disk, shared layers counted in full.
    pub size_bytes: u64,
    /// Unix milliseconds.
    pub pulled_at_ms: u64,
    /// A group uses it.
    pub in_use: bool,
}

/// A disk on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Which.
    pub id: DiskId,
    /// Its size, bytes.
    pub size_bytes: u64,
    /// What it takes on the host's disk, bytes.
    pub used_bytes: u64,
    /// When it was made, Unix milliseconds, if that is known.
    pub made_at_ms: Option<u64>,
    /// The group that has it.
    pub group: Option<GroupId>,
}
