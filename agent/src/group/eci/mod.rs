//! The parameters of CreateContainerGroup become a [`GroupSpec`]. What a single host has no use for (zones, vSwitches,
//! billing) is accepted and ignored; what would change how the group behaves and is not supported is refused.

mod lifecycle;
pub mod params;
#[cfg(test)]
mod tests;
pub mod update;
mod volumes;

use std::{cell::RefCell, collections::BTreeMap};

use self::params::{Params, Reader};
use super::{
    lifecycle::Role,
    network::{BANDWIDTHS, NetworkSpec},
    pod,
    rules::{Allow, Rules},
    size::Wanted,
    spec::{
        ContainerSpec, DnsSpec, Door, EnvValue, EnvVar, GroupSpec, ImagePullPolicy, PortSpec,
        RegistryCredential, RestartPolicy, Size, SupplementalGroups, VolumeMount, VolumeSource, VolumeSpec,
    },
    sysctls::{self, Given},
    validate,
    violation::{FieldPath, ViolationKind, Violations},
};

const NOT_YET: &str = "not supported yet";
const GIB: u64 = 1 << 30;
/// Parameters of a call that say nothing of the group.
const PROTOCOL: [&str; 14] = [
    "AccessKeyId",
    "Action",
    "ClientToken",
    "DryRun",
    "Format",
    "RegionId",
    "SecurityToken",
    "Signature",
    "SignatureMethod",
    "SignatureNonce",
    "SignatureType",
    "SignatureVersion",
    "Timestamp",
    "Version",
];

/// Turns the parameters into a checked group.
///
/// # Errors
/// All mistakes found, each with its field.
pub fn to_group(params: &Params, rules: &Rules) -> Result<GroupSpec, Violations> {
    let found = RefCell::new(Violations::default());
    let reader = Reader::new(params, &found);
    refuse_unsupported(&reader);

    let mut wanted = Vec::new();
    let mut containers = Vec::new();
    for (list, role) in [("Container", Role::App), ("InitContainer", Role::Init)] {
        for (index, item) in reader.list(list).iter().enumerate() {
            let size = read_size(item);
            wanted.push((role, size));
            containers.push((convert_container(item, index, role, &rules.allow), size));
        }
    }
    let own = read_size(&reader);
    let own = match (own.cpu_milli, own.memory_bytes) {
        (Some(cpu_milli), Some(memory_bytes)) => Some((
            Size {
                cpu_milli,
                memory_bytes,
            },
            "Cpu, Memory".to_owned(),
        )),
        (None, None) => None,
        _ => {
            if found.borrow().0.iter().all(|v| v.kind != ViolationKind::Size) {
                reader.note(
                    ViolationKind::Size,
                    "Cpu, Memory",
                    "",
                    "only one of the two is given; valid: both or none",
                );
            }
            None
        }
    };
    let volumes = reader.list("Volume");
    let volumes = volumes.iter().map(|item| convert_volume(item, &rules.allow));
    let volumes = volumes.collect();
    let name = reader.required("ContainerGroupName");
    let hostname = reader
        .text("HostName")
        .map_or_else(|| pod::hostname_of(&name), str::to_owned);
    let tags = read_tags(&reader);
    let dns = convert_dns(&reader);
    let host_aliases = reader
        .list("HostAliase")
        .iter()
        .map(|item| (item.required("Ip"), item.texts("Hostname")))
        .collect();
    let registry_credentials = reader
        .list("ImageRegistryCredential")
        .iter()
        .map(|item| RegistryCredential {
            server: item.required("Server"),
            username: item.required("UserName"),
            password: item.required("Password"),
        })
        .collect();
    let mut sysctls = Vec::new();
    for (context, is_host) in [("SecurityContext", false), ("HostSecurityContext", true)] {
        let at = FieldPath::new(Door::Eci).field("", context).field("", "Sysctl");
        for (index, item) in reader.object(context).list("Sysctl").iter().enumerate() {
            sysctls.push(Given {
                name: item.text("Name").unwrap_or_default().to_owned(),
                value: item.text("Value").unwrap_or_default().to_owned(),
                at: at.item(index),
                is_host,
            });
        }
    }
    let restart_policy = reader
        .choice(
            "RestartPolicy",
            &[
                ("Always", RestartPolicy::Always),
                ("OnFailure", RestartPolicy::OnFailure),
                ("Never", RestartPolicy::Never),
            ],
        )
        .unwrap_or(RestartPolicy::Always);
    let grace = reader
        .number("TerminationGracePeriodSeconds", 0..=24 * 3600)
        .unwrap_or(30);
    let network = NetworkSpec {
        security_groups: reader
            .word("SecurityGroupId")
            .map(str::to_owned)
            .into_iter()
            .collect(),
        ingress_bits: read_bandwidth(&reader, "IngressBandwidth"),
        egress_bits: read_bandwidth(&reader, "EgressBandwidth"),
        ipv6: (reader.number("Ipv6AddressCount", 0..=1) == Some(1)).then_some(true),
        ..NetworkSpec::default()
    };
    let share_process_namespace = reader.flag("ShareProcessNamespace").unwrap_or(false);
    let active_deadline_seconds = reader.number("ActiveDeadlineSeconds", 1..=validate::MAX_DEADLINE_SECONDS);

    let mut violations = found.take();
    let sysctls = sysctls::accept(sysctls, &rules.allow, &mut violations);
    let size = validate::choose_size(Door::Eci, own, &wanted, &rules.sizes, &mut violations);
    let containers = containers
        .into_iter()
        .map(|(container, wanted)| ContainerSpec {
            size: (wanted != Wanted::default()).then(|| Size {
                cpu_milli: wanted.cpu_milli.unwrap_or(size.cpu_milli),
                memory_bytes: wanted.memory_bytes.unwrap_or(size.memory_bytes),
            }),
            ..container
        })
        .collect();
    let group = GroupSpec {
        name,
        namespace: "default".into(),
        uid: None,
        labels: tags,
        annotations: BTreeMap::new(),
        containers,
        volumes,
        restart_policy,
        size,
        hostname,
        dns,
        host_aliases,
        termination_grace_period_seconds: grace,
        active_deadline_seconds,
        registry_credentials,
        share_process_namespace,
        host_pid: false,
        host_network: false,
        sysctls,
        fs_group: None,
        supplemental_groups: SupplementalGroups::default(),
        network,
        door: Door::Eci,
        request: Some(params.without(&PROTOCOL)),
    };
    // What is missing was noted where it was read; don't say it twice.
    let said: Vec<_> = violations.0.iter().map(|v| v.field.clone()).collect();
    let more = validate::validate(&group);
    violations
        .0
        .extend(more.0.into_iter().filter(|v| !said.contains(&v.field)));
    violations.into_result(group)
}

fn refuse_unsupported(reader: &Reader<'_>) {
    for (field, instead) in [
        ("PrivateIpAddress", "not supported; the host gives addresses"),
        (
            "EipInstanceId",
            "not supported; a host has no public addresses to give; valid: a Pod with hostPort",
        ),
        ("RamRoleName", "not supported; a host has no instance roles"),
        ("MaxPendingMinute", NOT_YET),
        ("CorePattern", NOT_YET),
        ("NtpServer", "not supported; a group's clock is the host's"),
        ("AcrRegistryInfo", "not supported; use ImageRegistryCredential"),
        (
            "PlainHttpRegistry",
            "not supported here; name the registry in the agent's configuration",
        ),
        (
            "InsecureRegistry",
            "not supported here; name the registry in the agent's configuration",
        ),
        (
            "ImageSnapshotId",
            "no such image cache; images are kept on the host without one",
        ),
        ("DataCacheBucket", NOT_YET),
        ("CpuOptionsNuma", "not supported"),
        ("InstanceType", "not supported; valid: Cpu and Memory"),
    ] {
        reader.refuse(field, instead);
    }
    for field in ["AutoCreateEip", "FixedIp", "Ipv6GatewayBandwidthEnable"] {
        if reader.flag(field) == Some(true) {
            reader.note(ViolationKind::Unsupported, field, "true", NOT_YET);
        }
    }
    let field = "EphemeralStorage";
    if let Some(gib) = reader.number(field, 0..=5000).filter(|gib| *gib > 0) {
        reader.note(ViolationKind::Unsupported, field, &gib.to_string(), NOT_YET);
    }
    for (field, valid) in [("OsType", "Linux"), ("CpuArchitecture", "AMD64")] {
        reader.choice(field, &[(valid, ())]);
    }
}

/// `Cpu` and `Memory` of a group or container.
fn read_size(reader: &Reader<'_>) -> Wanted {
    Wanted {
        cpu_milli: reader.milli("Cpu"),
        memory_bytes: reader
            .milli("Memory")
            .map(|milli| (u64::from(milli) * GIB).div_ceil(1000)),
    }
}

/// A limit in bits a second, as the English text of the API has it; 0 is none.
fn read_bandwidth(reader: &Reader<'_>, field: &str) -> Option<u64> {
    reader
        .number(field, 0..=*BANDWIDTHS.end())
        .filter(|bits| *bits > 0)
}

fn read_tags(reader: &Reader<'_>) -> BTreeMap<String, String> {
    let mut tags = BTreeMap::new();
    for item in reader.list("Tag") {
        let key = item.required("Key");
        let value = item.text("Value").unwrap_or_default().to_owned();
        if tags.insert(key.clone(), value).is_some() && !key.is_empty() {
            item.note(
                ViolationKind::Invalid,
                "Key",
                &key,
                "another tag has this key; valid: keys unique in the group",
            );
        }
    }
    tags
}

fn convert_dns(reader: &Reader<'_>) -> Option<DnsSpec> {
    let config = reader.object("DnsConfig");
    let from_config = reader.choice("DnsPolicy", &[("None", true), ("Default", false)]);
    match (from_config, config.is_given()) {
        (Some(true), false) => {
            reader.note(
                ViolationKind::Missing,
                "DnsConfig",
                "",
                "required with DnsPolicy None",
            );
            None
        }
        (Some(false), true) => {
            reader.note(
                ViolationKind::Unsupported,
                "DnsConfig",
                "",
                "not supported together with inherited DNS; valid: with DnsPolicy None",
            );
            None
        }
        (_, false) => None,
        (_, true) => Some(DnsSpec {
            nameservers: config.texts("NameServer"),
            searches: config.texts("Search"),
            options: config
                .list("Option")
                .iter()
                .map(|option| {
                    let name = option.required("Name");
                    match option.text("Value") {
                        Some(value) => format!("{name}:{value}"),
                        None => name,
                    }
                })
                .collect(),
        }),
    }
}

fn convert_container(reader: &Reader<'_>, index: usize, role: Role, allow: &Allow) -> ContainerSpec {
    if role == Role::Init {
        for field in ["Stdin", "StdinOnce", "Tty"] {
            if reader.flag(field) == Some(true) {
                reader.note(
                    ViolationKind::Unsupported,
                    field,
                    "true",
                    "not supported for an init container; valid: false",
                );
            }
        }
    }
    if let Some(gpus) = reader.number("Gpu", 0..=64)
        && gpus > 0
    {
        reader.note(
            ViolationKind::Unsupported,
            "Gpu",
            &gpus.to_string(),
            "not supported; valid: 0",
        );
    }
    let security = reader.object("SecurityContext");
    let privileged = reader.flag("SecurityContextPrivileged") == Some(true);
    if privileged && !allow.privileged {
        reader.note(
            ViolationKind::Restricted,
            "SecurityContextPrivileged",
            "true",
            "not supported; add the capabilities needed to SecurityContext.Capability.Add",
        );
    }
    let id = |reader: &Reader<'_>, field: &str| {
        reader
            .number(field, 0..=u64::from(u32::MAX) - 1)
            .and_then(|id| u32::try_from(id).ok())
    };
    let image = reader.required("Image");
    let command = bounded(reader, "Command", 20);
    let args = bounded(reader, "Arg", 100);
    let prefix = match role {
        Role::App => "container",
        Role::Init | Role::Sidecar => "init-container",
    };
    ContainerSpec {
        name: reader
            .text("Name")
            .map_or_else(|| format!("{prefix}-{}", index + 1), str::to_owned),
        image_pull_policy: reader
            .choice(
                "ImagePullPolicy",
                &[
                    ("Always", ImagePullPolicy::Always),
                    ("IfNotPresent", ImagePullPolicy::IfNotPresent),
                    ("Never", ImagePullPolicy::Never),
                ],
            )
            .unwrap_or_else(|| pod::default_pull_policy(&image)),
        image,
        command,
        args,
        working_dir: reader.text("WorkingDir").map(str::to_owned),
        env: reader
            .list("EnvironmentVar")
            .iter()
            .filter(|item| item.word("Key").is_some() || item.text("Value").is_some())
            .map(|item| EnvVar {
                name: item.required("Key"),
                value: match item.object("FieldRef").word("FieldPath") {
                    Some(field) => EnvValue::Field(field.to_owned()),
                    None => EnvValue::Literal(item.text("Value").unwrap_or_default().to_owned()),
                },
            })
            .collect(),
        ports: reader
            .list("Port")
            .iter()
            .filter_map(|item| {
                if item.word("Port").is_none() {
                    item.required("Port");
                }
                let port = item.number("Port", 1..=65_535)?;
                Some(PortSpec {
                    name: String::new(),
                    port: u16::try_from(port).ok()?,
                    protocol: item.word("Protocol").unwrap_or("TCP").to_owned(),
                    host_port: None,
                    host_ip: None,
                })
            })
            .collect(),
        volume_mounts: reader
            .list("VolumeMount")
            .iter()
            .map(|item| {
                item.choice("MountPropagation", &[("None", ())]);
                VolumeMount {
                    name: item.required("Name"),
                    mount_path: item.required("MountPath"),
                    sub_path: item.word("SubPath").map(str::to_owned),
                    is_sub_path_expr: false,
                    read_only: item.flag("ReadOnly").unwrap_or(false),
                }
            })
            .collect(),
        volume_devices: Vec::new(),
        size: None,
        run_as_user: id(&security, "RunAsUser"),
        run_as_group: id(reader, "SecurityContextRunAsGroup"),
        run_as_non_root: reader.flag("SecurityContextRunAsNonRoot").unwrap_or(false),
        read_only_root: security.flag("ReadOnlyRootFilesystem").unwrap_or(false),
        capabilities_add: security.object("Capability").texts("Add"),
        capabilities_drop: Vec::new(),
        privileged,
        allow_privilege_escalation: true,
        stdin: reader.flag("Stdin").unwrap_or(false),
        stdin_once: reader.flag("StdinOnce").unwrap_or(false),
        tty: reader.flag("Tty").unwrap_or(false),
        lifecycle: lifecycle::convert(reader, role),
    }
}

/// A list of texts with at most `most` items.
fn bounded(reader: &Reader<'_>, field: &str, most: usize) -> Vec<String> {
    let texts = reader.texts(field);
    if texts.len() > most {
        reader.note(
            ViolationKind::TooLong,
            field,
            &format!("{} items", texts.len()),
            &format!("valid: at most {most}"),
        );
    }
    texts
}

fn convert_volume(reader: &Reader<'_>, allow: &Allow) -> VolumeSpec {
    let kind = reader.required("Type");
    match kind.as_str() {
        "EmptyDirVolume" | "" => {}
        "HostPathVolume" if allow.host_path => return volumes::host_path(reader),
        "HostPathVolume" => reader.note(
            ViolationKind::Restricted,
            "Type",
            &kind,
            "not supported: use EmptyDirVolume, or bring the files in the image",
        ),
        "ConfigFileVolume" => return volumes::config_files(reader),
        "DiskVolume" => return volumes::disk(reader),
        "FlexVolume" => return volumes::flex(reader),
        "NFSVolume" => return volumes::nfs(reader),
        _ => reader.note(
            ViolationKind::Invalid,
            "Type",
            &kind,
            "valid: EmptyDirVolume, ConfigFileVolume, NFSVolume, DiskVolume or FlexVolume",
        ),
    }
    let empty_dir = reader.object("EmptyDirVolume");
    let memory = match empty_dir.word("Medium") {
        None => false,
        Some("Memory" | "memory") => true,
        Some(other) => {
            empty_dir.note(
                ViolationKind::Invalid,
                "Medium",
                other,
                "valid: Memory, or nothing for the disk",
            );
            false
        }
    };
    let size_limit_bytes = empty_dir.word("SizeLimit").and_then(|text| {
        // A bare number counts GiB, as documented; quantities are what responses show.
        let gib = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let text = if gib { format!("{text}Gi") } else { text.to_owned() };
        super::quantity::parse_units(&text)
            .map_err(|error| {
                empty_dir.note(ViolationKind::Invalid, "SizeLimit", &text, &error.to_string());
            })
            .ok()
    });
    VolumeSpec {
        name: reader.required("Name"),
        source: VolumeSource::EmptyDir {
            memory,
            size_limit_bytes,
        },
    }
}
