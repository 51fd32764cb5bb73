//! virtio-balloon (virtio 1.2, 5.5): memory that the guest does not use goes back to the host. One thread, `balloon`, while
//! active. Three ways, all of them ending in [`crate::memory::discard`]:
//!
//! - *free page reporting*: the guest names pages that are on its free lists, all by itself. This is what returns the
//!   memory of a burst;
//! - *inflating*: the guest gives up as much as the owner asked for ([`BalloonHandle::set_target`]), and takes it back
//!   when the target falls, or before it would kill a process for want of memory (`VIRTIO_BALLOON_F_DEFLATE_ON_OOM`);
//! - *statistics*: what the guest says of its memory, refreshed whenever the counters are asked for.
//!
//! Content: without `VIRTIO_BALLOON_F_PAGE_POISON`, which is not offered, the guest may not rely on what is in pages that
//! it gave up or reported. (Linux does not report if it would have to: `virtballoon_validate`.) So it does not matter
//! whether zeroes or a template's pages come back. Free page *hints* are not offered: their driver may use a page again
//! before the device has seen the hint, so they must not be discarded.

mod device;
mod request;
mod shared;
#[cfg(test)]
mod tests;
mod worker;

#[cfg(any(test, fuzzing))]
pub(crate) use worker::fuzz;

pub use device::{Balloon, BalloonError, BalloonHandle};
pub use shared::BalloonCounters;

/// Feature bits (linux/virtio_balloon.h).
const F_STATS_QUEUE: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_REPORTING: u32 = 5;

/// The queues of all features. The two last exist with their feature only, and then follow each other: Linux numbers the
/// queues that exist, where virtio 1.2, 5.5.2 has fixed numbers.
const QUEUE_SIZES: [u16; 4] = [128; 4];
const INFLATE_QUEUE: usize = 0;
const DEFLATE_QUEUE: usize = 1;
/// Queues without any feature.
const N_FIXED_QUEUES: usize = 2;

/// Longest chain accepted. Linux reports 32 blocks at a time, in an indirect table.
const MAX_DESCRIPTORS: usize = 64;
/// Page numbers count 4 KiB pages, whatever the guest's page size is (`VIRTIO_BALLOON_PFN_SHIFT`).
const PFN_SHIFT: u32 = 12;
