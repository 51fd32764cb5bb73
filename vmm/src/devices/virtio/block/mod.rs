//! virtio-blk (virtio 1.2, 5.2) for slice disks: wide, sparse disks on which host files are mapped at offsets.
//!
//! One thread per disk, `blk-vda` or `blk-vdb`, while active. A request becomes a [`request::Request`] (pure), is cut
//! into transfers along the extents it touches (`slices.rs`), and the transfers run on io_uring or, where that is refused,
//! one after the other (`engine.rs`).

mod device;
mod engine;
mod jobs;
mod request;
mod slices;
#[cfg(test)]
mod tests;
mod worker;

#[cfg(any(test, fuzzing))]
pub(crate) use worker::fuzz;

pub use device::{Block, BlockCounters};
pub use slices::{SliceError, SliceMap};

/// Sectors are this long whatever the disk's block size (virtio 1.2, 5.2.4).
const SECTOR_BYTES: u64 = 512;
/// The only queue.
const REQUEST_QUEUE: usize = 0;
const QUEUE_SIZES: [u16; 1] = [256];
/// Data segments in a request: a queue of descriptors less header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Bytes in a segment.
const MAX_SEGMENT_BYTES: u32 = 64 << 10;
/// Bytes in a request, which bounds the work that one descriptor chain causes.
const MAX_REQUEST_BYTES: usize = MAX_SEGMENTS as usize * MAX_SEGMENT_BYTES as usize;
/// Longest discard, 512-byte sectors. A hole costs the host the same whatever its length.
const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Longest write of zeroes, 512-byte sectors: on filesystems without `FALLOC_FL_ZERO_RANGE` they are written.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;
