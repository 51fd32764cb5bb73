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
    #[cfg(test)]
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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    /// A real tap, where this machine lets us make one.
    fn open_tap() -> io::Result<OwnedFd> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: an ifreq of zeroes is an unnamed interface.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags =
            libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
        // SAFETY: the kernel reads and writes the ifreq, which lives until after the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        check(result)?;
        Ok(file.into())
    }

    #[test]
    fn real_tap_knows_header_and_offloads() {
        match open_tap() {
            Ok(fd) => {
                let tap = Tap::new(fd).unwrap();
                tap.set_offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6)
                    .unwrap();
                tap.set_offloads(0).unwrap();
                let mut buffer = [0; 2000];
                // The interface is down: no frame comes, and the read does not block.
                assert!(tap.read(&mut buffer).is_err());
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
