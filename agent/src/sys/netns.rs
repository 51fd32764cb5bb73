//! Network namespaces (network_namespaces(7)) that stay while nobody is in them, as a mount each, and what is done in one: by a
//! thread of its own, which ends with that.

use std::{fs::File, io, os::fd::AsFd, path::Path, thread};

use rustix::{
    io::Errno,
    mount::{UnmountFlags, mount_bind, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

const OWN: &str = "/proc/thread-self/ns/net";

/// Makes a network namespace that is found at `path`, a new file in a directory that exists.
///
/// # Errors
/// Those of the kernel; `AlreadyExists` when there is such a file.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    File::create_new(path)?;
    in_thread(|| {
        // SAFETY: of what threads share, the network namespace is no memory and no descriptor, and this thread does nothing
        // but the next line before it ends.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        Ok(mount_bind(OWN, path)?)
    })
}

/// Removes what [`create`] made, whether or not it got that far. Interfaces in it go with it once nobody is in there.
///
/// # Errors
/// Those of the kernel.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        // Made, but nothing mounted; or gone.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Does something in the network namespace at `path`.
///
/// # Errors
/// It can't be entered; else those of `act`.
pub(crate) fn within<T: Send>(path: &Path, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    in_thread(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        act()
    })
}

fn in_thread<T: Send>(act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, act)?;
        let panicked = |_| Err(io::Error::other("the thread in the network namespace panicked"));
        thread.join().unwrap_or_else(panicked)
    })
}
