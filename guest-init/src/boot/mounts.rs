//! The guest init's own file systems.
//!
//! The kernel unpacks the initramfs into `rootfs`, which can be neither unmounted nor left by `pivot_root(2)`. So a root
//! in memory is made, put on top, and entered; containers then leave that one.

use std::{ffi::CStr, fs, path::Path};

use rustix::mount::{MountFlags, mount, mount_move, mount_remount};

use crate::error::{Context, Result};

/// Where the new root is made.
const NEW_ROOT: &str = "/root";

/// Target below the root, type, flags, options.
const MOUNTS: &[(&str, &str, MountFlags, &CStr)] = {
    const PLAIN: MountFlags = MountFlags::NOSUID
        .union(MountFlags::NODEV)
        .union(MountFlags::NOEXEC);
    const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
    &[
        ("proc", "proc", PLAIN, c""),
        ("sys", "sysfs", PLAIN, c""),
        (
            "sys/fs/cgroup",
            "cgroup2",
            PLAIN,
            c"nsdelegate,memory_recursiveprot",
        ),
        ("dev", "devtmpfs", DEVICES, c"mode=0755"),
        ("dev/pts", "devpts", DEVICES, c"mode=0620,ptmxmode=0666,gid=5"),
        ("dev/shm", "tmpfs", PLAIN, c"mode=1777,size=64m"),
        // Device nodes for containers are made below it.
        ("run", "tmpfs", DEVICES, c"mode=0755"),
        ("tmp", "tmpfs", PLAIN, c"mode=1777"),
    ]
};

/// Makes the root and everything on it, and enters it.
///
/// # Errors
/// Names the file system that could not be mounted.
pub fn enter_root() -> Result<()> {
    let root = Path::new(NEW_ROOT);
    make_directory(root)?;
    mount_one(root, "tmpfs", MountFlags::NOSUID, c"mode=0755,size=1m")?;
    for (target, kind, flags, options) in MOUNTS {
        let target = root.join(target);
        make_directory(&target)?;
        mount_one(&target, kind, *flags, options)?;
    }
    // The running binary lies on it: a container that reaches it through /proc/<pid>/exe must not write to it.
    mount_remount("/", MountFlags::RDONLY, c"").context(|| "make the initramfs read-only")?;
    rustix::process::chdir(root).context(|| "enter the new root")?;
    mount_move(".", "/").context(|| "move the new root")?;
    rustix::process::chroot(".").context(|| "change the root")?;
    rustix::process::chdir("/").context(|| "enter the new root")
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).context(|| format!("make {}", path.display()))
}

fn mount_one(target: &Path, kind: &str, flags: MountFlags, options: &CStr) -> Result<()> {
    mount(kind, target, kind, flags, options).context(|| format!("mount {kind} at {}", target.display()))
}
