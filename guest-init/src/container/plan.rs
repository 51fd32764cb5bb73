//! From a specification to the [`Program`] of a process. Pure: no file is touched here.

use std::{
    ffi::CString,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::Mode,
    process::{Gid, Resource, Rlimit, Uid},
};

use crate::{
    container::{
        capabilities, mounts,
        program::{InRoot, Program, Step},
        seccomp, spec,
        user::Identity,
    },
    error::{Error, Result},
    identity::{Access, FILES},
    sys::{exec::ExecImage, mount::MountAttributes},
};

/// Where the guest init has prepared what a container gets.
#[derive(Debug, Clone)]
pub struct Places {
    /// The mounted root file system.
    pub rootfs: PathBuf,
    /// The files of the sandbox's identity.
    pub identity_files: PathBuf,
    /// Nodes of the specification's own devices, named by their index.
    pub devices: PathBuf,
    /// The file for its last message, and where the container finds it.
    pub termination_message: Option<(PathBuf, String)>,
}

/// What a process reads and writes.
#[derive(Debug)]
pub enum Stdio {
    /// A new terminal.
    Terminal,
    /// These.
    Streams([OwnedFd; 3]),
}

/// Device nodes every container has.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// Links every container has in `/dev`.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
/// Where a program is looked for without `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most directories of `PATH` that are looked at.
const MAX_PATH_DIRECTORIES: usize = 64;

/// Which process namespace a container has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processes {
    /// Its own.
    Own,
    /// That of all containers that share theirs, whose first process is a [`Pause`](super::pause::Pause).
    Shared,
    /// The guest's, whose first process is the guest init.
    Guests,
}

/// The process namespace that the specification asks for: without a path the container's own, with one the shared one, as
/// the path of a sandbox's namespace is given; none is the guest's, as it is the host's in the runtime specification.
#[must_use]
pub fn processes(spec: &spec::Spec) -> Processes {
    let namespace = spec
        .linux
        .namespaces
        .iter()
        .find(|namespace| namespace.kind == "pid");
    match namespace {
        Some(namespace) if namespace.path.is_empty() => Processes::Own,
        Some(_) => Processes::Shared,
        None => Processes::Guests,
    }
}

/// The `CLONE_NEW*` flags for a container's init. The network and IPC namespaces are the sandbox's always, mount and
/// cgroup the container's own always; UTS is its own when given without a path, PID as [`processes`] says.
///
/// # Errors
/// `InvalidArgument` for user and time namespaces, which the guest does not have.
pub fn namespaces(spec: &spec::Spec) -> Result<i32> {
    let mut flags = libc::CLONE_NEWNS;
    if processes(spec) == Processes::Own {
        flags |= libc::CLONE_NEWPID;
    }
    for (index, namespace) in spec.linux.namespaces.iter().enumerate() {
        match namespace.kind.as_str() {
            "uts" if namespace.path.is_empty() => flags |= libc::CLONE_NEWUTS,
            "pid" | "uts" | "network" | "ipc" | "mount" | "cgroup" => {}
            other => {
                return Err(Error::invalid(format!(
                    "linux.namespaces[{index}].type is {other:?}: give pid, uts, network, ipc, mount or cgroup"
                )));
            }
        }
    }
    Ok(flags)
}

/// The program of a container's init.
///
/// # Errors
/// `InvalidArgument` names the field of the specification.
pub fn init(spec: &spec::Spec, identity: &Identity, places: &Places, stdio: Stdio) -> Result<Program> {
    let process = spec
        .process
        .as_ref()
        .ok_or_else(|| Error::invalid("process is missing from the specification"))?;
    let namespaces = namespaces(spec)?;
    let mut steps = vec![Step::NewSession, oom_score(process)?];
    for (name, value) in &spec.linux.sysctl {
        steps.push(Step::WriteFile {
            path: sysctl_path(name)?,
            content: value.clone().into_bytes(),
        });
    }
    steps.push(Step::NewCgroupNamespace);
    steps.push(Step::PrivateMounts);
    let hostname = spec
        .hostname
        .as_ref()
        .filter(|name| !name.is_empty() && namespaces & libc::CLONE_NEWUTS != 0);
    steps.extend(hostname.map(|name| Step::Hostname {
        name: name.clone().into_bytes(),
    }));
    steps.push(Step::OpenRoot {
        path: c_path(&places.rootfs)?,
    });
    let all_mounts = mounts::with_defaults(&spec.mounts);
    for (index, mount) in all_mounts.iter().enumerate() {
        steps.push(mounts::step(index, mount)?);
    }
    devices(spec, places, &mut steps)?;
    let read_only = spec.root.as_ref().is_some_and(|root| root.readonly);
    identity_files(&all_mounts, places, read_only, &mut steps)?;
    if let Some((file, path)) = &places.termination_message {
        steps.push(Step::Bind {
            source: c_path(file)?,
            target: in_root("termination_message_path", path)?,
            recursive: false,
            attributes: MountAttributes {
                set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
                ..Default::default()
            },
        });
    }
    steps.push(Step::MakeDirectory {
        path: in_root("process.cwd", &process.cwd)?,
    });
    let console = all_mounts.iter().all(|mount| mount.destination != "/dev/console");
    stdio_step(process, identity, stdio, console, &mut steps)?;
    for path in &spec.linux.readonly_paths {
        steps.push(Step::MakeReadOnly {
            path: in_root("linux.readonlyPaths", path)?,
        });
    }
    for path in &spec.linux.masked_paths {
        steps.push(Step::Mask {
            path: in_root("linux.maskedPaths", path)?,
        });
    }
    if read_only {
        steps.push(Step::MakeRootReadOnly);
    }
    steps.push(Step::EnterRoot);
    finish(spec, process, identity, &mut steps)?;
    Ok(Program { steps })
}

/// The program of a further process in the container whose init is `init`.
///
/// # Errors
/// `InvalidArgument` names the field of the specification.
pub fn exec(
    spec: &spec::Spec,
    process: &spec::Process,
    identity: &Identity,
    init: Arc<OwnedFd>,
    stdio: Stdio,
) -> Result<Program> {
    let kinds = (namespaces(spec)? | libc::CLONE_NEWCGROUP) & !libc::CLONE_NEWPID;
    let mut steps = vec![
        Step::NewSession,
        oom_score(process)?,
        Step::JoinContainer { init, kinds },
    ];
    stdio_step(process, identity, stdio, false, &mut steps)?;
    finish(spec, process, identity, &mut steps)?;
    Ok(Program { steps })
}

fn devices(spec: &spec::Spec, places: &Places, steps: &mut Vec<Step>) -> Result<()> {
    for name in DEVICES {
        let path = format!("/dev/{name}");
        steps.push(Step::Bind {
            source: c_string("linux.devices", &path)?,
            target: in_root("linux.devices", &path)?,
            recursive: false,
            attributes: MountAttributes::default(),
        });
    }
    let is_default = |path: &str| {
        path.strip_prefix("/dev/")
            .is_some_and(|name| DEVICES.contains(&name))
    };
    for (index, device) in spec
        .linux
        .devices
        .iter()
        .enumerate()
        .filter(|(_, device)| !is_default(&device.path))
    {
        steps.push(Step::Bind {
            source: c_path(&places.devices.join(index.to_string()))?,
            target: in_root(&format!("linux.devices[{index}].path"), &device.path)?,
            recursive: false,
            attributes: MountAttributes::default(),
        });
    }
    for (name, content) in LINKS {
        steps.push(Step::Symlink {
            content: c_string("linux.devices", content)?,
            directory: c"dev".to_owned(),
            name: c_string("linux.devices", name)?,
        });
    }
    Ok(())
}

fn identity_files(
    mounts: &[spec::Mount],
    places: &Places,
    read_only: bool,
    steps: &mut Vec<Step>,
) -> Result<()> {
    let has_proc = mounts
        .iter()
        .any(|mount| mount.destination == "/proc" && mount.kind == "proc");
    for (name, path, access) in FILES {
        let is_given = mounts.iter().any(|mount| mount.destination == path);
        // Whatever else is mounted there has no place for it.
        if is_given || (path.starts_with("/proc/") && !has_proc) {
            continue;
        }
        let mut attributes = MountAttributes {
            set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
            ..Default::default()
        };
        if read_only || access == Access::ReadOnly {
            attributes.set |= libc::MOUNT_ATTR_RDONLY;
        }
        steps.push(Step::Bind {
            source: c_path(&places.identity_files.join(name))?,
            target: in_root("mounts", path)?,
            recursive: false,
            attributes,
        });
    }
    Ok(())
}

fn stdio_step(
    process: &spec::Process,
    identity: &Identity,
    stdio: Stdio,
    console: bool,
    steps: &mut Vec<Step>,
) -> Result<()> {
    steps.push(match stdio {
        Stdio::Terminal => Step::Terminal {
            uid: identity.uid,
            size: process.console_size.map(|size| (size.height, size.width)),
            console: console
                .then(|| in_root("process.terminal", "/dev/console"))
                .transpose()?,
        },
        Stdio::Streams(streams) => Step::Stdio { streams },
    });
    Ok(())
}

/// What init and exec have in common: everything between a root file system and `execve`.
fn finish(
    spec: &spec::Spec,
    process: &spec::Process,
    identity: &Identity,
    steps: &mut Vec<Step>,
) -> Result<()> {
    for (index, rlimit) in process.rlimits.iter().enumerate() {
        steps.push(limit(index, rlimit)?);
    }
    let mask = process.user.umask.unwrap_or(0o022);
    steps.push(Step::Umask {
        mask: Mode::from_raw_mode(mask & 0o777),
    });
    steps.push(Step::ChangeDirectory {
        path: c_string("process.cwd", &process.cwd)?,
    });
    let capabilities = capabilities::parse(&process.capabilities)?;
    let mut filter = match &spec.linux.seccomp {
        Some(filter) => seccomp::compile(filter)?,
        None => Some(seccomp::compile_default(capabilities.bounding)?),
    };
    // Without no_new_privs only CAP_SYS_ADMIN can install a filter, so it must come before capabilities are dropped.
    if !process.no_new_privileges {
        steps.extend(filter.take().map(|filter| Step::Seccomp { filter }));
    }
    steps.push(Step::BoundingSet {
        keep: capabilities.bounding,
    });
    steps.push(Step::SetUser {
        uid: Uid::from_raw(identity.uid),
        gid: Gid::from_raw(identity.gid),
        groups: identity.groups.iter().copied().map(Gid::from_raw).collect(),
    });
    steps.push(Step::SetCapabilities { capabilities });
    if process.no_new_privileges {
        steps.push(Step::NoNewPrivileges);
        steps.extend(filter.take().map(|filter| Step::Seccomp { filter }));
    }
    steps.push(execute(process, identity)?);
    Ok(())
}

fn execute(process: &spec::Process, identity: &Identity) -> Result<Step> {
    let program = process
        .args
        .first()
        .filter(|program| !program.is_empty())
        .ok_or_else(|| Error::invalid("process.args is empty: give a program"))?;
    let mut environment = Vec::with_capacity(process.env.len() + 1);
    for variable in &process.env {
        environment.push(c_string("process.env", variable)?);
    }
    let value_of = |name: &str| {
        process
            .env
            .iter()
            .rev()
            .find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
    };
    if value_of("HOME").is_none() {
        environment.push(c_string("process.user", &format!("HOME={}", identity.home))?);
    }
    let candidates = if program.contains('/') {
        vec![c_string("process.args", program)?]
    } else {
        value_of("PATH")
            .unwrap_or(DEFAULT_PATH)
            .split(':')
            .take(MAX_PATH_DIRECTORIES)
            .map(|directory| {
                let directory = if directory.is_empty() { "." } else { directory };
                c_string("process.args", &format!("{directory}/{program}"))
            })
            .collect::<Result<_>>()?
    };
    let arguments = process
        .args
        .iter()
        .map(|argument| c_string("process.args", argument))
        .collect::<Result<_>>()?;
    Ok(Step::Execute {
        candidates,
        image: ExecImage::new(arguments, environment),
    })
}

fn oom_score(process: &spec::Process) -> Result<Step> {
    let score = process.oom_score_adj.unwrap_or(0);
    if !(-1000..=1000).contains(&score) {
        return Err(Error::invalid(format!(
            "process.oomScoreAdj is {score}: give -1000 to 1000"
        )));
    }
    Ok(Step::WriteFile {
        path: c"/proc/self/oom_score_adj".to_owned(),
        content: score.to_string().into_bytes(),
    })
}

/// `net.ipv4.tcp_syncookies` is `/proc/sys/net/ipv4/tcp_syncookies`.
///
/// # Errors
/// `InvalidArgument` for anything that is not such a name.
pub fn sysctl_path(name: &str) -> Result<CString> {
    let valid = !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte))
        && name.split(['.', '/']).all(|part| !part.is_empty());
    if !valid {
        return Err(Error::invalid(format!(
            "linux.sysctl: {name:?} is not a name such as net.ipv4.ip_forward"
        )));
    }
    // With a slash in it, dots belong to the names (an interface such as eth0.100).
    let path = if name.contains('/') {
        name.to_owned()
    } else {
        name.replace('.', "/")
    };
    c_string("linux.sysctl", &format!("/proc/sys/{path}"))
}

fn limit(index: usize, rlimit: &spec::Rlimit) -> Result<Step> {
    let resource = match rlimit.kind.as_str() {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        other => {
            return Err(Error::invalid(format!(
                "process.rlimits[{index}].type is {other:?}: give a name such as RLIMIT_NOFILE"
            )));
        }
    };
    if rlimit.soft > rlimit.hard {
        return Err(Error::invalid(format!(
            "process.rlimits[{index}]: soft limit {} is above hard limit {}",
            rlimit.soft, rlimit.hard
        )));
    }
    let value = |limit: u64| (limit != u64::MAX).then_some(limit);
    Ok(Step::Limit {
        resource,
        limit: Rlimit {
            current: value(rlimit.soft),
            maximum: value(rlimit.hard),
        },
    })
}

fn in_root(field: &str, path: &str) -> Result<InRoot> {
    InRoot::parse(path).ok_or_else(|| {
        Error::invalid(format!(
            "{field} is {path:?}: give an absolute path without \"..\""
        ))
    })
}

fn c_string(field: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid(format!("{field}: {text:?} has a NUL byte")))
}

pub(super) fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| Error::invalid(format!("{}: the path has a NUL byte", path.display())))
}

#[cfg(test)]
mod tests;
