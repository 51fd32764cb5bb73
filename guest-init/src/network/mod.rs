//! Network interfaces of the guest, set up through rtnetlink (rtnetlink(7)).

mod netlink;

use std::net::{IpAddr, Ipv6Addr};

use self::netlink::{Link, LinkChange, Message, Socket};
use crate::{
    error::{Context, Error, Result},
    identity::Origin,
};

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

/// Length of the prefix of link-local addresses.
const LINK_LOCAL_PREFIX: u8 = 64;
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

/// The network of the guest.
#[derive(Debug)]
pub struct Network {
    socket: Socket,
    /// As they were when the guest started, with the changes made here since.
    links: Vec<Link>,
    /// With the index of the link.
    configured: Vec<(u32, Interface)>,
}

impl Network {
    /// Looks which interfaces there are, and brings up the loopback interface and those of the machine: what their
    /// drivers allocate then, clones of a template find done. They have no address before they are set up, so nothing
    /// but multicast reports could leave through them.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::open().context(|| "open a netlink socket")?;
        let links = socket.links().context(|| "list the network interfaces")?;
        if let Some(loopback) = links.iter().find(|link| link.is_loopback) {
            socket
                .request(Message::bring_up(loopback.index, LinkChange::default()))
                .context(|| "bring up lo")?;
        }
        for link in links.iter().filter(|link| link.is_virtio) {
            // A template's own would be on the network thousands of times.
            socket
                .request(Message::no_automatic_address(link.index))
                .context(|| format!("keep {} without an address", link.name))?;
            socket
                .request(Message::bring_up(link.index, LinkChange::default()))
                .context(|| format!("bring up {}", link.name))?;
        }
        Ok(Self {
            socket,
            links,
            configured: Vec::new(),
        })
    }

    /// Sets up `interfaces`; those set up before lose what they were given.
    ///
    /// # Errors
    /// `NotFound` when there is no such interface, else what the kernel answers; can be called again then.
    pub fn configure(&mut self, interfaces: &[Interface], origin: Origin) -> Result<()> {
        while let Some((index, interface)) = self.configured.last() {
            retire(&mut self.socket, *index, interface)?;
            self.configured.pop();
        }
        for interface in interfaces {
            let link = find(&self.links, interface.mac, origin)?;
            let index = link.index;
            // First, so that what is half done is undone by the next call.
            self.configured.push((index, interface.clone()));
            set_up(&mut self.socket, link, interface)?;
            for link in self.links.iter_mut().filter(|link| link.index == index) {
                link.name.clone_from(&interface.name);
                link.mac = interface.mac;
            }
        }
        Ok(())
    }
}

/// The interface with address `mac`; in a clone, which still has its template's, else the machine's only one.
fn find(links: &[Link], mac: [u8; 6], origin: Origin) -> Result<&Link> {
    if let Some(link) = links.iter().find(|link| link.mac == mac) {
        return Ok(link);
    }
    let mut of_machine = links.iter().filter(|link| link.is_virtio);
    match (origin, of_machine.next(), of_machine.next()) {
        (Origin::Cloned, Some(link), None) => Ok(link),
        _ => Err(Error::not_found(format!(
            "no network interface has the MAC address {}",
            show_mac(mac)
        ))),
    }
}

fn set_up(socket: &mut Socket, link: &Link, interface: &Interface) -> Result<()> {
    let name = &interface.name;
    let change = LinkChange {
        name: Some(name),
        mac: (link.mac != interface.mac).then_some(interface.mac),
        mtu: interface.mtu,
    };
    socket
        .request(Message::bring_up(link.index, change))
        .context(|| {
            format!(
                "rename {} to {name}, set its MAC address to {} and its MTU to {}, and bring it up",
                link.name,
                show_mac(interface.mac),
                interface.mtu
            )
        })?;
    let link_local = (link_local(interface.mac).into(), LINK_LOCAL_PREFIX);
    for (address, length) in std::iter::once(&link_local).chain(&interface.addresses) {
        socket
            .request(Message::add_address(link.index, *address, *length))
            .context(|| format!("add {address}/{length} to {name}"))?;
    }
    for gateway in &interface.gateways {
        socket
            .request(Message::add_default_route(link.index, *gateway))
            .context(|| format!("add the default route through {gateway} on {name}"))?;
    }
    Ok(())
}

/// The address the kernel would give an interface with address `mac` (RFC 4291, section 2.5.6 and appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// Takes the interface down, with its routes, and its addresses away.
fn retire(socket: &mut Socket, index: u32, interface: &Interface) -> Result<()> {
    let name = &interface.name;
    socket
        .request(Message::take_down(index))
        .context(|| format!("take {name} down"))?;
    for (address, length) in &interface.addresses {
        match socket.request(Message::remove_address(index, *address, *length)) {
            // IPv6 addresses went with the interface; a container may have taken others away.
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            result => result.context(|| format!("take {address}/{length} from {name}"))?,
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

    fn link(index: u32, mac: u8, is_virtio: bool) -> Link {
        Link {
            index,
            name: format!("eth{index}"),
            mac: [mac; 6],
            is_loopback: false,
            is_virtio,
        }
    }

    #[test]
    fn a_clones_interface_is_the_machines_only_one() {
        let found = |links: &[Link], origin| find(links, [2; 6], origin).map(|link| link.index).ok();
        let (dummy, template, own) = (link(1, 8, false), link(2, 9, true), link(3, 2, true));
        for (links, booted, cloned) in [
            (vec![dummy.clone(), template.clone()], None, Some(2)),
            (
                vec![dummy.clone(), template.clone(), own.clone()],
                Some(3),
                Some(3),
            ),
            (vec![template.clone(), link(4, 7, true)], None, None),
            (vec![dummy], None, None),
        ] {
            assert_eq!(found(&links, Origin::Booted), booted, "{links:?}");
            assert_eq!(found(&links, Origin::Cloned), cloned, "{links:?}");
        }
    }

    #[test]
    fn a_link_local_address_is_the_kernels() {
        let address = link_local([0x02, 0x11, 0x22, 0x33, 0x44, 0x55]);
        assert_eq!(address.to_string(), "fe80::11:22ff:fe33:4455");
    }

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
