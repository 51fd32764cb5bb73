//! Groups in the words of DescribeContainerGroups.

use serde_json::{Map, Value, json};

use super::probe_view;
use crate::api::pod_view;
use crate::{
    config::EciConfig,
    group::{
        disk::{self, DiskVolume},
        quantity,
        spec::{ContainerSpec, EnvValue, ImagePullPolicy, RestartPolicy, Size, VolumeSource},
        status::{ContainerState, ContainerStatus, EventKind, Group, Phase},
    },
};

/// The status word of a group.
pub(super) fn status(group: &Group) -> &'static str {
    match group.status.phase {
        Phase::Scheduling => "Scheduling",
        Phase::Pending => "Pending",
        Phase::Running => "Running",
        Phase::Succeeded => "Succeeded",
        Phase::Failed if group.status.started_at_ms.is_none() => "ScheduleFailed",
        Phase::Failed => "Failed",
        Phase::Restarting => "Restarting",
        Phase::Updating => "Updating",
        Phase::Terminating => "Terminating",
    }
}

/// RFC 3339 in UTC, to the second.
pub(super) fn time(at_ms: u64) -> String {
    i64::try_from(at_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map(|time| format!("{time:.0}"))
        .unwrap_or_default()
}

fn cpu(size: Size) -> f64 {
    f64::from(size.cpu_milli) / 1000.0
}

/// GiB, to thousandths.
fn memory(size: Size) -> f64 {
    let milli = u128::from(size.memory_bytes) * 1000 / (1 << 30);
    f64::from(u32::try_from(milli).unwrap_or(u32::MAX)) / 1000.0
}

/// A group.
pub(super) fn group(group: &Group, config: &EciConfig, with_events: bool) -> Value {
    let (spec, status) = (&group.spec, &group.status);
    let mut object = Map::new();
    let mut set = |name: &str, value: Value| {
        object.insert(name.to_owned(), value);
    };
    set("ContainerGroupId", json!(group.id));
    set("ContainerGroupName", json!(spec.name));
    set("RegionId", json!(config.region_id));
    set("ZoneId", json!(config.zone_id));
    set("Status", json!(self::status(group)));
    set(
        "RestartPolicy",
        json!(match spec.restart_policy {
            RestartPolicy::Always => "Always",
            RestartPolicy::OnFailure => "OnFailure",
            RestartPolicy::Never => "Never",
        }),
    );
    set("Cpu", json!(cpu(spec.size)));
    set("Memory", json!(memory(spec.size)));
    set("CreationTime", json!(time(status.created_at_ms)));
    if let Some(finished) = status.finished_at_ms {
        match status.phase {
            Phase::Succeeded => set("SucceededTime", json!(time(finished))),
            Phase::Failed => set("FailedTime", json!(time(finished))),
            _ => {}
        }
    }
    if let Some(ip) = &status.ip {
        set("IntranetIp", json!(ip));
    }
    if let Some(ip) = &status.ip6 {
        set("Ipv6Address", json!(ip));
    }
    // A group may be in several; the API has room for one.
    if let Some(security_group) = spec.network.security_groups.first() {
        set("SecurityGroupId", json!(security_group));
    }
    let tags = spec
        .labels
        .iter()
        .map(|(key, value)| json!({"Key": key, "Value": value}));
    set("Tags", tags.collect());
    if with_events {
        set("Events", events(group));
    }
    if let Some(dns) = &spec.dns {
        let options = dns.options.iter().map(|option| {
            let (name, value) = option.split_once(':').unwrap_or((option, ""));
            json!({"Name": name, "Value": value})
        });
        set(
            "DnsConfig",
            json!({
                "NameServers": dns.nameservers,
                "Searches": dns.searches,
                "Options": options.collect::<Vec<_>>(),
            }),
        );
    }
    let aliases = spec
        .host_aliases
        .iter()
        .map(|(ip, names)| json!({"Ip": ip, "Hostnames": names}));
    set("HostAliases", aliases.collect());
    let sysctls = spec
        .sysctls
        .iter()
        .map(|(name, value)| json!({"Name": name, "Value": value}));
    set(
        "EciSecurityContext",
        json!({"Sysctls": sysctls.collect::<Vec<_>>()}),
    );
    set("Volumes", volumes(group));
    let (inits, containers): (Vec<_>, Vec<_>) = spec
        .containers
        .iter()
        .zip(&status.containers)
        .partition(|(spec, _)| spec.lifecycle.role.takes_turns());
    let containers = containers
        .into_iter()
        .map(|(spec, status)| container(spec, status));
    set("Containers", containers.collect());
    let inits = inits
        .into_iter()
        .map(|(spec, status)| init_container(spec, status));
    set("InitContainers", inits.collect());
    Value::Object(object)
}

/// The events of a group, at most 50.
pub(super) fn events(group: &Group) -> Value {
    let events = group.status.events.iter().rev().take(50).rev();
    events
        .map(|event| {
            json!({
                "Type": match event.kind {
                    EventKind::Normal => "Normal",
                    EventKind::Warning => "Warning",
                },
                "Reason": event.reason,
                "Message": event.message,
                "Count": event.count,
                "Name": event_name(group, event.first_ms),
                "FirstTimestamp": time(event.first_ms),
                "LastTimestamp": time(event.last_ms),
            })
        })
        .collect()
}

/// Name of a group's event: the group's name and the time in hexadecimal.
pub(super) fn event_name(group: &Group, first_ms: u64) -> String {
    format!("{}.{first_ms:x}", group.spec.name)
}

fn volumes(group: &Group) -> Value {
    let volumes = group.spec.volumes.iter().map(|volume| {
        let mut object = Map::new();
        object.insert("Name".into(), json!(volume.name));
        let (memory, size_limit_bytes) = match &volume.source {
            VolumeSource::EmptyDir {
                memory,
                size_limit_bytes,
            } => (memory, size_limit_bytes),
            VolumeSource::Files(files) => {
                // Contents may be secrets: they are not given out again.
                let paths = files.files.iter().map(|file| json!({"Path": file.path}));
                object.insert("Type".into(), json!("ConfigFileVolume"));
                object.insert(
                    "ConfigFileVolumeConfigFileToPaths".into(),
                    paths.collect::<Vec<_>>().into(),
                );
                return Value::Object(object);
            }
            VolumeSource::HostPath(volume) => {
                object.insert("Type".into(), json!("HostPathVolume"));
                object.insert("HostPathVolumePath".into(), json!(volume.path));
                object.insert("HostPathVolumeType".into(), json!(volume.kind.name()));
                return Value::Object(object);
            }
            VolumeSource::Disk(disk) => {
                object.extend(disk_volume(disk));
                return Value::Object(object);
            }
            VolumeSource::Nfs(nfs) => {
                object.insert("Type".into(), json!("NFSVolume"));
                object.insert("NFSVolumeServer".into(), json!(nfs.server));
                object.insert("NFSVolumePath".into(), json!(nfs.path));
                object.insert("NFSVolumeReadOnly".into(), json!(nfs.read_only));
                return Value::Object(object);
            }
        };
        object.insert("Type".into(), json!("EmptyDirVolume"));
        if *memory {
            object.insert("EmptyDirVolumeMedium".into(), json!("Memory"));
        }
        if let Some(limit) = size_limit_bytes {
            object.insert(
                "EmptyDirVolumeSizeLimit".into(),
                json!(quantity::bytes_text(*limit)),
            );
        }
        Value::Object(object)
    });
    volumes.collect()
}

fn disk_volume(disk: &DiskVolume) -> Vec<(String, Value)> {
    let fields = if disk.is_flex {
        vec![
            ("Type", json!("FlexVolume")),
            ("FlexVolumeDriver", json!(disk::FLEX_DRIVER)),
            ("FlexVolumeFsType", json!("ext4")),
            (
                "FlexVolumeOptions",
                json!(json!(disk::flex_options(disk)).to_string()),
            ),
        ]
    } else {
        vec![
            ("Type", json!("DiskVolume")),
            (
                "DiskVolumeDiskId",
                json!(disk.id.as_ref().map(ToString::to_string)),
            ),
            ("DiskVolumeFsType", json!("ext4")),
        ]
    };
    fields
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn container(spec: &ContainerSpec, status: &ContainerStatus) -> Value {
    let env = spec.env.iter().map(|variable| match &variable.value {
        EnvValue::Literal(value) => json!({"Key": variable.name, "Value": value}),
        EnvValue::Field(field) => json!({
            "Key": variable.name,
            "ValueFrom": {"FieldRef": {"FieldPath": field}},
        }),
        // ECI has no words for where it is from, and a secret's value is not given out again.
        EnvValue::Key(value) if value.is_secret => json!({"Key": variable.name}),
        EnvValue::Key(value) => {
            json!({"Key": variable.name, "Value": String::from_utf8_lossy(value.value.bytes())})
        }
    });
    let ports = spec
        .ports
        .iter()
        .map(|port| json!({"Port": port.port, "Protocol": port.protocol}));
    let mounts = spec.volume_mounts.iter().map(|mount| {
        json!({
            "Name": mount.name,
            "MountPath": mount.mount_path,
            "SubPath": mount.sub_path.clone().unwrap_or_default(),
            "ReadOnly": mount.read_only,
        })
    });
    let mut security = Map::new();
    security.insert("Capability".into(), json!({"Adds": spec.capabilities_add}));
    security.insert("ReadOnlyRootFilesystem".into(), json!(spec.read_only_root));
    if let Some(user) = spec.run_as_user {
        security.insert("RunAsUser".into(), json!(user));
    }
    let mut object = json!({
        "Name": spec.name,
        "Image": spec.image,
        "ImagePullPolicy": match spec.image_pull_policy {
            ImagePullPolicy::Always => "Always",
            ImagePullPolicy::IfNotPresent => "IfNotPresent",
            ImagePullPolicy::Never => "Never",
        },
        "Cpu": spec.size.map_or(0.0, cpu),
        "Memory": spec.size.map_or(0.0, memory),
        "Gpu": 0,
        "WorkingDir": spec.working_dir.clone().unwrap_or_default(),
        "Commands": spec.command,
        "Args": spec.args,
        "EnvironmentVars": env.collect::<Vec<_>>(),
        "Ports": ports.collect::<Vec<_>>(),
        "VolumeMounts": mounts.collect::<Vec<_>>(),
        "SecurityContext": security,
        "Stdin": spec.stdin,
        "StdinOnce": spec.stdin_once,
        "Tty": spec.tty,
        "LivenessProbe": probe_view::probe(spec.lifecycle.liveness.as_ref()),
        "ReadinessProbe": probe_view::probe(spec.lifecycle.readiness.as_ref()),
        "Ready": status.ready,
        "RestartCount": status.restart_count,
        "CurrentState": state(&status.state),
    });
    if let Some(previous) = &status.previous {
        object["PreviousState"] = state(previous);
    }
    object
}

/// An init container: as any other, but its command has another name, and it has no standard input.
fn init_container(spec: &ContainerSpec, status: &ContainerStatus) -> Value {
    let mut object = container(spec, status);
    if let Value::Object(fields) = &mut object {
        if let Some(command) = fields.remove("Commands") {
            fields.insert("Command".to_owned(), command);
        }
        for none in ["Stdin", "StdinOnce", "Tty", "LivenessProbe", "ReadinessProbe"] {
            fields.remove(none);
        }
    }
    object
}

fn state(state: &ContainerState) -> Value {
    match state {
        ContainerState::Waiting { reason, message } => json!({
            "State": "Waiting",
            "DetailStatus": reason,
            "Reason": reason,
            "Message": message,
        }),
        ContainerState::Running { started_at_ms } => json!({
            "State": "Running",
            "DetailStatus": "Started",
            "StartTime": time(*started_at_ms),
        }),
        ContainerState::Terminated {
            exit_code,
            signal,
            reason,
            message,
            started_at_ms,
            finished_at_ms,
        } => {
            let mut object = json!({
                "State": "Terminated",
                "DetailStatus": reason,
                "Reason": reason,
                "Message": message,
                "ExitCode": exit_code,
                "StartTime": time(*started_at_ms),
                "FinishTime": time(*finished_at_ms),
            });
            if let Some(signal) = signal {
                object["Signal"] = json!(signal);
            }
            object
        }
    }
}

/// The state of a container in the words of DescribeContainerGroupStatus.
pub(super) fn pod_state(state: &ContainerState) -> Value {
    match state {
        ContainerState::Waiting { reason, message } => {
            json!({"Waiting": {"Reason": reason, "Message": message}})
        }
        ContainerState::Running { started_at_ms } => {
            let at = time(*started_at_ms);
            // SDKs read the first name, documents have the second.
            json!({"Running": {"StartedAtstartedAt": at, "StartedAt": at}})
        }
        ContainerState::Terminated {
            exit_code,
            signal,
            reason,
            message,
            started_at_ms,
            finished_at_ms,
        } => json!({"Terminated": {
            "ExitCode": exit_code,
            "Signal": signal.unwrap_or(0),
            "Reason": reason,
            "Message": message,
            "StartedAt": time(*started_at_ms),
            "FinishedAt": time(*finished_at_ms),
        }}),
    }
}

/// Annotations as JSON text, with those the system writes.
pub(super) fn annotations(group: &Group) -> String {
    let mut annotations = group.spec.annotations.clone();
    annotations.insert("k8s.aliyun.com/eci-instance-id".into(), group.id.to_string());
    annotations.insert(
        "k8s.aliyun.com/eci-instance-spec".into(),
        format!("{:.1}-{:.1}Gi", cpu(group.spec.size), memory(group.spec.size)),
    );
    if let Some(ip) = &group.status.ip6 {
        annotations.insert(pod_view::IPV6_ANNOTATION.into(), ip.clone());
    }
    serde_json::to_string(&annotations).unwrap_or_default()
}
