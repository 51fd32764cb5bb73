//! Randomness from the host.

use std::{fs::File, io, os::fd::AsFd};

use crate::sys::random;

/// Mixes `seed` into the kernel's pool and makes it take new keys from it: a guest born from a template shares its pool
/// with all others until then.
///
/// # Errors
/// What the kernel answers.
pub fn add(seed: &[u8]) -> io::Result<()> {
    let device = File::open("/dev/urandom")?;
    for part in seed.chunks(random::MAX_SEED_BYTES) {
        random::add_entropy(device.as_fd(), part)?;
    }
    Ok(())
}
