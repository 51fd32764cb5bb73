//! virtio-mem (virtio 1.2, 5.15): memory that is plugged and unplugged while the guest runs, block by block. One thread,
//! `mem`, from the driver's first request on.
//!
//! Every sandbox has this device, and few ever use it: until the owner asks for a size there is no thread, no event of KVM's
//! for kicks, and the builder has not shown the region to KVM.
//!
//! The device owns a region of guest addresses above the base memory, mapped as a whole from the start, and backed by the
//! host only where it is touched. [`MemHandle::resize`] sets how much of it the guest is to have; the driver plugs and
//! unplugs blocks until it has that much, or as near as it can. What is unplugged goes back to the host at once.
//!
//! A hostile guest can touch blocks that it has not plugged: they are mapped, because the guest's devices must never find
//! a hole in guest memory. It gains nothing that a cgroup limit on the VMM does not bound, as everything else it touches.

mod blocks;
mod device;
mod request;
mod shared;
#[cfg(test)]
mod tests;
mod worker;

#[cfg(any(test, fuzzing))]
pub(crate) use worker::fuzz;

pub use device::{Mem, MemHandle, is_in_use};
pub use shared::{MemCounters, ResizeError};

/// The only queue: the driver's requests.
const REQUEST_QUEUE: usize = 0;
const QUEUE_SIZES: [u16; 1] = [64];
/// Longest chain accepted: a request and its answer, each in a few pieces at most.
const MAX_DESCRIPTORS: usize = 16;
/// `VIRTIO_ID_MEM` (linux/virtio_ids.h).
pub const DEVICE_TYPE: u32 = 24;
