//! virtio-rng (virtio 1.2, 5.4): random bytes of the host for the guest. One thread, `rng`, while active.

mod device;
#[cfg(test)]
mod tests;
mod worker;

#[cfg(any(test, fuzzing))]
pub(crate) use worker::fuzz;

pub use device::{Rng, RngCounters};

/// The only queue: buffers to be filled.
const REQUEST_QUEUE: usize = 0;
const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes for one request; the rest of its buffer stays unused. Linux asks for 32 to 64 at a time.
const MAX_REQUEST_BYTES: usize = 4096;
/// Longest chain accepted.
const MAX_DESCRIPTORS: usize = 64;
