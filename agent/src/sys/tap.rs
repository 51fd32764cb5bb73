//! Persistent tap interfaces (Linux `Documentation/networking/tuntap.rst`). They can't be made through netlink.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsFd,
};

use rustix::ioctl::{IntegerSetter, Opcode, Updater, ioctl};

/// linux/if_tun.h
const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETPERSIST: Opcode = 0x4004_54cb;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
/// linux/if.h, IFNAMSIZ with its terminating zero.
const NAME_BYTES: usize = 16;

/// struct ifreq of linux/if.h with `ifr_flags`.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: i16,
    rest: [u8; 22],
}

/// Makes a tap that stays when nobody holds it open. One of that name that is a tap already is left as it is.
///
/// # Errors
/// `InvalidInput` for a name that is no interface name; those of the kernel, `ResourceBusy` when somebody holds it.
pub(crate) fn create(name: &str) -> io::Result<()> {
    let file = attach(name)?;
    persist(&file)
}

fn attach(name: &str) -> io::Result<File> {
    let mut request = InterfaceRequest {
        name: [0; NAME_BYTES],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    if name.is_empty() || name.len() >= NAME_BYTES || name.bytes().any(|b| b == 0 || b == b'/') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is no interface name"),
        ));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads and writes a struct ifreq (linux/if.h, 40 bytes), which `InterfaceRequest` is: `repr(C)`,
    // its length tested below.
    let updater = unsafe { Updater::<TUNSETIFF, InterfaceRequest>::new(&mut request) };
    // SAFETY: the descriptor is of /dev/net/tun, opened above, where TUNSETIFF has the meaning used here.
    unsafe { ioctl(file.as_fd(), updater) }?;
    Ok(file)
}

fn persist(file: &File) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument by value (drivers/net/tun.c).
    let setter = unsafe { IntegerSetter::<TUNSETPERSIST>::new_usize(1) };
    // SAFETY: the descriptor is an attached /dev/net/tun (from `attach`), where TUNSETPERSIST has this meaning.
    unsafe { ioctl(file.as_fd(), setter) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_long_as_the_kernels() {
        assert_eq!(size_of::<InterfaceRequest>(), 40);
    }

    #[test]
    fn impossible_names_are_refused() {
        for name in ["", "0123456789abcdef", "a/b"] {
            assert_eq!(create(name).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
