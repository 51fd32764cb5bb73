//! A tap interface: Ethernet frames behind a `virtio_net_hdr`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::file;
use super::iovec::GuestIovecs;

/// Length of `struct virtio_net_hdr_v1`, which precedes every frame.
pub const VNET_HEADER_BYTES: usize = 12;

/// An attached tap, non-blocking.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// It is a tap; tests use packet sockets, which know no offloads.
    has_offloads: bool,
}

impl Tap {
    /// Takes a tap opened with `IFF_NO_PI | IFF_VNET_HDR`.
    ///
    /// # Errors
    /// It is no tap, or the kernel does not know the header.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let size = libc::c_int::try_from(VNET_HEADER_BYTES).expect("12");
        // SAFETY: the kernel reads an int at the pointer, which is one that lives until after the call.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        check(result)?;
        Tap::non_blocking(fd, true)
    }

    /// Takes one end of a packet socket pair in the place of a tap.
    ///
    /// # Errors
    /// None that matter.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_packet_socket(fd: OwnedFd) -> io::Result<Self> {
        Tap::non_blocking(fd, false)
    }

    fn non_blocking(fd: OwnedFd, has_offloads: bool) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Tap { fd, has_offloads })
    }

    /// Says which frames the reader of the tap takes: a set of `TUN_F_*`.
    ///
    /// # Errors
    /// `EINVAL` for sets that the kernel does not know.
    pub fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        if !self.has_offloads {
            return Ok(());
        }
        // SAFETY: the argument is a number, not a pointer.
        let result = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        };
        check(result)
    }

    /// Reads a frame with its header; what does not fit is lost.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    /// Writes a frame with its header from guest memory.
    ///
    /// # Errors
    /// The frame is not one, or the interface is down or full.
    pub fn write(&self, frame: &GuestIovecs<'_>) -> io::Result<()> {
        file::write(&self.fd, frame).map(|_| ())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A real tap with something on its other side, for tests that may run where taps can be made.
#[cfg(test)]
pub(crate) mod testing {
    use std::fs::{File, OpenOptions};
    use std::os::fd::FromRawFd;

    use super::*;

    /// For local experiments (IEEE 802): the kernel itself neither sends nor answers it.
    pub(crate) const ETHER_TYPE: u16 = 0x88b5;

    /// A tap, up, and a packet socket that speaks [`ETHER_TYPE`] on its interface.
    pub(crate) fn open() -> io::Result<(OwnedFd, File)> {
        let tap: OwnedFd = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?
            .into();
        // SAFETY: an ifreq of zeroes is an unnamed interface.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags =
            libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
        // SAFETY: the kernel reads and writes the ifreq, which lives until after the call.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        // SAFETY: a socket call has no pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                i32::from(ETHER_TYPE.to_be()),
            )
        };
        check(fd)?;
        // SAFETY: the call above made the descriptor, and nobody else has it.
        let socket = unsafe { File::from_raw_fd(fd) };
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap();
        // SAFETY: as above.
        check(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request) })?;
        // SAFETY: as above.
        check(unsafe { libc::ioctl(fd, libc::SIOCGIFINDEX, &raw mut request) })?;
        // SAFETY: a sockaddr_ll of zeroes is an address of nothing.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = ETHER_TYPE.to_be();
        // SAFETY: SIOCGIFINDEX has filled this member.
        address.sll_ifindex = unsafe { request.ifr_ifru.ifru_ifindex };
        let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        // SAFETY: the address lives until after the call and has this length.
        check(unsafe { libc::bind(fd, (&raw const address).cast(), length) })?;
        Ok((tap, socket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_tap_knows_header_and_offloads() {
        match testing::open() {
            Ok((fd, _socket)) => {
                let tap = Tap::new(fd).unwrap();
                tap.set_offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6)
                    .unwrap();
                tap.set_offloads(0).unwrap();
            }
            Err(e) => eprintln!("SKIPPED: this machine gives no tap: {e}"),
        }
    }

    #[test]
    fn other_files_are_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(Tap::new(file.into()).is_err());
    }
}
