//! What a caller wants of a container group. Plain data, no I/O.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::disk::DiskVolume;
use super::eci::params::Params;
use super::files::{Content, FileVolume};
use super::host_path::HostPathVolume;
use super::lifecycle::Lifecycle;
use super::network::NetworkSpec;
use super::nfs::NfsVolume;

/// A container group as wanted. Doors check it before the engine sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// Name; unique within `namespace` for the Kubernetes doors and `ecictl`. Also the default host name.
    pub name: String,
    /// Kubernetes namespace; `default` where the door has none.
    pub namespace: String,
    /// Kubernetes uid where given.
    pub uid: Option<String>,
    /// Labels (ECI: tags).
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// 1 to 20 containers, names unique: those that do the group's work, then those that take turns before them, in order.
    pub containers: Vec<ContainerSpec>,
    /// Up to 20 volumes, names unique.
    pub volumes: Vec<VolumeSpec>,
    /// What happens when a container ends.
    pub restart_policy: RestartPolicy,
    /// Size of the whole group, after rounding to the size table.
    pub size: Size,
    /// Host name inside the group.
    pub hostname: String,
    /// DNS settings; `None` inherits the host's.
    pub dns: Option<DnsSpec>,
    /// Extra `/etc/hosts` entries: address and its names.
    pub host_aliases: Vec<(String, Vec<String>)>,
    /// Seconds between SIGTERM and SIGKILL.
    pub termination_grace_period_seconds: u64,
    /// Seconds after its acceptance when the group fails.
    #[serde(default)]
    pub active_deadline_seconds: Option<u64>,
    /// Credentials for pulling.
    pub registry_credentials: Vec<RegistryCredential>,
    /// Its containers see and signal each other's processes.
    #[serde(default)]
    pub share_process_namespace: bool,
    /// They see the guest's processes.
    #[serde(default)]
    pub host_pid: bool,
    /// They have the guest's host name; its network they have in any case.
    #[serde(default)]
    pub host_network: bool,
    /// Sysctls of the guest.
    pub sysctls: BTreeMap<String, String>,
    /// Group that owns volumes, and that every process has beside its own.
    #[serde(default)]
    pub fs_group: Option<u32>,
    /// Groups that every process has beside its own.
    #[serde(default)]
    pub supplemental_groups: SupplementalGroups,
    /// Its place in the host's network.
    #[serde(default)]
    pub network: NetworkSpec,
    /// Which door it came through; kept for describing it in the same words.
    pub door: Door,
    /// The parameters it was made of at the ECI door, which an update changes.
    #[serde(default)]
    pub request: Option<Params>,
}

/// Groups of processes, beside those they run as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupplementalGroups {
    /// Group ids.
    pub ids: Vec<u32>,
    /// Those that the image's `/etc/group` gives the user do not count.
    pub is_strict: bool,
}

/// The door a group came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Door {
    /// ECI OpenAPI, port 111.
    Eci,
    /// A Kubernetes Pod, by `ecictl` or the kubelet API.
    Pod,
}

/// vCPU and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Thousandths of a vCPU.
    pub cpu_milli: u32,
    /// Bytes.
    pub memory_bytes: u64,
}

/// A container as wanted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Name, a DNS label.
    pub name: String,
    /// Image reference as written by the user.
    pub image: String,
    /// When to pull.
    pub image_pull_policy: ImagePullPolicy,
    /// Replaces the image's entrypoint when not empty.
    pub command: Vec<String>,
    /// Replaces the image's command when not empty.
    pub args: Vec<String>,
    /// Replaces the image's working directory when given.
    pub working_dir: Option<String>,
    /// Environment, in order.
    pub env: Vec<EnvVar>,
    /// Ports, for information and for refusing reserved ones.
    pub ports: Vec<PortSpec>,
    /// Mounted volumes.
    pub volume_mounts: Vec<VolumeMount>,
    /// Volumes that are devices.
    #[serde(default)]
    pub volume_devices: Vec<VolumeDevice>,
    /// Limits; `None` = shares the group.
    pub size: Option<Size>,
    /// User.
    pub run_as_user: Option<u32>,
    /// Group.
    pub run_as_group: Option<u32>,
    /// Refuse to run as uid 0.
    pub run_as_non_root: bool,
    /// Root file system is read-only.
    pub read_only_root: bool,
    /// Capabilities added to the default set, without the `CAP_` prefix.
    pub capabilities_add: Vec<String>,
    /// Capabilities dropped; `ALL` drops all.
    pub capabilities_drop: Vec<String>,
    /// Nothing of the guest is kept from it.
    #[serde(default)]
    pub privileged: bool,
    /// `allowPrivilegeEscalation`, default true.
    pub allow_privilege_escalation: bool,
    /// stdin is open.
    pub stdin: bool,
    /// stdin closes after the first attach.
    pub stdin_once: bool,
    /// A TTY is allocated.
    pub tty: bool,
    /// How it lives in the group.
    #[serde(default)]
    pub lifecycle: Lifecycle,
}

/// One environment variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvVar {
    /// Name.
    pub name: String,
    /// Value, or a field of the group resolved when the container starts.
    pub value: EnvValue,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EnvValue {
    /// Literal, with `$(NAME)` references as in Kubernetes.
    Literal(String),
    /// A field path such as `status.podIP`, `metadata.name`.
    Field(String),
    /// A value of a ConfigMap or Secret, taken as it is.
    Key(KeyValue),
}

/// A value of a ConfigMap or Secret, and where it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyValue {
    /// It is a Secret's.
    pub is_secret: bool,
    /// Name of the ConfigMap or Secret.
    pub object: String,
    /// Key in it.
    pub key: String,
    /// Valid UTF-8 without NUL bytes.
    pub value: Content,
}

/// One declared port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    /// Name, may be empty.
    pub name: String,
    /// 1 to 65535; not 111, 998, 10250, 10255.
    pub port: u16,
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// Port of the host that leads here.
    #[serde(default)]
    pub host_port: Option<u16>,
    /// At this address of the host only.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
}

/// A volume mounted into a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Name of the group's volume.
    pub name: String,
    /// Absolute path in the container.
    pub mount_path: String,
    /// Directory or file inside the volume.
    pub sub_path: Option<String>,
    /// `$(NAME)` in `sub_path` stands for variables of the container.
    #[serde(default)]
    pub is_sub_path_expr: bool,
    /// Mounted read-only.
    pub read_only: bool,
}

/// A volume that a container has as the device it is: nothing is mounted, and no file system made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDevice {
    /// Name of the group's volume, a disk.
    pub name: String,
    /// Absolute path in the container.
    pub device_path: String,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Name.
    pub name: String,
    /// Kind.
    pub source: VolumeSource,
}

/// Kinds of volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeSource {
    /// An empty directory that lives as long as the group.
    EmptyDir {
        /// On a tmpfs of the guest rather than on its scratch disk.
        memory: bool,
        /// Limit in bytes.
        size_limit_bytes: Option<u64>,
    },
    /// Files that come with the group.
    Files(FileVolume),
    /// A disk, which may outlive the group.
    Disk(DiskVolume),
    /// A directory of an NFS server.
    Nfs(NfsVolume),
    /// A path of the guest.
    HostPath(HostPathVolume),
}

/// DNS settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsSpec {
    /// Name servers.
    pub nameservers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// `name` or `name:value`.
    pub options: Vec<String>,
}

/// A registry login.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryCredential {
    /// `host[:port]`.
    pub server: String,
    /// User.
    pub username: String,
    /// Password; never printed.
    pub password: String,
}

impl GroupSpec {
    /// Whether containers have this volume as a device.
    pub fn is_device(&self, volume: &str) -> bool {
        let mut devices = self
            .containers
            .iter()
            .flat_map(|container| &container.volume_devices);
        devices.any(|device| device.name == volume)
    }

    /// Takes out what is not for reading: passwords, and what is in Secrets and volumes of files.
    pub fn hide_secrets(&mut self) {
        self.request = None;
        for credential in &mut self.registry_credentials {
            credential.password = String::new();
        }
        for volume in &mut self.volumes {
            if let VolumeSource::Files(files) = &mut volume.source {
                files.hide_contents();
            }
        }
        let variables = self
            .containers
            .iter_mut()
            .flat_map(|container| &mut container.env);
        for variable in variables {
            if let EnvValue::Key(value) = &mut variable.value
                && value.is_secret
            {
                value.value = Content::default();
            }
        }
    }
}

impl std::fmt::Debug for RegistryCredential {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("RegistryCredential")
            .field("server", &self.server)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// What happens when a container ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    /// Start it again.
    Always,
    /// Start it again unless it exited with 0.
    OnFailure,
    /// Leave it.
    Never,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImagePullPolicy {
    /// Ask the registry each time.
    Always,
    /// Only when it is not here.
    IfNotPresent,
    /// Never.
    Never,
}

/// Specs for the tests of other modules.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A group of `n` plain containers `c0`, `c1`... that restart always.
    pub(crate) fn group(name: &str, n: usize) -> GroupSpec {
        GroupSpec {
            name: name.into(),
            namespace: "default".into(),
            uid: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            containers: (0..n).map(container).collect(),
            volumes: Vec::new(),
            restart_policy: RestartPolicy::Always,
            size: Size {
                cpu_milli: 1000,
                memory_bytes: 256 << 20,
            },
            hostname: name.into(),
            dns: None,
            host_aliases: Vec::new(),
            termination_grace_period_seconds: 30,
            active_deadline_seconds: None,
            registry_credentials: Vec::new(),
            share_process_namespace: false,
            host_pid: false,
            host_network: false,
            sysctls: BTreeMap::new(),
            fs_group: None,
            supplemental_groups: SupplementalGroups::default(),
            network: NetworkSpec::default(),
            door: Door::Pod,
            request: None,
        }
    }

    fn container(index: usize) -> ContainerSpec {
        ContainerSpec {
            name: format!("c{index}"),
            image: "busybox".into(),
            image_pull_policy: ImagePullPolicy::IfNotPresent,
            command: Vec::new(),
            args: Vec::new(),
            working_dir: None,
            env: Vec::new(),
            ports: Vec::new(),
            volume_mounts: Vec::new(),
            volume_devices: Vec::new(),
            size: None,
            run_as_user: None,
            run_as_group: None,
            run_as_non_root: false,
            read_only_root: false,
            capabilities_add: Vec::new(),
            capabilities_drop: Vec::new(),
            privileged: false,
            allow_privilege_escalation: true,
            stdin: false,
            stdin_once: false,
            tty: false,
            lifecycle: Lifecycle::default(),
        }
    }
}
