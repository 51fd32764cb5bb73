//! Ports of the host that lead to groups: the `hostPort` of a container's port, as a kubelet's.
//!
//! A connection to a port of this host, from anywhere and from the host itself, is translated (`dnat`) to the group that has
//! the port; what comes back is translated by connection tracking. Three more rules make that whole:
//!
//! - A group that uses a host port of a group, and the host itself by a loopback address, get the bridge's address as their
//!   source (`masquerade`), so that the answer comes back this way. The group therefore sees that one.
//! - Loopback addresses may be routed to the bridge (`route_localnet`). Nothing may come from it to them: a group could else
//!   reach what listens for the host alone.
//! - The forward chain lets in what was translated, though it is new and comes from outside.
//!
//! The same holds for IPv6 where a group has such an address, but for the first two: groups answer each other through the host
//! anyway, and no connection from `::1` leaves the host's loopback interface.
//!
//! Whether a port is free is asked when a group is accepted: of the other groups, and of the kernel by binding to it. No socket
//! is kept, as no kubelet's plug-in does; a program that binds to the port later gets no connections while the group lives.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, bind, socket, sockopt},
};
use serde_json::{Value, json};

use super::{
    Addresses,
    family::{Family, Prefixes},
    nft::{TABLE, chain, compare, drop, jump, meta, payload, plain_chain, rule},
};

/// A port of the host that leads to a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPort {
    /// At this address of the host only.
    pub ip: Option<IpAddr>,
    /// Port of the host.
    pub port: u16,
    /// Of which protocol.
    pub protocol: HostProtocol,
    /// Port of the group.
    pub target: u16,
}

/// Protocols of host ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl HostProtocol {
    /// That of a declared port, `TCP` or `UDP`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = SocketAddr::new(self.ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), self.port);
        write!(formatter, "{address}/{}", self.protocol.name())
    }
}

impl HostPort {
    /// Whether a connection could be for both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let same_address = match (self.ip, other.ip) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        same_address && self.protocol == other.protocol && self.port == other.port
    }

    /// Why nobody could use the port of the host now; `None` when it is free.
    pub fn obstacle(&self) -> Option<String> {
        let kind = match self.protocol {
            HostProtocol::Tcp => SocketType::STREAM,
            HostProtocol::Udp => SocketType::DGRAM,
        };
        let any = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let addresses = self.ip.map_or_else(|| any.to_vec(), |ip| vec![ip]);
        let mut obstacles = addresses.into_iter().map(|ip| self.obstacle_at(ip, kind));
        obstacles.find_map(|obstacle| obstacle)
    }

    fn obstacle_at(&self, ip: IpAddr, kind: SocketType) -> Option<String> {
        let address = SocketAddr::new(ip, self.port);
        let family = match ip {
            IpAddr::V4(_) => AddressFamily::INET,
            IpAddr::V6(_) => AddressFamily::INET6,
        };
        let bound = socket(family, kind, None).and_then(|socket| {
            if ip.is_ipv6() {
                sockopt::set_ipv6_v6only(&socket, true)?;
            }
            // Connections that have ended do not keep a port, those who listen do.
            if self.protocol == HostProtocol::Tcp {
                sockopt::set_socket_reuseaddr(&socket, true)?;
            }
            bind(&socket, &address)
        });
        match bound {
            Ok(()) => None,
            // A host without IPv6 has nobody at its ports there.
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if ip == Ipv6Addr::UNSPECIFIED => None,
            Err(Errno::ADDRINUSE) => Some("a program of the host has it".to_owned()),
            Err(Errno::ADDRNOTAVAIL) => Some("the host has no such address".to_owned()),
            Err(error) => Some(format!("the host can't bind to it: {error}")),
        }
    }
}

/// Chain that translates.
const CHAIN: &str = "host-ports";
/// Where ports lead: to which address, and which port of it. By protocol and port; those of one address of the host by that
/// too. They are two, since nft 1.0 takes no map to an address and a port as JSON.
const ADDRESSES: &str = "host-port-addresses";
const TARGETS: &str = "host-port-targets";
const ADDRESSES_AT: &str = "host-port-addresses-at";
const TARGETS_AT: &str = "host-port-targets-at";

fn map(name: &str, key: &[&str], to: &str) -> Value {
    json!({"add": {"map": {"family": "inet", "table": TABLE, "name": name, "type": key, "map": to}}})
}

/// Chains and maps, for a new table `inet eci` with its chain `postrouting`.
pub(super) fn chains(bridge: &str, prefixes: Prefixes) -> Vec<Value> {
    let subnet = prefixes.v4;
    let network = json!({"prefix": {"addr": subnet.network().to_string(), "len": subnet.prefix()}});
    let loopback = json!({"prefix": {"addr": "127.0.0.0", "len": 8}});
    let mut commands = vec![plain_chain("inet", CHAIN)];
    for family in prefixes.families() {
        commands.extend(leading(family));
    }
    // NAT's own priorities (linux/netfilter_ipv4.h).
    for (name, hook) in [
        ("host-ports-from-outside", "prerouting"),
        ("host-ports-from-host", "output"),
    ] {
        let is_local = compare(
            "==",
            &json!({"fib": {"result": "type", "flags": ["daddr"]}}),
            &json!("local"),
        );
        commands.push(chain("inet", name, "nat", hook, -100));
        commands.push(rule("inet", name, &[is_local, jump(CHAIN)]));
    }
    let to_group = compare("==", &meta("oifname"), &json!(bridge));
    let from = |network: &Value| compare("==", &payload("ip", "saddr"), network);
    let masquerade = json!({"masquerade": null});
    for expressions in [
        vec![
            to_group.clone(),
            from(&network),
            was_translated(),
            masquerade.clone(),
        ],
        vec![to_group, from(&loopback), masquerade],
    ] {
        commands.push(rule("inet", "postrouting", &expressions));
    }
    commands.push(chain("inet", "no-loopback", "filter", "prerouting", -300));
    commands.push(rule(
        "inet",
        "no-loopback",
        &[
            compare("==", &meta("iifname"), &json!(bridge)),
            compare("==", &payload("ip", "daddr"), &loopback),
            drop(),
        ],
    ));
    commands
}

/// Maps and rules that lead connections of one version of IP.
fn leading(family: Family) -> Vec<Value> {
    let address = family.address_type();
    let any = ["inet_proto", "inet_service"];
    let at = [address, "inet_proto", "inet_service"];
    let [addresses, targets, addresses_at, targets_at] =
        [ADDRESSES, TARGETS, ADDRESSES_AT, TARGETS_AT].map(|name| family.its(name));
    let mut commands = vec![
        map(&addresses, &any, address),
        map(&targets, &any, "inet_service"),
        map(&addresses_at, &at, address),
        map(&targets_at, &at, "inet_service"),
    ];
    let port = [meta("l4proto"), payload("th", "dport")];
    let at_address: Vec<Value> = std::iter::once(payload(family.name(), "daddr"))
        .chain(port.clone())
        .collect();
    for (key, addresses, targets) in [
        (at_address, addresses_at, targets_at),
        (port.to_vec(), addresses, targets),
    ] {
        let found = |name: &str| json!({"map": {"key": {"concat": key}, "data": format!("@{name}")}});
        let translate =
            json!({"dnat": {"family": family.name(), "addr": found(&addresses), "port": found(&targets)}});
        commands.push(rule("inet", CHAIN, &[translate]));
    }
    commands
}

/// A host port led here.
pub(super) fn was_translated() -> Value {
    compare("in", &json!({"ct": {"key": "status"}}), &json!("dnat"))
}

/// The elements that lead ports to a group, by each address it has.
pub(super) fn leads(ip: Addresses, ports: &[HostPort]) -> impl Iterator<Item = Value> + '_ {
    let families = [Family::V4, Family::V6].into_iter();
    let addresses = families.filter_map(move |family| Some((family, family.address(ip)?)));
    addresses.flat_map(move |(family, address)| {
        let of_family = ports.iter().filter(move |lead| match lead.ip {
            Some(ip) => ip.is_ipv6() == (family == Family::V6),
            None => true,
        });
        of_family.flat_map(move |lead| leads_to(family, &address, lead))
    })
}

fn leads_to(family: Family, address: &str, lead: &HostPort) -> [Value; 2] {
    let element = |name: &str, key: &[Value], value: Value| {
        let name = family.its(name);
        json!({"family": "inet", "table": TABLE, "name": name, "elem": [[{"concat": key}, value]]})
    };
    let port = [json!(lead.protocol.name()), json!(lead.port)];
    let (key, addresses, targets) = match lead.ip {
        Some(at) => (
            std::iter::once(json!(at.to_string())).chain(port).collect(),
            ADDRESSES_AT,
            TARGETS_AT,
        ),
        None => (port.to_vec(), ADDRESSES, TARGETS),
    };
    [
        element(addresses, &key, json!(address)),
        element(targets, &key, json!(lead.target)),
    ]
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn port(ip: Option<Ipv4Addr>, port: u16, protocol: HostProtocol) -> HostPort {
        HostPort {
            ip: ip.map(Into::into),
            port,
            protocol,
            target: 80,
        }
    }

    #[test]
    fn ports_overlap_when_a_connection_could_be_for_both() {
        use HostProtocol::{Tcp, Udp};
        let (one, other) = (Some(Ipv4Addr::new(10, 0, 0, 1)), Some(Ipv4Addr::new(10, 0, 0, 2)));
        for (a, b, expected) in [
            (port(None, 80, Tcp), port(None, 80, Tcp), true),
            (port(one, 80, Tcp), port(None, 80, Tcp), true),
            (port(None, 80, Tcp), port(one, 80, Tcp), true),
            (port(one, 80, Tcp), port(one, 80, Tcp), true),
            (port(one, 80, Tcp), port(other, 80, Tcp), false),
            (port(None, 80, Tcp), port(None, 80, Udp), false),
            (port(None, 80, Tcp), port(None, 81, Tcp), false),
        ] {
            assert_eq!(a.overlaps(&b), expected, "{a} and {b}");
        }
    }

    #[test]
    fn ports_that_a_program_has_are_told_from_free_ones() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = tcp.local_addr().unwrap().port();
        let said = |ip, at, protocol| port(ip, at, protocol).obstacle().unwrap_or_default();
        for ip in [None, Some(Ipv4Addr::LOCALHOST)] {
            assert_eq!(said(ip, taken, HostProtocol::Tcp), "a program of the host has it");
        }
        std::mem::drop(tcp);
        let of_ipv6 = TcpListener::bind("[::1]:0").unwrap();
        let at = of_ipv6.local_addr().unwrap().port();
        assert_eq!(said(None, at, HostProtocol::Tcp), "a program of the host has it");
        assert_eq!(said(Some(Ipv4Addr::LOCALHOST), at, HostProtocol::Tcp), "");
        assert_eq!(said(None, taken, HostProtocol::Tcp), "");
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = udp.local_addr().unwrap().port();
        assert_eq!(
            said(None, taken, HostProtocol::Udp),
            "a program of the host has it"
        );
        let nowhere = Some(Ipv4Addr::new(192, 0, 2, 1));
        assert_eq!(
            said(nowhere, 1, HostProtocol::Tcp),
            "the host has no such address"
        );
    }
}
