use std::net::Ipv4Addr;

use super::*;
use crate::network::{
    HostProtocol, Subnet, Subnet6,
    security::{Protocol, Rule},
};

fn leased(number: u8, security_groups: &[&str]) -> Leased {
    Leased {
        is_guarded: !security_groups.is_empty(),
        security_groups: security_groups.iter().map(|id| (*id).to_owned()).collect(),
        ..Leased::new(
            format!("eci-0123456789{}", char::from(b'a' + number)),
            Addresses {
                v4: Ipv4Addr::new(10, 89, 0, number),
                v6: None,
            },
        )
    }
}

fn allow(protocol: Protocol, ports: &[&str], peers: &[&str]) -> Rule {
    let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    Rule {
        protocol,
        ports: owned(ports),
        peers: owned(peers),
    }
}

/// Two security groups with rules of all kinds.
fn security_groups() -> Vec<SecurityGroup> {
    vec![
        SecurityGroup {
            id: "sg-web".into(),
            ingress: vec![
                allow(Protocol::Tcp, &["80", "8000-8099"], &["0.0.0.0/0"]),
                allow(Protocol::Icmp, &[], &["10.0.0.0/8", "192.0.2.7"]),
                allow(Protocol::All, &[], &["sg-db", "192.0.2.8"]),
            ],
            egress: Vec::new(),
        },
        SecurityGroup {
            id: "sg-db".into(),
            ingress: vec![allow(Protocol::Tcp, &["5432"], &["sg-web"])],
            egress: vec![allow(Protocol::Udp, &["53"], &["0.0.0.0/0"])],
        },
    ]
}

/// A port at all addresses of the host, and one at a single one.
fn host_ports() -> Vec<HostPort> {
    let port = |ip, port, protocol| HostPort {
        ip,
        port,
        protocol,
        target: port + 1,
    };
    vec![
        port(None, 8080, HostProtocol::Tcp),
        port(Some(Ipv4Addr::new(192, 0, 2, 1).into()), 53, HostProtocol::Udp),
    ]
}

/// Compares with a file beside this one, or writes it.
fn ensure_recorded(name: &str, text: &str, recorded: &str) {
    if std::env::var_os("ECI_UPDATE_SNAPSHOTS").is_some() {
        let path = format!("{}/src/network/snapshots/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::write(path, text).unwrap();
        return;
    }
    assert!(
        text == recorded,
        "{name} changed; run again with ECI_UPDATE_SNAPSHOTS=1 if it should:\n{text}"
    );
}

fn prefixes(config: &NetworkConfig) -> Prefixes {
    Prefixes {
        v4: Subnet::parse(&config.subnet).unwrap(),
        v6: Subnet6::parse(&config.subnet6).ok(),
    }
}

/// The same group with an IPv6 address.
fn with_ipv6(leased: Leased) -> Leased {
    let subnet6 = Subnet6::parse(SUBNET6).unwrap();
    let ip = Addresses {
        v6: Some(subnet6.address(leased.ip.v4)),
        ..leased.ip
    };
    Leased { ip, ..leased }
}

const SUBNET6: &str = "fd00:89::/64";

fn text_of_base(security_groups: &[SecurityGroup], leased: &[Leased]) -> String {
    let config = NetworkConfig::default();
    nft::text(&base(&config, security_groups, prefixes(&config), leased))
}

#[test]
fn the_rules_are_as_recorded() {
    let plain = text_of_base(&[], &[leased(2, &[])]);
    ensure_recorded("plain.txt", &plain, include_str!("../snapshots/plain.txt"));
    let all = text_of_base(
        &security_groups(),
        &[
            leased(2, &[]),
            leased(3, &["sg-web"]),
            leased(4, &["sg-web", "sg-db"]),
        ],
    );
    ensure_recorded(
        "security_groups.txt",
        &all,
        include_str!("../snapshots/security_groups.txt"),
    );
}

#[test]
fn the_rules_of_ipv6_are_as_recorded() {
    let mut groups = security_groups();
    groups[0].ingress.push(allow(
        Protocol::Icmp,
        &[],
        &["::/0", "fd00:1::/32", "2001:db8::7", "sg-db"],
    ));
    groups[0]
        .ingress
        .push(allow(Protocol::Udp, &["53"], &["fd00:1::/32", "2001:db8::7"]));
    let config = NetworkConfig {
        subnet6: SUBNET6.into(),
        ..NetworkConfig::default()
    };
    let leased = [leased(2, &[]), with_ipv6(leased(3, &["sg-web", "sg-db"]))];
    let text = nft::text(&base(&config, &groups, prefixes(&config), &leased));
    ensure_recorded("ipv6.txt", &text, include_str!("../snapshots/ipv6.txt"));
    // A network that is routed here is reached from outside, and leaves as it is.
    let routed = NetworkConfig {
        masquerade6: false,
        ..config
    };
    let text = nft::text(&base(&routed, &[], prefixes(&routed), &[]));
    assert!(!text.contains("\"ipv6\""), "{text}");
    assert!(text.contains("\"ipv4\""), "{text}");
}

#[test]
fn a_group_with_both_addresses_takes_back_all() {
    let leased = with_ipv6(Leased {
        host_ports: vec![
            HostPort {
                ip: Some("2001:db8::1".parse().unwrap()),
                ..host_ports()[0]
            },
            host_ports()[1],
            host_ports()[0],
        ],
        ..leased(4, &["sg-web"])
    });
    let added = nft::text(&add(policy(&leased)));
    let text = format!("{added}\n{}", nft::text(&remove_commands(&leased)));
    ensure_recorded(
        "membership_ipv6.txt",
        &text,
        include_str!("../snapshots/membership_ipv6.txt"),
    );
}

#[test]
fn what_a_group_adds_it_takes_back() {
    let leased = Leased {
        host_ports: host_ports(),
        ..leased(4, &["sg-web", "sg-db"])
    };
    let added = nft::text(&add(policy(&leased)));
    let text = format!("{added}\n{}", nft::text(&remove_commands(&leased)));
    ensure_recorded(
        "membership.txt",
        &text,
        include_str!("../snapshots/membership.txt"),
    );
}

#[test]
fn a_group_whose_security_group_is_gone_stays_closed() {
    let closed = Leased {
        is_guarded: true,
        ..leased(2, &[])
    };
    let text = text_of_base(&[], &[closed]);
    assert!(
        text.contains(r#""name":"guarded","elem":["eci-0123456789c"]"#),
        "{text}"
    );
    assert!(text.contains(r#""chain":"in","expr":[{"drop":null}]"#), "{text}");
}
