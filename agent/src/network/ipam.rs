//! Addresses of a subnet. Pure: leases are kept durable with their groups.

use std::{collections::BTreeSet, net::Ipv4Addr};

/// Why a subnet can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("subnet {text:?} can't be used: give an IPv4 network such as 10.89.0.0/16, prefix length 8 to 29")]
pub struct SubnetError {
    text: String,
}

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

impl Subnet {
    /// Parses `a.b.c.d/n`; the host part must be zero.
    ///
    /// # Errors
    /// [`SubnetError`].
    pub fn parse(text: &str) -> Result<Self, SubnetError> {
        let error = || SubnetError {
            text: text.to_owned(),
        };
        let (address, prefix) = text.split_once('/').ok_or_else(error)?;
        let network = u32::from(address.parse::<Ipv4Addr>().map_err(|_| error())?);
        let prefix: u8 = prefix.parse().map_err(|_| error())?;
        if !(8..=29).contains(&prefix) || network & (u32::MAX >> prefix) != 0 {
            return Err(error());
        }
        Ok(Self { network, prefix })
    }

    /// The first address: the bridge's.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(self.network + 1)
    }

    /// Prefix length.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The network's own address.
    pub fn network(self) -> Ipv4Addr {
        Ipv4Addr::from(self.network)
    }

    /// First and last address for groups: neither network, gateway nor broadcast.
    fn range(self) -> (u32, u32) {
        let broadcast = self.network | (u32::MAX >> self.prefix);
        (self.network + 2, broadcast - 1)
    }
}

/// Gives out addresses in turn, so that one just given back is used again as late as possible.
#[derive(Debug)]
pub struct AddressPool {
    subnet: Subnet,
    taken: BTreeSet<u32>,
    next: u32,
}

impl AddressPool {
    /// All addresses free.
    pub fn new(subnet: Subnet) -> Self {
        Self {
            subnet,
            taken: BTreeSet::new(),
            next: subnet.range().0,
        }
    }

    /// Number of addresses, taken ones included.
    pub fn size(&self) -> u32 {
        let (first, last) = self.subnet.range();
        last - first + 1
    }

    /// Marks an address as taken (outside the subnet: no effect).
    pub fn take(&mut self, ip: Ipv4Addr) {
        let (first, last) = self.subnet.range();
        let ip = u32::from(ip);
        if (first..=last).contains(&ip) {
            self.taken.insert(ip);
            self.next = if ip == last { first } else { self.next.max(ip + 1) };
        }
    }

    /// The next free address.
    pub fn allocate(&mut self) -> Option<Ipv4Addr> {
        let (first, last) = self.subnet.range();
        let free =
            |range: std::ops::RangeInclusive<u32>| range.into_iter().find(|ip| !self.taken.contains(ip));
        let ip = free(self.next..=last).or_else(|| free(first..=last))?;
        self.taken.insert(ip);
        self.next = if ip == last { first } else { ip + 1 };
        Some(Ipv4Addr::from(ip))
    }

    /// Gives an address back.
    pub fn release(&mut self, ip: Ipv4Addr) {
        self.taken.remove(&u32::from(ip));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn subnets() {
        let subnet = Subnet::parse("10.89.0.0/16").unwrap();
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 89, 0, 1));
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.1/16",
            "10.0.0.0/30",
            "10.0.0.0/7",
            "::/64",
            "10.0.0.0/x",
        ] {
            assert!(Subnet::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_small_pool_is_given_out_whole_and_no_more() {
        let mut pool = AddressPool::new(Subnet::parse("192.168.7.0/29").unwrap());
        let all: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(all.len(), 5);
        assert_eq!(all[0], Ipv4Addr::new(192, 168, 7, 2));
        assert_eq!(all[4], Ipv4Addr::new(192, 168, 7, 6));
        pool.release(all[2]);
        assert_eq!(pool.allocate(), Some(all[2]));
    }

    proptest! {
        #[test]
        fn no_address_is_given_twice(steps in proptest::collection::vec(any::<Option<usize>>(), 0..200), taken in 0u8..8) {
            let mut pool = AddressPool::new(Subnet::parse("10.0.0.0/28").unwrap());
            let mut held = vec![Ipv4Addr::new(10, 0, 0, taken)];
            pool.take(held[0]);
            if taken < 2 { held.clear(); }
            for step in steps {
                match step {
                    None => match pool.allocate() {
                        Some(ip) => {
                            prop_assert!(!held.contains(&ip));
                            prop_assert!((2..=14).contains(&ip.octets()[3]));
                            held.push(ip);
                        }
                        None => prop_assert_eq!(held.len(), 13),
                    },
                    Some(at) if !held.is_empty() => {
                        let ip = held.remove(at % held.len());
                        pool.release(ip);
                    }
                    Some(_) => {}
                }
            }
        }
    }
}
