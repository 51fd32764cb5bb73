//! The one setting of the host that decides how fast sandboxes start: how long moving a process between cgroups takes.
//!
//! Every such move waits until no process of the host is in the middle of a fork or exit. By default the kernel finds
//! that out with an RCU grace period, two or three ticks of its timer, which keeps fork and exit as cheap as can be. With
//! the mount option `favordynmods` (Linux 6.0, Documentation/admin-guide/cgroup-v2.rst, "Mounting") moves do not wait, and
//! fork and exit cost an atomic operation more.
//!
//! A sandbox's start has several moves: of its shim, of its VMM, and one that is easily missed: up to Linux 6.12
//! `KVM_CREATE_VM` starts a kernel thread that moves itself into its caller's cgroup. Two thirds of the VMM's share of a
//! start were that wait (`docs/benchmarks.md`).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_flag, fspick};

const OPTION: &str = "favordynmods";

/// Why the host was not set up.
#[derive(Debug, thiserror::Error)]
pub enum TuningError {
    /// The list of mounts.
    #[error("Failed to read the list of mounts")]
    Mounts(#[source] io::Error),
    /// No cgroup v2.
    #[error("No cgroup v2 file system is mounted")]
    NoCgroups,
    /// The kernel refused the option.
    #[error("Failed to change the mount options of {}", mount_point.display())]
    Reconfigure {
        /// Where cgroups are mounted.
        mount_point: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel took the option and ignored it.
    #[error("{} does not take the mount option {OPTION}: only the host's own cgroup namespace may set it", .0.display())]
    Ignored(PathBuf),
}

/// A mounted cgroup v2 file system.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CgroupMount {
    mount_point: PathBuf,
    /// Options of the file system, not of the mount.
    options: Vec<String>,
}

/// Whether moves between cgroups are fast on this host; `None` without cgroup v2.
pub fn moves_are_fast() -> Option<bool> {
    let mount = find().ok()?;
    Some(mount.has_option())
}

/// Makes moves between cgroups fast, for the whole host until it is mounted anew. Returns whether something was changed.
///
/// # Errors
/// [`TuningError`]; sandboxes start all the same, later.
pub fn make_moves_fast() -> Result<bool, TuningError> {
    let mount = find()?;
    if mount.has_option() {
        return Ok(false);
    }
    reconfigure(&mount).map_err(|source| TuningError::Reconfigure {
        mount_point: mount.mount_point.clone(),
        source: source.into(),
    })?;
    // Outside of the host's own cgroup namespace the kernel ignores options without a word.
    if find()?.has_option() {
        Ok(true)
    } else {
        Err(TuningError::Ignored(mount.mount_point))
    }
}

/// Sets the option. Options that are not named again would be taken away.
fn reconfigure(mount: &CgroupMount) -> rustix::io::Result<()> {
    let file_system = fspick(rustix::fs::CWD, &mount.mount_point, FsPickFlags::FSPICK_CLOEXEC)?;
    for option in mount.options.iter().map(String::as_str).chain([OPTION]) {
        fsconfig_set_flag(&file_system, option)?;
    }
    fsconfig_reconfigure(&file_system)
}

impl CgroupMount {
    fn has_option(&self) -> bool {
        self.options.iter().any(|option| option == OPTION)
    }
}

fn find() -> Result<CgroupMount, TuningError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(TuningError::Mounts)?;
    parse(&mounts).ok_or(TuningError::NoCgroups)
}

/// The first cgroup v2 file system of a `mountinfo` (proc_pid_mountinfo(5)): there is only one, however often mounted.
fn parse(mounts: &str) -> Option<CgroupMount> {
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mount_point = Path::new(mount.split(' ').nth(4)?);
        let mut fields = file_system.split(' ');
        if fields.next()? != "cgroup2" {
            return None;
        }
        let options = fields.nth(1)?.split(',');
        Some(CgroupMount {
            mount_point: mount_point.to_owned(),
            options: options
                .filter(|option| !matches!(*option, "rw" | "ro" | "seclabel"))
                .map(str::to_owned)
                .collect(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_mount_and_its_own_options_are_found() {
        let before = "22 1 0:20 / /proc rw,relatime shared:5 - proc proc rw\n";
        let line = "26 24 0:23 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
        let found = parse(&format!("{before}{line}")).unwrap();
        assert_eq!(found.mount_point, Path::new("/sys/fs/cgroup"));
        assert_eq!(found.options, ["nsdelegate", "memory_recursiveprot"]);
        assert!(!found.has_option());
        let fast = line.replace("rw,nsdelegate", "rw,nsdelegate,favordynmods");
        assert!(parse(&fast).unwrap().has_option());
        // Of the mount only, which is no option of the file system.
        assert!(
            !parse(&line.replace("rw,nosuid", "rw,favordynmods"))
                .unwrap()
                .has_option()
        );
        assert_eq!(parse(before), None);
    }
}
