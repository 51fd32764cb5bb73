//! From the initramfs to a machine that looks like the one outside.

use std::fs::{self, File};
use std::os::unix::fs::{self as unix_fs};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot, sethostname};

use crate::initramfs::Settings;

/// The port of the virtio console device that carries the commands.
pub(super) const COMMAND_PORT: &str = "/dev/vport0p1";
/// The sessions' cgroups.
pub(super) const SESSIONS_CGROUP: &str = "/sys/fs/cgroup/nested";

const NEW_ROOT: &str = "/rw/root";
const SCRATCH_DISK: &str = "/dev/vda";
const SCRATCH_DIR: &str = "/var/lib/eci-agent";
const N_OPEN_FILES: u64 = 1 << 20;

/// What the kernel does not load by itself when somebody asks for it: drivers, and those behind a device node.
/// File systems, network device types and netfilter expressions it does load by itself.
const MODULES: [&str; 8] = [
    "kvm_amd",
    "virtio_blk",
    "ext4",
    "tun",
    "vhost_net",
    "vhost_vsock",
    "loop",
    "fuse",
];

/// Sets the machine up, one step a line.
pub(super) fn run() -> Result<()> {
    let settings = read_settings()?;
    // The kernel mounts /dev by itself only where there is no initramfs.
    mount_new("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "")?;
    load_early_modules(&settings)?;
    mount_machine_root()?;
    mount_kernel_file_systems()?;
    mount_shares(&settings)?;
    switch_root()?;
    provide_modules(&settings)?;
    load_modules();
    mount_scratch_disk()?;
    set_up_cgroups()?;
    set_limits()?;
    bring_loopback_up();
    wait_for(Path::new(COMMAND_PORT))
}

fn read_settings() -> Result<Settings> {
    let text = fs::read("/settings.json").context("read /settings.json of the initramfs")?;
    serde_json::from_slice(&text).context("parse /settings.json of the initramfs")
}

fn load_early_modules(settings: &Settings) -> Result<()> {
    for path in &settings.early_modules {
        let module = File::open(path).with_context(|| format!("open module {path}"))?;
        finit_module(&module, c"", ModuleInitFlags::empty())
            .with_context(|| format!("load module {path}"))?;
    }
    Ok(())
}

/// The machine's root, read-only and cached for good, under a layer of memory that takes the changes.
fn mount_machine_root() -> Result<()> {
    let options = "trans=virtio,version=9p2000.L,cache=loose,msize=1048576";
    mount_new("root", "/lower", "9p", MsFlags::MS_RDONLY, options)?;
    mount_new("rw", "/rw", "tmpfs", MsFlags::empty(), "size=50%,mode=755")?;
    for dir in ["/rw/upper", "/rw/work", NEW_ROOT] {
        fs::create_dir(dir).with_context(|| format!("create {dir}"))?;
    }
    let options = "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work";
    mount_new("root", NEW_ROOT, "overlay", MsFlags::empty(), options)
}

fn mount_kernel_file_systems() -> Result<()> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let at = |dir: &str| format!("{NEW_ROOT}{dir}");
    mount_new("proc", &at("/proc"), "proc", safe, "")?;
    mount_new("sysfs", &at("/sys"), "sysfs", safe, "")?;
    mount_new("cgroup2", &at("/sys/fs/cgroup"), "cgroup2", safe, "nsdelegate")?;
    mount_new("devtmpfs", &at("/dev"), "devtmpfs", MsFlags::MS_NOSUID, "")?;
    mount_new(
        "devpts",
        &at("/dev/pts"),
        "devpts",
        MsFlags::MS_NOSUID,
        "newinstance,ptmxmode=666,mode=620",
    )?;
    mount_new("tmpfs", &at("/dev/shm"), "tmpfs", MsFlags::MS_NOSUID, "size=50%")?;
    mount_new("mqueue", &at("/dev/mqueue"), "mqueue", safe, "")?;
    mount_new("tmpfs", &at("/tmp"), "tmpfs", MsFlags::MS_NOSUID, "size=50%")?;
    mount_new(
        "tmpfs",
        &at("/run"),
        "tmpfs",
        MsFlags::MS_NOSUID,
        "size=25%,mode=755",
    )?;
    for (target, link) in [
        ("/proc/self/fd", "fd"),
        ("fd/0", "stdin"),
        ("fd/1", "stdout"),
        ("fd/2", "stderr"),
    ] {
        let path = at(&format!("/dev/{link}"));
        if fs::symlink_metadata(&path).is_err() {
            unix_fs::symlink(target, &path).with_context(|| format!("create {path}"))?;
        }
    }
    fs::create_dir_all(at("/run/lock")).context("create /run/lock")
}

/// What changes outside while this host is up, read afresh at every open and written through.
fn mount_shares(settings: &Settings) -> Result<()> {
    let options = "trans=virtio,version=9p2000.L,cache=mmap,msize=1048576";
    for (tag, path) in &settings.shares {
        mount_new(tag, &format!("{NEW_ROOT}{path}"), "9p", MsFlags::empty(), options)?;
    }
    Ok(())
}

fn switch_root() -> Result<()> {
    chdir(NEW_ROOT).context("enter the new root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the new root to /")?;
    chroot(".").context("change the root")?;
    chdir("/").context("enter /")
}

fn provide_modules(settings: &Settings) -> Result<()> {
    let dir = format!("/lib/modules/{}", settings.release);
    fs::create_dir_all(&dir).with_context(|| format!("create {dir}"))?;
    mount(
        Some(settings.modules.as_str()),
        dir.as_str(),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| format!("bind {} to {dir}", settings.modules))
}

/// A module that is missing is worth a line on the console, not the machine.
fn load_modules() {
    let loaded = modprobe(&["-a", "-q"].iter().chain(&MODULES).copied().collect::<Vec<_>>());
    if !loaded {
        for module in MODULES.iter().filter(|module| !modprobe(&["-q", module])) {
            eprintln!("nested: module {module} is not loaded");
        }
    }
}

fn modprobe(arguments: &[&str]) -> bool {
    Command::new("/sbin/modprobe")
        .args(arguments)
        .status()
        .is_ok_and(|status| status.success())
}

fn mount_scratch_disk() -> Result<()> {
    mount_new(SCRATCH_DISK, SCRATCH_DIR, "ext4", MsFlags::MS_NOATIME, "discard")
}

fn set_up_cgroups() -> Result<()> {
    fs::create_dir(SESSIONS_CGROUP).context("create the sessions' cgroup")?;
    let controllers =
        fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").context("read the cgroup controllers")?;
    for controller in controllers.split_whitespace() {
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", format!("+{controller}"))
            .with_context(|| format!("enable cgroup controller {controller}"))?;
    }
    Ok(())
}

fn set_limits() -> Result<()> {
    sethostname("l1").context("set the host name")?;
    fs::write("/proc/sys/fs/nr_open", N_OPEN_FILES.to_string()).context("raise fs.nr_open")?;
    setrlimit(Resource::RLIMIT_NOFILE, N_OPEN_FILES, N_OPEN_FILES).context("raise the open files limit")
}

fn bring_loopback_up() {
    let up = Command::new("/sbin/ip")
        .args(["link", "set", "lo", "up"])
        .status();
    if !up.is_ok_and(|status| status.success()) {
        eprintln!("nested: `ip link set lo up` failed: is iproute2 installed?");
    }
}

/// The kernel makes port devices after the console module is loaded, when the device has told it of them.
fn wait_for(path: &Path) -> Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).context("watch /dev")?;
    inotify
        .add_watch("/dev", AddWatchFlags::IN_CREATE)
        .context("watch /dev")?;
    while !path.exists() {
        inotify.read_events().context("watch /dev")?;
    }
    Ok(())
}

fn mount_new(source: &str, target: &str, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    let target = PathBuf::from(target);
    fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
    mount(Some(source), &target, Some(kind), flags, Some(options))
        .with_context(|| format!("mount {source} ({kind}, {options}) at {}", target.display()))
}
