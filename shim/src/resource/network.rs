//! The sandbox's network device: tap and vhost-net descriptors.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{
    error::{Error, ErrorKind, Result},
    sys,
};

/// Open descriptors of the network device.
#[derive(Debug)]
pub struct Tap {
    /// The tap.
    pub tap_fd: OwnedFd,
    /// `/dev/vhost-net`, where the host has it.
    pub vhost_fd: Option<OwnedFd>,
}

/// Opens tap `name`, which is in the network namespace at `netns` when that is not empty, and vhost-net when there is one.
///
/// # Errors
/// There is no such tap or namespace, or it is in use.
pub fn open(name: &str, netns: &str) -> Result<Tap> {
    let tap = match netns {
        "" => sys::open_tap(name),
        netns => within(netns, || sys::open_tap(name)),
    };
    let tap = tap.map_err(|error| Error::io(format!("open tap {name:?}"), error))?;
    let vhost = OpenOptions::new().read(true).write(true).open("/dev/vhost-net");
    Ok(Tap {
        tap_fd: tap.into(),
        vhost_fd: vhost.ok().map(File::into),
    })
}

/// Does something in a network namespace, by a thread of its own: descriptors opened there stay with that.
fn within<T: Send>(netns: &str, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(netns)?;
    thread::scope(|scope| {
        let entered = move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            act()
        };
        let thread = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, entered)?;
        let panicked = |_| Err(io::Error::other("the thread in the network namespace panicked"));
        thread.join().unwrap_or_else(panicked)
    })
}

/// Parses `aa:bb:cc:dd:ee:ff`.
///
/// # Errors
/// `InvalidArgument`.
pub fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
        *byte = part
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .ok_or_else(|| bad_mac(text))?;
    }
    if parts.next().is_some() || mac[0] & 1 != 0 {
        return Err(bad_mac(text));
    }
    Ok(mac)
}

fn bad_mac(text: &str) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        format!("network.mac is {text:?}: give a unicast address like 02:00:00:00:00:01"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses() {
        assert_eq!(parse_mac("02:aB:00:00:00:ff").unwrap(), [2, 0xab, 0, 0, 0, 0xff]);
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02:00:00:00:00:0g",
            "+2:00:00:00:00:01",
            "01:00:00:00:00:01",
        ] {
            assert_eq!(
                parse_mac(bad).unwrap_err().kind(),
                ErrorKind::InvalidArgument,
                "{bad}"
            );
        }
    }
}
