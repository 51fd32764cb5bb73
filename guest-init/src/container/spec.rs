//! The parts of an OCI runtime specification (1.2) that the guest acts on. Everything else in the document is the
//! host's business or has no meaning in a microVM (user namespaces, hooks, Intel RDT) and is skipped when read.

use std::collections::BTreeMap;

use serde::Deserialize;

/// `config.json`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// What to run.
    pub process: Option<Process>,
    /// The root file system.
    pub root: Option<Root>,
    /// Host name, for a UTS namespace of the container's own.
    pub hostname: Option<String>,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// Everything about Linux.
    pub linux: Linux,
}

/// `root`; its path is not used: the guest makes the root itself.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Root {
    /// Nothing may be written to it.
    pub readonly: bool,
}

/// `process`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Runs on a terminal.
    pub terminal: bool,
    /// First size of the terminal.
    pub console_size: Option<ConsoleSize>,
    /// Who runs it.
    pub user: User,
    /// Program and arguments.
    pub args: Vec<String>,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: String,
    /// Capabilities; none when absent.
    pub capabilities: Capabilities,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// No privileges through `execve`.
    pub no_new_privileges: bool,
    /// Adjustment of the out-of-memory score.
    pub oom_score_adj: Option<i32>,
}

/// `process.consoleSize`, in characters.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

/// `process.user`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// `user[:group]`, names or numbers, looked up in the image's `/etc/passwd` and `/etc/group`; wins over the ids.
    pub username: String,
}

/// `process.capabilities`: names such as `CAP_CHOWN`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Upper limit.
    pub bounding: Vec<String>,
    /// In force.
    pub effective: Vec<String>,
    /// Kept through `execve`, with the file's.
    pub inheritable: Vec<String>,
    /// Can be put in force.
    pub permitted: Vec<String>,
    /// Kept through `execve` of ordinary files.
    pub ambient: Vec<String>,
}

/// One of `process.rlimits`.
#[derive(Debug, Clone, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_...`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Highest the process may set.
    pub hard: u64,
    /// In force.
    pub soft: u64,
}

/// One of `mounts`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Where in the container, absolute.
    pub destination: String,
    /// File system type, `bind`, or `emptydir`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Device, path or volume name.
    pub source: String,
    /// As for `mount -o`.
    pub options: Vec<String>,
}

/// `linux`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    /// Namespaces of the container's own (no path) or the sandbox's (absent, or with a path).
    pub namespaces: Vec<Namespace>,
    /// Devices beside the default ones.
    pub devices: Vec<Device>,
    /// Limits.
    pub resources: Resources,
    /// Kernel parameters.
    pub sysctl: BTreeMap<String, String>,
    /// System call filter; the guest's default when absent.
    pub seccomp: Option<Seccomp>,
    /// Paths nothing can be read from.
    pub masked_paths: Vec<String>,
    /// Paths nothing can be written to.
    pub readonly_paths: Vec<String>,
}

/// One of `linux.namespaces`.
#[derive(Debug, Clone, Deserialize)]
pub struct Namespace {
    /// `pid`, `mount`, `network`, `ipc`, `uts`, `cgroup`, `user` or `time`.
    #[serde(rename = "type")]
    pub kind: String,
    /// An existing namespace on the host, which stands for the sandbox's here.
    #[serde(default)]
    pub path: String,
}

/// One of `linux.devices`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Where in the container, absolute.
    pub path: String,
    /// `c`, `u` or `b`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Major number.
    #[serde(default)]
    pub major: u32,
    /// Minor number.
    #[serde(default)]
    pub minor: u32,
    /// Permissions.
    pub file_mode: Option<u32>,
    /// Owner.
    #[serde(default)]
    pub uid: u32,
    /// Group.
    #[serde(default)]
    pub gid: u32,
}

/// `linux.resources`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// Memory limits.
    pub memory: Option<Memory>,
    /// CPU limits.
    pub cpu: Option<Cpu>,
    /// Process limit.
    pub pids: Option<Pids>,
    /// Which devices may be used: only whether the last rule allows all counts, as others are not there anyway.
    pub devices: Vec<DeviceRule>,
    /// Block device limits.
    #[serde(rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    /// cgroup v2 files and what to write to them.
    pub unified: BTreeMap<String, String>,
}

/// One of `linux.resources.devices`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    /// Or deny.
    pub allow: bool,
    /// `a`, `b` or `c`; none is `a`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Major number; none, or below 0, is all.
    pub major: Option<i64>,
    /// Minor number.
    pub minor: Option<i64>,
}

/// `linux.resources.memory`, bytes; -1 is no limit.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    /// Hard limit.
    pub limit: Option<i64>,
    /// Protected from reclaim as far as possible.
    pub reservation: Option<i64>,
    /// Memory plus swap.
    pub swap: Option<i64>,
}

/// `linux.resources.cpu`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    /// Weight, 2 to 262144.
    pub shares: Option<u64>,
    /// Microseconds in each period; 0 or less is no limit.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// List of CPUs.
    pub cpus: String,
    /// List of memory nodes.
    pub mems: String,
}

/// `linux.resources.pids`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Pids {
    /// 0 or less is no limit.
    pub limit: i64,
}

/// `linux.resources.blockIO`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    /// Bytes a second read.
    pub throttle_read_bps_device: Vec<Throttle>,
    /// Bytes a second written.
    pub throttle_write_bps_device: Vec<Throttle>,
    /// Reads a second.
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Vec<Throttle>,
    /// Writes a second.
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Vec<Throttle>,
}

/// A limit on one block device.
#[derive(Debug, Clone, Deserialize)]
pub struct Throttle {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Per second.
    pub rate: u64,
}

/// `linux.seccomp`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seccomp {
    /// For calls no rule names.
    pub default_action: String,
    /// Error number of a default `SCMP_ACT_ERRNO`.
    pub default_errno_ret: Option<u32>,
    /// Rules.
    pub syscalls: Vec<SeccompRule>,
}

/// One of `linux.seccomp.syscalls`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompRule {
    /// Calls by name; names this kernel does not know are skipped.
    pub names: Vec<String>,
    /// `SCMP_ACT_...`.
    pub action: String,
    /// Error number of `SCMP_ACT_ERRNO`, or data of `SCMP_ACT_TRACE`.
    pub errno_ret: Option<u32>,
    /// All must hold.
    #[serde(default)]
    pub args: Vec<SeccompArg>,
}

/// A condition on one argument.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompArg {
    /// 0 to 5.
    pub index: u8,
    /// Compared with; for `SCMP_CMP_MASKED_EQ` the mask.
    pub value: u64,
    /// For `SCMP_CMP_MASKED_EQ`, what the masked argument must be.
    #[serde(default)]
    pub value_two: u64,
    /// `SCMP_CMP_...`.
    pub op: String,
    /// Compare the low 32 bits only, as the kernel does with an argument of type `int`. Not in the specification: set
    /// by the guest's own filter.
    #[serde(skip)]
    pub is_int: bool,
}
