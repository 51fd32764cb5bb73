//! The kernel's own bounds on processes and open files.
//!
//! They are sums over the whole guest, made from its memory when it boots: a container that forks or opens without end would
//! reach them, and then none of its neighbours can fork or open. What a container may have is bounded by its cgroup
//! instead, which is charged for each process and each open file; so these are taken out of the way.

use std::fs;

use rustix::process::{Resource, Rlimit, setrlimit};

use crate::error::{Context, Result};

/// Files below `/proc/sys`, and the largest value each takes: Linux Documentation/admin-guide/sysctl, `fs` and `kernel`.
const SYSCTLS: &[(&str, &str)] = &[
    ("fs/file-max", "9223372036854775807"),
    ("kernel/pid_max", "4194304"),
    ("kernel/threads-max", "1073741823"),
];

/// Leaves containers bounded by their cgroups only. What this process may have is handed down to all others.
///
/// # Errors
/// Names what could not be set.
pub fn lift() -> Result<()> {
    for (file, value) in SYSCTLS {
        fs::write(format!("/proc/sys/{file}"), value).context(|| format!("set {file} to {value}"))?;
    }
    // Counted for each user, and root is the same user in all containers.
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    setrlimit(Resource::Nproc, unlimited).context(|| "lift the limit of processes")
}
