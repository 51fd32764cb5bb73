//! One container of a Pod.

use std::net::IpAddr;

use super::lifecycle;
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerPort, EnvVar as PodEnvVar, PodSecurityContext, ResourceRequirements,
        SecurityContext, VolumeDevice as PodVolumeDevice, VolumeMount as PodVolumeMount,
    },
    apimachinery::pkg::api::resource::Quantity,
};

use super::sources::Sources;
use crate::group::{
    lifecycle::{Lifecycle, Role, TERMINATION_MESSAGE_PATH},
    quantity,
    size::Wanted,
    spec::{ContainerSpec, EnvValue, EnvVar, ImagePullPolicy, PortSpec, VolumeDevice, VolumeMount},
    violation::{ViolationKind, Violations},
};

/// What a container says about its size.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    /// Counts for the size of the group: limits, else requests.
    pub(super) wanted: Wanted,
    /// Limits only.
    pub(super) limit: Wanted,
    /// Requests only.
    pub(super) request: Wanted,
}

/// The list of the Pod a container is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Containers,
    InitContainers,
}

impl Place {
    /// The part of a container there, by its own restart policy.
    pub(super) fn role(self, restart_policy: Option<&str>) -> Role {
        match (self, restart_policy) {
            (Self::Containers, _) => Role::App,
            (Self::InitContainers, Some("Always")) => Role::Sidecar,
            (Self::InitContainers, _) => Role::Init,
        }
    }
}

/// Converts a container; its size is left open, the group's has to be known first.
pub(super) fn convert(
    container: Container,
    path: &str,
    place: Place,
    pod: &PodSecurityContext,
    sources: &Sources<'_>,
    found: &mut Violations,
) -> (ContainerSpec, Sizes) {
    let Container {
        args,
        command,
        env,
        env_from,
        image,
        image_pull_policy,
        lifecycle: hooks,
        liveness_probe,
        name,
        ports,
        readiness_probe,
        // Sizes don't change while a group runs.
        resize_policy: _,
        resources,
        restart_policy,
        restart_policy_rules,
        security_context,
        startup_probe,
        stdin,
        stdin_once,
        termination_message_path,
        termination_message_policy,
        tty,
        volume_devices,
        volume_mounts,
        working_dir,
    } = container;
    let mut refuse = |refused: bool, field: &str, instead: &str| {
        if refused {
            found.add(ViolationKind::Unsupported, format!("{path}.{field}"), "", instead);
        }
    };
    let role = place.role(restart_policy.as_deref());
    let restarts = restart_policy.is_some() && role != Role::Sidecar;
    let instead = match place {
        Place::Containers => "not supported for one container; set spec.restartPolicy",
        Place::InitContainers => "valid: Always, for a sidecar; else spec.restartPolicy counts",
    };
    refuse(restarts, "restartPolicy", instead);
    refuse(
        restart_policy_rules.is_some_and(|rules| !rules.is_empty()),
        "restartPolicyRules",
        "not supported; set spec.restartPolicy",
    );

    let falls_back_to_logs = match termination_message_policy.as_deref() {
        None | Some("" | "File") => false,
        Some("FallbackToLogsOnError") => true,
        Some(other) => {
            let field = format!("{path}.terminationMessagePolicy");
            found.invalid(field, other, "valid: File or FallbackToLogsOnError");
            false
        }
    };
    let ports = ports.unwrap_or_default();
    let mut reader = lifecycle::Reader {
        ports: &ports,
        path,
        found: &mut *found,
    };
    let startup = reader.probe("startupProbe", startup_probe);
    let liveness = reader.probe("livenessProbe", liveness_probe);
    let readiness = reader.probe("readinessProbe", readiness_probe);
    let (post_start, pre_stop) = reader.hooks(hooks);
    let lifecycle = Lifecycle {
        role,
        startup,
        liveness,
        readiness,
        post_start,
        pre_stop,
        termination_message_path: termination_message_path
            .filter(|path| !path.is_empty())
            .unwrap_or_else(|| TERMINATION_MESSAGE_PATH.to_owned()),
        falls_back_to_logs,
    };

    let image = image.unwrap_or_default();
    let sizes = resources.map_or_else(Sizes::default, |resources| {
        read_resources(&resources, &format!("{path}.resources"), found)
    });
    let mut variables = sources.env_from(env_from, path, found);
    for (index, variable) in env.unwrap_or_default().into_iter().enumerate() {
        let path = format!("{path}.env[{index}]");
        variables.extend(convert_env(variable, &name, &path, sources, found));
    }
    let spec = ContainerSpec {
        image_pull_policy: pull_policy(image_pull_policy.as_deref(), &image, path, found),
        command: command.unwrap_or_default(),
        args: args.unwrap_or_default(),
        working_dir: working_dir.filter(|directory| !directory.is_empty()),
        env: variables,
        ports: ports
            .into_iter()
            .enumerate()
            .filter_map(|(index, port)| convert_port(port, &format!("{path}.ports[{index}]"), found))
            .collect(),
        volume_mounts: volume_mounts
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(index, mount)| convert_mount(mount, &format!("{path}.volumeMounts[{index}]"), found))
            .collect(),
        volume_devices: volume_devices
            .unwrap_or_default()
            .into_iter()
            .map(|PodVolumeDevice { device_path, name }| VolumeDevice { name, device_path })
            .collect(),
        size: None,
        stdin: stdin.unwrap_or(false),
        stdin_once: stdin_once.unwrap_or(false),
        tty: tty.unwrap_or(false),
        lifecycle,
        name,
        image,
        ..security(security_context.unwrap_or_default(), pod, path, found)
    };
    (spec, sizes)
}

/// Kubernetes' default: `Always` for the tag `latest` or none.
fn pull_policy(policy: Option<&str>, image: &str, path: &str, found: &mut Violations) -> ImagePullPolicy {
    match policy {
        Some("Always") => ImagePullPolicy::Always,
        Some("IfNotPresent") => ImagePullPolicy::IfNotPresent,
        Some("Never") => ImagePullPolicy::Never,
        None | Some("") => default_pull_policy(image),
        Some(other) => {
            found.invalid(
                format!("{path}.imagePullPolicy"),
                other,
                "valid: Always, IfNotPresent or Never",
            );
            ImagePullPolicy::IfNotPresent
        }
    }
}

/// `Always` for the tag `latest` or none, else `IfNotPresent`.
pub(in crate::group) fn default_pull_policy(image: &str) -> ImagePullPolicy {
    let name = image.rsplit_once('/').map_or(image, |(_, name)| name);
    let latest = !name.contains('@') && name.split_once(':').is_none_or(|(_, tag)| tag == "latest");
    if latest {
        ImagePullPolicy::Always
    } else {
        ImagePullPolicy::IfNotPresent
    }
}

/// A container of which only the security settings are filled in.
fn security(
    context: SecurityContext,
    pod: &PodSecurityContext,
    path: &str,
    found: &mut Violations,
) -> ContainerSpec {
    let SecurityContext {
        allow_privilege_escalation,
        app_armor_profile,
        capabilities,
        privileged,
        proc_mount,
        read_only_root_filesystem,
        run_as_group,
        run_as_non_root,
        run_as_user,
        se_linux_options,
        seccomp_profile,
        windows_options,
    } = context;
    let path = format!("{path}.securityContext");
    if privileged == Some(true) && allow_privilege_escalation == Some(false) {
        let problem = "not false with privileged; valid: true, or no privileged";
        found.invalid(format!("{path}.allowPrivilegeEscalation"), false, problem);
    }
    for (refused, field, instead) in [
        (
            app_armor_profile.is_some_and(|profile| profile.type_ == "Localhost"),
            "appArmorProfile",
            "not supported; valid: RuntimeDefault or Unconfined",
        ),
        (
            proc_mount.is_some_and(|mount| mount != "Default"),
            "procMount",
            "not supported; valid: Default",
        ),
        (
            se_linux_options.is_some(),
            "seLinuxOptions",
            "not supported in a microVM",
        ),
        (
            seccomp_profile.is_some_and(|profile| profile.type_ == "Localhost"),
            "seccompProfile",
            "not supported; valid: RuntimeDefault or Unconfined",
        ),
        (
            windows_options.is_some(),
            "windowsOptions",
            "not supported: Linux only",
        ),
    ] {
        if refused {
            found.add(ViolationKind::Unsupported, format!("{path}.{field}"), "", instead);
        }
    }
    let mut id = |own: Option<i64>, of_pod: Option<i64>, field: &str| {
        let (value, path) = match own {
            Some(value) => (value, format!("{path}.{field}")),
            None => (of_pod?, format!("spec.securityContext.{field}")),
        };
        match u32::try_from(value) {
            Ok(id) if id < u32::MAX => Some(id),
            _ => {
                found.invalid(path, value, "valid: 0 to 4294967294");
                None
            }
        }
    };
    let run_as_user = id(run_as_user, pod.run_as_user, "runAsUser");
    let run_as_group = id(run_as_group, pod.run_as_group, "runAsGroup");
    let plain = |names: Option<Vec<String>>| {
        names
            .unwrap_or_default()
            .into_iter()
            .map(|name| name.strip_prefix("CAP_").unwrap_or(&name).to_owned())
            .collect()
    };
    let (add, drop) = capabilities.map_or((None, None), |capabilities| (capabilities.add, capabilities.drop));
    ContainerSpec {
        name: String::new(),
        image: String::new(),
        image_pull_policy: ImagePullPolicy::IfNotPresent,
        command: Vec::new(),
        args: Vec::new(),
        working_dir: None,
        env: Vec::new(),
        ports: Vec::new(),
        volume_mounts: Vec::new(),
        volume_devices: Vec::new(),
        size: None,
        run_as_user,
        run_as_group,
        run_as_non_root: run_as_non_root.or(pod.run_as_non_root).unwrap_or(false),
        read_only_root: read_only_root_filesystem.unwrap_or(false),
        capabilities_add: plain(add),
        capabilities_drop: plain(drop),
        privileged: privileged.unwrap_or(false),
        allow_privilege_escalation: allow_privilege_escalation.unwrap_or(true),
        stdin: false,
        stdin_once: false,
        tty: false,
        lifecycle: Lifecycle::default(),
    }
}

/// Reads vCPU and memory of a `resources` object at `path`.
pub(super) fn read_resources(resources: &ResourceRequirements, path: &str, found: &mut Violations) -> Sizes {
    let ResourceRequirements {
        claims,
        limits,
        requests,
    } = resources;
    if claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        found.add(
            ViolationKind::Unsupported,
            format!("{path}.claims"),
            "",
            "not supported",
        );
    }
    let mut read = |list: &Option<std::collections::BTreeMap<String, Quantity>>, list_name: &str| {
        let mut read = Wanted::default();
        for (name, Quantity(text)) in list.iter().flatten() {
            let field = format!("{path}.{list_name}.{name}");
            let result = match name.as_str() {
                "cpu" => quantity::parse_milli(text).map(|cpu| read.cpu_milli = Some(cpu)),
                "memory" => quantity::parse_units(text).map(|memory| read.memory_bytes = Some(memory)),
                // A request only helps to place the Pod, which is done.
                "ephemeral-storage" if list_name == "requests" => continue,
                "ephemeral-storage" => {
                    found.add(
                        ViolationKind::Unsupported,
                        field,
                        text,
                        "a limit of one container is not supported yet; the whole group has a limit",
                    );
                    continue;
                }
                _ => {
                    found.add(
                        ViolationKind::Unsupported,
                        field,
                        text,
                        "no such resource on this host; valid: cpu and memory",
                    );
                    continue;
                }
            };
            if let Err(error) = result {
                found.add(ViolationKind::Size, field, text, error.to_string());
            }
        }
        read
    };
    let limit = read(limits, "limits");
    let request = read(requests, "requests");
    if let (Some(limit), Some(request)) = (limit.cpu_milli, request.cpu_milli)
        && request > limit
    {
        found.add(
            ViolationKind::Size,
            format!("{path}.requests.cpu"),
            quantity::milli_text(request),
            format!("above the limit; valid: at most {}", quantity::milli_text(limit)),
        );
    }
    if let (Some(limit), Some(request)) = (limit.memory_bytes, request.memory_bytes)
        && request > limit
    {
        found.add(
            ViolationKind::Size,
            format!("{path}.requests.memory"),
            quantity::bytes_text(request),
            format!("above the limit; valid: at most {}", quantity::bytes_text(limit)),
        );
    }
    Sizes {
        wanted: Wanted {
            cpu_milli: limit.cpu_milli.or(request.cpu_milli),
            memory_bytes: limit.memory_bytes.or(request.memory_bytes),
        },
        limit,
        request,
    }
}

/// `None` for a variable whose value is optional and not there.
fn convert_env(
    variable: PodEnvVar,
    container: &str,
    path: &str,
    sources: &Sources<'_>,
    found: &mut Violations,
) -> Option<EnvVar> {
    let PodEnvVar {
        name,
        value,
        value_from,
    } = variable;
    let value = match value_from {
        None => EnvValue::Literal(value.unwrap_or_default()),
        Some(source) => {
            if value.is_some_and(|value| !value.is_empty()) {
                found.invalid(
                    format!("{path}.value"),
                    &name,
                    "both value and valueFrom are given; valid: one",
                );
            }
            sources.env_value(source, container, path, found)?
        }
    };
    Some(EnvVar { name, value })
}

fn convert_port(port: ContainerPort, path: &str, found: &mut Violations) -> Option<PortSpec> {
    let ContainerPort {
        container_port,
        host_ip,
        host_port,
        name,
        protocol,
    } = port;
    let host_port = host_port.filter(|port| *port != 0).map(|port| {
        u16::try_from(port).unwrap_or_else(|_| {
            found.invalid(
                format!("{path}.hostPort"),
                port,
                "valid: 1 to 65535, or 0 for none",
            );
            1
        })
    });
    let host_ip = host_ip.filter(|ip| !ip.is_empty()).and_then(|ip| {
        let address = ip.parse::<IpAddr>();
        let leads_nowhere = address.as_ref().is_ok_and(|ip| ip.is_ipv6() && ip.is_loopback());
        if address.is_err() || leads_nowhere {
            found.invalid(
                format!("{path}.hostIP"),
                &ip,
                "valid: an address of the host, of IPv6 another than ::1",
            );
        }
        address.ok().filter(|ip| !ip.is_unspecified())
    });
    let Ok(port) = u16::try_from(container_port) else {
        found.invalid(
            format!("{path}.containerPort"),
            container_port,
            "valid: 1 to 65535",
        );
        return None;
    };
    Some(PortSpec {
        name: name.unwrap_or_default(),
        port,
        protocol: protocol
            .filter(|protocol| !protocol.is_empty())
            .unwrap_or_else(|| "TCP".into()),
        host_port,
        host_ip,
    })
}

fn convert_mount(mount: PodVolumeMount, path: &str, found: &mut Violations) -> VolumeMount {
    let PodVolumeMount {
        mount_path,
        mount_propagation,
        name,
        read_only,
        recursive_read_only,
        sub_path,
        sub_path_expr,
    } = mount;
    if let Some(propagation) = mount_propagation.filter(|propagation| propagation != "None") {
        found.add(
            ViolationKind::Unsupported,
            format!("{path}.mountPropagation"),
            propagation,
            "not supported; valid: None",
        );
    }
    let read_only = read_only.unwrap_or(false);
    // What is mounted read-only here is so with all below it.
    match recursive_read_only.as_deref() {
        None | Some("" | "Disabled") => {}
        Some("Enabled" | "IfPossible") if read_only => {}
        Some(other @ ("Enabled" | "IfPossible")) => found.invalid(
            format!("{path}.recursiveReadOnly"),
            other,
            "the mount is not read-only; valid: with readOnly: true",
        ),
        Some(other) => found.invalid(
            format!("{path}.recursiveReadOnly"),
            other,
            "valid: Disabled, IfPossible or Enabled",
        ),
    }
    let expression = sub_path_expr.filter(|path| !path.is_empty());
    let sub_path = sub_path.filter(|path| !path.is_empty());
    if let (Some(_), Some(expression)) = (&sub_path, &expression) {
        let problem = "subPath is given too; valid: one of the two";
        found.invalid(format!("{path}.subPathExpr"), expression, problem);
    }
    VolumeMount {
        name,
        mount_path,
        is_sub_path_expr: expression.is_some(),
        sub_path: expression.or(sub_path),
        read_only,
    }
}
