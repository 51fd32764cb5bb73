//! Pipes, terminals and sockets as one non-blocking type.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    buffer::spare_capacity,
    net::{self, Shutdown},
};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// A descriptor that readiness can be waited for.
#[derive(Debug)]
pub struct Stream {
    fd: AsyncFd<OwnedFd>,
}

impl Stream {
    /// Takes `fd` over and makes it non-blocking.
    ///
    /// # Errors
    /// When the descriptor cannot be polled.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self {
            fd: sys::poll::watch(fd)?,
        })
    }

    /// Reads at most `max_bytes`, at least one byte; nothing is the end. A terminal whose last user has gone is at its end
    /// too. Memory is taken only when there is something to read. Cancelling loses nothing.
    ///
    /// # Errors
    /// What `read` answers.
    pub async fn read(&self, max_bytes: usize) -> io::Result<Vec<u8>> {
        loop {
            let mut ready = self.fd.readable().await?;
            let result = ready.try_io(|fd| {
                let mut chunk = Vec::with_capacity(max_bytes);
                rustix::io::read(fd, spare_capacity(&mut chunk))?;
                Ok(chunk)
            });
            match result {
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(Vec::new()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes at least one byte.
    ///
    /// # Errors
    /// What `write` answers.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.fd.writable().await?;
            match ready.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// What `write` answers.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.write(bytes).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Waits for a connection on a listening socket.
    ///
    /// # Errors
    /// What `accept` answers.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let mut ready = self.fd.readable().await?;
            match ready.try_io(|fd| Ok(net::accept_with(fd, net::SocketFlags::CLOEXEC)?)) {
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes what fits at once.
    ///
    /// # Errors
    /// What `write` answers; `WouldBlock` when nothing fits.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(self.fd.get_ref(), bytes)?)
    }

    /// Bytes that can be read at once.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn readable_bytes(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(self.fd.get_ref())?)
    }

    /// Tells the other end of a socket that nothing more comes.
    pub fn finish(&self) {
        // The other end may have gone, which says the same.
        let _ = net::shutdown(self.fd.get_ref(), Shutdown::Write);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}
