//! How a group takes part in the host's network, as asked for: security groups and limits. Which security groups exist is
//! the host's to know, so that is checked where a group is accepted.

use serde::{Deserialize, Serialize};

use super::{
    spec::{Door, GroupSpec},
    validate::{DNS_LABEL, is_dns_label},
    violation::{FieldPath, ViolationKind, Violations},
};
use crate::network::host_ports;

/// The security groups of a Pod, separated by commas.
pub const SECURITY_GROUP_ANNOTATION: &str = "k8s.aliyun.com/eci-security-group";
/// The limit of what comes to a Pod, bits a second.
pub const INGRESS_ANNOTATION: &str = "kubernetes.io/ingress-bandwidth";
/// The limit of what goes out of it.
pub const EGRESS_ANNOTATION: &str = "kubernetes.io/egress-bandwidth";
/// Whether a Pod has an IPv6 address, `true` or `false`.
pub const IPV6_ANNOTATION: &str = "k8s.aliyun.com/eci-enable-ipv6";
/// Limits, bits a second: those that a kubelet takes.
pub(super) const BANDWIDTHS: std::ops::RangeInclusive<u64> = 1000..=10_u64.pow(15);
/// Most security groups of one group.
const MAX_SECURITY_GROUPS: usize = 5;

/// A group's place in the network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkSpec {
    /// Security groups it is a member of, at most 5, each once. A member of none is open to all.
    pub security_groups: Vec<String>,
    /// Whether it has an IPv6 address; `None`: what is usual at its door.
    pub ipv6: Option<bool>,
    /// Most bits a second that come to it; `None`: no limit.
    pub ingress_bits: Option<u64>,
    /// Most bits a second that it sends; `None`: no limit.
    pub egress_bits: Option<u64>,
    /// Part of the domain its host name is in: `HOSTNAME.SUBDOMAIN.NAMESPACE.svc.CLUSTER-DOMAIN`.
    pub subdomain: Option<String>,
    /// Its host name is all of that.
    pub hostname_is_fqdn: bool,
}

/// Longest host name of Linux (`__NEW_UTS_LEN`, linux/utsname.h).
pub const MAX_HOSTNAME_BYTES: usize = 64;

/// The domain of a group's host name, as a kubelet makes it; `None` without a subdomain.
pub fn domain(spec: &GroupSpec, cluster_domain: &str) -> Option<String> {
    let subdomain = spec.network.subdomain.as_ref()?;
    Some(format!("{subdomain}.{}.svc.{cluster_domain}", spec.namespace))
}

/// The host name that a group's containers see.
pub fn seen_hostname(spec: &GroupSpec, cluster_domain: &str) -> String {
    match domain(spec, cluster_domain).filter(|_| spec.network.hostname_is_fqdn) {
        Some(domain) => format!("{}.{domain}", spec.hostname),
        None => spec.hostname.clone(),
    }
}

/// The items of a list separated by commas; empty text has none.
pub(super) fn comma_list(text: &str) -> Vec<String> {
    let items = text.split(',').map(str::trim);
    items.filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

/// The field that names the security groups of groups of this door.
pub fn security_group_field(door: Door) -> String {
    annotation_or(
        &FieldPath::new(door),
        SECURITY_GROUP_ANNOTATION,
        "SecurityGroupId",
    )
    .into()
}

/// Whether a group has an IPv6 address, where this host has any to give: by itself every Pod, as in a cluster of both versions,
/// and an ECI group that asks for one.
pub fn wants_ipv6(spec: &GroupSpec) -> bool {
    spec.network.ipv6.unwrap_or(spec.door == Door::Pod)
}

/// The limits of a group's traffic, in and out, with their fields.
pub fn bandwidth_fields(spec: &GroupSpec) -> [(String, Option<u64>); 2] {
    let root = FieldPath::new(spec.door);
    let field = |annotation, parameter| annotation_or(&root, annotation, parameter).into();
    [
        (
            field(INGRESS_ANNOTATION, "IngressBandwidth"),
            spec.network.ingress_bits,
        ),
        (
            field(EGRESS_ANNOTATION, "EgressBandwidth"),
            spec.network.egress_bits,
        ),
    ]
}

/// The field by which groups of this door ask for an IPv6 address.
pub fn ipv6_field(door: Door) -> String {
    annotation_or(&FieldPath::new(door), IPV6_ANNOTATION, "Ipv6AddressCount").into()
}

/// The field of a container's port that names the host's.
pub fn host_port_field(spec: &GroupSpec, container: usize, port: usize) -> String {
    // Containers that take turns come last, whatever the door.
    let takes_turns = |index: usize| spec.containers[index].lifecycle.role.takes_turns();
    let (pod, eci) = if takes_turns(container) {
        ("spec.initContainers", "InitContainer")
    } else {
        ("spec.containers", "Container")
    };
    let before = (0..container).filter(|index| takes_turns(*index) == takes_turns(container));
    let list = FieldPath::new(spec.door).field(pod, eci).item(before.count());
    let item = list.field("ports", "Port").item(port);
    item.field("hostPort", "HostPort").into()
}

/// A field that is an annotation of a Pod, or a parameter of ECI.
fn annotation_or(root: &FieldPath, annotation: &str, parameter: &str) -> FieldPath {
    let field = root.field("metadata.annotations", parameter);
    match root.door() {
        Door::Pod => field.key(annotation),
        Door::Eci => field,
    }
}

/// Finds what is wrong without knowing the host.
pub(super) fn validate(spec: &GroupSpec, root: &FieldPath, found: &mut Violations) {
    let groups = &spec.network.security_groups;
    let field = || annotation_or(root, SECURITY_GROUP_ANNOTATION, "SecurityGroupId");
    if groups.len() > MAX_SECURITY_GROUPS {
        found.add(
            ViolationKind::TooLong,
            field(),
            format!("{} security groups", groups.len()),
            format!("valid: at most {MAX_SECURITY_GROUPS}"),
        );
    }
    for (index, group) in groups.iter().enumerate() {
        if groups[..index].contains(group) {
            found.invalid(field(), group, "named twice; valid: each security group once");
        }
    }
    for (annotation, parameter, bits) in [
        (INGRESS_ANNOTATION, "IngressBandwidth", spec.network.ingress_bits),
        (EGRESS_ANNOTATION, "EgressBandwidth", spec.network.egress_bits),
    ] {
        if let Some(bits) = bits
            && !BANDWIDTHS.contains(&bits)
        {
            found.invalid(
                annotation_or(root, annotation, parameter),
                bits,
                "bits a second; valid: 1000 (1k) to 1000000000000000 (1P)",
            );
        }
    }
    if let Some(subdomain) = spec.network.subdomain.as_ref().filter(|name| !is_dns_label(name)) {
        let field = root.field("spec.subdomain", "Subdomain");
        found.invalid(field, subdomain, DNS_LABEL);
    }
    let ports = host_ports(spec);
    for (position, (container, index, port)) in ports.iter().enumerate() {
        let before = ports[..position]
            .iter()
            .find(|(_, _, other)| other.overlaps(port));
        if let Some((other, other_index, _)) = before {
            let problem = format!(
                "{} has it; valid: each port of the host once",
                host_port_field(spec, *other, *other_index)
            );
            found.invalid(host_port_field(spec, *container, *index), port, problem);
        }
    }
}

/// A bandwidth in bits a second: `40M`, `400G`, `1000000`.
pub fn bandwidth_text(bits: u64) -> String {
    let units = [
        (10_u64.pow(12), "T"),
        (10_u64.pow(9), "G"),
        (10_u64.pow(6), "M"),
        (1000, "k"),
    ];
    let unit = units
        .into_iter()
        .find(|(unit, _)| bits >= *unit && bits.is_multiple_of(*unit));
    let (unit, prefix) = unit.unwrap_or((1, ""));
    format!("{} {prefix}bit/s", bits / unit)
}

#[cfg(test)]
mod tests {
    use super::bandwidth_text;

    #[test]
    fn bandwidths_are_exact() {
        for (bits, text) in [
            (999, "999 bit/s"),
            (1500, "1500 bit/s"),
            (40_000_000, "40 Mbit/s"),
            (10_u64.pow(15), "1000 Tbit/s"),
        ] {
            assert_eq!(bandwidth_text(bits), text);
        }
    }
}
