//! The network as groups find it: who has which address when an agent starts, and what of a group's wishes this host can
//! grant.

use super::Host;
use crate::{
    config::Config,
    error::{Error, Result},
    group::{
        driver::Published,
        network::{
            MAX_HOSTNAME_BYTES, bandwidth_fields, host_port_field, ipv6_field, security_group_field,
            seen_hostname,
        },
        spec::{Door, GroupSpec},
        status::{Group, GroupId, Phase},
        violation::{ViolationKind, Violations},
    },
    network::{
        HostPort, Lease, Network, Policy,
        cni::{
            Cni,
            conf::{self, Capability},
        },
        host_ports,
    },
    store::Record,
};

/// Opens the network with the addresses that groups have.
pub(super) async fn open(config: &Config, records: &[Record]) -> Result<Network> {
    let lease = |record: &Record| {
        Some(Lease {
            id: record.group.id.clone(),
            ip: record.addresses()?,
            policy: Policy::of(&record.group.spec),
            is_attached: record.sandbox_running,
        })
    };
    let leases = records.iter().filter_map(lease).collect();
    let cni = config
        .network
        .enabled
        .then(|| Cni::open(&config.network.cni, &config.state_dir, &config.run_dir));
    let security_groups = config.security_group.clone();
    Network::open(config.network.clone(), security_groups, leases, cni.transpose()?).await
}

impl Host {
    /// Refuses what the network of this host does not have, with all that is wrong about it. What the group `of` has already it
    /// may have again.
    pub(super) fn admit_to_network(&self, spec: &GroupSpec, of: Option<&GroupId>) -> Result<()> {
        let mut found = Violations::default();
        let known: Vec<&str> = self.parts.network.security_groups().collect();
        unknown_security_groups(spec, &known, &mut found);
        let has_ipv6 = self.parts.network.has_ipv6();
        no_ipv6(spec, has_ipv6, &mut found);
        if let Some(network) = self.parts.network.cni_network() {
            beyond_cni(spec, network, &mut found);
        }
        too_long_a_hostname(spec, &self.parts.config.network.cluster_domain, &mut found);
        let others: Vec<Group> = self
            .all()
            .iter()
            .filter(|other| has_ports(other) && Some(&other.group.id) != of)
            .flat_map(|other| {
                // One that is being updated has what it is to have, too.
                let update = other.update.as_deref().map(|spec| Group {
                    spec: spec.clone(),
                    ..other.group.clone()
                });
                [other.group.clone()].into_iter().chain(update)
            })
            .collect();
        let others: Vec<&Group> = others.iter().collect();
        taken_ports(spec, &others, HostPort::obstacle, &mut found);
        if found.0.is_empty() {
            Ok(())
        } else {
            Err(Error::refused(found))
        }
    }
}

fn unknown_security_groups(spec: &GroupSpec, known: &[&str], found: &mut Violations) {
    let valid = if known.is_empty() {
        "none is configured; valid: nothing, or an id from [[security_group]] of the agent's configuration"
            .to_owned()
    } else {
        format!("valid: {}", known.join(", "))
    };
    for id in &spec.network.security_groups {
        if !known.contains(&id.as_str()) {
            found.add(
                ViolationKind::UnknownSecurityGroup,
                security_group_field(spec.door),
                id,
                format!("no such security group on this host; {valid}"),
            );
        }
    }
}

fn no_ipv6(spec: &GroupSpec, has_ipv6: bool, found: &mut Violations) {
    if spec.network.ipv6 == Some(true) && !has_ipv6 {
        let (field, value) = match spec.door {
            Door::Pod => (ipv6_field(spec.door), "true"),
            Door::Eci => (ipv6_field(spec.door), "1"),
        };
        let problem = "this host has no IPv6 addresses to give: set network.subnet6 in the agent's configuration, such as \
                       \"fd00:89::/64\"";
        found.add(ViolationKind::NoIpv6, field, value, problem);
    }
}

/// What the plugins of a network do not do: rules of security groups are for the agent's own network, the rest is for plugins that
/// say that they can.
fn beyond_cni(spec: &GroupSpec, network: &conf::Network, found: &mut Violations) {
    let mut add = |field: String, value: &dyn std::fmt::Display, problem: String| {
        found.add(ViolationKind::Unsupported, field, value, problem);
    };
    let name = &network.name;
    for id in &spec.network.security_groups {
        let problem = format!(
            "groups of this host are in the CNI network {name}, where there are no security groups; valid: none, or \
             network.cni.mode = \"off\" in the agent's configuration"
        );
        add(security_group_field(spec.door), id, problem);
    }
    let can_not = |capability: Capability| {
        format!(
            "the CNI network {name} has no plugin with the capability {}; valid: none, or such a plugin",
            capability.name()
        )
    };
    if !network.can(Capability::PortMappings) {
        for (container, index, port) in &host_ports(spec) {
            let field = host_port_field(spec, *container, *index);
            add(field, port, can_not(Capability::PortMappings));
        }
    }
    if !network.can(Capability::Bandwidth) {
        for (field, bits) in bandwidth_fields(spec) {
            if let Some(bits) = bits {
                add(field, &bits, can_not(Capability::Bandwidth));
            }
        }
    }
}

fn too_long_a_hostname(spec: &GroupSpec, cluster_domain: &str, found: &mut Violations) {
    let hostname = seen_hostname(spec, cluster_domain);
    if hostname.len() > MAX_HOSTNAME_BYTES {
        let problem =
            format!("as host name it is too long; valid: up to {MAX_HOSTNAME_BYTES} characters, or false");
        found.invalid("spec.setHostnameAsFQDN", hostname, problem);
    }
}

/// Whether host ports lead to a group: one that has ended gave them back with its sandbox.
fn has_ports(published: &Published) -> bool {
    let ended = matches!(published.group.status.phase, Phase::Succeeded | Phase::Failed);
    !ended || published.connection.is_some()
}

/// Host ports that are not free: another group or a program of the host has them.
fn taken_ports(
    spec: &GroupSpec,
    others: &[&Group],
    obstacle: impl Fn(&HostPort) -> Option<String>,
    found: &mut Violations,
) {
    for (container, index, port) in &host_ports(spec) {
        let field = host_port_field(spec, *container, *index);
        let mut taken = |by: String| {
            let problem = format!("{by}; valid: a port of the host that is free");
            found.add(ViolationKind::PortTaken, field.clone(), port, problem);
        };
        let mut is_led_elsewhere = false;
        for other in others {
            if host_ports(&other.spec)
                .iter()
                .any(|(_, _, other)| other.overlaps(port))
            {
                let Group { id, spec, .. } = other;
                taken(format!(
                    "container group {}/{} ({id}) has it",
                    spec.namespace, spec.name
                ));
                is_led_elsewhere = true;
            }
        }
        if !is_led_elsewhere && let Some(obstacle) = obstacle(port) {
            taken(obstacle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{
        spec::{PortSpec, testing},
        status::GroupStatus,
    };

    #[test]
    fn unknown_security_groups_are_named_in_the_words_of_the_door_with_those_there_are() {
        let mut spec = testing::group("g", 1);
        spec.network.security_groups = vec!["sg-a".into(), "sg-x".into(), "sg-y".into()];
        let said = |spec: &GroupSpec, known: &[&str]| {
            let mut found = Violations::default();
            unknown_security_groups(spec, known, &mut found);
            found.to_string()
        };
        let field = "metadata.annotations[k8s.aliyun.com/eci-security-group]";
        assert_eq!(
            said(&spec, &["sg-a", "sg-b"]),
            format!(
                "{field}: \"sg-x\": no such security group on this host; valid: sg-a, sg-b\n\
                 {field}: \"sg-y\": no such security group on this host; valid: sg-a, sg-b"
            )
        );
        spec.door = Door::Eci;
        spec.network.security_groups.truncate(1);
        assert_eq!(said(&spec, &["sg-a"]), "");
        let text = said(&spec, &[]);
        assert!(
            text.starts_with("SecurityGroupId: \"sg-a\": no such security group")
                && text.contains("none is configured"),
            "{text}"
        );
    }

    #[test]
    fn a_group_that_can_have_no_ipv6_address_is_told_what_to_configure() {
        let mut spec = testing::group("g", 1);
        let said = |spec: &GroupSpec, has_ipv6| {
            let mut found = Violations::default();
            no_ipv6(spec, has_ipv6, &mut found);
            assert!(found.0.iter().all(|found| found.kind == ViolationKind::NoIpv6));
            found.to_string()
        };
        assert_eq!(said(&spec, false), "", "a Pod that does not care has none");
        spec.network.ipv6 = Some(true);
        assert_eq!(said(&spec, true), "");
        let text = said(&spec, false);
        let field = "metadata.annotations[k8s.aliyun.com/eci-enable-ipv6]: \"true\": ";
        assert!(
            text.starts_with(field) && text.contains("network.subnet6"),
            "{text}"
        );
        spec.door = Door::Eci;
        assert!(said(&spec, false).starts_with("Ipv6AddressCount: \"1\": "));
    }

    #[test]
    fn what_plugins_do_not_do_is_refused() {
        let network = |capabilities: &str| {
            let text = format!(
                r#"{{"cniVersion":"1.0.0","name":"n","type":"p","capabilities":{{{capabilities}}}}}"#
            );
            conf::parse(&text).unwrap()
        };
        let mut spec = with_port("g", 8080);
        spec.network.security_groups = vec!["sg-a".into()];
        spec.network.ingress_bits = Some(1000);
        let said = |network: &conf::Network| {
            let mut found = Violations::default();
            beyond_cni(&spec, network, &mut found);
            found.0.into_iter().map(|found| found.field).collect::<Vec<_>>()
        };
        let all = [
            "metadata.annotations[k8s.aliyun.com/eci-security-group]",
            "spec.containers[1].ports[0].hostPort",
            "metadata.annotations[kubernetes.io/ingress-bandwidth]",
        ];
        assert_eq!(said(&network("")), all);
        assert_eq!(said(&network(r#""portMappings":true"#)), [all[0], all[2]]);
        assert_eq!(
            said(&network(r#""portMappings":true,"bandwidth":true"#)),
            [all[0]]
        );
    }

    fn with_port(name: &str, host_port: u16) -> GroupSpec {
        let mut spec = testing::group(name, 2);
        spec.containers[1].ports.push(PortSpec {
            name: String::new(),
            port: 80,
            protocol: "TCP".into(),
            host_port: Some(host_port),
            host_ip: None,
        });
        spec
    }

    #[test]
    fn whoever_has_a_port_is_named() {
        let group = |id: &str, spec: GroupSpec| Group {
            id: GroupId::parse(id).unwrap(),
            status: GroupStatus::new(&spec, 1),
            spec,
        };
        let one = group("eci-0000000000000000000a", with_port("one", 8080));
        let other = group("eci-0000000000000000000b", with_port("other", 8081));
        let said = |port: u16| {
            let mut found = Violations::default();
            let obstacle =
                |port: &HostPort| (port.port == 22).then(|| "a program of the host has it".to_owned());
            taken_ports(&with_port("new", port), &[&one, &other], obstacle, &mut found);
            assert!(found.0.iter().all(|found| found.kind == ViolationKind::PortTaken));
            found.to_string()
        };
        let field = "spec.containers[1].ports[0].hostPort";
        assert_eq!(
            said(8081),
            format!(
                "{field}: \"0.0.0.0:8081/tcp\": container group default/other (eci-0000000000000000000b) has it; valid: a \
                 port of the host that is free"
            )
        );
        assert_eq!(
            said(22),
            format!(
                "{field}: \"0.0.0.0:22/tcp\": a program of the host has it; valid: a port of the host that is free"
            )
        );
        assert_eq!(said(8082), "");
    }

    #[test]
    fn a_host_name_that_linux_can_not_have_is_refused() {
        let said = |hostname: &str| {
            let mut spec = testing::group("g", 1);
            hostname.clone_into(&mut spec.hostname);
            spec.network.subdomain = Some("db".into());
            spec.network.hostname_is_fqdn = true;
            let mut found = Violations::default();
            too_long_a_hostname(&spec, "cluster.local", &mut found);
            found.to_string()
        };
        assert_eq!(said(&"a".repeat(64 - ".db.default.svc.cluster.local".len())), "");
        let found = said(&"a".repeat(63));
        assert!(
            found.starts_with("spec.setHostnameAsFQDN: \"aaa") && found.contains("up to 64"),
            "{found}"
        );
    }
}
