//! The agent's nftables: table `inet eci` for NAT, forwarding and host ports, table `bridge eci` that keeps each tap to its own
//! MAC and IP address and has the rules of security groups. Nobody else's tables are touched.
//!
//! Both are replaced as a whole when an agent starts, with all that the store knows of; in between only elements of sets
//! come and go, as one transaction for each group.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use super::{
    Subnet, mac, mac_text,
    nft::{self, TABLE, accept, add, chain, compare, drop, fresh_table, in_set, meta, payload, rule, set},
    ports::{self, HostPort},
    security::{self, SecurityGroup},
};
use crate::{config::NetworkConfig, error::Result};

const TAPS: &str = "taps";

/// A tap, and what holds for it.
#[derive(Debug, Clone)]
pub(super) struct Leased {
    pub(super) tap: String,
    pub(super) ip: Ipv4Addr,
    /// Security groups decide about its traffic, even when none is left.
    pub(super) is_guarded: bool,
    /// Those there are.
    pub(super) security_groups: Vec<String>,
    pub(super) host_ports: Vec<HostPort>,
}

impl Leased {
    /// A tap that has nothing but its addresses.
    pub(super) fn new(tap: String, ip: Ipv4Addr) -> Self {
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
    subnet: Subnet,
    leased: &[Leased],
) -> Result<()> {
    nft::apply(
        base(config, security_groups, subnet, leased),
        "set up nftables tables inet eci and bridge eci",
    )
    .await
}

/// Lets a tap send with its own addresses. Idempotent.
pub(super) async fn add_tap(tap: &str, ip: Ipv4Addr) -> Result<()> {
    nft::apply(
        add([own_addresses(tap, ip)]),
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

fn own_addresses(tap: &str, ip: Ipv4Addr) -> Value {
    let element = json!({"concat": [tap, mac_text(mac(ip)), ip.to_string()]});
    json!({"family": "bridge", "table": TABLE, "name": TAPS, "elem": [element]})
}

/// All elements that a group's policy comes to.
fn policy(leased: &Leased) -> Vec<Value> {
    security::memberships(leased)
        .chain(ports::leads(leased.ip, &leased.host_ports))
        .collect()
}

fn remove_commands(leased: &Leased) -> Vec<Value> {
    let own = own_addresses(&leased.tap, leased.ip);
    nft::remove(std::iter::once(own).chain(policy(leased)))
}

fn base(
    config: &NetworkConfig,
    security_groups: &[SecurityGroup],
    subnet: Subnet,
    leased: &[Leased],
) -> Vec<Value> {
    let input = meta("iifname");
    let output = meta("oifname");
    let bridge = json!(config.bridge);
    let network = json!({"prefix": {"addr": subnet.network().to_string(), "len": subnet.prefix()}});

    let mut commands = fresh_table("inet");
    commands.push(chain("inet", "forward", "filter", "forward", 0));
    commands.push(security::no_strangers(&config.bridge, subnet));
    commands.push(chain("inet", "postrouting", "nat", "postrouting", 100));
    commands.extend(ports::chains(&config.bridge, subnet));
    // From outside only what answers, and what a host port leads here: groups are behind NAT.
    if config.masquerade {
        commands.push(rule("inet", "forward", &[ports::was_translated(), accept()]));
        commands.push(rule(
            "inet",
            "forward",
            &[
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
                compare("==", &payload("ip", "saddr"), &network),
                compare("!=", &output, &bridge),
                json!({"masquerade": null}),
            ],
        ));
    }

    commands.extend(fresh_table("bridge"));
    commands.push(set("bridge", TAPS, &json!(["ifname", "ether_addr", "ipv4_addr"])));
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
    guard(&[drop()]);
    // Without security groups the bridge needs no connection tracking.
    if !security_groups.is_empty() || leased.iter().any(|leased| leased.is_guarded) {
        commands.extend(security::chains(security_groups, TAPS));
    }
    for leased in leased {
        commands.extend(add([own_addresses(&leased.tap, leased.ip)]));
        commands.extend(add(policy(leased)));
    }
    commands
}

#[cfg(test)]
mod tests;
