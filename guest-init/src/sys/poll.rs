//! Readiness of descriptors.

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Watches `fd` with the event loop, for as long as the result lives.
///
/// # Errors
/// When the kernel cannot poll such a descriptor.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for its whole life, and AsyncFd owns it and hands out no `&mut`
    // to it here, so it is neither closed nor replaced while registered.
    let watched = unsafe { AsyncFd::register(fd) }?;
    Ok(watched)
}

/// As [`watch`], for exceptional conditions only (`EPOLLPRI`): how files of the kernel's tell that they have changed.
///
/// # Errors
/// When the kernel cannot poll such a descriptor.
pub fn watch_priority(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as in `watch`.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::PRIORITY) }?;
    Ok(watched)
}
