//! A Kubernetes Pod becomes a [`GroupSpec`]. Every field of the Pod is named here: it is taken over, known to make no
//! difference on a single host, or refused with what to use instead. Nothing that changes behaviour is dropped silently.

mod container;
mod lifecycle;
mod manifest;
mod objects;
mod place;
mod sources;
#[cfg(test)]
mod tests;
mod volumes;
mod yaml_types;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, HostAlias, PodDNSConfig, PodSecurityContext, PodSpec};

use self::container::Place;
pub(super) use self::container::default_pull_policy;
use self::sources::Sources;
pub use self::{
    manifest::{ManifestError, parse_manifest},
    objects::{Manifest, Objects},
};
use super::{
    network::{self, NetworkSpec},
    quantity,
    rules::Rules,
    size::{SizeTable, Wanted},
    spec::{DnsSpec, Door, GroupSpec, RestartPolicy, Size, SupplementalGroups},
    sysctls::{self, Given},
    validate,
    violation::{FieldPath, ViolationKind, Violations},
};

/// Sizes of a Pod's group, tried in order, as in `2-4Gi,4-8Gi`.
pub const SIZE_ANNOTATION: &str = "k8s.aliyun.com/eci-use-specs";

const DEFAULT_GRACE_SECONDS: i64 = 30;

/// Turns a Pod into a checked group.
///
/// # Errors
/// All mistakes found, each with its field.
pub fn to_group(manifest: impl Into<Manifest>, rules: &Rules) -> Result<GroupSpec, Violations> {
    let mut found = Violations::default();
    let Manifest { pod, objects } = manifest.into();
    let metadata = pod.metadata;
    let name = match (metadata.name, metadata.generate_name) {
        (Some(name), _) => name,
        (None, Some(prefix)) => format!("{prefix}{}", random_suffix()),
        (None, None) => String::new(),
    };
    let Some(spec) = pod.spec else {
        found.add(
            ViolationKind::Missing,
            "spec",
            "",
            "required; valid: a Pod spec with containers",
        );
        return Err(found);
    };
    let annotations = metadata.annotations.unwrap_or_default();
    let namespace = metadata
        .namespace
        .filter(|namespace| !namespace.is_empty())
        .unwrap_or_else(|| "default".into());
    let group = convert(spec, name, annotations, (&objects, &namespace), rules, &mut found);
    let group = GroupSpec {
        namespace,
        uid: metadata.uid,
        labels: metadata.labels.unwrap_or_default(),
        ..group
    };
    found.0.extend(validate::validate(&group).0);
    found.into_result(group)
}

/// Five letters and digits, as Kubernetes adds them to `generateName`.
fn random_suffix() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..5].to_owned()
}

fn convert(
    spec: PodSpec,
    name: String,
    annotations: BTreeMap<String, String>,
    (objects, namespace): (&Objects, &str),
    rules: &Rules,
    found: &mut Violations,
) -> GroupSpec {
    let table = &rules.sizes;
    let PodSpec {
        active_deadline_seconds,
        containers,
        dns_config,
        dns_policy,
        ephemeral_containers,
        host_aliases,
        host_ipc,
        host_network,
        host_pid,
        hostname,
        hostname_override,
        image_pull_secrets,
        init_containers,
        os,
        readiness_gates,
        resource_claims,
        resources,
        restart_policy,
        scheduling_gates,
        security_context,
        set_hostname_as_fqdn,
        share_process_namespace,
        subdomain,
        termination_grace_period_seconds,
        volumes,
        // Where the Pod runs was decided before it came here.
        affinity: _,
        node_name: _,
        node_selector: _,
        overhead: _,
        preemption_policy: _,
        priority: _,
        priority_class_name: _,
        runtime_class_name: _,
        scheduler_name: _,
        tolerations: _,
        topology_spread_constraints: _,
        // There is no API server to get a token or services from; a token volume would be refused as a volume.
        automount_service_account_token: _,
        enable_service_links: _,
        service_account: _,
        service_account_name: _,
        // A microVM is a user namespace and more.
        host_users: _,
    } = spec;

    let mut refuse = |refused: bool, field: &str, instead: &str| {
        if refused {
            found.add(ViolationKind::Unsupported, field, "", instead);
        }
    };
    refuse(
        is_some_and_not_empty(&ephemeral_containers),
        "spec.ephemeralContainers",
        "not supported; use exec",
    );
    refuse(
        host_ipc == Some(true),
        "spec.hostIPC",
        "not supported in a microVM; containers of the group share their IPC",
    );
    refuse(
        is_some_and_not_empty(&image_pull_secrets),
        "spec.imagePullSecrets",
        "not supported yet: there is no API server to read the secrets from",
    );
    refuse(
        os.is_some_and(|os| os.name != "linux"),
        "spec.os.name",
        "valid: linux",
    );
    refuse(
        is_some_and_not_empty(&readiness_gates),
        "spec.readinessGates",
        "not supported",
    );
    refuse(
        is_some_and_not_empty(&resource_claims),
        "spec.resourceClaims",
        "not supported",
    );
    refuse(
        is_some_and_not_empty(&scheduling_gates),
        "spec.schedulingGates",
        "not supported; create the group when it may start",
    );
    refuse(
        hostname_override.is_some(),
        "spec.hostnameOverride",
        "not supported; set spec.hostname",
    );
    let mut restrict = |refused: bool, field: &str, instead: &str| {
        if refused {
            found.add(ViolationKind::Restricted, field, "true", instead);
        }
    };
    restrict(
        host_network == Some(true) && !rules.allow.host_network,
        "spec.hostNetwork",
        "not supported: a group has its own network; reach it by its address",
    );
    restrict(
        host_pid == Some(true) && !rules.allow.host_pid,
        "spec.hostPID",
        "not supported: a group is a virtual machine of its own; valid: shareProcessNamespace",
    );
    if host_pid == Some(true) && share_process_namespace == Some(true) {
        let problem = "not together with hostPID; valid: one of the two";
        found.invalid("spec.shareProcessNamespace", true, problem);
    }

    let security = security_context.unwrap_or_default();
    pod_security(&security, found);
    let (fs_group, supplemental_groups) = groups(&security, found);
    let at = FieldPath::new(Door::Pod).field("spec.securityContext.sysctls", "");
    let given = security.sysctls.iter().flatten().enumerate();
    let given = given.map(|(index, sysctl)| Given {
        name: sysctl.name.clone(),
        value: sysctl.value.clone(),
        at: at.item(index),
        is_host: false,
    });
    let sysctls = sysctls::accept(given.collect(), &rules.allow, found);

    let lists = [
        ("containers", Place::Containers, containers),
        (
            "initContainers",
            Place::InitContainers,
            init_containers.unwrap_or_default(),
        ),
    ];
    let sources = {
        // What is wrong with sizes is found below.
        let unheard = &mut Violations::default();
        let own = own_size(&annotations, resources.as_ref(), table, unheard);
        let read = |place: Place, container: &Container| {
            let resources = container.resources.as_ref();
            let wanted = resources.map_or_else(Wanted::default, |resources| {
                container::read_resources(resources, "", &mut Violations::default()).wanted
            });
            (place.role(container.restart_policy.as_deref()), wanted)
        };
        let all = || {
            lists
                .iter()
                .flat_map(|(_, place, list)| list.iter().map(|container| (*place, container)))
        };
        let wanted: Vec<_> = all().map(|(place, container)| read(place, container)).collect();
        let size = validate::choose_size(Door::Pod, own, &wanted, table, unheard);
        Sources::new(objects, namespace, all().map(|(_, container)| container), size)
    };
    let mut wanted = Vec::new();
    let mut limits = Vec::new();
    let mut converted = Vec::new();
    for (list, place, containers) in lists {
        for (index, container) in containers.into_iter().enumerate() {
            let path = format!("spec.{list}[{index}]");
            let (container, sizes) = container::convert(container, &path, place, &security, &sources, found);
            if container.privileged && !rules.allow.privileged {
                found.add(
                    ViolationKind::Restricted,
                    format!("{path}.securityContext.privileged"),
                    "true",
                    "not supported; add the capabilities needed to securityContext.capabilities.add",
                );
            }
            wanted.push((container.lifecycle.role, sizes.wanted));
            limits.push(sizes.limit);
            converted.push(container);
        }
    }
    let own = own_size(&annotations, resources.as_ref(), table, found);
    let size = validate::choose_size(Door::Pod, own, &wanted, table, found);
    let active_deadline_seconds = active_deadline_seconds.map(|seconds| {
        u64::try_from(seconds).unwrap_or_else(|_| {
            found.invalid("spec.activeDeadlineSeconds", seconds, validate::DEADLINES);
            1
        })
    });
    for (container, limit) in converted.iter_mut().zip(limits) {
        container.size = (limit != Wanted::default()).then(|| Size {
            cpu_milli: limit.cpu_milli.unwrap_or(size.cpu_milli),
            memory_bytes: limit.memory_bytes.unwrap_or(size.memory_bytes),
        });
    }

    let grace = termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_SECONDS);
    if grace < 0 {
        found.invalid(
            "spec.terminationGracePeriodSeconds",
            grace,
            "valid: 0 or more seconds",
        );
    }
    let hostname = hostname
        .filter(|hostname| !hostname.is_empty())
        .unwrap_or_else(|| hostname_of(&name));
    GroupSpec {
        namespace: "default".into(),
        uid: None,
        labels: BTreeMap::new(),
        containers: converted,
        volumes: volumes
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(index, volume)| volumes::convert(volume, index, &sources, &rules.allow, found))
            .collect(),
        restart_policy: convert_restart_policy(restart_policy.as_deref(), found),
        size,
        hostname,
        dns: convert_dns(dns_policy.as_deref(), dns_config, found),
        host_aliases: host_aliases
            .unwrap_or_default()
            .into_iter()
            .map(|HostAlias { hostnames, ip }| (ip, hostnames.unwrap_or_default()))
            .collect(),
        termination_grace_period_seconds: grace.try_into().unwrap_or(0),
        active_deadline_seconds,
        registry_credentials: Vec::new(),
        share_process_namespace: share_process_namespace.unwrap_or(false),
        host_pid: host_pid.unwrap_or(false),
        host_network: host_network.unwrap_or(false),
        sysctls,
        fs_group,
        supplemental_groups,
        network: NetworkSpec {
            subdomain: subdomain.filter(|subdomain| !subdomain.is_empty()),
            hostname_is_fqdn: set_hostname_as_fqdn.unwrap_or(false),
            ..network_spec(&annotations, found)
        },
        door: Door::Pod,
        request: None,
        name,
        annotations,
    }
}

/// What annotations say about the network.
fn network_spec(annotations: &BTreeMap<String, String>, found: &mut Violations) -> NetworkSpec {
    let security_groups = annotations.get(network::SECURITY_GROUP_ANNOTATION);
    let ipv6 = annotations.get(network::IPV6_ANNOTATION).and_then(|text| {
        let wanted = text.parse();
        if wanted.is_err() {
            let field = format!("metadata.annotations[{}]", network::IPV6_ANNOTATION);
            found.invalid(field, text, "valid: true or false");
        }
        wanted.ok()
    });
    let mut bits = |annotation: &str| {
        let text = annotations.get(annotation)?;
        let bits = quantity::parse_units(text);
        if let Err(error) = &bits {
            let field = format!("metadata.annotations[{annotation}]");
            found.invalid(field, text, format!("{error}; bits a second, such as 40M"));
        }
        bits.ok()
    };
    NetworkSpec {
        ipv6,
        security_groups: security_groups.map_or_else(Vec::new, |text| network::comma_list(text)),
        ingress_bits: bits(network::INGRESS_ANNOTATION),
        egress_bits: bits(network::EGRESS_ANNOTATION),
        ..NetworkSpec::default()
    }
}

/// The host name a group gets by its name: at most 63 characters, no dots.
pub(super) fn hostname_of(name: &str) -> String {
    let mut hostname: String = name
        .chars()
        .take(63)
        .map(|c| if c == '.' { '-' } else { c })
        .collect();
    hostname.truncate(hostname.trim_end_matches('-').len());
    // An empty name is reported where it is checked; this only keeps one mistake from being two.
    if hostname.is_empty() {
        "group".into()
    } else {
        hostname
    }
}

fn is_some_and_not_empty<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

fn pod_security(security: &PodSecurityContext, found: &mut Violations) {
    let PodSecurityContext {
        app_armor_profile,
        // Taken over by the group.
        fs_group: _,
        fs_group_change_policy,
        // Taken over by each container.
        run_as_group: _,
        run_as_non_root: _,
        run_as_user: _,
        se_linux_change_policy: _,
        se_linux_options,
        seccomp_profile,
        supplemental_groups: _,
        supplemental_groups_policy: _,
        // Taken over by the group.
        sysctls: _,
        windows_options,
    } = security;
    let mut refuse = |refused: bool, field: &str, instead: &str| {
        if refused {
            found.add(
                ViolationKind::Unsupported,
                format!("spec.securityContext.{field}"),
                "",
                instead,
            );
        }
    };
    refuse(
        app_armor_profile
            .as_ref()
            .is_some_and(|profile| profile.type_ == "Localhost"),
        "appArmorProfile",
        "not supported; valid: RuntimeDefault or Unconfined",
    );
    refuse(
        se_linux_options.is_some(),
        "seLinuxOptions",
        "not supported in a microVM",
    );
    refuse(
        seccomp_profile
            .as_ref()
            .is_some_and(|profile| profile.type_ == "Localhost"),
        "seccompProfile",
        "not supported; valid: RuntimeDefault or Unconfined",
    );
    refuse(
        windows_options.is_some(),
        "windowsOptions",
        "not supported: Linux only",
    );
    // Volumes are new with the group, so both come to the same.
    if let Some(policy) = fs_group_change_policy
        && !["Always", "OnRootMismatch"].contains(&policy.as_str())
    {
        found.invalid(
            "spec.securityContext.fsGroupChangePolicy",
            policy,
            "valid: Always or OnRootMismatch",
        );
    }
}

/// The groups of all processes: that of the volumes, and others.
fn groups(security: &PodSecurityContext, found: &mut Violations) -> (Option<u32>, SupplementalGroups) {
    let mut id = |value: i64, field: String| match u32::try_from(value) {
        Ok(id) if id < u32::MAX => Some(id),
        _ => {
            let field = format!("spec.securityContext.{field}");
            found.invalid(field, value, "valid: 0 to 4294967294");
            None
        }
    };
    let fs_group = security.fs_group.and_then(|value| id(value, "fsGroup".into()));
    let ids = security.supplemental_groups.iter().flatten().enumerate();
    let ids = ids
        .filter_map(|(index, value)| id(*value, format!("supplementalGroups[{index}]")))
        .collect();
    let is_strict = match security.supplemental_groups_policy.as_deref() {
        None | Some("" | "Merge") => false,
        Some("Strict") => true,
        Some(other) => {
            let field = "spec.securityContext.supplementalGroupsPolicy";
            found.invalid(field, other, "valid: Merge or Strict");
            false
        }
    };
    (fs_group, SupplementalGroups { ids, is_strict })
}

/// The group's own size: the annotation, or the Pod's own resources.
fn own_size(
    annotations: &BTreeMap<String, String>,
    resources: Option<&k8s_openapi::api::core::v1::ResourceRequirements>,
    table: &SizeTable,
    found: &mut Violations,
) -> Option<(Size, String)> {
    if let Some(text) = annotations.get(SIZE_ANNOTATION) {
        let field = format!("metadata.annotations[{SIZE_ANNOTATION}]");
        let sizes: Vec<_> = text
            .split(',')
            .filter_map(|part| parse_size(part.trim()))
            .collect();
        // The first that exists; if none does, the first is reported.
        let size = sizes
            .iter()
            .find(|size| table.fit(**size).is_ok())
            .or_else(|| sizes.first());
        if let Some(size) = size {
            return Some((*size, field));
        }
        found.invalid(
            field,
            text,
            "valid: vCPU and memory such as 2-4Gi, several separated by commas",
        );
        return None;
    }
    let resources = resources?;
    let field = "spec.resources".to_owned();
    let wanted = container::read_resources(resources, &field, found).wanted;
    match wanted {
        Wanted {
            cpu_milli: Some(cpu_milli),
            memory_bytes: Some(memory_bytes),
        } => Some((
            Size {
                cpu_milli,
                memory_bytes,
            },
            field,
        )),
        Wanted {
            cpu_milli: None,
            memory_bytes: None,
        } => None,
        _ => {
            found.add(
                ViolationKind::Size,
                field,
                "",
                "only one of cpu and memory is given; valid: both or none",
            );
            None
        }
    }
}

/// `2-4Gi`
fn parse_size(text: &str) -> Option<Size> {
    let (cpu, memory) = text.split_once('-')?;
    Some(Size {
        cpu_milli: quantity::parse_milli(cpu).ok()?,
        memory_bytes: quantity::parse_units(memory).ok()?,
    })
}

fn convert_restart_policy(policy: Option<&str>, found: &mut Violations) -> RestartPolicy {
    match policy {
        None | Some("" | "Always") => RestartPolicy::Always,
        Some("OnFailure") => RestartPolicy::OnFailure,
        Some("Never") => RestartPolicy::Never,
        Some(other) => {
            found.invalid("spec.restartPolicy", other, "valid: Always, OnFailure or Never");
            RestartPolicy::Never
        }
    }
}

fn convert_dns(
    policy: Option<&str>,
    config: Option<PodDNSConfig>,
    found: &mut Violations,
) -> Option<DnsSpec> {
    let config = config.filter(|config| *config != PodDNSConfig::default());
    match (policy.unwrap_or("ClusterFirst"), config) {
        ("None", Some(config)) => Some(DnsSpec {
            nameservers: config.nameservers.unwrap_or_default(),
            searches: config.searches.unwrap_or_default(),
            options: config
                .options
                .unwrap_or_default()
                .into_iter()
                .map(|option| {
                    let name = option.name.unwrap_or_default();
                    match option.value {
                        Some(value) => format!("{name}:{value}"),
                        None => name,
                    }
                })
                .collect(),
        }),
        ("None", None) => {
            found.add(
                ViolationKind::Missing,
                "spec.dnsConfig",
                "",
                "required with dnsPolicy None",
            );
            None
        }
        // Without a cluster's DNS, as a kubelet without clusterDNS: the host's.
        ("Default" | "ClusterFirst", None) => None,
        ("Default" | "ClusterFirst", Some(_)) => {
            found.add(
                ViolationKind::Unsupported,
                "spec.dnsConfig",
                "",
                "not supported yet together with inherited DNS; valid: with dnsPolicy None",
            );
            None
        }
        (other, _) => {
            found.invalid("spec.dnsPolicy", other, "valid: Default, ClusterFirst or None");
            None
        }
    }
}
