//! The kernel's random pool (`linux/random.h`).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `_IOW('R', 0x03, int[2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// Most bytes mixed in by one call.
pub const MAX_SEED_BYTES: usize = 512;

#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    size_bytes: libc::c_int,
    data: [u8; MAX_SEED_BYTES],
}

/// Mixes the first [`MAX_SEED_BYTES`] of `seed` into the pool behind `random` (`/dev/urandom`), counts them as
/// entropy, and makes the kernel's generator take a new key from the pool.
///
/// # Errors
/// What the kernel answers.
pub fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    let seed = &seed[..seed.len().min(MAX_SEED_BYTES)];
    let size_bytes = libc::c_int::try_from(seed.len()).expect("at most 512");
    let mut pool = PoolInfo {
        entropy_bits: size_bytes * 8,
        size_bytes,
        data: [0; MAX_SEED_BYTES],
    };
    pool.data[..seed.len()].copy_from_slice(seed);
    // SAFETY: `pool` is laid out as struct rand_pool_info with `size_bytes` bytes of data, all inside the array.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw mut pool) };
    super::check(added.into())?;
    // SAFETY: takes no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    super::check(reseeded.into()).map(drop)
}
