//! The agent's nftables: table `inet eci` for NAT and forwarding, table `bridge eci` that keeps each tap to its own
//! MAC and IP address. Nobody else's tables are touched.

use std::net::Ipv4Addr;

use nftables::{helper, schema::Nftables};
use serde_json::{Value, json};

use super::{Subnet, mac, mac_text};
use crate::{
    config::NetworkConfig,
    error::{Error, ErrorKind, Result},
};

const TABLE: &str = "eci";
const TAPS: &str = "taps";

/// Replaces both tables as one transaction.
pub(super) async fn apply_base(
    config: &NetworkConfig,
    subnet: Subnet,
    taps: &[(String, Ipv4Addr)],
) -> Result<()> {
    apply(
        base(config, subnet, taps),
        "set up nftables tables inet eci and bridge eci",
    )
    .await
}

/// Lets a tap send with its own addresses. Idempotent.
pub(super) async fn add_tap(tap: &str, ip: Ipv4Addr) -> Result<()> {
    apply(
        vec![json!({"add": {"element": elements(&[(tap.to_owned(), ip)])}})],
        "add a tap to nftables set bridge eci taps",
    )
    .await
}

/// Ends that. Idempotent.
pub(super) async fn remove_tap(tap: &str, ip: Ipv4Addr) -> Result<()> {
    let element = elements(&[(tap.to_owned(), ip)]);
    // Deleting needs the element to be there; adding one that is there changes nothing.
    apply(
        vec![
            json!({"add": {"element": element}}),
            json!({"delete": {"element": element}}),
        ],
        "remove a tap from nftables set bridge eci taps",
    )
    .await
}

/// Removes both tables. Idempotent.
pub(super) async fn remove_base() -> Result<()> {
    let mut commands = Vec::new();
    for family in ["inet", "bridge"] {
        commands.extend(fresh_table(family).into_iter().take(2));
    }
    apply(commands, "remove nftables tables inet eci and bridge eci").await
}

async fn apply(commands: Vec<Value>, what: &str) -> Result<()> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
        Error::with_source(ErrorKind::Internal, what.to_owned(), source)
    };
    // Through the crate's own types, so that a mistake of ours is found before the kernel sees it.
    let ruleset: Nftables<'static> =
        serde_json::from_value(json!({"nftables": commands})).map_err(|error| failed(Box::new(error)))?;
    helper::apply_ruleset_async(&ruleset)
        .await
        .map_err(|error| match error {
            helper::NftablesError::NftFailed { stderr, .. } => failed(stderr.trim().to_owned().into()),
            error => failed(Box::new(error)),
        })
}

/// Add, delete, add: a table of that name exists and is empty afterwards, whatever there was.
fn fresh_table(family: &str) -> Vec<Value> {
    let table = json!({"table": {"family": family, "name": TABLE}});
    vec![
        json!({"add": table}),
        json!({"delete": table}),
        json!({"add": table}),
    ]
}

fn chain(family: &str, name: &str, kind: &str, hook: &str, priority: i32) -> Value {
    json!({"add": {"chain": {
        "family": family, "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
    }}})
}

fn rule(family: &str, chain: &str, expressions: &[Value]) -> Value {
    json!({"add": {"rule": {"family": family, "table": TABLE, "chain": chain, "expr": expressions}}})
}

fn compare(operator: &str, left: &Value, right: &Value) -> Value {
    json!({"match": {"op": operator, "left": left, "right": right}})
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn elements(taps: &[(String, Ipv4Addr)]) -> Value {
    let list: Vec<Value> = taps
        .iter()
        .map(|(tap, ip)| json!({"concat": [tap, mac_text(mac(*ip)), ip.to_string()]}))
        .collect();
    json!({"family": "bridge", "table": TABLE, "name": TAPS, "elem": list})
}

fn base(config: &NetworkConfig, subnet: Subnet, taps: &[(String, Ipv4Addr)]) -> Vec<Value> {
    let input = json!({"meta": {"key": "iifname"}});
    let output = json!({"meta": {"key": "oifname"}});
    let bridge = json!(config.bridge);
    let network = json!({"prefix": {"addr": subnet.network().to_string(), "len": subnet.prefix()}});

    let mut commands = fresh_table("inet");
    commands.push(chain("inet", "forward", "filter", "forward", 0));
    // From outside only what answers: groups are behind NAT.
    if config.masquerade {
        commands.push(rule(
            "inet",
            "forward",
            &[
                compare("!=", &input, &bridge),
                compare("==", &output, &bridge),
                compare("in", &json!({"ct": {"key": "state"}}), &json!(["new", "invalid"])),
                json!({"drop": null}),
            ],
        ));
        commands.push(chain("inet", "postrouting", "nat", "postrouting", 100));
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
    commands.push(json!({"add": {"set": {
        "family": "bridge", "table": TABLE, "name": TAPS, "type": ["ifname", "ether_addr", "ipv4_addr"],
    }}}));
    if !taps.is_empty() {
        commands.push(json!({"add": {"element": elements(taps)}}));
    }
    commands.push(chain("bridge", "guard", "filter", "prerouting", -300));
    let set = json!(format!("@{TAPS}"));
    let sender = |ether: Value, ip: Value| json!({"concat": [input, ether, ip]});
    commands.push(rule(
        "bridge",
        "guard",
        &[compare("!=", &input, &json!("eci-*")), json!({"accept": null})],
    ));
    commands.push(rule(
        "bridge",
        "guard",
        &[
            compare(
                "==",
                &sender(payload("ether", "saddr"), payload("ip", "saddr")),
                &set,
            ),
            json!({"accept": null}),
        ],
    ));
    commands.push(rule(
        "bridge",
        "guard",
        &[
            compare(
                "==",
                &sender(payload("arp", "saddr ether"), payload("arp", "saddr ip")),
                &set,
            ),
            json!({"accept": null}),
        ],
    ));
    commands.push(rule("bridge", "guard", &[json!({"drop": null})]));
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_what_the_crate_knows() {
        let config = NetworkConfig::default();
        let subnet = Subnet::parse(&config.subnet).unwrap();
        let taps = [("eci-0123456789a".to_owned(), Ipv4Addr::new(10, 89, 0, 2))];
        let commands = base(&config, subnet, &taps);
        let ruleset: Nftables = serde_json::from_value(json!({"nftables": commands})).unwrap();
        let text = serde_json::to_string(&ruleset).unwrap();
        for part in ["masquerade", "02:ec:0a:59:00:02", "saddr ether"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
