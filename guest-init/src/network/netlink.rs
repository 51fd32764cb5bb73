//! The few rtnetlink messages that are needed (`linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_link.h`).

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::OwnedFd,
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const HEADER_BYTES: usize = 16;
const IFINFO_BYTES: usize = 16;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFLA_PARENT_DEV_BUS_NAME: u16 = 57;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
const IFA_F_NODAD: u8 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    pub(super) is_loopback: bool,
    /// A network device of the machine's, not one made in the guest.
    pub(super) is_virtio: bool,
}

/// What to change on an interface before it is brought up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LinkChange<'a> {
    pub(super) name: Option<&'a str>,
    pub(super) mac: Option<[u8; 6]>,
    /// 0 leaves it.
    pub(super) mtu: u32,
}

/// A request without its header.
#[derive(Debug)]
pub(super) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    u8::try_from(family).expect("both are small")
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

impl Message {
    /// Brings interface `index` up after changing it.
    pub(super) fn bring_up(index: u32, change: LinkChange<'_>) -> Self {
        let mut message = Self::link(index, IFF_UP);
        let LinkChange { name, mac, mtu } = change;
        if let Some(mac) = mac {
            message.attribute(IFLA_ADDRESS, &mac);
        }
        if let Some(name) = name {
            let mut value = name.as_bytes().to_vec();
            value.push(0);
            message.attribute(IFLA_IFNAME, &value);
        }
        if mtu != 0 {
            message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
        }
        message
    }

    /// Makes the kernel give interface `index` no IPv6 address of its own accord.
    pub(super) fn no_automatic_address(index: u32) -> Self {
        let mut message = Self {
            kind: RTM_NEWLINK,
            flags: 0,
            body: vec![0; IFINFO_BYTES],
        };
        // Of struct ifinfomsg the index only: no flag changes.
        message.body[4..8].copy_from_slice(&index.to_ne_bytes());
        let inet6 = u16::from(family(IpAddr::V6(Ipv6Addr::UNSPECIFIED)));
        let mode = attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        message.attribute(IFLA_AF_SPEC, &attribute(inet6, &mode));
        message
    }

    /// Takes interface `index` down, which takes its routes and IPv6 addresses away.
    pub(super) fn take_down(index: u32) -> Self {
        Self::link(index, 0)
    }

    fn link(index: u32, flags: u32) -> Self {
        let mut message = Self {
            kind: RTM_NEWLINK,
            flags: 0,
            body: Vec::new(),
        };
        // struct ifinfomsg: family, padding, type, index, flags, mask of flags to change.
        message.body.extend([0; 4]);
        message.body.extend(index.to_ne_bytes());
        message.body.extend(flags.to_ne_bytes());
        message.body.extend(IFF_UP.to_ne_bytes());
        message
    }

    /// Gives interface `index` an address, replacing the same one.
    pub(super) fn add_address(index: u32, address: IpAddr, prefix_length: u8) -> Self {
        let mut message = Self::address(index, address, prefix_length);
        (message.kind, message.flags) = (RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE);
        message
    }

    /// Takes an address from interface `index`.
    pub(super) fn remove_address(index: u32, address: IpAddr, prefix_length: u8) -> Self {
        let mut message = Self::address(index, address, prefix_length);
        message.kind = RTM_DELADDR;
        message
    }

    fn address(index: u32, address: IpAddr, prefix_length: u8) -> Self {
        let mut message = Self {
            kind: 0,
            flags: 0,
            body: Vec::new(),
        };
        // struct ifaddrmsg. The host's address management knows of no duplicates, so none are looked for: an IPv6
        // address can be used at once.
        let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
        message.body.extend([family(address), prefix_length, flags, 0]);
        message.body.extend(index.to_ne_bytes());
        message.attribute(IFA_LOCAL, &octets(address));
        message.attribute(IFA_ADDRESS, &octets(address));
        message
    }

    /// Adds a default route.
    pub(super) fn add_default_route(index: u32, gateway: IpAddr) -> Self {
        let mut message = Self {
            kind: RTM_NEWROUTE,
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            body: Vec::new(),
        };
        // struct rtmsg: family, destination and source length, tos, table, protocol, scope, type, flags. The gateway
        // may lie outside the interface's own prefix (RTNH_F_ONLINK), as with /32 addresses.
        message.body.extend([
            family(gateway),
            0,
            0,
            0,
            RT_TABLE_MAIN,
            RTPROT_BOOT,
            0,
            RTN_UNICAST,
        ]);
        message.body.extend(RTNH_F_ONLINK.to_ne_bytes());
        message.attribute(RTA_OIF, &index.to_ne_bytes());
        message.attribute(RTA_GATEWAY, &octets(gateway));
        message
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.body.extend(attribute(kind, value));
    }
}

/// struct rtattr: length and type, then the value, padded.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("attributes here are short");
    let mut bytes = Vec::with_capacity(value.len() + 8);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An rtnetlink socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub(super) fn open() -> io::Result<Self> {
        // No protocol is protocol 0: NETLINK_ROUTE.
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends `message` and waits until the kernel has done it.
    pub(super) fn request(&mut self, message: Message) -> io::Result<()> {
        self.send(message, NLM_F_ACK)?;
        self.receive(|_, _| ())
    }

    /// All interfaces.
    pub(super) fn links(&mut self) -> io::Result<Vec<Link>> {
        let body = vec![0; IFINFO_BYTES];
        self.send(
            Message {
                kind: RTM_GETLINK,
                flags: 0,
                body,
            },
            NLM_F_DUMP,
        )?;
        let mut links = Vec::new();
        self.receive(|kind, body| {
            if kind == RTM_NEWLINK {
                links.extend(parse_link(body));
            }
        })?;
        Ok(links)
    }

    fn send(&mut self, message: Message, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let length = u32::try_from(HEADER_BYTES + message.body.len()).expect("messages here are short");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + message.body.len());
        // struct nlmsghdr: length, type, flags, sequence, port.
        bytes.extend(length.to_ne_bytes());
        bytes.extend(message.kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags | message.flags).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(message.body);
        send(&self.fd, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// Reads answers until the one that ends the request.
    fn receive(&self, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0; 32 << 10];
        loop {
            let (length, _) = recv(&self.fd, &mut buffer, RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some((header, body, next)) = split_message(rest) {
                rest = next;
                match header.kind {
                    _ if header.sequence != self.sequence => {}
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match u32_at(body, 0).map(u32::cast_signed) {
                            Some(0) => Ok(()),
                            Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
                            None => Err(io::ErrorKind::UnexpectedEof.into()),
                        };
                    }
                    kind => each(kind, body),
                }
            }
        }
    }
}

struct Header {
    kind: u16,
    sequence: u32,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Header, body, and what follows.
fn split_message(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
    let body = bytes.get(HEADER_BYTES..length)?;
    let header = Header {
        kind: u16_at(bytes, 4)?,
        sequence: u32_at(bytes, 8)?,
    };
    Some((
        header,
        body,
        bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]),
    ))
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4)?,
        name: String::new(),
        mac: [0; 6],
        is_loopback: u32_at(body, 8)? & IFF_LOOPBACK != 0,
        is_virtio: false,
    };
    let mut rest = body.get(IFINFO_BYTES..)?;
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let length = usize::from(length);
        let value = rest.get(4..length)?;
        match kind {
            IFLA_IFNAME => {
                link.name = String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned();
            }
            IFLA_ADDRESS => link.mac = value.try_into().unwrap_or([0; 6]),
            IFLA_PARENT_DEV_BUS_NAME => link.is_virtio = value == b"virtio\0",
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_read_back_from_its_message() {
        let mac = [2, 0, 0, 0, 0, 9];
        let change = LinkChange {
            name: Some("eth0"),
            mac: Some(mac),
            mtu: 1400,
        };
        for (bus, is_virtio) in [(&b"virtio\0"[..], true), (b"pci\0", false)] {
            let mut message = Message::bring_up(7, change);
            message.attribute(IFLA_PARENT_DEV_BUS_NAME, bus);
            assert_eq!(
                parse_link(&message.body).unwrap(),
                Link {
                    index: 7,
                    name: "eth0".into(),
                    mac,
                    is_loopback: false,
                    is_virtio,
                }
            );
        }
    }

    #[test]
    fn nested_attributes_are_laid_out_as_the_kernel_reads_them() {
        let message = Message::no_automatic_address(7);
        assert_eq!(message.body.len(), IFINFO_BYTES + 16);
        assert_eq!(u32_at(&message.body, 4), Some(7));
        assert_eq!(message.body[8..IFINFO_BYTES], [0; 8], "no flag changes");
        let at = |offset| u16_at(&message.body, IFINFO_BYTES + offset);
        assert_eq!((at(0), at(2)), (Some(16), Some(IFLA_AF_SPEC)));
        assert_eq!((at(4), at(6)), (Some(12), Some(10)));
        assert_eq!((at(8), at(10)), (Some(5), Some(IFLA_INET6_ADDR_GEN_MODE)));
        assert_eq!(message.body[IFINFO_BYTES + 12], IN6_ADDR_GEN_MODE_NONE);
    }

    #[test]
    fn cut_messages_are_no_links() {
        let message = Message::bring_up(7, LinkChange::default());
        for length in 0..IFINFO_BYTES {
            assert!(parse_link(&message.body[..length]).is_none());
        }
    }

    #[test]
    fn this_machine_has_a_loopback_interface() {
        let links = Socket::open().unwrap().links().unwrap();
        assert!(
            links.iter().any(|link| link.is_loopback && link.name == "lo"),
            "{links:?}"
        );
    }
}
