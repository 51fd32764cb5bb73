//! System calls that `rustix` does not wrap: the only place of this crate where `unsafe` may live.
#![allow(unsafe_code)]

pub mod block;
pub mod clone;
pub mod exec;
pub mod mount;
pub mod namespace;
pub mod poll;
pub mod random;
pub mod seccomp;
pub mod signal;

use std::io;

/// Turns the result of [`libc::syscall`] into a [`io::Result`].
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
