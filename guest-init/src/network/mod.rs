//! Network interfaces of the guest, set up through rtnetlink (rtnetlink(7)).

mod netlink;

use std::net::IpAddr;

use self::netlink::{Message, Socket};
use crate::error::{Context, Error, Result};

/// An interface as the host wants it; checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name it gets.
    pub name: String,
    /// Address it is found by.
    pub mac: [u8; 6],
    /// Addresses with prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default routes.
    pub gateways: Vec<IpAddr>,
    /// Bytes; 0 leaves it.
    pub mtu: u32,
}

/// Longest interface name (`IFNAMSIZ` without its NUL, `linux/if.h`).
const MAX_NAME_BYTES: usize = 15;

impl Interface {
    /// Checks the parts of an interface; `index` is its place in the request, for messages.
    ///
    /// # Errors
    /// `InvalidArgument` names the field.
    pub fn parse(
        index: usize,
        name: &str,
        mac: &[u8],
        addresses: &[String],
        gateways: &[String],
        mtu: u32,
    ) -> Result<Self> {
        let field = |name: &str| format!("interfaces[{index}].{name}");
        let is_name = !name.is_empty()
            && name.len() <= MAX_NAME_BYTES
            && !matches!(name, "." | ".." | "lo")
            && name
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
        if !is_name {
            return Err(Error::invalid(format!(
                "{} is {name:?}: give 1 to {MAX_NAME_BYTES} letters and digits",
                field("name")
            )));
        }
        let mac = mac
            .try_into()
            .map_err(|_| Error::invalid(format!("{} has {} bytes: give 6", field("mac"), mac.len())))?;
        let addresses = addresses
            .iter()
            .map(|text| {
                parse_cidr(text).ok_or_else(|| {
                    Error::invalid(format!(
                        "{}: {text:?} is not an address such as 10.0.0.2/24",
                        field("addresses")
                    ))
                })
            })
            .collect::<Result<_>>()?;
        let gateways = gateways
            .iter()
            .map(|text| {
                text.parse().map_err(|_| {
                    Error::invalid(format!("{}: {text:?} is not an IP address", field("gateways")))
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            name: name.to_owned(),
            mac,
            addresses,
            gateways,
            mtu,
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

/// Brings up the loopback interface and sets up `interfaces`.
///
/// # Errors
/// `NotFound` when no interface has the MAC address, else what the kernel answers.
pub fn configure(interfaces: &[Interface]) -> Result<()> {
    let mut socket = Socket::open().context(|| "open a netlink socket")?;
    let links = socket.links().context(|| "list the network interfaces")?;
    if let Some(loopback) = links.iter().find(|link| link.is_loopback) {
        socket
            .request(Message::set_link(loopback.index, None, 0))
            .context(|| "bring up lo")?;
    }
    for interface in interfaces {
        let link = links
            .iter()
            .find(|link| link.mac == interface.mac)
            .ok_or_else(|| {
                Error::not_found(format!(
                    "no network interface has the MAC address {}",
                    show_mac(interface.mac)
                ))
            })?;
        let name = &interface.name;
        // A name can be changed while the interface is down only, so this comes before bringing it up.
        socket
            .request(Message::set_link(link.index, Some(name), interface.mtu))
            .context(|| {
                format!(
                    "rename {} to {name}, set its MTU to {} and bring it up",
                    link.name, interface.mtu
                )
            })?;
        for (address, length) in &interface.addresses {
            socket
                .request(Message::add_address(link.index, *address, *length))
                .context(|| format!("add {address}/{length} to {name}"))?;
        }
        for gateway in &interface.gateways {
            socket
                .request(Message::add_default_route(link.index, *gateway))
                .context(|| format!("add the default route through {gateway} on {name}"))?;
        }
    }
    Ok(())
}

fn show_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_interfaces_are_named() {
        let parse = |name: &str, mac: &[u8], address: &str| {
            Interface::parse(2, name, mac, &[address.to_owned()], &[], 0).map_err(|error| error.to_string())
        };
        let mac = [2, 0, 0, 0, 0, 1];
        assert!(parse("eth0", &mac, "10.0.0.2/24").is_ok());
        assert!(parse("eth0", &mac, "fd00::2/128").is_ok());
        for (name, mac, address, message) in [
            ("", &mac[..], "10.0.0.2/24", "interfaces[2].name is \"\""),
            ("a/b", &mac, "10.0.0.2/24", "interfaces[2].name is \"a/b\""),
            ("eth0", &mac[..5], "10.0.0.2/24", "interfaces[2].mac has 5 bytes"),
            ("eth0", &mac, "10.0.0.2", "interfaces[2].addresses: \"10.0.0.2\""),
            (
                "eth0",
                &mac,
                "10.0.0.2/33",
                "interfaces[2].addresses: \"10.0.0.2/33\"",
            ),
        ] {
            let error = parse(name, mac, address).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
