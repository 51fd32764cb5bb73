//! What rules for the two versions of IP differ in.

use serde_json::{Value, json};

use super::{Addresses, Subnet, Subnet6};

/// A version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// What nftables calls its header, and its packets.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    /// Type of its addresses in a set.
    pub(super) fn address_type(self) -> &'static str {
        match self {
            Self::V4 => "ipv4_addr",
            Self::V6 => "ipv6_addr",
        }
    }

    /// Its protocol of messages.
    pub(super) fn icmp(self) -> &'static str {
        match self {
            Self::V4 => "icmp",
            Self::V6 => "icmpv6",
        }
    }

    /// The name of a set or map that there is one of for each version.
    pub(super) fn its(self, name: &str) -> String {
        match self {
            Self::V4 => name.to_owned(),
            Self::V6 => format!("{name}.ip6"),
        }
    }

    /// A group's address.
    pub(super) fn address(self, ip: Addresses) -> Option<String> {
        match self {
            Self::V4 => Some(ip.v4.to_string()),
            Self::V6 => ip.v6.map(|ip| ip.to_string()),
        }
    }
}

/// The groups' networks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prefixes {
    pub(super) v4: Subnet,
    pub(super) v6: Option<Subnet6>,
}

impl Prefixes {
    /// Each version that groups speak, with its network.
    pub(super) fn networks(self) -> impl Iterator<Item = (Family, Value)> {
        let network = |address: String, length: u8| json!({"prefix": {"addr": address, "len": length}});
        let v4 = network(self.v4.network().to_string(), self.v4.prefix());
        let v6 = self
            .v6
            .map(|subnet| network(subnet.network().to_string(), subnet.prefix()));
        std::iter::once((Family::V4, v4)).chain(v6.map(|network| (Family::V6, network)))
    }

    /// The versions that groups speak.
    pub(super) fn families(self) -> impl Iterator<Item = Family> + Clone {
        std::iter::once(Family::V4).chain(self.v6.map(|_| Family::V6))
    }
}
