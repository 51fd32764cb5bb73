//! Randomness: from the host into the kernel, and out of the kernel.

use std::{fs::File, io, os::fd::AsFd};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::sys::random;

/// The kernel's random pool.
#[derive(Debug)]
pub struct Pool {
    device: File,
}

impl Pool {
    /// Opens it.
    ///
    /// # Errors
    /// When there is no `/dev/urandom`.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            device: File::open("/dev/urandom")?,
        })
    }

    /// Mixes `seed` in and makes the kernel's generator take new keys: a guest born from a template shares its pool with
    /// all others until then.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn add(&self, seed: &[u8]) -> io::Result<()> {
        seed.chunks(random::MAX_SEED_BYTES)
            .try_for_each(|part| random::add_entropy(self.device.as_fd(), part))
    }
}

/// Fills `bytes` from the kernel's generator; blocks until it is ready, once after the boot.
///
/// # Errors
/// What the kernel answers.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(length) => filled += length,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
