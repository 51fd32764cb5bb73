//! What a network's plugins answer (CNI specification 1.0.0, section 5), and what of it a group's guest is given.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, ErrorKind, Result},
    network::Addresses,
};

/// A result of ADD, as far as it is used. Versions 0.3 to 1.1 have these in common.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Answer {
    ips: Vec<AnswerIp>,
    routes: Vec<AnswerRoute>,
    dns: Dns,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct AnswerIp {
    address: String,
    gateway: Option<IpAddr>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct AnswerRoute {
    dst: String,
    gw: Option<IpAddr>,
}

/// The name servers of a network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses.
    pub nameservers: Vec<String>,
    /// Domains to look in.
    pub search: Vec<String>,
    /// Options of resolv.conf(5).
    pub options: Vec<String>,
}

/// What a group is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Given {
    /// With the length of the prefix, IPv4 first.
    pub(super) addresses: Vec<String>,
    /// Default routes.
    pub(super) gateways: Vec<String>,
    pub(super) dns: Dns,
    pub(super) own: Addresses,
}

impl Given {
    /// Takes from an answer what a guest can have.
    ///
    /// # Errors
    /// `FailedPrecondition`: the network gives no IPv4 address, or something that a guest can't have.
    pub(super) fn from(answer: &Answer) -> Result<Self> {
        let refused = |message: String| Err(Error::new(ErrorKind::FailedPrecondition, message));
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for ip in &answer.ips {
            match parse_cidr(&ip.address) {
                Some((IpAddr::V4(address), _)) => v4.push((address, ip)),
                Some((IpAddr::V6(address), _)) => v6.push((address, ip)),
                None => return refused(format!("the network gives {:?}, which is no address", ip.address)),
            }
        }
        let (Some((first, _)), false) = (v4.first(), v4.len() > 1 || v6.len() > 1) else {
            let all: Vec<_> = answer.ips.iter().map(|ip| ip.address.as_str()).collect();
            return refused(format!(
                "the network gives the addresses {all:?}: a group has one of IPv4 and at most one of IPv6"
            ));
        };
        let own = Addresses {
            v4: *first,
            v6: v6.first().map(|(address, _)| *address),
        };
        let ips: Vec<&AnswerIp> = v4
            .iter()
            .map(|(_, ip)| *ip)
            .chain(v6.iter().map(|(_, ip)| *ip))
            .collect();
        let gateway_of = |is_v4: bool| {
            let own = ips
                .iter()
                .find_map(|ip| ip.gateway.filter(|gateway| gateway.is_ipv4() == is_v4));
            let default = answer
                .routes
                .iter()
                .find(|route| matches!(parse_cidr(&route.dst), Some((ip, 0)) if ip.is_ipv4() == is_v4));
            default.and_then(|route| route.gw.or(own))
        };
        let gateways: Vec<IpAddr> = [true, false].into_iter().filter_map(gateway_of).collect();
        for route in &answer.routes {
            // The way to a gateway, and what goes by it anyway.
            let is_covered = route.gw.is_none_or(|gateway| gateways.contains(&gateway));
            if !is_covered {
                return refused(format!(
                    "the network gives a route to {} by {:?}: a group has default routes only",
                    route.dst, route.gw
                ));
            }
        }
        Ok(Self {
            addresses: ips.iter().map(|ip| ip.address.clone()).collect(),
            gateways: gateways.iter().map(IpAddr::to_string).collect(),
            dns: answer.dns.clone(),
            own,
        })
    }
}

fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let length = length.parse().ok().filter(|length| *length <= longest)?;
    Some((address, length))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn given(answer: Value) -> Result<Given> {
        Given::from(&serde_json::from_value(answer).unwrap())
    }

    #[test]
    fn the_answer_of_a_bridge_is_what_a_guest_gets() {
        let answer = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "cni0", "mac": "aa:bb:cc:dd:ee:ff" }],
            "ips": [
                { "address": "fd00:7::2/64", "gateway": "fd00:7::1", "interface": 2 },
                { "address": "10.77.0.2/24", "gateway": "10.77.0.1", "interface": 2 },
            ],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0", "gw": "fd00:7::9" }, { "dst": "10.0.0.0/8" }],
            "dns": { "nameservers": ["10.77.0.53"], "search": ["a.local"] },
        });
        let given = given(answer).unwrap();
        assert_eq!(given.addresses, ["10.77.0.2/24", "fd00:7::2/64"]);
        assert_eq!(given.gateways, ["10.77.0.1", "fd00:7::9"]);
        assert_eq!(given.own.texts().collect::<Vec<_>>(), ["10.77.0.2", "fd00:7::2"]);
        assert_eq!((given.dns.nameservers.len(), given.dns.options.len()), (1, 0));
    }

    #[test]
    fn an_isolated_network_has_no_way_out() {
        let given = given(json!({ "ips": [{ "address": "10.77.0.2/24", "gateway": "10.77.0.1" }] })).unwrap();
        assert!(given.gateways.is_empty());
    }

    #[test]
    fn what_a_guest_can_not_have_is_named() {
        for (answer, words) in [
            (json!({}), "a group has one of IPv4"),
            (json!({ "ips": [{ "address": "fd00::2/64" }] }), "fd00::2/64"),
            (
                json!({ "ips": [{ "address": "10.0.0.2" }] }),
                "\"10.0.0.2\", which is no address",
            ),
            (
                json!({ "ips": [{ "address": "10.0.0.2/8" }, { "address": "10.0.0.3/8" }] }),
                "10.0.0.3/8",
            ),
            (
                json!({ "ips": [{ "address": "10.0.0.2/8" }], "routes": [{ "dst": "10.9.0.0/16", "gw": "10.0.0.9" }] }),
                "a route to 10.9.0.0/16",
            ),
        ] {
            let error = given(answer.clone()).unwrap_err().chain();
            assert!(error.contains(words), "{answer}: {error}");
        }
    }
}
