//! A container of a group as an OCI runtime-spec `config.json` for the guest. Pure.

use std::collections::BTreeMap;

use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

use super::volumes::has_file;
use crate::{
    error::{Error, ErrorKind, Result},
    group::spec::{ContainerSpec, EnvValue, GroupSpec, Size, VolumeMount, VolumeSource},
};

/// The capabilities containerd gives a container.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// All capabilities of Linux 6.12, for `ALL`.
const ALL_CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Hidden from containers, as containerd does.
const MASKED_PATHS: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/proc/scsi",
];

/// Read-only in containers, as containerd does.
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// CPU bandwidth period, microseconds.
const CPU_PERIOD_US: u64 = 100_000;
/// CPU shares (cgroup v1, as OCI has them) that become 100, the weight that a cgroup v2 begins with.
const DEFAULT_SHARES: u64 = 2598;
/// The default of the search path when neither image nor group give one.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What runs, with the image's configuration and user database already taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedProcess {
    /// Program and arguments, not empty.
    pub args: Vec<String>,
    /// `NAME=value`, from the image.
    pub image_env: Vec<String>,
    /// Absolute.
    pub cwd: String,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
}

/// What a group's own fields are when a container starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupFacts {
    /// The group's id, the default of `metadata.uid`.
    pub group_id: String,
    /// Addresses, the IPv4 one first; none without a network.
    pub ips: Vec<String>,
    /// This host's node name.
    pub node_name: String,
    /// This host's own addresses in the groups' network, the IPv4 one first.
    pub host_ips: Vec<String>,
    /// The host name that containers see.
    pub hostname: String,
}

/// The environment of a container: `HOSTNAME`, the image's variables, then the container's with `$(NAME)` expanded.
///
/// # Errors
/// `InvalidArgument` names a field reference that is not known.
pub fn environment(
    group: &GroupSpec,
    container: &ContainerSpec,
    image_env: &[String],
    facts: &GroupFacts,
) -> Result<Vec<String>> {
    // Kept in order of first appearance; a later value replaces an earlier one.
    let mut order: Vec<String> = Vec::new();
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    let mut set = |name: &str, value: String| {
        if values.insert(name.to_owned(), value).is_none() {
            order.push(name.to_owned());
        }
    };
    set("PATH", DEFAULT_PATH["PATH=".len()..].to_owned());
    set("HOSTNAME", facts.hostname.clone());
    if container.tty {
        set("TERM", "xterm".to_owned());
    }
    for entry in image_env {
        if let Some((name, value)) = entry.split_once('=') {
            set(name, value.to_owned());
        }
    }
    // $(NAME) sees the container's own earlier variables only, as in Kubernetes.
    let mut own: BTreeMap<&str, String> = BTreeMap::new();
    for variable in &container.env {
        let value = match &variable.value {
            EnvValue::Literal(text) => expand(text, |name| own.get(name).cloned()),
            EnvValue::Key(key) => String::from_utf8_lossy(key.value.bytes()).into_owned(),
            EnvValue::Field(path) => field(group, path, facts)
                .ok_or_else(|| {
                    Error::new(
                        ErrorKind::InvalidArgument,
                        format!(
                            "container {}: env {}: field path {path:?} is not known: give metadata.name, \
                             metadata.namespace, metadata.uid, metadata.labels['KEY'], metadata.annotations['KEY'], \
                             spec.nodeName, spec.serviceAccountName, status.podIP, status.podIPs, status.hostIP \
                             or status.hostIPs",
                            container.name, variable.name
                        ),
                    )
                })?,
        };
        own.insert(&variable.name, value);
    }
    for variable in &container.env {
        if let Some(value) = own.get(variable.name.as_str()) {
            set(&variable.name, value.clone());
        }
    }
    Ok(order
        .iter()
        .map(|name| format!("{name}={}", values[name]))
        .collect())
}

/// Expands `$(NAME)`; `$$` is a dollar sign, an unknown name stays as it is (Kubernetes, third_party/forked/golang/expansion).
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

pub(super) fn field(group: &GroupSpec, path: &str, facts: &GroupFacts) -> Option<String> {
    let subscript = |name: &str| {
        path.strip_prefix(name)?
            .strip_prefix("['")?
            .strip_suffix("']")
            .map(str::to_owned)
    };
    if let Some(key) = subscript("metadata.labels") {
        return Some(group.labels.get(&key).cloned().unwrap_or_default());
    }
    if let Some(key) = subscript("metadata.annotations") {
        return Some(group.annotations.get(&key).cloned().unwrap_or_default());
    }
    Some(match path {
        "metadata.name" => group.name.clone(),
        "metadata.namespace" => group.namespace.clone(),
        "metadata.uid" => group.uid.clone().unwrap_or_else(|| facts.group_id.clone()),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => "default".to_owned(),
        "status.podIP" => facts.ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => facts.ips.join(","),
        "status.hostIP" => facts.host_ips.first().cloned().unwrap_or_default(),
        "status.hostIPs" => facts.host_ips.join(","),
        _ => return None,
    })
}

fn capabilities(container: &ContainerSpec) -> Result<Vec<String>> {
    if container.privileged {
        return Ok(ALL_CAPABILITIES
            .iter()
            .map(|name| format!("CAP_{name}"))
            .collect());
    }
    let normal = |name: &String| {
        let upper = name.to_ascii_uppercase();
        upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned()
    };
    let known = |name: String| {
        if name == "ALL" || ALL_CAPABILITIES.contains(&name.as_str()) {
            Ok(name)
        } else {
            Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "container {}: capability {name:?} is not known: give a name from capabilities(7) without CAP_",
                    container.name
                ),
            ))
        }
    };
    let add: Vec<String> = container
        .capabilities_add
        .iter()
        .map(normal)
        .map(known)
        .collect::<Result<_>>()?;
    let drop: Vec<String> = container
        .capabilities_drop
        .iter()
        .map(normal)
        .map(known)
        .collect::<Result<_>>()?;
    let has = |list: &[String], name: &str| list.iter().any(|item| item == name);
    Ok(ALL_CAPABILITIES
        .iter()
        .filter(|name| {
            // containerd's order: the sets of ALL first, then single additions, then single removals.
            let base = (DEFAULT_CAPABILITIES.contains(name) || has(&add, "ALL")) && !has(&drop, "ALL");
            (base || has(&add, name)) && !has(&drop, name)
        })
        .map(|name| format!("CAP_{name}"))
        .collect())
}

fn process(container: &ContainerSpec, resolved: &ResolvedProcess, env: &[String]) -> Result<Value> {
    let capabilities = capabilities(container)?;
    let mut process = json!({
        "terminal": container.tty,
        "user": {"uid": resolved.uid, "gid": resolved.gid, "additionalGids": resolved.additional_gids},
        "args": resolved.args,
        "env": env,
        "cwd": resolved.cwd,
        "capabilities": {
            "bounding": capabilities,
            "permitted": capabilities,
            "effective": capabilities,
            "inheritable": [],
            "ambient": [],
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1_048_576, "hard": 1_048_576}],
        "noNewPrivileges": !container.allow_privilege_escalation,
        "oomScoreAdj": 0,
    });
    // Kubernetes: capabilities of a process that is not root end at its execve.
    if resolved.uid != 0 {
        process["capabilities"]["permitted"] = json!([]);
        process["capabilities"]["effective"] = json!([]);
    }
    Ok(process)
}

fn standard_mounts() -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
    ]
}

/// The part of a volume that is mounted. `lookup` knows the container's variables.
fn sub_path(
    container: &ContainerSpec,
    mount: &VolumeMount,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Option<String>> {
    let Some(path) = &mount.sub_path else {
        return Ok(None);
    };
    if !mount.is_sub_path_expr {
        return Ok(Some(path.clone()));
    }
    let invalid = |problem: String| {
        Error::new(
            ErrorKind::InvalidArgument,
            format!("container {}: subPathExpr {path:?}: {problem}", container.name),
        )
    };
    let missing = std::cell::RefCell::new(None);
    let expanded = expand(path, |name| {
        let value = lookup(name);
        if value.is_none() {
            missing.replace(Some(name.to_owned()));
        }
        value
    });
    if let Some(name) = missing.into_inner() {
        return Err(invalid(format!("the container has no variable {name:?}")));
    }
    if expanded.is_empty() || expanded.starts_with('/') || expanded.split('/').any(|part| part == "..") {
        return Err(invalid(
            "its value is not a relative path without '..'".to_owned(),
        ));
    }
    Ok(Some(expanded))
}

fn volume_mounts(
    group: &GroupSpec,
    container: &ContainerSpec,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Value>> {
    let mut mounts = Vec::new();
    for mount in &container.volume_mounts {
        let volume = group
            .volumes
            .iter()
            .find(|volume| volume.name == mount.name)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidArgument,
                    format!(
                        "container {}: volume mount {:?}: the group has no such volume",
                        container.name, mount.name
                    ),
                )
            })?;
        let is_read_only = match &volume.source {
            VolumeSource::Disk(disk) => mount.read_only || disk.read_only,
            VolumeSource::Nfs(nfs) => mount.read_only || nfs.read_only,
            VolumeSource::EmptyDir { .. } | VolumeSource::Files(_) | VolumeSource::HostPath(_) => {
                mount.read_only
            }
        };
        let mut options = vec![if is_read_only { "ro" } else { "rw" }.to_owned()];
        let kind = match &volume.source {
            _ if has_file(volume) => protocol::VOLUME_MOUNT_TYPE,
            VolumeSource::EmptyDir {
                memory,
                size_limit_bytes,
            } => {
                if *memory {
                    options.push("medium=memory".to_owned());
                }
                if let Some(bytes) = size_limit_bytes {
                    options.push(format!("size={bytes}"));
                }
                if let Some(gid) = group.fs_group {
                    options.push(format!("gid={gid}"));
                }
                protocol::EMPTYDIR_MOUNT_TYPE
            }
            VolumeSource::Disk(_) => protocol::VOLUME_MOUNT_TYPE,
            VolumeSource::Nfs(_) => protocol::NFS_MOUNT_TYPE,
            VolumeSource::HostPath(volume) => {
                options.push(format!("type={}", volume.kind.name()));
                protocol::HOST_PATH_MOUNT_TYPE
            }
            // Nobody writes to them, as in Kubernetes.
            VolumeSource::Files(_) => {
                options = vec!["ro".to_owned(), "nosuid".to_owned()];
                protocol::FILES_MOUNT_TYPE
            }
        };
        if let Some(path) = sub_path(container, mount, &lookup)? {
            options.push(format!("subpath={path}"));
        }
        mounts.push(json!({
            "destination": mount.mount_path,
            "type": kind,
            "source": match &volume.source {
                VolumeSource::HostPath(path) => &path.path,
                _ => &volume.name,
            },
            "options": options,
        }));
    }
    for device in &container.volume_devices {
        mounts.push(json!({
            "destination": device.device_path,
            "type": protocol::DEVICE_MOUNT_TYPE,
            "source": device.name,
            "options": [],
        }));
    }
    // A mount below another one must come after it.
    mounts.sort_by_key(|mount| {
        mount["destination"]
            .as_str()
            .map_or(0, |path| path.matches('/').count())
    });
    Ok(mounts)
}

/// With a path a namespace is the sandbox's: protos/guest.proto, `CreateContainerRequest`.
fn namespaces(group: &GroupSpec) -> Value {
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "ipc"})];
    if group.share_process_namespace {
        namespaces.push(json!({"type": "pid", "path": "/proc/1/ns/pid"}));
    } else if !group.host_pid {
        namespaces.push(json!({"type": "pid"}));
    }
    if !group.host_network {
        namespaces.push(json!({"type": "uts"}));
    }
    namespaces.into()
}

/// Takes away what keeps a container from the guest it is in.
fn set_privileged(spec: &mut Value) {
    let linux = &mut spec["linux"];
    linux["maskedPaths"] = json!([]);
    linux["readonlyPaths"] = json!([]);
    linux["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
    linux["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        if ["sysfs", "cgroup"].map(Value::from).contains(&mount["type"])
            && let Some(options) = mount["options"].as_array_mut()
        {
            options.retain(|option| option != "ro");
        }
    }
}

/// The whole `config.json` of a container.
///
/// # Errors
/// `InvalidArgument` names the field of the container that can't be carried out.
pub fn container_spec(
    group: &GroupSpec,
    container: &ContainerSpec,
    container_id: &str,
    resolved: &ResolvedProcess,
    facts: &GroupFacts,
) -> Result<Spec> {
    if resolved.args.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "container {}: neither command nor args are given and image {} has no entrypoint or command",
                container.name, container.image
            ),
        ));
    }
    if container.run_as_non_root && resolved.uid == 0 {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "container {}: runAsNonRoot is set and the image would run as uid 0: set runAsUser",
                container.name
            ),
        ));
    }
    let env = environment(group, container, &resolved.image_env, facts)?;
    let mut expanded = resolved.clone();
    // Kubernetes expands $(NAME) in command and args from the container's own variables.
    let own = environment(group, container, &[], facts)?;
    let lookup = |name: &str| {
        container.env.iter().find(|variable| variable.name == name)?;
        own.iter()
            .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('=').map(str::to_owned))
    };
    if !container.command.is_empty() || !container.args.is_empty() {
        expanded.args = resolved.args.iter().map(|arg| expand(arg, lookup)).collect();
    }
    if group.supplemental_groups.is_strict {
        expanded.additional_gids.clear();
    }
    for gid in group.supplemental_groups.ids.iter().chain(&group.fs_group) {
        if !expanded.additional_gids.contains(gid) {
            expanded.additional_gids.push(*gid);
        }
    }
    let volumes = volume_mounts(group, container, lookup)?;
    // A volume takes the place of what is there for all: a larger `/dev/shm`, for one.
    let is_taken = |mount: &Value| {
        let mut volumes = volumes.iter();
        volumes.any(|volume| volume["destination"] == mount["destination"])
    };
    let mut mounts = standard_mounts();
    mounts.retain(|mount| !is_taken(mount));
    mounts.extend(volumes);
    // As the kubelet has it on cgroup v2: a container that is out of memory ends as a whole. Without one of its processes
    // it would go on in a state that nobody wrote it for, and its end, if any, would not name the reason.
    let mut resources = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "unified": {"memory.oom.group": "1"},
    });
    if container.size.is_some() {
        let limits = limits(container.size);
        (resources["memory"], resources["cpu"]) = (limits["memory"].clone(), limits["cpu"].clone());
    }
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "process": process(container, &expanded, &env)?,
        "root": {"path": "rootfs", "readonly": container.read_only_root},
        "hostname": facts.hostname,
        "mounts": mounts,
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.container-name": container.name,
            "io.kubernetes.cri.sandbox-name": group.name,
            "io.kubernetes.cri.sandbox-namespace": group.namespace,
        },
        "linux": {
            "resources": resources,
            "cgroupsPath": format!("/{container_id}"),
            "namespaces": namespaces(group),
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READONLY_PATHS,
        },
    });
    if container.privileged {
        set_privileged(&mut spec);
    }
    serde_json::from_value(spec).map_err(|error| {
        Error::with_source(
            ErrorKind::InvalidArgument,
            format!(
                "container {}: its OCI specification can't be built",
                container.name
            ),
            error,
        )
    })
}

/// The limits of a container of that size, as OCI `LinuxResources`; without a size those that a container without limits begins
/// with.
pub fn limits(size: Option<Size>) -> Value {
    match size {
        Some(size) => json!({
            "memory": {"limit": size.memory_bytes},
            "cpu": {
                "quota": u64::from(size.cpu_milli) * CPU_PERIOD_US / 1000,
                "period": CPU_PERIOD_US,
                "shares": (u64::from(size.cpu_milli) * 1024 / 1000).max(2),
            },
        }),
        None => json!({
            "memory": {"limit": -1},
            "cpu": {"quota": -1, "period": CPU_PERIOD_US, "shares": DEFAULT_SHARES},
        }),
    }
}

/// The process of an exec: the container's own user, environment, directory and rights, another command.
///
/// # Errors
/// `Internal` when the container's specification has no process.
pub fn exec_process(container: &Spec, command: &[String], tty: bool) -> Result<Process> {
    let mut process = container.process().clone().ok_or_else(|| {
        Error::new(
            ErrorKind::Internal,
            "the container's OCI specification has no process",
        )
    })?;
    process.set_args(Some(command.to_vec())).set_terminal(Some(tty));
    if tty {
        let mut env = process.env().clone().unwrap_or_default();
        if !env.iter().any(|entry| entry.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
        process.set_env(Some(env));
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{
        host_path::{HostPathKind, HostPathVolume},
        nfs::NfsVolume,
        spec::{EnvVar, Size, VolumeDevice, VolumeSpec, testing},
    };

    fn facts() -> GroupFacts {
        GroupFacts {
            group_id: "eci-00000000000000000001".into(),
            ips: vec!["10.89.0.2".into(), "fd00:89::a59:2".into()],
            node_name: "node-1".into(),
            host_ips: vec!["10.89.0.1".into(), "fd00:89::1".into()],
            hostname: "g".into(),
        }
    }

    fn resolved(args: &[&str]) -> ResolvedProcess {
        ResolvedProcess {
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            image_env: vec!["PATH=/bin".into(), "A=image".into()],
            cwd: "/".into(),
            uid: 0,
            gid: 0,
            additional_gids: vec![],
        }
    }

    fn literal(name: &str, value: &str) -> EnvVar {
        EnvVar {
            name: name.into(),
            value: EnvValue::Literal(value.into()),
        }
    }

    fn caps(spec: &Spec) -> Vec<String> {
        let value = serde_json::to_value(spec).unwrap();
        let list = value["process"]["capabilities"]["bounding"].as_array().unwrap();
        list.iter()
            .map(|item| item.as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn expansion_follows_kubernetes() {
        let lookup = |name: &str| (name == "A").then(|| "x".to_owned());
        for (input, expected) in [
            ("$(A)", "x"),
            ("$$(A)", "$(A)"),
            ("$(B)", "$(B)"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
            ("a$(A)$(A)b", "axxb"),
        ] {
            assert_eq!(expand(input, lookup), expected, "{input}");
        }
    }

    #[test]
    fn environment_order_override_and_fields() {
        let mut group = testing::group("g", 1);
        group.containers[0].env = vec![
            literal("B", "1"),
            literal("A", "$(B)-$(C)"),
            literal("C", "later"),
            EnvVar {
                name: "IP".into(),
                value: EnvValue::Field("status.podIP".into()),
            },
        ];
        let env = environment(
            &group,
            &group.containers[0],
            &resolved(&["x"]).image_env,
            &facts(),
        )
        .unwrap();
        assert!(env.contains(&"PATH=/bin".to_owned()));
        assert!(env.contains(&"HOSTNAME=g".to_owned()));
        assert!(env.contains(&"A=1-$(C)".to_owned()), "{env:?}");
        assert!(env.contains(&"IP=10.89.0.2".to_owned()));
        group.containers[0].env = vec![EnvVar {
            name: "X".into(),
            value: EnvValue::Field("status.nope".into()),
        }];
        let error = environment(&group, &group.containers[0], &[], &facts()).unwrap_err();
        assert!(error.message.contains("status.nope"), "{error}");
    }

    #[test]
    fn processes_are_a_containers_own_unless_the_group_shares_them() {
        let mut group = testing::group("g", 1);
        let build = |group: &GroupSpec| {
            let spec = container_spec(group, &group.containers[0], "c", &resolved(&["x"]), &facts()).unwrap();
            serde_json::to_value(&spec).unwrap()["linux"]["namespaces"].clone()
        };
        let (mount, ipc, uts) = (
            json!({"type": "mount"}),
            json!({"type": "ipc"}),
            json!({"type": "uts"}),
        );
        assert_eq!(build(&group), json!([mount, ipc, {"type": "pid"}, uts]));
        group.share_process_namespace = true;
        let shared = json!({"type": "pid", "path": "/proc/1/ns/pid"});
        assert_eq!(build(&group), json!([mount, ipc, shared, uts]));
        (group.share_process_namespace, group.host_pid, group.host_network) = (false, true, true);
        assert_eq!(build(&group), json!([mount, ipc]));
    }

    #[test]
    fn nothing_of_the_guest_is_kept_from_a_privileged_container() {
        let mut group = testing::group("g", 1);
        group.volumes = vec![VolumeSpec {
            name: "v".into(),
            source: VolumeSource::HostPath(HostPathVolume {
                path: "/var/lib/x".into(),
                kind: HostPathKind::DirectoryOrCreate,
            }),
        }];
        group.containers[0].privileged = true;
        group.containers[0].volume_mounts = vec![VolumeMount {
            name: "v".into(),
            mount_path: "/x".into(),
            sub_path: None,
            is_sub_path_expr: false,
            read_only: true,
        }];
        let spec = container_spec(&group, &group.containers[0], "c", &resolved(&["x"]), &facts()).unwrap();
        assert_eq!(caps(&spec).len(), ALL_CAPABILITIES.len());
        let value = serde_json::to_value(&spec).unwrap();
        let linux = &value["linux"];
        assert_eq!(
            (&linux["maskedPaths"], &linux["readonlyPaths"]),
            (&json!([]), &json!([]))
        );
        assert_eq!(linux["seccomp"]["defaultAction"], "SCMP_ACT_ALLOW");
        assert_eq!(linux["resources"]["devices"][0]["allow"], true);
        assert_eq!(linux["resources"]["unified"]["memory.oom.group"], "1");
        let mounts = value["mounts"].as_array().unwrap();
        for mount in mounts.iter().filter(|mount| mount["destination"] != "/x") {
            assert!(
                !mount["options"].as_array().unwrap().contains(&json!("ro")),
                "{mount}"
            );
        }
        let path = mounts.last().unwrap();
        assert_eq!(
            (&path["type"], &path["source"]),
            (&json!("hostpath"), &json!("/var/lib/x"))
        );
        assert_eq!(path["options"], json!(["ro", "type=DirectoryOrCreate"]));
    }

    #[test]
    fn command_arguments_are_expanded() {
        let mut group = testing::group("g", 1);
        group.containers[0].env = vec![literal("A", "1")];
        group.containers[0].args = vec!["$(A)".into(), "$(PATH)".into()];
        let spec = container_spec(
            &group,
            &group.containers[0],
            "c-0",
            &resolved(&["echo", "$(A)", "$(PATH)"]),
            &facts(),
        )
        .unwrap();
        let args = spec.process().as_ref().unwrap().args().clone().unwrap();
        assert_eq!(args, ["echo", "1", "$(PATH)"]);
    }

    #[test]
    fn capabilities_follow_add_and_drop() {
        let mut group = testing::group("g", 1);
        let build =
            |group: &GroupSpec| container_spec(group, &group.containers[0], "c", &resolved(&["x"]), &facts());
        assert_eq!(caps(&build(&group).unwrap()).len(), DEFAULT_CAPABILITIES.len());
        group.containers[0].capabilities_drop = vec!["ALL".into()];
        group.containers[0].capabilities_add = vec!["net_admin".into()];
        assert_eq!(caps(&build(&group).unwrap()), ["CAP_NET_ADMIN"]);
        group.containers[0].capabilities_drop = vec!["NET_RAW".into()];
        group.containers[0].capabilities_add = vec!["ALL".into()];
        let all = caps(&build(&group).unwrap());
        assert!(!all.contains(&"CAP_NET_RAW".to_owned()) && all.contains(&"CAP_SYS_ADMIN".to_owned()));
        group.containers[0].capabilities_add = vec!["NOPE".into()];
        assert!(build(&group).unwrap_err().message.contains("NOPE"));
    }

    #[test]
    fn limits_and_volumes_arrive() {
        let mut group = testing::group("g", 1);
        group.volumes = vec![VolumeSpec {
            name: "data".into(),
            source: VolumeSource::EmptyDir {
                memory: true,
                size_limit_bytes: Some(4096),
            },
        }];
        group.containers[0].size = Some(Size {
            cpu_milli: 500,
            memory_bytes: 1 << 20,
        });
        group.containers[0].volume_mounts = vec![VolumeMount {
            name: "data".into(),
            mount_path: "/data".into(),
            sub_path: None,
            is_sub_path_expr: false,
            read_only: true,
        }];
        let spec = container_spec(&group, &group.containers[0], "c", &resolved(&["x"]), &facts()).unwrap();
        let value = serde_json::to_value(&spec).unwrap();
        assert_eq!(value["linux"]["resources"]["cpu"]["quota"], 50_000);
        assert_eq!(value["linux"]["resources"]["memory"]["limit"], 1 << 20);
        assert_eq!(value["linux"]["resources"]["unified"]["memory.oom.group"], "1");
        let mount = value["mounts"].as_array().unwrap().last().unwrap();
        assert_eq!(mount["type"], "emptydir");
        assert_eq!(mount["options"], json!(["ro", "medium=memory", "size=4096"]));
        group.containers[0].volume_mounts[0].name = "other".into();
        assert!(container_spec(&group, &group.containers[0], "c", &resolved(&["x"]), &facts()).is_err());
    }

    #[test]
    fn a_volume_takes_the_place_of_shared_memory_and_a_limit_makes_it_a_file() {
        let mut group = testing::group("g", 1);
        let shm = |group: &GroupSpec| {
            let spec = container_spec(group, &group.containers[0], "c", &resolved(&["x"]), &facts()).unwrap();
            let value = serde_json::to_value(&spec).unwrap();
            let mounts = value["mounts"].as_array().unwrap().iter();
            let there = mounts.filter(|mount| mount["destination"] == "/dev/shm");
            there
                .map(|mount| (mount["type"].clone(), mount["options"].clone()))
                .collect::<Vec<_>>()
        };
        let standard = json!(["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]);
        assert_eq!(shm(&group), [(json!("tmpfs"), standard)]);
        let mut volume = |memory| {
            group.volumes = vec![VolumeSpec {
                name: "v".into(),
                source: VolumeSource::EmptyDir {
                    memory,
                    size_limit_bytes: Some(1 << 20),
                },
            }];
            group.containers[0].volume_mounts = vec![VolumeMount {
                name: "v".into(),
                mount_path: "/dev/shm".into(),
                sub_path: None,
                is_sub_path_expr: false,
                read_only: false,
            }];
            shm(&group)
        };
        let options = json!(["rw", "medium=memory", "size=1048576"]);
        assert_eq!(volume(true), [(json!("emptydir"), options)]);
        assert_eq!(volume(false), [(json!("volume"), json!(["rw"]))]);
    }

    #[test]
    fn nobody_writes_to_a_servers_directory_when_volume_or_mount_says_so_and_it_keeps_its_group() {
        let mut group = testing::group("g", 1);
        group.fs_group = Some(2000);
        for (volume, mount, expected) in [
            (false, false, "rw"),
            (true, false, "ro"),
            (false, true, "ro"),
            (true, true, "ro"),
        ] {
            group.volumes = vec![VolumeSpec {
                name: "v".into(),
                source: VolumeSource::Nfs(NfsVolume {
                    server: "nas".into(),
                    path: "/a".into(),
                    read_only: volume,
                }),
            }];
            group.containers[0].volume_mounts = vec![VolumeMount {
                name: "v".into(),
                mount_path: "/v".into(),
                sub_path: Some("b".into()),
                is_sub_path_expr: false,
                read_only: mount,
            }];
            let spec =
                container_spec(&group, &group.containers[0], "c", &resolved(&["x"]), &facts()).unwrap();
            let value = serde_json::to_value(&spec).unwrap();
            let made = value["mounts"].as_array().unwrap().last().unwrap();
            assert_eq!(made["type"], "nfs");
            assert_eq!(made["options"], json!([expected, "subpath=b"]));
        }
    }

    #[test]
    fn a_volume_that_is_a_device_is_not_mounted() {
        let mut group = testing::group("g", 1);
        group.containers[0].volume_devices = vec![VolumeDevice {
            name: "v".into(),
            device_path: "/dev/xvda".into(),
        }];
        assert!(group.is_device("v") && !group.is_device("w"));
        let spec = container_spec(&group, &group.containers[0], "c", &resolved(&["x"]), &facts()).unwrap();
        let value = serde_json::to_value(&spec).unwrap();
        let made = value["mounts"].as_array().unwrap().last().unwrap();
        assert_eq!((&made["type"], &made["source"]), (&json!("device"), &json!("v")));
    }

    #[test]
    fn volumes_of_a_group_with_groups() {
        let mut group = testing::group("g", 1);
        group.fs_group = Some(2000);
        group.supplemental_groups.ids = vec![7, 2000, 9];
        group.volumes = vec![VolumeSpec {
            name: "v".into(),
            source: VolumeSource::EmptyDir {
                memory: false,
                size_limit_bytes: None,
            },
        }];
        group.containers[0].env = vec![literal("DIR", "a"), literal("UP", "..")];
        group.containers[0].volume_mounts = vec![VolumeMount {
            name: "v".into(),
            mount_path: "/v".into(),
            sub_path: Some("x/$(DIR)".into()),
            is_sub_path_expr: true,
            read_only: false,
        }];
        let mut image = resolved(&["x"]);
        image.additional_gids = vec![5, 7];
        let build = |group: &GroupSpec| container_spec(group, &group.containers[0], "c", &image, &facts());
        let groups = |group: &GroupSpec| {
            let value = serde_json::to_value(build(group).unwrap()).unwrap();
            (
                value["process"]["user"]["additionalGids"].clone(),
                value["mounts"].clone(),
            )
        };
        let (gids, mounts) = groups(&group);
        assert_eq!(gids, json!([5, 7, 2000, 9]));
        let options = &mounts.as_array().unwrap().last().unwrap()["options"];
        assert_eq!(*options, json!(["rw", "gid=2000", "subpath=x/a"]));
        group.supplemental_groups.is_strict = true;
        assert_eq!(groups(&group).0, json!([7, 2000, 9]));
        for (path, problem) in [("$(NO)", "no variable \"NO\""), ("$(UP)/b", "without '..'")] {
            group.containers[0].volume_mounts[0].sub_path = Some(path.into());
            let error = build(&group).unwrap_err();
            assert!(error.message.contains(problem), "{error}");
        }
    }

    #[test]
    fn refuses_root_and_empty_commands_by_name() {
        let mut group = testing::group("g", 1);
        group.containers[0].run_as_non_root = true;
        let error =
            container_spec(&group, &group.containers[0], "c", &resolved(&["x"]), &facts()).unwrap_err();
        assert!(error.message.contains("runAsNonRoot"), "{error}");
        group.containers[0].run_as_non_root = false;
        assert!(container_spec(&group, &group.containers[0], "c", &resolved(&[]), &facts()).is_err());
    }

    #[test]
    fn exec_inherits_everything_but_the_command() {
        let group = testing::group("g", 1);
        let spec = container_spec(&group, &group.containers[0], "c", &resolved(&["x"]), &facts()).unwrap();
        let process = exec_process(&spec, &["ls".to_owned()], true).unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["ls"]);
        assert!(process.env().as_ref().unwrap().contains(&"TERM=xterm".to_owned()));
        assert_eq!(
            process.capabilities(),
            spec.process().as_ref().unwrap().capabilities()
        );
    }
}
