//! The agent's configuration: a TOML file, then `ECI_AGENT_...` variables of the environment. Every field has a default,
//! an unknown field is an error. Parsing does no I/O; [`Config::load`] reads the file.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    group::{rules::Allow, validate},
    image::ImageConfig,
    network::security::{self, SecurityGroup},
};

/// Prefix of the variables that override the file. `ECI_AGENT_NETWORK__SUBNET` is the field `subnet` of `[network]`.
pub const ENV_PREFIX: &str = "ECI_AGENT_";

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("Failed to read configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown or wrong field.
    #[error("Configuration {origin} is not valid")]
    Parse {
        /// File or environment.
        origin: String,
        /// Cause, with line and field.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A variable names no field.
    #[error("Environment variable {name} names no configuration field: write {ENV_PREFIX}<TABLE>__<FIELD>")]
    Variable {
        /// The variable.
        name: String,
    },
    /// A field has a value that can't work.
    #[error("Configuration field {field} is {value}: {valid}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is valid.
        valid: &'static str,
    },
}

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("***")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

/// The whole configuration; each table belongs to one part of the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Durable state: store, images, scratch files, logs.
    pub state_dir: PathBuf,
    /// State that ends with the host's uptime: sandbox bundles and sockets.
    pub run_dir: PathBuf,
    /// Kubernetes node name; empty = the host's name.
    pub node_name: String,
    /// The agent's own log.
    pub log: LogConfig,
    /// Programs and guest files.
    pub files: FilesConfig,
    /// Sandboxes.
    pub sandbox: SandboxConfig,
    /// Templates, which groups go on from instead of booting.
    pub template: TemplateConfig,
    /// Sandboxes made before they are asked for.
    pub standby: StandbyConfig,
    /// What groups may grow to while they run.
    pub resize: ResizeConfig,
    /// Network of the groups.
    pub network: NetworkConfig,
    /// Images.
    pub image: ImageConfig,
    /// Admission of groups.
    pub capacity: CapacityConfig,
    /// What groups may have that is refused by default.
    pub allow: Allow,
    /// Port 111, the ECI OpenAPI.
    pub eci: EciConfig,
    /// Port 10250, the kubelet API.
    pub kubelet: KubeletConfig,
    /// Port 10255, read-only kubelet API and metrics.
    pub readonly: ReadonlyConfig,
    /// The local socket of `ecictl`.
    pub admin: AdminConfig,
    /// Security groups that container groups may be members of.
    pub security_group: Vec<SecurityGroup>,
}

/// The agent's own log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Filter in the form of `tracing`'s `EnvFilter`: `info`, `agent=debug,info`.
    pub filter: String,
    /// Form of a line.
    pub format: LogFormat,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Programs and guest files. An empty path means the default place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FilesConfig {
    /// `containerd-shim-eci-v2`; default beside the `eci-agent` executable.
    pub shim: PathBuf,
    /// `eci-vmm`; default beside the `eci-agent` executable.
    pub vmm: PathBuf,
    /// Guest kernel; default `/usr/lib/eci/vmlinux`.
    pub kernel: PathBuf,
    /// Guest initramfs; default `/usr/lib/eci/initramfs.cpio`.
    pub initrd: PathBuf,
}

/// Sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SandboxConfig {
    /// Size of a group's scratch disk (writable layers and emptyDir volumes), GiB.
    pub scratch_gib: u64,
    /// Guest memory beside the group's size, for its kernel and init, MiB.
    pub guest_overhead_mib: u32,
    /// Host memory beside the guest's, for shim and VMM, MiB.
    pub host_overhead_mib: u32,
    /// Seconds a sandbox may take to start.
    pub start_timeout_seconds: u64,
    /// Seconds any other request to a sandbox may take.
    pub request_timeout_seconds: u64,
    /// Added to the guest kernel's command line, for debugging.
    pub kernel_args: String,
    /// Parent cgroup (v2) of the groups; empty = no limits on the host's side.
    pub cgroup_root: PathBuf,
    /// Mount the host's cgroups with `favordynmods`: sandboxes start faster, every fork and exit on the host costs a little.
    pub fast_cgroup_moves: bool,
    /// Most sandboxes that start at the same time; others wait for their turn. 0 = twice the host's CPUs. A start is nearly all
    /// work for a processor: many at once take as long together, and each so long that its deadlines pass.
    pub max_concurrent_starts: usize,
}

/// Network of the groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Groups have a network; without it they have a loopback interface only.
    pub enabled: bool,
    /// Name of the agent's bridge.
    pub bridge: String,
    /// Subnet of the groups, IPv4 CIDR; the first address is the bridge's.
    pub subnet: String,
    /// IPv6 network of the groups, a prefix of unique local or of routed addresses, such as fd00:89::/64; the first address is
    /// the bridge's. Empty: groups have no IPv6.
    pub subnet6: String,
    /// MTU of bridge, taps and guests.
    pub mtu: u16,
    /// Name servers of groups without their own; empty = the host's, without loopback ones.
    pub nameservers: Vec<IpAddr>,
    /// Masquerade what leaves the subnet.
    pub masquerade: bool,
    /// Masquerade what leaves `subnet6`; switched off where that network is routed to this host.
    pub masquerade6: bool,
    /// A network of CNI instead.
    pub cni: CniConfig,
    /// Domain of the Kubernetes cluster, in which Pods with a subdomain have their names.
    pub cluster_domain: String,
}

/// Networks of CNI plugins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CniConfig {
    /// Whether groups get one.
    pub mode: CniMode,
    /// Where networks are configured; the first file by name holds.
    pub conf_dir: PathBuf,
    /// Where the plugins are.
    pub bin_dirs: Vec<PathBuf>,
}

/// Whether groups get their network from CNI plugins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CniMode {
    /// When one is configured as the agent starts.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always: the agent does not start without a configuration.
    Required,
}

impl Default for CniConfig {
    fn default() -> Self {
        Self {
            mode: CniMode::default(),
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
        }
    }
}

/// Admission of groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CapacityConfig {
    /// vCPUs given to groups for each CPU of the host.
    pub cpu_overcommit: f64,
    /// Memory promised to groups for each byte of the host's. Above 1 a host whose groups use what they were promised runs
    /// out of memory, and its kernel ends one.
    pub memory_overcommit: f64,
    /// Host memory kept from groups, MiB.
    pub reserved_memory_mib: u64,
    /// Most groups.
    pub max_groups: usize,
}

/// Port 111, the ECI OpenAPI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EciConfig {
    /// Served.
    pub enabled: bool,
    /// Address.
    pub listen: SocketAddr,
    /// Region the API names itself.
    pub region_id: String,
    /// Zone the API names itself.
    pub zone_id: String,
    /// Keys whose signatures are accepted; without any every request is refused.
    pub access_keys: Vec<AccessKey>,
    /// PEM certificate chain; with `tls_key` the port speaks HTTPS, without both HTTP.
    pub tls_cert: Option<PathBuf>,
    /// PEM private key.
    pub tls_key: Option<PathBuf>,
}

/// One access key of port 111.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessKey {
    /// AccessKey id.
    pub id: String,
    /// AccessKey secret.
    pub secret: Secret,
}

/// Port 10250, the kubelet API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubeletConfig {
    /// Served.
    pub enabled: bool,
    /// Address.
    pub listen: SocketAddr,
    /// Bearer tokens accepted.
    pub bearer_tokens: Vec<Secret>,
    /// PEM certificate authority of client certificates. Without tokens and without it every request is refused.
    pub client_ca: Option<PathBuf>,
    /// PEM certificate chain; without `tls_cert` and `tls_key` a self-signed one is made in the state directory.
    pub tls_cert: Option<PathBuf>,
    /// PEM private key.
    pub tls_key: Option<PathBuf>,
}

/// Port 10255, read-only kubelet API and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReadonlyConfig {
    /// Served.
    pub enabled: bool,
    /// Address.
    pub listen: SocketAddr,
}

/// The local socket of `ecictl`: whoever may open it may do everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// Path; empty = `agent.sock` in the run directory. Made with mode 0660, owner root.
    pub socket: PathBuf,
    /// Group (name or number) whose members may use the socket too; empty = root alone.
    pub group: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/eci-agent".into(),
            run_dir: "/run/eci-agent".into(),
            node_name: String::new(),
            log: LogConfig::default(),
            files: FilesConfig::default(),
            sandbox: SandboxConfig::default(),
            template: TemplateConfig::default(),
            standby: StandbyConfig::default(),
            resize: ResizeConfig::default(),
            network: NetworkConfig::default(),
            image: ImageConfig::default(),
            capacity: CapacityConfig::default(),
            allow: Allow::default(),
            eci: EciConfig::default(),
            kubelet: KubeletConfig::default(),
            readonly: ReadonlyConfig::default(),
            admin: AdminConfig::default(),
            security_group: Vec::new(),
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".into(),
            format: LogFormat::Text,
        }
    }
}

/// Templates: captured guests, kept in memory below `run_dir`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TemplateConfig {
    /// Groups start from templates; `false`: every group boots.
    pub enabled: bool,
    /// Most templates kept; the least recently used go first.
    pub max_templates: usize,
    /// Groups whose guests have more memory boot, MiB. A template takes about 2 % of its guests' memory.
    pub max_memory_mib: u32,
}

impl Default for TemplateConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            max_templates: 8,
            max_memory_mib: 8256,
        }
    }
}

/// Sandboxes that stand by for groups of the shapes (vCPUs, memory) asked for last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StandbyConfig {
    /// Of each shape; 0: none. Each takes about as much memory as an idle group.
    pub per_shape: usize,
    /// Of all shapes together.
    pub max: usize,
}

impl Default for StandbyConfig {
    fn default() -> Self {
        Self { per_shape: 1, max: 4 }
    }
}

/// What groups may grow to while they run; a group that is to be larger gets another sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResizeConfig {
    /// Times the vCPUs that it began with, rounded up to a power of two. 1: none beyond that. Each vCPU that a guest may come to
    /// have takes it some 50 KiB.
    pub vcpu_factor: u32,
    /// Times the memory that it began with, at most the host's. 1: none beyond that. Only addresses are set aside.
    pub memory_factor: u32,
    /// Seconds a guest may take to give back memory, or to make use of more; then the resize is taken back.
    pub timeout_seconds: u64,
}

impl Default for ResizeConfig {
    fn default() -> Self {
        Self {
            vcpu_factor: 2,
            memory_factor: 4,
            timeout_seconds: 60,
        }
    }
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            scratch_gib: 30,
            guest_overhead_mib: 64,
            host_overhead_mib: 96,
            start_timeout_seconds: 120,
            request_timeout_seconds: 60,
            kernel_args: String::new(),
            cgroup_root: "/sys/fs/cgroup/eci".into(),
            fast_cgroup_moves: true,
            max_concurrent_starts: 0,
        }
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            bridge: "eci0".into(),
            subnet: "10.89.0.0/16".into(),
            subnet6: String::new(),
            mtu: 1500,
            nameservers: Vec::new(),
            masquerade: true,
            masquerade6: true,
            cni: CniConfig::default(),
            cluster_domain: "cluster.local".into(),
        }
    }
}

impl Default for CapacityConfig {
    fn default() -> Self {
        Self {
            cpu_overcommit: 4.0,
            memory_overcommit: 1.0,
            reserved_memory_mib: 256,
            max_groups: 1000,
        }
    }
}

impl Default for EciConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 111)),
            region_id: "local".into(),
            zone_id: "local-a".into(),
            access_keys: Vec::new(),
            tls_cert: None,
            tls_key: None,
        }
    }
}

impl Default for KubeletConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 10250)),
            bearer_tokens: Vec::new(),
            client_ca: None,
            tls_cert: None,
            tls_key: None,
        }
    }
}

impl Default for ReadonlyConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 10255)),
        }
    }
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            socket: PathBuf::new(),
            group: String::new(),
        }
    }
}

impl Config {
    /// Where sandboxes have their bundles.
    #[must_use]
    pub fn bundles_dir(&self) -> PathBuf {
        self.run_dir.join("sandboxes")
    }

    /// Reads the file (none = defaults) and the environment, and checks the result.
    ///
    /// # Errors
    /// [`ConfigError`] names file, field and what is valid.
    pub fn load(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let (text, origin) = match path {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
                    path: path.to_owned(),
                    source,
                })?;
                (text, path.display().to_string())
            }
            None => (String::new(), "defaults".to_owned()),
        };
        Self::parse(&text, &origin, environment)
    }

    /// Parses TOML text and overrides from the environment, and checks the result.
    ///
    /// # Errors
    /// [`ConfigError`], without `Read`.
    pub fn parse(
        text: &str,
        origin: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let parse_error = |origin: &str, source| ConfigError::Parse {
            origin: origin.to_owned(),
            source: Box::new(source),
        };
        // Once by itself, so that errors carry the line of the file.
        let mut config: Self = toml::from_str(text).map_err(|source| parse_error(origin, source))?;
        let mut table: toml::Table = toml::from_str(text).map_err(|source| parse_error(origin, source))?;
        let mut overridden = false;
        for (name, value) in environment {
            let Some(path) = name.strip_prefix(ENV_PREFIX) else {
                continue;
            };
            set_field(&mut table, &path.to_ascii_lowercase(), &value)
                .ok_or(ConfigError::Variable { name: name.clone() })?;
            overridden = true;
        }
        if overridden {
            config = table
                .try_into()
                .map_err(|source| parse_error("from the environment", source))?;
        }
        config.check()?;
        Ok(config.with_defaults())
    }

    /// The configuration as TOML; secrets are masked.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("the configuration is plain tables")
    }

    fn check(&self) -> Result<(), ConfigError> {
        let field = |field, value: String, valid| Err(ConfigError::Field { field, value, valid });
        for (name, path) in [("state_dir", &self.state_dir), ("run_dir", &self.run_dir)] {
            if !path.is_absolute() {
                return field(name, path.display().to_string(), "give an absolute path");
            }
        }
        let bridge = &self.network.bridge;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if bridge.is_empty() || bridge.len() > 15 || !bridge.bytes().all(plain) {
            return field(
                "network.bridge",
                bridge.clone(),
                "give 1 to 15 letters, digits, '-' or '_'",
            );
        }
        let domain = &self.network.cluster_domain;
        if !validate::is_dns_subdomain(domain) {
            return field(
                "network.cluster_domain",
                domain.clone(),
                "give a domain such as cluster.local",
            );
        }
        if !(576..=9216).contains(&self.network.mtu) {
            return field("network.mtu", self.network.mtu.to_string(), "give 576 to 9216");
        }
        security::check(&self.security_group)?;
        self.allow.check()?;
        for (name, value) in [
            ("capacity.cpu_overcommit", self.capacity.cpu_overcommit),
            ("capacity.memory_overcommit", self.capacity.memory_overcommit),
        ] {
            if !(0.1..=1000.0).contains(&value) {
                return field(name, value.to_string(), "give 0.1 to 1000");
            }
        }
        if !(1..=4096).contains(&self.sandbox.scratch_gib) {
            return field(
                "sandbox.scratch_gib",
                self.sandbox.scratch_gib.to_string(),
                "give 1 to 4096",
            );
        }
        if self.template.enabled && !(1..=64).contains(&self.template.max_templates) {
            return field(
                "template.max_templates",
                self.template.max_templates.to_string(),
                "give 1 to 64, or set template.enabled = false",
            );
        }
        for (name, factor) in [
            ("resize.vcpu_factor", self.resize.vcpu_factor),
            ("resize.memory_factor", self.resize.memory_factor),
        ] {
            if !(1..=64).contains(&factor) {
                return field(name, factor.to_string(), "give 1 to 64");
            }
        }
        if !(1..=600).contains(&self.resize.timeout_seconds) {
            return field(
                "resize.timeout_seconds",
                self.resize.timeout_seconds.to_string(),
                "give 1 to 600",
            );
        }
        for (name, seconds) in [
            (
                "sandbox.start_timeout_seconds",
                self.sandbox.start_timeout_seconds,
            ),
            (
                "sandbox.request_timeout_seconds",
                self.sandbox.request_timeout_seconds,
            ),
        ] {
            if !(1..=3600).contains(&seconds) {
                return field(name, seconds.to_string(), "give 1 to 3600");
            }
        }
        for (name, cert, key) in [
            ("eci.tls_cert", &self.eci.tls_cert, &self.eci.tls_key),
            ("kubelet.tls_cert", &self.kubelet.tls_cert, &self.kubelet.tls_key),
        ] {
            if cert.is_some() != key.is_some() {
                return field(
                    name,
                    format!("{cert:?}"),
                    "give both certificate and key, or neither",
                );
            }
        }
        Ok(())
    }

    fn with_defaults(mut self) -> Self {
        let or = |path: &mut PathBuf, default: PathBuf| {
            if path.as_os_str().is_empty() {
                *path = default;
            }
        };
        or(&mut self.admin.socket, self.run_dir.join("agent.sock"));
        or(&mut self.files.kernel, "/usr/lib/eci/vmlinux".into());
        or(&mut self.files.initrd, "/usr/lib/eci/initramfs.cpio".into());
        self
    }

    /// Fills in what depends on this process and host: where its executable lies, and the host's name.
    pub fn with_host(mut self, executable: &Path, hostname: &str) -> Self {
        let beside = |name: &str| {
            executable
                .parent()
                .unwrap_or_else(|| Path::new("/usr/bin"))
                .join(name)
        };
        if self.files.shim.as_os_str().is_empty() {
            self.files.shim = beside("containerd-shim-eci-v2");
        }
        if self.files.vmm.as_os_str().is_empty() {
            self.files.vmm = beside("eci-vmm");
        }
        if self.node_name.is_empty() {
            self.node_name = hostname.to_owned();
        }
        self
    }
}

/// Sets `a__b` in the table to the value: TOML where it parses as such, text otherwise.
fn set_field(table: &mut toml::Table, path: &str, value: &str) -> Option<()> {
    let (tables, field) = match path.rsplit_once("__") {
        Some((tables, field)) => (tables.split("__").collect(), field),
        None => (Vec::new(), path),
    };
    let mut table = table;
    for name in tables {
        table = table
            .entry(name)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()?;
    }
    if field.is_empty() {
        return None;
    }
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut parsed| parsed.remove("v"));
    let parsed = parsed.unwrap_or_else(|| toml::Value::String(value.to_owned()));
    table.insert(field.to_owned(), parsed);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn defaults_are_valid_and_survive_printing() {
        let config = Config::parse("", "test", env(&[])).unwrap();
        let again = Config::parse(&config.to_toml(), "test", env(&[])).unwrap();
        assert_eq!(config, again);
    }

    #[test]
    fn unknown_fields_are_refused_with_their_name() {
        let error = Config::parse("[network]\nbrigde = 'x'", "test", env(&[])).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("brigde"), "{cause}");
    }

    #[test]
    fn what_is_allowed_is_checked() {
        let config = Config::parse(
            "[allow]\nunsafe_sysctls = ['net.*', 'vm.max_map_count']",
            "test",
            env(&[]),
        );
        assert_eq!(config.unwrap().allow.unsafe_sysctls.len(), 2);
        let error = Config::parse("[allow]\nunsafe_sysctls = ['net.*', '../x']", "test", env(&[]));
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("allow.unsafe_sysctls is ../x")
        );
    }

    #[test]
    fn environment_wins_over_the_file() {
        let config = Config::parse(
            "[network]\nmtu = 1400\nbridge = 'br9'",
            "test",
            env(&[
                ("ECI_AGENT_NETWORK__MTU", "9000"),
                ("ECI_AGENT_NODE_NAME", "n1"),
                ("PATH", "/bin"),
            ]),
        )
        .unwrap();
        assert_eq!(
            (config.network.mtu, config.network.bridge.as_str()),
            (9000, "br9")
        );
        assert_eq!(config.node_name, "n1");
    }

    #[test]
    fn unknown_variable_is_refused() {
        assert!(Config::parse("", "test", env(&[("ECI_AGENT_NOPE", "1")])).is_err());
    }

    #[test]
    fn wrong_values_name_the_field() {
        let error = Config::parse("state_dir = 'x'", "test", env(&[])).unwrap_err();
        assert!(error.to_string().contains("state_dir"), "{error}");
    }

    #[test]
    fn secrets_are_masked() {
        let text = "[[eci.access_keys]]\nid = 'a'\nsecret = 'hunter2'";
        let config = Config::parse(text, "test", env(&[])).unwrap();
        assert!(!config.to_toml().contains("hunter2"));
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
