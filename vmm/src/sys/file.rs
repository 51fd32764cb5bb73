//! File and socket I/O straight to and from guest memory.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::iovec::GuestIovecs;

/// Reads at `offset` of a file into guest memory: the bytes read, 0 at the end of the file.
///
/// # Errors
/// Those of preadv(2); `EINVAL` for an offset that no file has.
pub fn read_at(file: &impl AsFd, into: &GuestIovecs<'_>, offset: u64) -> io::Result<usize> {
    let (pointer, count) = raw(into);
    let offset = file_offset(offset)?;
    retry(|| {
        // SAFETY: the list was made from mapped guest memory, which `into` borrows until after the call; guest memory is
        // plain bytes that anyone may write at any time.
        unsafe { libc::preadv(file.as_fd().as_raw_fd(), pointer, count, offset) }
    })
}

/// Writes guest memory at `offset` of a file: the bytes written.
///
/// # Errors
/// Those of pwritev(2); `EINVAL` for an offset that no file has.
pub fn write_at(file: &impl AsFd, from: &GuestIovecs<'_>, offset: u64) -> io::Result<usize> {
    let (pointer, count) = raw(from);
    let offset = file_offset(offset)?;
    retry(|| {
        // SAFETY: the list was made from mapped guest memory, which `from` borrows until after the call.
        unsafe { libc::pwritev(file.as_fd().as_raw_fd(), pointer, count, offset) }
    })
}

/// Reads from a stream or packet descriptor into guest memory.
///
/// # Errors
/// Those of readv(2); `WouldBlock` when it is non-blocking and has nothing.
pub fn read(file: &impl AsFd, into: &GuestIovecs<'_>) -> io::Result<usize> {
    let (pointer, count) = raw(into);
    retry(|| {
        // SAFETY: as in `read_at`.
        unsafe { libc::readv(file.as_fd().as_raw_fd(), pointer, count) }
    })
}

/// Writes guest memory to a stream or packet descriptor.
///
/// # Errors
/// Those of writev(2).
pub fn write(file: &impl AsFd, from: &GuestIovecs<'_>) -> io::Result<usize> {
    let (pointer, count) = raw(from);
    retry(|| {
        // SAFETY: as in `write_at`.
        unsafe { libc::writev(file.as_fd().as_raw_fd(), pointer, count) }
    })
}

/// Sends guest memory to a socket: never blocks, and a closed peer is an error, not a signal.
///
/// # Errors
/// Those of sendmsg(2); `WouldBlock` when the socket takes nothing now.
pub fn send(socket: &impl AsFd, from: &GuestIovecs<'_>) -> io::Result<usize> {
    // SAFETY: a msghdr of zeroes is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = from.as_slice().as_ptr().cast_mut();
    message.msg_iovlen = from.as_slice().len();
    retry(|| {
        // SAFETY: the list was made from mapped guest memory, which `from` borrows until after the call; the kernel does
        // not write to the list of a sent message.
        unsafe {
            libc::sendmsg(
                socket.as_fd().as_raw_fd(),
                &raw const message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        }
    })
}

/// Receives from a socket into guest memory, never blocking: 0 at the end of the stream.
///
/// # Errors
/// Those of recvmsg(2); `WouldBlock` when the socket has nothing now.
pub fn receive(socket: &impl AsFd, into: &GuestIovecs<'_>) -> io::Result<usize> {
    // SAFETY: a msghdr of zeroes is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = into.as_slice().as_ptr().cast_mut();
    message.msg_iovlen = into.as_slice().len();
    retry(|| {
        // SAFETY: the list was made from mapped guest memory, which `into` borrows until after the call; the kernel writes
        // to what the list points at, not to the list.
        unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })
}

fn raw(iovecs: &GuestIovecs<'_>) -> (*const libc::iovec, libc::c_int) {
    let count =
        libc::c_int::try_from(iovecs.as_slice().len()).expect("a list has at most MAX_IOVECS entries");
    (iovecs.as_slice().as_ptr(), count)
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
