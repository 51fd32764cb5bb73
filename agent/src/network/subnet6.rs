//! The groups' IPv6 network. Pure arithmetic: a group's address in it ends with its IPv4 address, so one lease is for both, and
//! no IPv6 address is given twice while no IPv4 address is.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// The addresses of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Leased; no other group has it.
    pub v4: Ipv4Addr,
    /// Made of it, when the group was accepted.
    pub v6: Option<Ipv6Addr>,
}

impl Addresses {
    /// All of them, the IPv4 one first.
    pub fn texts(&self) -> impl Iterator<Item = String> + use<> {
        [Some(self.v4.to_string()), self.v6.map(|ip| ip.to_string())]
            .into_iter()
            .flatten()
    }
}

/// Why an IPv6 network can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "subnet6 {text:?} can't be used: give an IPv6 network such as fd00:89::/64, prefix length 32 to 96, of unique local \
     (fc00::/7) or global (2000::/3) addresses, or nothing for no IPv6"
)]
pub struct Subnet6Error {
    text: String,
}

/// An IPv6 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet6 {
    network: u128,
    prefix: u8,
}

impl Subnet6 {
    /// Parses `a:b::/n`; the host part must be zero.
    ///
    /// # Errors
    /// [`Subnet6Error`].
    pub fn parse(text: &str) -> Result<Self, Subnet6Error> {
        let error = || Subnet6Error {
            text: text.to_owned(),
        };
        let (address, prefix) = text.split_once('/').ok_or_else(error)?;
        let network = u128::from(address.parse::<Ipv6Addr>().map_err(|_| error())?);
        let prefix: u8 = prefix.parse().map_err(|_| error())?;
        // An IPv4 address has to fit behind the prefix.
        let has_room = (32..=96).contains(&prefix);
        let is_unicast = network >> 121 == 0xfc >> 1 || network >> 125 == 0x2000 >> 13;
        if !has_room || !is_unicast || network & (u128::MAX >> prefix) != 0 {
            return Err(error());
        }
        Ok(Self { network, prefix })
    }

    /// The first address: the bridge's. No group's, since no group is 0.0.0.1.
    pub fn gateway(self) -> Ipv6Addr {
        Ipv6Addr::from(self.network + 1)
    }

    /// The address of the group that has this IPv4 address.
    pub fn address(self, ip: Ipv4Addr) -> Ipv6Addr {
        Ipv6Addr::from(self.network | u128::from(u32::from(ip)))
    }

    /// Prefix length.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The network's own address.
    pub fn network(self) -> Ipv6Addr {
        Ipv6Addr::from(self.network)
    }
}

/// The address that an interface with this MAC has on its link (RFC 4291, appendix A), as the guest sets it.
pub(super) fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn networks_that_can_be_used() {
        for (text, gateway) in [
            ("fd00:89::/64", Some("fd00:89::1")),
            ("2001:db8:1::/48", Some("2001:db8:1::1")),
            ("fd00:89:0:0:0:1::/96", Some("fd00:89::1:0:1")),
            ("fd00:89::/97", None),
            ("fd00::/31", None),
            ("fd00:89::1/64", None),
            ("fe80::/64", None),
            ("ff00::/64", None),
            ("::/64", None),
            ("::ffff:10.0.0.0/96", None),
            ("10.0.0.0/16", None),
            ("fd00:89::", None),
            ("", None),
        ] {
            let found = Subnet6::parse(text)
                .ok()
                .map(|subnet| subnet.gateway().to_string());
            assert_eq!(found.as_deref(), gateway, "{text}");
        }
    }

    #[test]
    fn an_address_ends_with_the_ipv4_address() {
        let subnet = Subnet6::parse("fd00:89::/64").unwrap();
        let found = subnet.address(Ipv4Addr::new(10, 89, 0, 2));
        assert_eq!(found.to_string(), "fd00:89::a59:2");
        assert_eq!(
            link_local([0x02, 0xec, 0x0a, 0x59, 0, 2]).to_string(),
            "fe80::ec:aff:fe59:2"
        );
    }

    proptest! {
        #[test]
        fn no_two_groups_have_the_same_and_none_the_bridges(one in 2u32.., other in 2u32.., prefix in 32u8..=96) {
            let network = 0xfd_u128 << 120;
            let subnet = Subnet6::parse(&format!("{}/{prefix}", Ipv6Addr::from(network))).unwrap();
            let [a, b] = [one, other].map(|ip| subnet.address(Ipv4Addr::from(ip)));
            prop_assert_eq!(a == b, one == other);
            prop_assert!(a != subnet.gateway());
            prop_assert_eq!(u128::from(a) >> (128 - u32::from(prefix)), network >> (128 - u32::from(prefix)));
        }
    }
}
