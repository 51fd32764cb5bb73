//! Security groups: named sets of container groups and what may reach them, from the agent's configuration.
//!
//! As in ECI's basic security groups: members of one may talk to each other; from elsewhere only what a rule allows
//! comes in; everything goes out, unless the security group has rules about that. What answers an allowed connection is
//! allowed. Rules only allow, so neither their order nor that of a group's security groups matters. A container group in
//! no security group is as open as without any: others reach it, whatever security groups those are in.
//!
//! ```text
//!   tap --> prerouting: guard (own addresses only) --> prerouting: leaving --> to another tap: forward: entering --> tap
//!                                                                         \--> to the host or beyond
//!   host, or through it ----------------------------------------------------------> output: entering --> tap
//! ```
//! Frames between two taps of a bridge pass no hook of the `inet` family, so the rules are in the `bridge` family, with the
//! connection tracking that it has there (`nf_conntrack_bridge`). Who a packet is from is known by its source address,
//! which `guard` and the forward chain of table `inet eci` vouch for. Rules are asked after a host port was translated: they
//! name the port of the container.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    family::{Family, Prefixes},
    nft::{TABLE, accept, chain, compare, drop, goto, in_set, jump, meta, payload, plain_chain, rule, set},
    rules::{self, Leased},
};
use crate::config::ConfigError;

/// Longest id.
const MAX_ID_BYTES: usize = 64;

/// A security group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecurityGroup {
    /// `sg-` and lower-case letters, digits and `-`.
    pub id: String,
    /// What comes in, beside what other members send.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<Rule>,
    /// What goes out, beside what goes to other members; without any rule everything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<Rule>,
}

/// What is allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Of which protocol.
    pub protocol: Protocol,
    /// To which ports: `80`, or `8000-8099`; none: all. For TCP and UDP only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<String>,
    /// Who is at the other end: networks such as `10.0.0.0/8` or `fd00:89::/64`, addresses, ids of security groups. `0.0.0.0/0` is
    /// anybody by IPv4, `::/0` by IPv6.
    pub peers: Vec<String>,
}

/// The protocol of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP, and ICMPv6.
    Icmp,
    /// Any.
    All,
}

impl Protocol {
    fn name(self, family: Family) -> Option<&'static str> {
        match self {
            Self::Tcp => Some("tcp"),
            Self::Udp => Some("udp"),
            Self::Icmp => Some(family.icmp()),
            Self::All => None,
        }
    }
}

/// First and last port of `80` or `8000-8099`.
fn parse_ports(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (0 < first && first <= last).then_some((first, last))
}

/// A network of any size, or an address.
fn parse_network(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text
        .split_once('/')
        .map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let address: IpAddr = address.parse().ok()?;
    let (bits, longest) = match address {
        IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, 32),
        IpAddr::V6(address) => (u128::from(address), 128),
    };
    let prefix: u8 = prefix.map_or(Some(longest), |prefix| prefix.parse().ok())?;
    let host_bits = u128::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
    // Behind an IPv4 address all bits are zero.
    (prefix <= longest && bits & host_bits == 0).then_some((address, prefix))
}

fn is_id(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    text.len() <= MAX_ID_BYTES
        && text.strip_prefix("sg-").is_some_and(|tail| !tail.is_empty())
        && text.bytes().all(plain)
}

/// Checks the security groups of a configuration.
///
/// # Errors
/// The first field that can't work, and what is valid.
pub fn check(groups: &[SecurityGroup]) -> Result<(), ConfigError> {
    let field = |field, value: &str, valid| {
        Err(ConfigError::Field {
            field,
            value: value.to_owned(),
            valid,
        })
    };
    for (index, group) in groups.iter().enumerate() {
        if !is_id(&group.id) {
            return field(
                "security_group.id",
                &group.id,
                "give sg- and up to 61 lower-case letters, digits and '-'",
            );
        }
        if groups[..index].iter().any(|other| other.id == group.id) {
            return field(
                "security_group.id",
                &group.id,
                "give each security group an id of its own",
            );
        }
        for (list, rules) in [
            ("security_group.ingress", &group.ingress),
            ("security_group.egress", &group.egress),
        ] {
            for rule in rules {
                let has_ports = matches!(rule.protocol, Protocol::Tcp | Protocol::Udp);
                if !rule.ports.is_empty() && !has_ports {
                    return field(
                        list,
                        &rule.ports.join(", "),
                        "give ports with protocol tcp or udp only",
                    );
                }
                if let Some(ports) = rule.ports.iter().find(|ports| parse_ports(ports).is_none()) {
                    return field(list, ports, "give ports such as 80 or 8000-8099, 1 to 65535");
                }
                if rule.peers.is_empty() {
                    return field(
                        list,
                        "a rule without peers",
                        "give peers; [\"0.0.0.0/0\", \"::/0\"] is anybody",
                    );
                }
                let known = |peer: &String| groups.iter().any(|group| group.id == *peer);
                if let Some(peer) = rule
                    .peers
                    .iter()
                    .find(|peer| parse_network(peer).is_none() && !known(peer))
                {
                    return field(
                        list,
                        peer,
                        "give peers that are networks such as 10.0.0.0/8 or fd00:89::/64, addresses, or ids of security groups \
                         that are configured",
                    );
                }
            }
        }
    }
    Ok(())
}

/// The set of taps whose traffic the rules of security groups decide about.
const GUARDED: &str = "guarded";
/// How an IPv6 address is asked for, and said, on the link.
const SOLICITATION: [&str; 2] = ["nd-neighbor-solicit", "nd-neighbor-advert"];
/// After connection tracking (-200, linux/netfilter_bridge.h and netfilter_ipv4.h).
const LEAVING_PRIORITY: i32 = -100;

/// A direction of traffic, seen from the container group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

impl Direction {
    /// The chain with the rules of one security group. Its name can't be that of a set of addresses.
    fn chain(self, id: &str) -> String {
        match self {
            Self::In => format!("to.{id}"),
            Self::Out => format!("from.{id}"),
        }
    }

    /// The address of the other end.
    fn peer(self, family: Family) -> Value {
        match self {
            Self::In => payload(family.name(), "saddr"),
            Self::Out => payload(family.name(), "daddr"),
        }
    }

    fn own(self, family: Family) -> Value {
        match self {
            Self::In => payload(family.name(), "daddr"),
            Self::Out => payload(family.name(), "saddr"),
        }
    }
}

/// The chains and sets of all security groups, for a new table `bridge eci`.
pub(super) fn chains(groups: &[SecurityGroup], prefixes: Prefixes, taps: &str) -> Vec<Value> {
    let mut commands = vec![set("bridge", GUARDED, &json!("ifname"))];
    for group in groups {
        for family in prefixes.families() {
            let name = family.its(&group.id);
            commands.push(set("bridge", &name, &json!(family.address_type())));
        }
    }
    for direction in [Direction::In, Direction::Out] {
        for group in groups {
            commands.extend(rules_of(group, prefixes, direction));
        }
        commands.extend(decision(groups, prefixes, direction, taps));
    }
    let guarded = |interface: &str| compare("==", &meta(interface), &in_set(GUARDED));
    commands.push(chain(
        "bridge",
        "leaving",
        "filter",
        "prerouting",
        LEAVING_PRIORITY,
    ));
    commands.push(rule("bridge", "leaving", &[guarded("iifname"), goto("out")]));
    for (name, hook) in [("entering", "forward"), ("entering-from-host", "output")] {
        commands.push(chain("bridge", name, "filter", hook, 0));
        commands.push(rule("bridge", name, &[guarded("oifname"), goto("in")]));
    }
    commands
}

/// The chain that decides about all guarded traffic of a direction.
fn decision(groups: &[SecurityGroup], prefixes: Prefixes, direction: Direction, taps: &str) -> Vec<Value> {
    let name = match direction {
        Direction::In => "in",
        Direction::Out => "out",
    };
    let mut commands = vec![plain_chain("bridge", name)];
    let mut push = |expressions: &[Value]| commands.push(rule("bridge", name, expressions));
    push(&[compare("==", &payload("ether", "type"), &json!("arp")), accept()]);
    if prefixes.v6.is_some() {
        // As ARP; what groups may not say of it went no further than their taps.
        push(&[rules::said_about_the_link(&SOLICITATION), accept()]);
    }
    if direction == Direction::In {
        // What is not for the group itself is not let in by rules for others.
        for family in prefixes.families() {
            let ip = payload(family.name(), "daddr");
            let receiver = json!({"concat": [meta("oifname"), payload("ether", "daddr"), ip]});
            push(&[compare("!=", &receiver, &in_set(&family.its(taps))), drop()]);
        }
    }
    let state = json!({"ct": {"key": "state"}});
    push(&[
        compare("in", &state, &json!(["established", "related"])),
        accept(),
    ]);
    for group in groups {
        for family in prefixes.families() {
            let is_member = compare("==", &direction.own(family), &in_set(&family.its(&group.id)));
            push(&[is_member, jump(&direction.chain(&group.id))]);
        }
    }
    push(&[drop()]);
    commands
}

/// The chain of one security group: accepts what it allows, and returns for the rest.
fn rules_of(group: &SecurityGroup, prefixes: Prefixes, direction: Direction) -> Vec<Value> {
    let name = direction.chain(&group.id);
    let mut commands = vec![plain_chain("bridge", &name)];
    let mut push = |expressions: &[Value]| commands.push(rule("bridge", &name, expressions));
    let rules = match direction {
        Direction::Out if group.egress.is_empty() => {
            push(&[accept()]);
            return commands;
        }
        Direction::Out => &group.egress,
        Direction::In => &group.ingress,
    };
    for family in prefixes.families() {
        let members = in_set(&family.its(&group.id));
        push(&[compare("==", &direction.peer(family), &members), accept()]);
        for wanted in rules {
            let what = match (wanted.protocol.name(family), wanted.ports.as_slice()) {
                (None, _) => None,
                (Some(protocol), []) => Some(compare("==", &meta("l4proto"), &json!(protocol))),
                (Some(protocol), ports) => Some(compare("==", &payload(protocol, "dport"), &port_set(ports))),
            };
            for who in peers(&wanted.peers, family, direction) {
                let mut expressions = vec![who];
                expressions.extend(what.clone());
                expressions.push(accept());
                push(&expressions);
            }
        }
    }
    commands
}

fn port_set(ports: &[String]) -> Value {
    let ports = ports.iter().filter_map(|text| parse_ports(text));
    let items: Vec<Value> = ports
        .map(|(first, last)| {
            if first == last {
                json!(first)
            } else {
                json!({"range": [first, last]})
            }
        })
        .collect();
    json!({"set": items})
}

/// That the other end is a peer: in one of the networks, or, one after the other, in a security group.
fn peers(peers: &[String], family: Family, direction: Direction) -> Vec<Value> {
    let networks = peers.iter().filter_map(|peer| parse_network(peer));
    let networks: Vec<_> = networks
        .filter(|(address, _)| address.is_ipv6() == (family == Family::V6))
        .collect();
    if networks.iter().any(|(_, prefix)| *prefix == 0) {
        let is_any = compare("==", &payload("ether", "type"), &json!(family.name()));
        return vec![is_any];
    }
    let network = |(address, prefix): &(IpAddr, u8)| match (address, prefix) {
        (IpAddr::V4(_), 32) | (IpAddr::V6(_), 128) => json!(address.to_string()),
        _ => json!({"prefix": {"addr": address.to_string(), "len": prefix}}),
    };
    let other_end = direction.peer(family);
    let mut found = Vec::new();
    if !networks.is_empty() {
        let items: Vec<Value> = networks.iter().map(network).collect();
        found.push(compare("==", &other_end, &json!({"set": items})));
    }
    let groups = peers.iter().filter(|peer| parse_network(peer).is_none());
    found.extend(groups.map(|id| compare("==", &other_end, &in_set(&family.its(id)))));
    found
}

/// The elements that make a tap and its address a member: of what is guarded, and of its security groups.
pub(super) fn memberships(leased: &Leased) -> impl Iterator<Item = Value> {
    let element = |name: &str, element: &str| json!({"family": "bridge", "table": TABLE, "name": name, "elem": [element]});
    let guarded = leased.is_guarded.then(|| element(GUARDED, &leased.tap));
    let families = [Family::V4, Family::V6].into_iter();
    let addresses = families.filter_map(|family| Some((family, family.address(leased.ip)?)));
    let members = addresses.flat_map(move |(family, ip)| {
        let ids = leased.security_groups.iter();
        ids.map(move |id| element(&family.its(id), &ip))
    });
    guarded.into_iter().chain(members)
}

/// The forward rule that keeps anybody outside from passing for a group.
pub(super) fn no_strangers(bridge: &str, family: Family, network: &Value) -> Value {
    rule(
        "inet",
        "forward",
        &[
            compare("!=", &meta("iifname"), &json!(bridge)),
            compare("==", &meta("oifname"), &json!(bridge)),
            compare("==", &payload(family.name(), "saddr"), network),
            drop(),
        ],
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn problem(toml: &str) -> String {
        #[derive(Deserialize)]
        struct File {
            security_group: Vec<SecurityGroup>,
        }
        let file: File = toml::from_str(toml).unwrap();
        check(&file.security_group).map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn what_can_not_work_is_named() {
        let with =
            |rule: &str| format!("[[security_group]]\nid = 'sg-a'\n[[security_group.ingress]]\n{rule}");
        for (text, words) in [
            (
                with(
                    "protocol = 'tcp'\nports = ['80', '1-65535']\npeers = ['10.0.0.0/8', '1.2.3.4', 'sg-a']",
                ),
                None,
            ),
            (with("protocol = 'all'\npeers = ['0.0.0.0/0']"), None),
            (
                "[[security_group]]\nid = 'web'".into(),
                Some("security_group.id is web"),
            ),
            (
                "[[security_group]]\nid = 'sg-'".into(),
                Some("security_group.id is sg-"),
            ),
            (
                "[[security_group]]\nid = 'sg-a'\n[[security_group]]\nid = 'sg-a'".into(),
                Some("an id of its own"),
            ),
            (
                with("protocol = 'icmp'\nports = ['8']\npeers = ['0.0.0.0/0']"),
                Some("tcp or udp only"),
            ),
            (
                with("protocol = 'tcp'\nports = ['0']\npeers = ['sg-a']"),
                Some("is 0: give ports"),
            ),
            (
                with("protocol = 'tcp'\nports = ['9-8']\npeers = ['sg-a']"),
                Some("is 9-8: give ports"),
            ),
            (with("protocol = 'tcp'\npeers = []"), Some("without peers")),
            (
                with("protocol = 'tcp'\npeers = ['sg-b']"),
                Some("ingress is sg-b"),
            ),
            (
                with("protocol = 'tcp'\npeers = ['10.0.0.1/8']"),
                Some("is 10.0.0.1/8"),
            ),
            (
                with("protocol = 'tcp'\npeers = ['10.0.0.0/33']"),
                Some("is 10.0.0.0/33"),
            ),
        ] {
            let found = problem(&text);
            match words {
                None => assert_eq!(found, "", "{text}"),
                Some(words) => assert!(found.contains(words), "{text}: {found}"),
            }
        }
    }

    proptest! {
        #[test]
        fn networks_of_ipv6_too(address in any::<u128>(), n_zeros in 0u32..128, prefix in 0u8..=140) {
            let address = address >> n_zeros << n_zeros;
            let text = format!("{}/{prefix}", std::net::Ipv6Addr::from(address));
            let whole = prefix <= 128 && address.checked_shl(prefix.into()).unwrap_or(0) == 0;
            prop_assert_eq!(parse_network(&text).is_some(), whole, "{}", text);
        }

        #[test]
        fn networks_are_those_that_have_no_host_part(address in any::<u32>(), n_zeros in 0u32..32, prefix in 0u8..=40) {
            let address = address >> n_zeros << n_zeros;
            let text = format!("{}/{prefix}", std::net::Ipv4Addr::from(address));
            let bits = u64::from(address) << 32;
            let whole = prefix <= 32 && (bits << prefix) == 0;
            prop_assert_eq!(parse_network(&text).is_some(), whole, "{}", text);
        }
    }
}
