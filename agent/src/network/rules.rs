//! The agent's nftables: table `inet eci` for NAT, forwarding and host ports, table `bridge eci` that keeps each tap to its own
//! MAC and IP address and has the rules of security groups. Nobody else's tables are touched.
//!
//! Both are replaced as a whole when an agent starts, with all that the store knows of; in between only elements of sets
//! come and go, as one transaction for each group.

use serde_json::{Value, json};

use super::{
    Addresses,
    family::{Family, Prefixes},
    mac, mac_text,
    nft::{self, TABLE, accept, add, chain, compare, drop, fresh_table, in_set, meta, payload, rule, set},
    ports::{self, HostPort},
    security::{self, SecurityGroup},
    subnet6,
};
use crate::{config::NetworkConfig, error::Result};

const TAPS: &str = "taps";

/// A tap, and what holds for it.
#[derive(Debug, Clone)]
pub(super) struct Leased {
    pub(super) tap: String,
    pub(super) ip: Addresses,
    /// Security groups decide about its traffic, even when none is left.
    pub(super) is_guarded: bool,
    /// Those there are.
    pub(super) security_groups: Vec<String>,
    pub(super) host_ports: Vec<HostPort>,
}

impl Leased {
    /// A tap that has nothing but its addresses.
    pub(super) fn new(tap: String, ip: Addresses) -> Self {
        Self {
            tap,
            ip,
            is_guarded: false,
            security_groups: Vec::new(),
            host_ports: Vec::new(),
        }
    }
}

/// Replaces both tables as one transaction.
pub(super) async fn apply_base(
    config: &NetworkConfig,
    security_groups: &[SecurityGroup],
    prefixes: Prefixes,
    leased: &[Leased],
) -> Result<()> {
    nft::apply(
        base(config, security_groups, prefixes, leased),
        "set up nftables tables inet eci and bridge eci",
    )
    .await
}

/// Lets a tap send with its own addresses. Idempotent.
pub(super) async fn add_tap(tap: &str, ip: Addresses) -> Result<()> {
    nft::apply(
        add(own_addresses(tap, ip)),
        "add a tap to nftables set bridge eci taps",
    )
    .await
}

/// Makes a group's policy hold. Idempotent.
pub(super) async fn add_policy(leased: &Leased) -> Result<()> {
    nft::apply(add(policy(leased)), "add a group to nftables sets").await
}

/// Ends what the group may do. Idempotent.
pub(super) async fn remove(leased: &Leased) -> Result<()> {
    nft::apply(remove_commands(leased), "remove a group from nftables sets").await
}

/// Removes both tables. Idempotent.
pub(super) async fn remove_base() -> Result<()> {
    let mut commands = Vec::new();
    for family in ["inet", "bridge"] {
        commands.extend(fresh_table(family).into_iter().take(2));
    }
    nft::apply(commands, "remove nftables tables inet eci and bridge eci").await
}

/// With which addresses a tap may send: IPv6 takes one of the link beside the group's own.
fn own_addresses(tap: &str, ip: Addresses) -> impl Iterator<Item = Value> {
    let mac = mac(ip.v4);
    let element = move |family: Family, ip: String| {
        let element = json!({"concat": [tap, mac_text(mac), ip]});
        json!({"family": "bridge", "table": TABLE, "name": family.its(TAPS), "elem": [element]})
    };
    let v6 = ip
        .v6
        .into_iter()
        .flat_map(move |ip| [ip, subnet6::link_local(mac)]);
    std::iter::once(element(Family::V4, ip.v4.to_string()))
        .chain(v6.map(move |ip| element(Family::V6, ip.to_string())))
}

/// All elements that a group's policy comes to.
fn policy(leased: &Leased) -> Vec<Value> {
    security::memberships(leased)
        .chain(ports::leads(leased.ip, &leased.host_ports))
        .collect()
}

fn remove_commands(leased: &Leased) -> Vec<Value> {
    let own = own_addresses(&leased.tap, leased.ip);
    nft::remove(own.chain(policy(leased)))
}

fn base(
    config: &NetworkConfig,
    security_groups: &[SecurityGroup],
    prefixes: Prefixes,
    leased: &[Leased],
) -> Vec<Value> {
    let input = meta("iifname");
    let output = meta("oifname");
    let bridge = json!(config.bridge);

    let mut commands = fresh_table("inet");
    commands.push(chain("inet", "forward", "filter", "forward", 0));
    for (family, network) in prefixes.networks() {
        commands.push(security::no_strangers(&config.bridge, family, &network));
    }
    commands.push(chain("inet", "postrouting", "nat", "postrouting", 100));
    commands.extend(ports::chains(&config.bridge, prefixes));
    // From outside only what answers, and what a host port leads here: groups are behind NAT.
    commands.push(rule("inet", "forward", &[ports::was_translated(), accept()]));
    for (family, network) in prefixes.networks() {
        let (is_masqueraded, protocol) = match family {
            Family::V4 => (config.masquerade, "ipv4"),
            Family::V6 => (config.masquerade6, "ipv6"),
        };
        if !is_masqueraded {
            continue;
        }
        commands.push(rule(
            "inet",
            "forward",
            &[
                compare("==", &meta("nfproto"), &json!(protocol)),
                compare("!=", &input, &bridge),
                compare("==", &output, &bridge),
                compare("in", &json!({"ct": {"key": "state"}}), &json!(["new", "invalid"])),
                drop(),
            ],
        ));
        commands.push(rule(
            "inet",
            "postrouting",
            &[
                compare("==", &payload(family.name(), "saddr"), &network),
                compare("!=", &output, &bridge),
                json!({"masquerade": null}),
            ],
        ));
    }

    commands.extend(fresh_table("bridge"));
    for family in prefixes.families() {
        let element = json!(["ifname", "ether_addr", family.address_type()]);
        commands.push(set("bridge", &family.its(TAPS), &element));
    }
    commands.push(chain("bridge", "guard", "filter", "prerouting", -300));
    let sender = |ether: Value, ip: Value| json!({"concat": [input, ether, ip]});
    let mut guard = |expressions: &[Value]| commands.push(rule("bridge", "guard", expressions));
    guard(&[compare("!=", &input, &json!("eci-*")), accept()]);
    for (ether, ip) in [
        (payload("ether", "saddr"), payload("ip", "saddr")),
        (payload("arp", "saddr ether"), payload("arp", "saddr ip")),
    ] {
        guard(&[compare("==", &sender(ether, ip), &in_set(TAPS)), accept()]);
    }
    if prefixes.v6.is_some() {
        guard(&[said_about_the_link(&NOT_FOR_GROUPS), drop()]);
        let own = sender(payload("ether", "saddr"), payload("ip6", "saddr"));
        guard(&[compare("==", &own, &in_set(&Family::V6.its(TAPS))), accept()]);
    }
    guard(&[drop()]);
    if prefixes.v6.is_some() {
        commands.extend(through_the_host());
    }
    // Without security groups the bridge needs no connection tracking.
    if !security_groups.is_empty() || leased.iter().any(|leased| leased.is_guarded) {
        commands.extend(security::chains(security_groups, prefixes, TAPS));
    }
    for leased in leased {
        commands.extend(add(own_addresses(&leased.tap, leased.ip)));
        commands.extend(add(policy(leased)));
    }
    commands
}

/// What a router and its host say about a link, and who listens to which multicast: no group says that to anybody. Of neighbour
/// discovery only solicitations are left, by which it finds the bridge.
const NOT_FOR_GROUPS: [&str; 8] = [
    "nd-router-solicit",
    "nd-router-advert",
    "nd-redirect",
    "nd-neighbor-advert",
    "mld-listener-query",
    "mld-listener-report",
    "mld-listener-done",
    "mld2-listener-report",
];

/// ICMPv6 of these types.
pub(super) fn said_about_the_link(types: &[&str]) -> Value {
    compare("==", &payload("icmpv6", "type"), &json!({"set": types}))
}

/// IPv6 goes from one group to another through the host alone, and the host tells none of a shorter way.
fn through_the_host() -> Vec<Value> {
    let of_group = |key: &str| compare("==", &meta(key), &json!("eci-*"));
    let is_ipv6 = compare("==", &payload("ether", "type"), &json!("ip6"));
    vec![
        chain("bridge", "between", "filter", "forward", -10),
        rule(
            "bridge",
            "between",
            &[of_group("iifname"), of_group("oifname"), is_ipv6, drop()],
        ),
        chain("bridge", "no-shorter-way", "filter", "output", -10),
        rule(
            "bridge",
            "no-shorter-way",
            &[of_group("oifname"), said_about_the_link(&["nd-redirect"]), drop()],
        ),
    ]
}

#[cfg(test)]
mod tests;
