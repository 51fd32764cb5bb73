//! A group as Kubernetes sees it: a v1 Pod with its status.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapKeySelector, ConfigMapVolumeSource, Container, ContainerPort,
        ContainerState as PodContainerState, ContainerStateRunning, ContainerStateTerminated,
        ContainerStateWaiting, ContainerStatus as PodContainerStatus, DownwardAPIVolumeSource,
        EmptyDirVolumeSource, EnvVar as PodEnvVar, EnvVarSource, FlexVolumeSource, HostAlias,
        HostPathVolumeSource, NFSVolumeSource, ObjectFieldSelector, Pod, PodCondition, PodDNSConfig,
        PodDNSConfigOption, PodIP, PodSecurityContext, PodSpec, PodStatus, ProjectedVolumeSource,
        ResourceRequirements, SecretKeySelector, SecretVolumeSource, SecurityContext, Sysctl, Volume,
        VolumeDevice as PodVolumeDevice, VolumeMount as PodVolumeMount,
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{ObjectMeta, Time},
    },
};

use super::pod_lifecycle;
use crate::group::{
    conditions::Condition,
    disk,
    files::FileOrigin,
    lifecycle::Role,
    quantity,
    spec::{
        ContainerSpec, DnsSpec, EnvValue, EnvVar, GroupSpec, ImagePullPolicy, RestartPolicy, VolumeSource,
        VolumeSpec,
    },
    status::{ContainerState, ContainerStatus, Group, Phase},
};

/// Annotation with the group's id.
const ID_ANNOTATION: &str = "k8s.aliyun.com/eci-instance-id";

/// Annotation with its IPv6 address.
pub(super) const IPV6_ANNOTATION: &str = "k8s.aliyun.com/allocated-ipv6Address";

/// The whole Pod.
pub(super) fn pod(group: &Group, node_name: &str) -> Pod {
    let spec = &group.spec;
    let mut annotations = spec.annotations.clone();
    annotations.insert(ID_ANNOTATION.into(), group.id.to_string());
    if let Some(ip) = &group.status.ip6 {
        annotations.insert(IPV6_ANNOTATION.into(), ip.clone());
    }
    Pod {
        metadata: ObjectMeta {
            name: Some(spec.name.clone()),
            namespace: Some(spec.namespace.clone()),
            uid: Some(uid(group)),
            labels: (!spec.labels.is_empty()).then(|| spec.labels.clone()),
            annotations: Some(annotations),
            creation_timestamp: time(group.status.created_at_ms),
            ..ObjectMeta::default()
        },
        spec: Some(pod_spec(spec, node_name)),
        status: Some(pod_status(group)),
    }
}

/// The Pod's uid: what Kubernetes gave, else the group's id.
pub(super) fn uid(group: &Group) -> String {
    group.spec.uid.clone().unwrap_or_else(|| group.id.to_string())
}

/// Unix milliseconds as a Kubernetes time, which has whole seconds.
pub(super) fn time(at_ms: u64) -> Option<Time> {
    let seconds = i64::try_from(at_ms / 1000).ok()?;
    jiff::Timestamp::from_second(seconds).ok().map(Time)
}

/// The phase in the words of Kubernetes.
pub(super) fn phase(group: &Group) -> &'static str {
    match group.status.phase {
        Phase::Scheduling | Phase::Pending => "Pending",
        Phase::Running => "Running",
        Phase::Restarting | Phase::Updating if group.status.initialized => "Running",
        Phase::Restarting | Phase::Updating => "Pending",
        Phase::Succeeded => "Succeeded",
        Phase::Failed => "Failed",
        // Kubernetes has no phase for it.
        Phase::Terminating if group.status.started_at_ms.is_some() => "Running",
        Phase::Terminating => "Pending",
    }
}

/// The conditions of the Pod.
pub(super) fn conditions(group: &Group) -> Vec<PodCondition> {
    let condition = |condition: &Condition| PodCondition {
        type_: condition.kind.name().into(),
        status: if condition.holds { "True" } else { "False" }.into(),
        last_transition_time: time(condition.since_ms),
        reason: text(&condition.reason),
        message: text(&condition.message),
        ..PodCondition::default()
    };
    group.status.conditions.iter().map(condition).collect()
}

/// The quality of service class Kubernetes derives from sizes; requests equal limits here.
pub(super) fn qos_class(spec: &GroupSpec) -> &'static str {
    if spec.containers.iter().all(|container| container.size.is_some()) {
        "Guaranteed"
    } else if spec.containers.iter().any(|container| container.size.is_some()) {
        "Burstable"
    } else {
        "BestEffort"
    }
}

fn pod_status(group: &Group) -> PodStatus {
    let status = &group.status;
    let (inits, containers): (Vec<_>, Vec<_>) = group
        .spec
        .containers
        .iter()
        .zip(&status.containers)
        .partition(|(spec, _)| spec.lifecycle.role.takes_turns());
    let view = |pairs: Vec<(&ContainerSpec, &ContainerStatus)>| -> Vec<_> {
        let views = pairs
            .into_iter()
            .map(|(spec, status)| container_status(spec, status));
        views.collect()
    };
    PodStatus {
        phase: Some(phase(group).into()),
        conditions: Some(conditions(group)),
        message: text(&status.message),
        reason: text(&status.reason),
        pod_ip: status.ip.clone(),
        pod_ips: status
            .ip
            .as_ref()
            .map(|_| status.ips().map(|ip| PodIP { ip: ip.to_owned() }).collect()),
        start_time: time(status.started_at_ms.unwrap_or(status.created_at_ms)),
        init_container_statuses: (!inits.is_empty()).then(|| view(inits)),
        container_statuses: Some(view(containers)),
        qos_class: Some(qos_class(&group.spec).into()),
        ..PodStatus::default()
    }
}

fn text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn container_status(spec: &ContainerSpec, status: &ContainerStatus) -> PodContainerStatus {
    let id = status.container_id.as_ref().map(|id| format!("eci://{id}"));
    PodContainerStatus {
        name: spec.name.clone(),
        image: spec.image.clone(),
        image_id: status
            .image_digest
            .as_ref()
            .map(|digest| format!("{}@{digest}", repository(&spec.image)))
            .unwrap_or_default(),
        ready: status.ready,
        started: Some(status.started),
        restart_count: i32::try_from(status.restart_count).unwrap_or(i32::MAX),
        state: Some(container_state(&status.state, id.as_ref())),
        last_state: Some(
            status
                .previous
                .as_ref()
                .map_or_else(PodContainerState::default, |state| container_state(state, None)),
        ),
        container_id: id,
        ..PodContainerStatus::default()
    }
}

/// A reference without tag and digest.
fn repository(image: &str) -> &str {
    let image = image.split_once('@').map_or(image, |(name, _)| name);
    match image.rfind(':') {
        Some(colon) if !image[colon..].contains('/') => &image[..colon],
        _ => image,
    }
}

fn container_state(state: &ContainerState, id: Option<&String>) -> PodContainerState {
    match state {
        ContainerState::Waiting { reason, message } => PodContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: text(reason),
                message: text(message),
            }),
            ..PodContainerState::default()
        },
        ContainerState::Running { started_at_ms } => PodContainerState {
            running: Some(ContainerStateRunning {
                started_at: time(*started_at_ms),
            }),
            ..PodContainerState::default()
        },
        ContainerState::Terminated {
            exit_code,
            signal,
            reason,
            message,
            started_at_ms,
            finished_at_ms,
        } => PodContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: *exit_code,
                signal: *signal,
                reason: text(reason),
                message: text(message),
                started_at: time(*started_at_ms),
                finished_at: time(*finished_at_ms),
                container_id: id.cloned(),
            }),
            ..PodContainerState::default()
        },
    }
}

fn pod_spec(spec: &GroupSpec, node_name: &str) -> PodSpec {
    let aliases: Vec<_> = spec
        .host_aliases
        .iter()
        .map(|(ip, names)| HostAlias {
            ip: ip.clone(),
            hostnames: Some(names.clone()),
        })
        .collect();
    let sysctls: Vec<_> = spec
        .sysctls
        .iter()
        .map(|(name, value)| Sysctl {
            name: name.clone(),
            value: value.clone(),
        })
        .collect();
    let volumes: Vec<_> = spec.volumes.iter().map(volume).collect();
    let groups: Vec<_> = spec
        .supplemental_groups
        .ids
        .iter()
        .map(|id| i64::from(*id))
        .collect();
    let (inits, containers): (Vec<_>, Vec<_>) = spec
        .containers
        .iter()
        .partition(|container| container.lifecycle.role.takes_turns());
    PodSpec {
        active_deadline_seconds: spec
            .active_deadline_seconds
            .and_then(|seconds| i64::try_from(seconds).ok()),
        containers: containers.into_iter().map(container).collect(),
        init_containers: (!inits.is_empty()).then(|| inits.into_iter().map(container).collect()),
        node_name: Some(node_name.to_owned()),
        restart_policy: Some(
            match spec.restart_policy {
                RestartPolicy::Always => "Always",
                RestartPolicy::OnFailure => "OnFailure",
                RestartPolicy::Never => "Never",
            }
            .into(),
        ),
        hostname: Some(spec.hostname.clone()),
        subdomain: spec.network.subdomain.clone(),
        set_hostname_as_fqdn: spec.network.hostname_is_fqdn.then_some(true),
        share_process_namespace: spec.share_process_namespace.then_some(true),
        host_pid: spec.host_pid.then_some(true),
        host_network: spec.host_network.then_some(true),
        dns_policy: Some(if spec.dns.is_some() { "None" } else { "Default" }.into()),
        dns_config: spec.dns.as_ref().map(dns),
        host_aliases: (!aliases.is_empty()).then_some(aliases),
        security_context: Some(PodSecurityContext {
            sysctls: (!sysctls.is_empty()).then_some(sysctls),
            fs_group: spec.fs_group.map(i64::from),
            supplemental_groups: (!groups.is_empty()).then_some(groups),
            supplemental_groups_policy: spec.supplemental_groups.is_strict.then(|| "Strict".into()),
            ..PodSecurityContext::default()
        }),
        termination_grace_period_seconds: i64::try_from(spec.termination_grace_period_seconds).ok(),
        volumes: (!volumes.is_empty()).then_some(volumes),
        ..PodSpec::default()
    }
}

fn dns(dns: &DnsSpec) -> PodDNSConfig {
    let options = dns.options.iter().map(|option| match option.split_once(':') {
        Some((name, value)) => PodDNSConfigOption {
            name: Some(name.into()),
            value: Some(value.into()),
        },
        None => PodDNSConfigOption {
            name: Some(option.clone()),
            value: None,
        },
    });
    PodDNSConfig {
        nameservers: Some(dns.nameservers.clone()),
        searches: Some(dns.searches.clone()),
        options: Some(options.collect()),
    }
}

/// What a volume of files holds is not shown.
fn volume(volume: &VolumeSpec) -> Volume {
    let mut shown = Volume {
        name: volume.name.clone(),
        ..Volume::default()
    };
    match &volume.source {
        VolumeSource::EmptyDir {
            memory,
            size_limit_bytes,
        } => {
            shown.empty_dir = Some(EmptyDirVolumeSource {
                medium: memory.then(|| "Memory".into()),
                size_limit: size_limit_bytes.map(|bytes| Quantity(quantity::bytes_text(bytes))),
            });
        }
        VolumeSource::Files(files) => match &files.origin {
            FileOrigin::Config(name) => {
                shown.config_map = Some(ConfigMapVolumeSource {
                    name: name.clone(),
                    ..ConfigMapVolumeSource::default()
                });
            }
            FileOrigin::Secret(name) => {
                shown.secret = Some(SecretVolumeSource {
                    secret_name: Some(name.clone()),
                    ..SecretVolumeSource::default()
                });
            }
            FileOrigin::Projected => shown.projected = Some(ProjectedVolumeSource::default()),
            FileOrigin::DownwardApi => shown.downward_api = Some(DownwardAPIVolumeSource::default()),
        },
        VolumeSource::HostPath(volume) => {
            let kind = volume.kind.name();
            shown.host_path = Some(HostPathVolumeSource {
                path: volume.path.clone(),
                type_: (!kind.is_empty()).then(|| kind.into()),
            });
        }
        VolumeSource::Nfs(nfs) => {
            shown.nfs = Some(NFSVolumeSource {
                path: nfs.path.clone(),
                read_only: nfs.read_only.then_some(true),
                server: nfs.server.clone(),
            });
        }
        VolumeSource::Disk(disk) => {
            shown.flex_volume = Some(FlexVolumeSource {
                driver: disk::FLEX_DRIVER.into(),
                fs_type: Some("ext4".into()),
                options: Some(disk::flex_options(disk)),
                read_only: disk.read_only.then_some(true),
                secret_ref: None,
            });
        }
    }
    shown
}

fn container(spec: &ContainerSpec) -> Container {
    let lifecycle = &spec.lifecycle;
    let list = |list: &Vec<String>| (!list.is_empty()).then(|| list.clone());
    let ports: Vec<_> = spec
        .ports
        .iter()
        .map(|port| ContainerPort {
            container_port: port.port.into(),
            name: text(&port.name),
            protocol: Some(port.protocol.clone()),
            host_port: port.host_port.map(i32::from),
            host_ip: port.host_ip.map(|ip| ip.to_string()),
        })
        .collect();
    let mounts: Vec<_> = spec
        .volume_mounts
        .iter()
        .map(|mount| PodVolumeMount {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            sub_path: mount.sub_path.clone().filter(|_| !mount.is_sub_path_expr),
            sub_path_expr: mount.sub_path.clone().filter(|_| mount.is_sub_path_expr),
            read_only: mount.read_only.then_some(true),
            ..PodVolumeMount::default()
        })
        .collect();
    let devices: Vec<_> = spec
        .volume_devices
        .iter()
        .map(|device| PodVolumeDevice {
            device_path: device.device_path.clone(),
            name: device.name.clone(),
        })
        .collect();
    let env: Vec<_> = spec.env.iter().map(env_var).collect();
    let resources = spec.size.map(|size| {
        let limits = BTreeMap::from([
            ("cpu".to_owned(), Quantity(quantity::milli_text(size.cpu_milli))),
            (
                "memory".to_owned(),
                Quantity(quantity::bytes_text(size.memory_bytes)),
            ),
        ]);
        ResourceRequirements {
            requests: Some(limits.clone()),
            limits: Some(limits),
            claims: None,
        }
    });
    Container {
        name: spec.name.clone(),
        image: Some(spec.image.clone()),
        image_pull_policy: Some(
            match spec.image_pull_policy {
                ImagePullPolicy::Always => "Always",
                ImagePullPolicy::IfNotPresent => "IfNotPresent",
                ImagePullPolicy::Never => "Never",
            }
            .into(),
        ),
        command: list(&spec.command),
        args: list(&spec.args),
        working_dir: spec.working_dir.clone(),
        env: (!env.is_empty()).then_some(env),
        ports: (!ports.is_empty()).then_some(ports),
        volume_mounts: (!mounts.is_empty()).then_some(mounts),
        volume_devices: (!devices.is_empty()).then_some(devices),
        resources: Some(resources.unwrap_or_default()),
        security_context: Some(security(spec)),
        stdin: spec.stdin.then_some(true),
        stdin_once: spec.stdin_once.then_some(true),
        tty: spec.tty.then_some(true),
        restart_policy: (spec.lifecycle.role == Role::Sidecar).then(|| "Always".into()),
        startup_probe: lifecycle.startup.as_ref().map(pod_lifecycle::probe),
        liveness_probe: lifecycle.liveness.as_ref().map(pod_lifecycle::probe),
        readiness_probe: lifecycle.readiness.as_ref().map(pod_lifecycle::probe),
        lifecycle: pod_lifecycle::hooks(lifecycle),
        termination_message_path: Some(lifecycle.termination_message_path.clone()),
        termination_message_policy: Some(
            if lifecycle.falls_back_to_logs {
                "FallbackToLogsOnError"
            } else {
                "File"
            }
            .into(),
        ),
        ..Container::default()
    }
}

fn env_var(variable: &EnvVar) -> PodEnvVar {
    match &variable.value {
        EnvValue::Literal(value) => PodEnvVar {
            name: variable.name.clone(),
            value: Some(value.clone()),
            value_from: None,
        },
        EnvValue::Field(field) => PodEnvVar {
            name: variable.name.clone(),
            value: None,
            value_from: Some(EnvVarSource {
                field_ref: Some(ObjectFieldSelector {
                    api_version: Some("v1".into()),
                    field_path: field.clone(),
                }),
                ..EnvVarSource::default()
            }),
        },
        EnvValue::Key(value) => {
            let (key, name) = (value.key.clone(), value.object.clone());
            let mut source = EnvVarSource::default();
            if value.is_secret {
                source.secret_key_ref = Some(SecretKeySelector {
                    key,
                    name,
                    optional: None,
                });
            } else {
                source.config_map_key_ref = Some(ConfigMapKeySelector {
                    key,
                    name,
                    optional: None,
                });
            }
            PodEnvVar {
                name: variable.name.clone(),
                value: None,
                value_from: Some(source),
            }
        }
    }
}

fn security(spec: &ContainerSpec) -> SecurityContext {
    let list = |list: &Vec<String>| (!list.is_empty()).then(|| list.clone());
    let (add, drop) = (list(&spec.capabilities_add), list(&spec.capabilities_drop));
    SecurityContext {
        run_as_user: spec.run_as_user.map(i64::from),
        run_as_group: spec.run_as_group.map(i64::from),
        run_as_non_root: spec.run_as_non_root.then_some(true),
        read_only_root_filesystem: spec.read_only_root.then_some(true),
        privileged: spec.privileged.then_some(true),
        allow_privilege_escalation: (!spec.allow_privilege_escalation).then_some(false),
        capabilities: (add.is_some() || drop.is_some()).then_some(Capabilities { add, drop }),
        ..SecurityContext::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::fake,
        group::{pod as pod_door, rules::Rules},
    };

    fn web() -> Group {
        fake::group("eci-aaaaaaaaaaaaaaaaaaa1", "web", "shop")
    }

    #[test]
    fn a_running_group_is_a_ready_pod() {
        let pod = pod(&web(), "node-1");
        let text = serde_json::to_string(&pod).unwrap();
        let again: Pod = serde_json::from_str(&text).unwrap();
        assert_eq!(pod, again);
        let status = pod.status.unwrap();
        assert_eq!(status.phase.as_deref(), Some("Running"));
        assert_eq!(status.pod_ip.as_deref(), Some("10.89.0.2"));
        let container = &status.container_statuses.as_ref().unwrap()[0];
        assert!(container.ready && container.state.as_ref().unwrap().running.is_some());
        assert!(container.image_id.starts_with("busybox@sha256:"));
        let ready = |name: &str| {
            let conditions = status.conditions.as_ref().unwrap();
            conditions.iter().find(|c| c.type_ == name).unwrap().status == "True"
        };
        assert!(ready("Ready") && ready("ContainersReady") && ready("Initialized") && ready("PodScheduled"));
        assert!(text.contains("\"startTime\":\"2026-01-01T00:00:00Z\""), "{text}");
    }

    #[test]
    fn a_failed_group_says_why() {
        let mut group = web();
        group.status.phase = Phase::Failed;
        group.status.reason = "SandboxDied".into();
        group.status.message = "it died".into();
        group.status.containers[0].ready = false;
        group.status.containers[0].state = ContainerState::Terminated {
            exit_code: 137,
            signal: Some(9),
            reason: "OOMKilled".into(),
            message: String::new(),
            started_at_ms: 1000,
            finished_at_ms: 2000,
        };
        let status = pod(&group, "n").status.unwrap();
        assert_eq!(
            (status.phase.as_deref(), status.reason.as_deref()),
            (Some("Failed"), Some("SandboxDied"))
        );
        let state = status.container_statuses.unwrap()[0].state.clone().unwrap();
        let terminated = state.terminated.unwrap();
        assert_eq!(
            (terminated.exit_code, terminated.reason.as_deref()),
            (137, Some("OOMKilled"))
        );
    }

    #[test]
    fn the_view_of_a_pod_makes_the_same_group_again() {
        let text = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u-1, labels: {a: b}}
spec:
  restartPolicy: Never
  hostAliases: [{ip: 10.0.0.1, hostnames: [db]}]
  subdomain: db
  setHostnameAsFQDN: true
  dnsPolicy: None
  dnsConfig: {nameservers: [1.1.1.1], options: [{name: ndots, value: '2'}]}
  shareProcessNamespace: true
  securityContext: {sysctls: [{name: net.ipv4.tcp_fin_timeout, value: '9'}]}
  volumes: [{name: v, emptyDir: {medium: Memory, sizeLimit: 64Mi}}]
  containers:
  - name: c
    image: reg:5000/a/b:1
    command: [sh]
    args: [-c, 'true']
    workingDir: /srv
    env: [{name: A, value: b}, {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    ports: [{containerPort: 80, name: http, hostPort: 8080, hostIP: 192.0.2.1}]
    volumeMounts: [{name: v, mountPath: /v, readOnly: true, subPath: x}]
    resources: {limits: {cpu: 500m, memory: 128Mi}}
    securityContext: {runAsUser: 5, runAsNonRoot: true, capabilities: {add: [NET_ADMIN], drop: [ALL]}}
    tty: true
    terminationMessagePath: /tmp/last
    terminationMessagePolicy: FallbackToLogsOnError
    startupProbe: {tcpSocket: {port: http}, failureThreshold: 30, terminationGracePeriodSeconds: 5}
    livenessProbe: {exec: {command: [ok]}, initialDelaySeconds: 3, periodSeconds: 4}
    readinessProbe: {httpGet: {port: 81, path: /r, httpHeaders: [{name: A, value: b}]}, successThreshold: 2}
    lifecycle: {postStart: {exec: {command: [a]}}, preStop: {sleep: {seconds: 4}}}
";
        let text = &text.replace(
            "  containers:",
            "  activeDeadlineSeconds: 9
  initContainers: [{name: i, image: x}, {name: s, image: y, restartPolicy: Always}]
  containers:",
        );
        let table = Rules::default();
        let spec = pod_door::to_group(pod_door::parse_manifest(text).unwrap(), &table).unwrap();
        let mut group = web();
        group.spec = spec.clone();
        let mut again = pod_door::to_group(pod(&group, "n"), &table).unwrap();
        again.annotations.remove(IPV6_ANNOTATION);
        assert_eq!(
            again.annotations.remove(ID_ANNOTATION).as_deref(),
            Some(group.id.as_str())
        );
        assert_eq!(again, spec);
    }

    #[test]
    fn repositories_of_references() {
        for (image, expected) in [
            ("busybox", "busybox"),
            ("reg:5000/a", "reg:5000/a"),
            ("reg:5000/a:1", "reg:5000/a"),
            ("a@sha256:1", "a"),
        ] {
            assert_eq!(repository(image), expected);
        }
    }
}
