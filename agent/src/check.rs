//! Whether this host can run groups: every line is one thing that is needed, with a fix where it is not there.

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{config::Config, tuning};

/// Free disk below which images and scratch disks soon fail.
const MIN_FREE_BYTES: u64 = 2 << 30;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Usable.
    Ok,
    /// Works without, with a loss.
    Warning,
    /// Groups can't run.
    Failed,
}

/// One thing that is needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// What was found.
    pub found: String,
    /// What to do, where something is to be done.
    pub fix: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Ok,
            found: found.into(),
            fix: String::new(),
        }
    }

    fn failed(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Failed,
            found: found.into(),
            fix: fix.into(),
        }
    }

    fn warning(mut self) -> Self {
        if self.outcome == Outcome::Failed {
            self.outcome = Outcome::Warning;
        }
        self
    }
}

/// Checks this host against a complete configuration.
pub fn run(config: &Config) -> Vec<Check> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut checks = vec![kvm(&cpuinfo, open("/dev/kvm"))];
    if !config.sandbox.cgroup_root.as_os_str().is_empty() {
        checks.push(cgroup(&config.sandbox.cgroup_root));
    }
    checks.push(starts(tuning::moves_are_fast(), config.sandbox.fast_cgroup_moves));
    if config.network.enabled {
        checks.push(device("tun", "/dev/net/tun", "modprobe tun"));
        checks.push(module("bridge", "bridge", "set network.enabled = false"));
        if !config.security_group.is_empty() {
            checks.push(module(
                "security groups",
                "nf_conntrack_bridge",
                "remove [[security_group]] from the configuration",
            ));
        }
        checks.push(program("nft", "install nftables"));
        for kernel_module in ["sch_tbf", "sch_ingress", "cls_matchall", "act_police"] {
            let limits = module("bandwidth limits", kernel_module, "use no limits of bandwidth");
            if limits.outcome == Outcome::Failed {
                checks.push(limits.warning());
            }
        }
        checks.push(
            device(
                "vhost-net",
                "/dev/vhost-net",
                "modprobe vhost_net (without it the VMM moves packets itself)",
            )
            .warning(),
        );
    }
    checks.push(program("mkfs.ext4", "install e2fsprogs"));
    let files = &config.files;
    for (name, path) in [
        ("guest kernel", &files.kernel),
        ("guest initramfs", &files.initrd),
        ("shim", &files.shim),
        ("vmm", &files.vmm),
    ] {
        checks.push(file(name, path));
    }
    checks.push(disk(&config.state_dir));
    checks
}

/// Whether groups can run: no check failed.
pub fn usable(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.outcome != Outcome::Failed)
}

/// The checks as a table for people.
pub fn table(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let sign = match check.outcome {
            Outcome::Ok => "ok  ",
            Outcome::Warning => "warn",
            Outcome::Failed => "FAIL",
        };
        text.push_str(&format!("{sign}  {:width$}  {}\n", check.name, check.found));
        if !check.fix.is_empty() {
            text.push_str(&format!("      {:width$}  -> {}\n", "", check.fix));
        }
    }
    text
}

fn open(path: &str) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(path).map(|_| ())
}

/// The three cases of KVM: usable; opens but can't run ordinary guests; not there.
fn kvm(cpuinfo: &str, opened: io::Result<()>) -> Check {
    let has = |flag: &str| {
        cpuinfo
            .lines()
            .filter_map(|line| line.strip_prefix("flags"))
            .any(|flags| flags.split_whitespace().any(|word| word == flag))
    };
    let extension = ["vmx", "svm"].into_iter().find(|flag| has(flag));
    match (opened, extension) {
        (Ok(()), Some(extension)) => Check::ok("kvm", format!("/dev/kvm opens, the CPU has {extension}")),
        (Ok(()), None) => Check::failed(
            "kvm",
            "/dev/kvm opens but cannot run ordinary guests (no vmx/svm in /proc/cpuinfo): the guest would stop with KVM \
             internal error",
            "use a machine with hardware virtualisation, or a virtual machine with nested virtualisation",
        ),
        (Err(error), Some(extension)) if error.kind() == io::ErrorKind::PermissionDenied => Check::failed(
            "kvm",
            format!("the CPU has {extension}, /dev/kvm may not be opened: {error}"),
            "run as root, or add the user to group kvm",
        ),
        (Err(error), Some(extension)) => Check::failed(
            "kvm",
            format!("the CPU has {extension}, /dev/kvm does not open: {error}"),
            if extension == "svm" {
                "modprobe kvm_amd"
            } else {
                "modprobe kvm_intel"
            },
        ),
        (Err(error), None) => Check::failed(
            "kvm",
            format!("/dev/kvm does not open ({error}) and the CPU has neither vmx nor svm"),
            "switch virtualisation on in the firmware; in a virtual machine, have nested virtualisation switched on by \
             its host (then modprobe kvm_amd or kvm_intel)",
        ),
    }
}

fn cgroup(root: &Path) -> Check {
    let parent = root.parent().unwrap_or(Path::new("/sys/fs/cgroup"));
    match fs::read_to_string(parent.join("cgroup.controllers")) {
        Ok(controllers) => {
            let missing: Vec<&str> = ["cpu", "memory"]
                .into_iter()
                .filter(|name| !controllers.split_whitespace().any(|word| word == *name))
                .collect();
            if missing.is_empty() {
                Check::ok("cgroup v2", parent.display().to_string())
            } else {
                Check::failed(
                    "cgroup v2",
                    format!("{} has no controller {}", parent.display(), missing.join(", ")),
                    "enable it in the parent's cgroup.subtree_control; without cgroup v1 mounts",
                )
            }
        }
        Err(error) => Check::failed(
            "cgroup v2",
            format!("{} is no cgroup v2 directory: {error}", parent.display()),
            "boot with systemd.unified_cgroup_hierarchy=1, or set sandbox.cgroup_root = \"\" to run without limits",
        ),
    }
}

/// Whether starts wait for moves between cgroups; what `serve` sets by itself is no warning.
fn starts(moves_are_fast: Option<bool>, agent_may_set_it: bool) -> Check {
    match moves_are_fast {
        Some(true) => Check::ok("start time", "cgroups are mounted with favordynmods"),
        Some(false) if agent_may_set_it => Check::ok(
            "start time",
            "cgroups will be mounted with favordynmods by `eci-agent serve`",
        ),
        Some(false) => Check::failed(
            "start time",
            "every start waits for the kernel several times, some milliseconds each",
            "set sandbox.fast_cgroup_moves = true, or mount -o remount,favordynmods /sys/fs/cgroup",
        )
        .warning(),
        None => Check::failed(
            "start time",
            "no cgroup v2 is mounted",
            "mount it at /sys/fs/cgroup",
        )
        .warning(),
    }
}

fn device(name: &'static str, path: &str, fix: &str) -> Check {
    match open(path) {
        Ok(()) => Check::ok(name, format!("{path} opens")),
        Err(error) => Check::failed(name, format!("{path} does not open: {error}"), fix),
    }
}

/// A part of the kernel that it may have built in, loaded, or on disk.
fn module(name: &'static str, module: &str, instead: &str) -> Check {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy().into_owned();
    let modules = Path::new("/lib/modules").join(&release);
    find_module(
        name,
        module,
        &Path::new("/sys/module").join(module),
        &modules,
        instead,
    )
}

fn find_module(name: &'static str, module: &str, loaded: &Path, modules: &Path, instead: &str) -> Check {
    if loaded.exists() {
        return Check::ok(name, "the kernel has it");
    }
    let file = format!("/{module}.ko");
    let listed = ["modules.dep", "modules.builtin"]
        .iter()
        .filter_map(|name| fs::read_to_string(modules.join(name)).ok())
        .any(|text| text.contains(&file));
    if listed {
        Check::ok(name, "the kernel loads it when needed")
    } else {
        Check::failed(
            name,
            format!("{module} is neither loaded nor in {}", modules.display()),
            format!("modprobe {module}, or {instead}"),
        )
    }
}

fn program(name: &'static str, fix: &str) -> Check {
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/sbin"]);
    let found = places
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file());
    match found {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::failed(name, "not on PATH", fix),
    }
}

fn file(name: &'static str, path: &Path) -> Check {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {
            Check::ok(name, path.display().to_string())
        }
        Ok(_) => Check::failed(
            name,
            format!("{} is empty or no file", path.display()),
            fix_file(path),
        ),
        Err(error) => Check::failed(name, format!("{}: {error}", path.display()), fix_file(path)),
    }
}

fn fix_file(path: &Path) -> String {
    format!(
        "install {} or name another in [files] of the configuration",
        path.display()
    )
}

fn disk(state_dir: &Path) -> Check {
    // The directory itself may not be made yet.
    let existing: PathBuf = state_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"))
        .to_owned();
    match rustix::fs::statvfs(&existing) {
        Ok(fs) => {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            let found = format!("{:.1} GiB free in {}", gib(free), existing.display());
            if free < MIN_FREE_BYTES {
                let fix = "free some space, or set state_dir to a larger file system".to_owned();
                Check::failed("disk", found, fix).warning()
            } else {
                Check::ok("disk", found)
            }
        }
        Err(error) => Check::failed(
            "disk",
            format!("{}: {error}", existing.display()),
            "check the mount",
        ),
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SVM: &str = "processor : 0\nflags\t\t: fpu svm sse\n";
    const NONE: &str = "flags : fpu svmx\n";

    fn error(kind: io::ErrorKind) -> io::Result<()> {
        Err(kind.into())
    }

    #[test]
    fn a_module_is_loaded_or_on_disk_or_named() {
        let dir = tempfile::tempdir().unwrap();
        let loaded = dir.path().join("loaded");
        let check = || find_module("m", "nf_conntrack_bridge", &loaded, dir.path(), "do without");
        let missing = check();
        assert_eq!(missing.outcome, Outcome::Failed);
        assert_eq!(missing.fix, "modprobe nf_conntrack_bridge, or do without");
        let path = dir.path().join("modules.dep");
        fs::write(
            &path,
            "kernel/net/bridge/netfilter/nf_conntrack_bridge.ko: x.ko\n",
        )
        .unwrap();
        assert_eq!(check().found, "the kernel loads it when needed");
        fs::write(&path, "").unwrap();
        fs::create_dir(&loaded).unwrap();
        assert_eq!(check().found, "the kernel has it");
    }

    #[test]
    fn the_cases_of_kvm() {
        assert_eq!(kvm(SVM, Ok(())).outcome, Outcome::Ok);
        let third = kvm(NONE, Ok(()));
        assert_eq!(third.outcome, Outcome::Failed);
        assert!(
            third
                .found
                .contains("opens but cannot run ordinary guests (no vmx/svm in /proc/cpuinfo)")
        );
        assert_eq!(kvm(SVM, error(io::ErrorKind::NotFound)).fix, "modprobe kvm_amd");
        assert!(
            kvm(SVM, error(io::ErrorKind::PermissionDenied))
                .fix
                .contains("root")
        );
        assert!(kvm("", error(io::ErrorKind::NotFound)).fix.contains("nested"));
    }

    #[test]
    fn slow_starts_are_a_warning_only_where_nobody_will_mend_them() {
        assert_eq!(starts(Some(true), false).outcome, Outcome::Ok);
        assert_eq!(starts(Some(false), true).outcome, Outcome::Ok);
        let slow = starts(Some(false), false);
        assert_eq!(slow.outcome, Outcome::Warning);
        assert!(slow.fix.contains("favordynmods"));
        assert_eq!(starts(None, true).outcome, Outcome::Warning);
    }

    #[test]
    fn a_warning_does_not_make_a_host_unusable() {
        let checks = [Check::ok("a", "x"), Check::failed("b", "y", "do z").warning()];
        assert!(usable(&checks));
        let text = table(&checks);
        assert!(text.contains("warn") && text.contains("-> do z"), "{text}");
    }
}
