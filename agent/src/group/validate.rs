//! The one check of a container group, whatever door it came through. All mistakes are found, not only the first.

use std::{collections::HashSet, fmt::Display, net::IpAddr};

use super::{
    devices, files,
    lifecycle::{self, Role},
    network, pod,
    size::{self, NoSuchSize, SizeTable},
    spec::{ContainerSpec, Door, EnvValue, GroupSpec, Size, VolumeSource},
    violation::{FieldPath, ViolationKind, Violations},
};

/// Most containers of a group.
pub const MAX_CONTAINERS: usize = 20;
/// Most volumes of a group.
pub const MAX_VOLUMES: usize = 20;
/// Most tags of a group that came through the ECI door.
pub const MAX_TAGS: usize = 10;
/// Ports the host keeps for itself inside a group.
pub const RESERVED_PORTS: [u16; 4] = [111, 998, 10250, 10255];

const MAX_CREDENTIALS: usize = 10;
const MAX_GRACE_SECONDS: u64 = 24 * 3600;

const CAPABILITIES: [&str; 42] = [
    "ALL",
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// What is valid for names of containers and volumes.
pub(super) const DNS_LABEL: &str =
    "valid: 1 to 63 lower-case letters, digits and '-', beginning and ending with a letter or digit";

/// What is valid for names of ports.
const PORT_NAME: &str =
    "valid: 1 to 15 lower-case letters, digits and single '-' inside, one letter at least";

/// Longest life of a group, seconds.
pub(super) const MAX_DEADLINE_SECONDS: u64 = i32::MAX as u64;
/// What is valid for it.
pub(super) const DEADLINES: &str = "valid: 1 to 2147483647 seconds";

/// Finds everything that is wrong with a group whose size was already chosen.
pub fn validate(spec: &GroupSpec) -> Violations {
    let mut check = Check {
        found: Violations::default(),
    };
    let root = FieldPath::new(spec.door);
    check.identity(spec, &root);
    check.containers(spec, &root);
    check.volumes(spec, &root);
    files::validate(spec, &root, &mut check.found);
    check.network_settings(spec, &root);
    network::validate(spec, &root, &mut check.found);
    check.found
}

/// The size of the group: its own or the sum of its containers, brought to the size table.
///
/// `own` is the group's own size where given, with the field it comes from.
pub(super) fn choose_size(
    door: Door,
    own: Option<(Size, String)>,
    containers: &[(Role, size::Wanted)],
    table: &SizeTable,
    found: &mut Violations,
) -> Size {
    let sum = size::sum_in_turns(containers);
    let said_by_containers = size::said_in_turns(containers);
    let sum_field = match door {
        Door::Pod => "spec.containers",
        Door::Eci => "Container",
    };
    let (wanted, field) = match own {
        Some((own, field)) => {
            if said_by_containers.0 > own.cpu_milli || said_by_containers.1 > own.memory_bytes {
                let (cpu_milli, memory_bytes) = said_by_containers;
                found.add(
                    ViolationKind::Size,
                    sum_field,
                    size::text(Size {
                        cpu_milli,
                        memory_bytes,
                    }),
                    format!(
                        "the containers together exceed the size of the group, {}; valid: a sum within it",
                        size::text(own)
                    ),
                );
            }
            (own, field)
        }
        None => (sum, sum_field.to_owned()),
    };
    match table.fit(wanted) {
        Ok(size) => size,
        Err(refused @ NoSuchSize { .. }) => {
            found.add(
                ViolationKind::Size,
                field,
                size::text(wanted),
                refused.to_string(),
            );
            wanted
        }
    }
}

struct Check {
    found: Violations,
}

impl Check {
    fn invalid(&mut self, field: FieldPath, value: impl Display, problem: impl Into<String>) {
        self.found.invalid(field, value, problem);
    }

    fn add(
        &mut self,
        kind: ViolationKind,
        field: FieldPath,
        value: impl Display,
        problem: impl Into<String>,
    ) {
        self.found.add(kind, field, value, problem);
    }

    fn identity(&mut self, spec: &GroupSpec, root: &FieldPath) {
        let name = root.field("metadata.name", "ContainerGroupName");
        match spec.door {
            _ if spec.name.is_empty() => {
                self.add(ViolationKind::Missing, name, "", "required");
            }
            Door::Pod if !is_dns_subdomain(&spec.name) => {
                self.invalid(
                    name,
                    &spec.name,
                    "valid: 1 to 253 lower-case letters, digits, '-' and '.', labels beginning and ending with a \
                     letter or digit",
                );
            }
            Door::Eci if !is_eci_name(&spec.name) => {
                self.invalid(
                    name,
                    &spec.name,
                    "valid: 2 to 128 lower-case letters, digits and '-', not beginning or ending with '-'",
                );
            }
            _ => {}
        }
        if !is_dns_label(&spec.namespace) {
            self.invalid(
                root.field("metadata.namespace", "Namespace"),
                &spec.namespace,
                DNS_LABEL,
            );
        }
        // A name may be longer than a host name; then the host name is cut where the spec is made.
        // One made of a bad name is that mistake, not another one.
        let is_own = spec.hostname != pod::hostname_of(&spec.name);
        if is_own && !is_dns_label(&spec.hostname) {
            self.invalid(root.field("spec.hostname", "HostName"), &spec.hostname, DNS_LABEL);
        }
        match spec.door {
            Door::Pod => self.labels(spec, root),
            Door::Eci => self.tags(spec, root),
        }
        if spec.termination_grace_period_seconds > MAX_GRACE_SECONDS {
            self.invalid(
                root.field(
                    "spec.terminationGracePeriodSeconds",
                    "TerminationGracePeriodSeconds",
                ),
                spec.termination_grace_period_seconds,
                format!("valid: 0 to {MAX_GRACE_SECONDS}"),
            );
        }
        if let Some(seconds) = spec.active_deadline_seconds
            && !(1..=MAX_DEADLINE_SECONDS).contains(&seconds)
        {
            self.invalid(
                root.field("spec.activeDeadlineSeconds", "ActiveDeadlineSeconds"),
                seconds,
                DEADLINES,
            );
        }
        let credentials = root.field("spec.imagePullSecrets", "ImageRegistryCredential");
        if spec.registry_credentials.len() > MAX_CREDENTIALS {
            self.add(
                ViolationKind::TooLong,
                credentials.clone(),
                format!("{} credentials", spec.registry_credentials.len()),
                format!("valid: at most {MAX_CREDENTIALS}"),
            );
        }
        for (index, credential) in spec.registry_credentials.iter().enumerate() {
            let server = &credential.server;
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-.:[]_".contains(&b);
            if server.is_empty() || !server.bytes().all(plain) {
                self.invalid(
                    credentials.item(index).field("server", "Server"),
                    server,
                    "valid: a registry as host or host:port, without http:// and without a path",
                );
            }
        }
    }

    fn labels(&mut self, spec: &GroupSpec, root: &FieldPath) {
        let labels = root.field("metadata.labels", "Tag");
        for (key, value) in &spec.labels {
            if !is_label_key(key) {
                self.invalid(
                    labels.key(key),
                    key,
                    "valid keys: an optional DNS prefix and '/', then 1 to 63 letters, digits, '-', '_' and '.', \
                     beginning and ending with a letter or digit",
                );
            }
            if !is_label_value(value) {
                self.invalid(
                    labels.key(key),
                    value,
                    "valid values: up to 63 letters, digits, '-', '_' and '.', beginning and ending with a letter \
                     or digit",
                );
            }
        }
        for key in spec.annotations.keys() {
            if !is_label_key(key) {
                self.invalid(
                    root.field("metadata.annotations", "").key(key),
                    key,
                    "valid keys: as for labels",
                );
            }
        }
        let annotations: usize = spec.annotations.iter().map(|(k, v)| k.len() + v.len()).sum();
        if annotations > 256 * 1024 {
            self.add(
                ViolationKind::TooLong,
                root.field("metadata.annotations", ""),
                format!("{annotations} bytes"),
                "valid: at most 262144 bytes in all",
            );
        }
    }

    fn tags(&mut self, spec: &GroupSpec, root: &FieldPath) {
        let tags = root.field("metadata.labels", "Tag");
        if spec.labels.len() > MAX_TAGS {
            self.add(
                ViolationKind::TooLong,
                tags.clone(),
                format!("{} tags", spec.labels.len()),
                format!("valid: at most {MAX_TAGS}"),
            );
        }
        for (key, value) in &spec.labels {
            let scheme = |text: &str| text.contains("http://") || text.contains("https://");
            if key.is_empty()
                || key.chars().count() > 64
                || key.starts_with("aliyun")
                || key.starts_with("acs:")
                || scheme(key)
            {
                self.invalid(
                    tags.field("", "Key"),
                    key,
                    "valid: 1 to 64 characters, not beginning with aliyun or acs:, without http:// and https://",
                );
            }
            if value.chars().count() > 128 || value.starts_with("acs:") || scheme(value) {
                self.invalid(
                    tags.field("", "Value"),
                    value,
                    "valid: up to 128 characters, not beginning with acs:, without http:// and https://",
                );
            }
        }
    }

    fn containers(&mut self, spec: &GroupSpec, root: &FieldPath) {
        let list = root.field("spec.containers", "Container");
        let inits = root.field("spec.initContainers", "InitContainer");
        let turns = |container: &ContainerSpec| container.lifecycle.role.takes_turns();
        let n_apps = spec
            .containers
            .iter()
            .filter(|container| !turns(container))
            .count();
        if n_apps == 0 {
            self.add(
                ViolationKind::Missing,
                list.clone(),
                "",
                format!("no container; valid: 1 to {MAX_CONTAINERS}"),
            );
        }
        if spec.containers.len() > MAX_CONTAINERS {
            self.add(
                ViolationKind::TooLong,
                list.clone(),
                format!("{} containers", spec.containers.len()),
                format!("valid: 1 to {MAX_CONTAINERS}, init containers included"),
            );
        }
        let mut names = HashSet::new();
        for (index, container) in spec.containers.iter().enumerate() {
            let path = match index.checked_sub(n_apps) {
                None => list.item(index),
                Some(index) => inits.item(index),
            };
            if !is_dns_label(&container.name) {
                self.invalid(path.field("name", "Name"), &container.name, DNS_LABEL);
            } else if !names.insert(&container.name) {
                self.add(
                    ViolationKind::DuplicateContainer,
                    path.field("name", "Name"),
                    &container.name,
                    "another container has this name; valid: names unique in the group",
                );
            }
            self.container(spec, container, &path);
        }
    }

    fn container(&mut self, spec: &GroupSpec, container: &ContainerSpec, path: &FieldPath) {
        let image = path.field("image", "Image");
        if container.image.is_empty() {
            self.add(ViolationKind::Missing, image, "", "required");
        } else if container.image.len() > 255
            || !container.image.bytes().all(|b| b.is_ascii_graphic())
            || container.image.contains("://")
        {
            self.invalid(
                image,
                &container.image,
                "valid: up to 255 characters as registry/name:tag or registry/name@sha256:digest, without http://",
            );
        }
        for (field, eci, list) in [
            ("command", "Command", &container.command),
            ("args", "Arg", &container.args),
        ] {
            for (index, text) in list.iter().enumerate() {
                if text.contains('\0') {
                    self.invalid(path.field(field, eci).item(index), text, "contains a NUL byte");
                }
            }
        }
        if let Some(directory) = &container.working_dir
            && (!directory.starts_with('/') || directory.contains('\0'))
        {
            self.invalid(
                path.field("workingDir", "WorkingDir"),
                directory,
                "valid: an absolute path",
            );
        }
        self.environment(container, path);
        self.ports(container, path);
        self.mounts(spec, container, path);
        devices::check(spec, container, path, &mut self.found);
        self.security(container, path);
        lifecycle::check(container, path, &mut self.found);
        if let Some(size) = container.size {
            self.container_size(spec, size, path);
        }
    }

    fn environment(&mut self, container: &ContainerSpec, path: &FieldPath) {
        for (index, variable) in container.env.iter().enumerate() {
            let path = path.field("env", "EnvironmentVar").item(index);
            if variable.name.is_empty() || variable.name.contains(['=', '\0']) {
                self.invalid(
                    path.field("name", "Key"),
                    &variable.name,
                    "valid: not empty, without '='",
                );
            }
            match &variable.value {
                EnvValue::Literal(text) if text.contains('\0') => {
                    self.invalid(path.field("value", "Value"), text, "contains a NUL byte");
                }
                EnvValue::Literal(_) | EnvValue::Key(_) => {}
                EnvValue::Field(field) if is_known_field(field) => {}
                EnvValue::Field(field) => {
                    self.invalid(
                        path.field("valueFrom.fieldRef.fieldPath", "FieldRef.FieldPath"),
                        field,
                        "valid: metadata.name, metadata.namespace, metadata.uid, metadata.labels['KEY'], \
                         metadata.annotations['KEY'], spec.nodeName, spec.serviceAccountName, status.podIP, \
                         status.podIPs, status.hostIP, status.hostIPs",
                    );
                }
            }
        }
    }

    fn ports(&mut self, container: &ContainerSpec, path: &FieldPath) {
        let mut names = HashSet::new();
        for (index, port) in container.ports.iter().enumerate() {
            let path = path.field("ports", "Port").item(index);
            if port.port == 0 {
                self.invalid(
                    path.field("containerPort", "Port"),
                    port.port,
                    "valid: 1 to 65535",
                );
            } else if RESERVED_PORTS.contains(&port.port) {
                self.invalid(
                    path.field("containerPort", "Port"),
                    port.port,
                    "reserved for the host; valid: 1 to 65535 without 111, 998, 10250 and 10255",
                );
            }
            if !port.name.is_empty() && !is_port_name(&port.name) {
                self.invalid(path.field("name", "Name"), &port.name, PORT_NAME);
            } else if !port.name.is_empty() && !names.insert(&port.name) {
                self.invalid(
                    path.field("name", "Name"),
                    &port.name,
                    "another port of the container has this name",
                );
            }
            if let Some(host_port) = port.host_port.filter(|port| RESERVED_PORTS.contains(port)) {
                self.invalid(
                    path.field("hostPort", "HostPort"),
                    host_port,
                    "the host's own; valid: 1 to 65535 without 111, 998, 10250 and 10255",
                );
            }
            if !["TCP", "UDP"].contains(&port.protocol.as_str()) {
                self.invalid(
                    path.field("protocol", "Protocol"),
                    &port.protocol,
                    "valid: TCP or UDP",
                );
            }
        }
    }

    fn mounts(&mut self, spec: &GroupSpec, container: &ContainerSpec, path: &FieldPath) {
        let mut seen = HashSet::new();
        for (index, mount) in container.volume_mounts.iter().enumerate() {
            let path = path.field("volumeMounts", "VolumeMount").item(index);
            if !spec.volumes.iter().any(|volume| volume.name == mount.name) {
                let known: Vec<_> = spec.volumes.iter().map(|volume| volume.name.as_str()).collect();
                let known = if known.is_empty() {
                    "the group has no volumes".to_owned()
                } else {
                    format!("valid: {}", known.join(", "))
                };
                self.invalid(
                    path.field("name", "Name"),
                    &mount.name,
                    format!("no such volume; {known}"),
                );
            } else if spec.is_device(&mount.name) {
                self.invalid(
                    path.field("name", "Name"),
                    &mount.name,
                    "a container of the group has this volume as a device; valid: a volume is mounted or a device, not both",
                );
            }
            let target = &mount.mount_path;
            if !target.starts_with('/') || target == "/" || !is_plain_path(&target[1..]) {
                self.invalid(
                    path.field("mountPath", "MountPath"),
                    target,
                    "valid: an absolute path other than '/', without '..'",
                );
            } else if !seen.insert(target.trim_end_matches('/')) {
                self.invalid(
                    path.field("mountPath", "MountPath"),
                    target,
                    "another volume is mounted there; valid: paths unique in the container",
                );
            }
            if let Some(sub_path) = &mount.sub_path
                && (sub_path.starts_with('/') || !is_plain_path(sub_path))
            {
                self.invalid(
                    path.field("subPath", "SubPath"),
                    sub_path,
                    "valid: a relative path without '..'",
                );
            }
        }
    }

    fn security(&mut self, container: &ContainerSpec, path: &FieldPath) {
        if container.run_as_non_root && container.run_as_user == Some(0) {
            self.invalid(
                path.field("securityContext.runAsUser", "SecurityContext.RunAsUser"),
                0,
                "user 0 contradicts runAsNonRoot; valid: another user, or runAsNonRoot false",
            );
        }
        for (field, eci, list) in [
            (
                "securityContext.capabilities.add",
                "SecurityContext.Capability.Add",
                &container.capabilities_add,
            ),
            (
                "securityContext.capabilities.drop",
                "SecurityContext.Capability.Drop",
                &container.capabilities_drop,
            ),
        ] {
            for (index, name) in list.iter().enumerate() {
                if !CAPABILITIES.contains(&name.as_str()) {
                    self.invalid(
                        path.field(field, eci).item(index),
                        name,
                        "valid: ALL or a Linux capability without CAP_, for example NET_ADMIN",
                    );
                }
            }
        }
    }

    fn container_size(&mut self, spec: &GroupSpec, size: Size, path: &FieldPath) {
        const LEAST_MEMORY: u64 = 4 << 20;
        if size.cpu_milli == 0 {
            self.add(
                ViolationKind::Size,
                path.field("resources.limits.cpu", "Cpu"),
                0,
                "valid: more than 0, or none for a share of the group",
            );
        }
        if size.memory_bytes < LEAST_MEMORY {
            self.add(
                ViolationKind::Size,
                path.field("resources.limits.memory", "Memory"),
                size.memory_bytes,
                "valid: 4Mi or more, or none for a share of the group",
            );
        }
        if size.memory_bytes > spec.size.memory_bytes {
            self.add(
                ViolationKind::Size,
                path.field("resources.limits.memory", "Memory"),
                size.memory_bytes,
                format!(
                    "more than the group has; valid: at most {}",
                    spec.size.memory_bytes
                ),
            );
        }
    }

    fn volumes(&mut self, spec: &GroupSpec, root: &FieldPath) {
        let list = root.field("spec.volumes", "Volume");
        if spec.volumes.len() > MAX_VOLUMES {
            self.add(
                ViolationKind::TooLong,
                list.clone(),
                format!("{} volumes", spec.volumes.len()),
                format!("valid: at most {MAX_VOLUMES}"),
            );
        }
        let (mut names, mut disks) = (HashSet::new(), HashSet::new());
        for (index, volume) in spec.volumes.iter().enumerate() {
            let path = list.item(index);
            if !is_dns_label(&volume.name) {
                self.invalid(path.field("name", "Name"), &volume.name, DNS_LABEL);
            } else if !names.insert(&volume.name) {
                self.add(
                    ViolationKind::DuplicateVolume,
                    path.field("name", "Name"),
                    &volume.name,
                    "another volume has this name; valid: names unique in the group",
                );
            }
            match &volume.source {
                VolumeSource::EmptyDir {
                    size_limit_bytes: Some(0),
                    ..
                } => self.invalid(
                    path.field("emptyDir.sizeLimit", "EmptyDirVolume.SizeLimit"),
                    0,
                    "valid: more than 0, or none",
                ),
                VolumeSource::Disk(disk) => {
                    if let Some(id) = &disk.id
                        && !disks.insert(id)
                    {
                        self.invalid(
                            path.field("flexVolume.options.volumeId", "DiskVolume.DiskId"),
                            id,
                            "another volume is this disk; valid: disks unique in the group",
                        );
                    }
                }
                VolumeSource::Nfs(nfs) => nfs.check(&path, &mut self.found),
                VolumeSource::HostPath(volume) => volume.check(&path, &mut self.found),
                VolumeSource::EmptyDir { .. } | VolumeSource::Files(_) => {}
            }
        }
    }

    fn network_settings(&mut self, spec: &GroupSpec, root: &FieldPath) {
        if let Some(dns) = &spec.dns {
            let path = root.field("spec.dnsConfig", "DnsConfig");
            for (index, server) in dns.nameservers.iter().enumerate() {
                if server.parse::<IpAddr>().is_err() {
                    self.invalid(
                        path.field("nameservers", "NameServer").item(index),
                        server,
                        "valid: an IP address",
                    );
                }
            }
            for (index, domain) in dns.searches.iter().enumerate() {
                let plain = domain.trim_end_matches('.');
                if !plain.is_empty() && !is_dns_subdomain(&plain.to_ascii_lowercase()) {
                    self.invalid(
                        path.field("searches", "Search").item(index),
                        domain,
                        "valid: a domain name",
                    );
                }
            }
            for (index, option) in dns.options.iter().enumerate() {
                if option.is_empty() || !option.bytes().all(|b| b.is_ascii_graphic()) {
                    self.invalid(
                        path.field("options", "Option").item(index),
                        option,
                        "valid: a name without spaces",
                    );
                }
            }
            for (pod, eci, count) in [
                ("nameservers", "NameServer", dns.nameservers.len()),
                ("searches", "Search", dns.searches.len()),
                ("options", "Option", dns.options.len()),
            ] {
                if count > 20 {
                    self.add(
                        ViolationKind::TooLong,
                        path.field(pod, eci),
                        count,
                        "valid: at most 20",
                    );
                }
            }
        }
        for (index, (ip, names)) in spec.host_aliases.iter().enumerate() {
            let path = root.field("spec.hostAliases", "HostAliase").item(index);
            if ip.parse::<IpAddr>().is_err() {
                self.invalid(path.field("ip", "Ip"), ip, "valid: an IP address");
            }
            for (index, name) in names.iter().enumerate() {
                if !is_dns_subdomain(&name.to_ascii_lowercase()) {
                    self.invalid(
                        path.field("hostnames", "Hostname").item(index),
                        name,
                        "valid: a host name",
                    );
                }
            }
        }
    }
}

/// A DNS label (RFC 1123).
pub(super) fn is_dns_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

pub(crate) fn is_dns_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_dns_label)
}

/// RFC 6335, section 5.1.
fn is_port_name(text: &str) -> bool {
    text.len() <= 15
        && is_dns_label(text)
        && !text.contains("--")
        && text.bytes().any(|b| b.is_ascii_lowercase())
}

fn is_eci_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (2..=128).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_label_value(text: &str) -> bool {
    text.is_empty() || is_label_name(text)
}

fn is_label_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let outer = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 63 && bytes.iter().all(|b| inner(*b)) && outer(bytes.first()) && outer(bytes.last())
}

fn is_label_key(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => is_dns_subdomain(&prefix.to_ascii_lowercase()) && is_label_name(name),
        None => is_label_name(text),
    }
}

pub(super) fn is_plain_path(text: &str) -> bool {
    !text.is_empty() && text.len() <= 4096 && !text.contains('\0') && text.split('/').all(|part| part != "..")
}

pub(super) fn is_known_field(field: &str) -> bool {
    const PLAIN: [&str; 9] = [
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "spec.nodeName",
        "spec.serviceAccountName",
        "status.podIP",
        "status.podIPs",
        "status.hostIP",
        "status.hostIPs",
    ];
    let keyed = |prefix: &str| {
        field
            .strip_prefix(prefix)
            .and_then(|rest| rest.strip_prefix("['"))
            .and_then(|rest| rest.strip_suffix("']"))
            .is_some_and(is_label_key)
    };
    PLAIN.contains(&field) || keyed("metadata.labels") || keyed("metadata.annotations")
}
