//! The transport half.

use std::sync::Arc;

use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::QueueState;

use super::jobs::{DirtyFiles, Jobs};
use super::worker::Worker;
use super::{
    MAX_DISCARD_SECTORS, MAX_SEGMENT_BYTES, MAX_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, QUEUE_SIZES,
    REQUEST_QUEUE, SECTOR_BYTES, SliceMap,
};
use crate::config::{SLICE_DISK_BYTES, SliceDisk};
use crate::devices::virtio::counters::define_counters;
use crate::devices::virtio::device::{COMMON_FEATURES, feature, read_config_bytes};
use crate::devices::virtio::worker::WorkerHalf;
use crate::devices::virtio::{ActivateError, Activation, Counters, VirtioDevice};

define_counters!(
    /// What a disk counts.
    BlockCounters {
        /// Bytes read successfully.
        read_bytes,
        /// Bytes written successfully.
        write_bytes,
        /// Read requests.
        reads,
        /// Write requests.
        writes,
        /// Flush requests.
        flushes,
        /// Discard and write-zeroes requests.
        discards,
        /// Requests answered with an error, for whatever reason.
        failures,
        /// Chains that are no request and could not be answered.
        bad_requests,
        /// Transfers run on io_uring.
        io_uring_transfers,
    }
);

/// Length of `struct virtio_blk_config` as far as it is used.
const CONFIG_BYTES: usize = 60;
/// Physical blocks of 8 sectors: the page size, to which extents are aligned.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// A slice disk.
#[derive(Debug)]
pub struct Block {
    disk: SliceDisk,
    io_uring: bool,
    map: SliceMap,
    config: [u8; CONFIG_BYTES],
    counters: Arc<BlockCounters>,
    worker: WorkerHalf<Worker>,
    /// Written but not flushed before the last reset.
    dirty: DirtyFiles,
}

impl Block {
    /// An inactive disk without extents, and the handle by which they come and go. `io_uring` permits that engine; the
    /// synchronous one is taken where it is refused.
    pub fn new(disk: SliceDisk, io_uring: bool) -> (Self, SliceMap) {
        let map = SliceMap::default();
        let prefix = match disk {
            SliceDisk::ReadOnly => "blk_vda",
            SliceDisk::ReadWrite => "blk_vdb",
        };
        let block = Block {
            disk,
            io_uring,
            map: map.clone(),
            config: config(),
            counters: Arc::new(BlockCounters::new(prefix)),
            worker: WorkerHalf::Inactive,
            dirty: DirtyFiles::default(),
        };
        (block, map)
    }
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4). Nothing in it depends on what is mapped.
fn config() -> [u8; CONFIG_BYTES] {
    let sector_bytes = u32::try_from(SECTOR_BYTES).expect("512");
    let block_sectors = 1_u16 << PHYSICAL_BLOCK_EXP;
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(SLICE_DISK_BYTES / SECTOR_BYTES).to_le_bytes());
    put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &sector_bytes.to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXP]);
    put(26, &block_sectors.to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &1_u32.to_le_bytes());
    put(44, &u32::from(block_sectors).to_le_bytes());
    put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
    put(52, &1_u32.to_le_bytes());
    put(56, &[1]);
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let both = COMMON_FEATURES
            | feature(blk::VIRTIO_BLK_F_SIZE_MAX)
            | feature(blk::VIRTIO_BLK_F_SEG_MAX)
            | feature(blk::VIRTIO_BLK_F_BLK_SIZE)
            | feature(blk::VIRTIO_BLK_F_TOPOLOGY);
        both | match self.disk {
            SliceDisk::ReadOnly => feature(blk::VIRTIO_BLK_F_RO),
            SliceDisk::ReadWrite => {
                feature(blk::VIRTIO_BLK_F_FLUSH)
                    | feature(blk::VIRTIO_BLK_F_DISCARD)
                    | feature(blk::VIRTIO_BLK_F_WRITE_ZEROES)
            }
        }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn can_begin_later(&self) -> bool {
        true
    }

    fn wake(&mut self) -> Result<(), ActivateError> {
        self.worker.wake()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let name = match self.disk {
            SliceDisk::ReadOnly => "blk-vda",
            SliceDisk::ReadWrite => "blk-vdb",
        };
        let Activation {
            memory,
            interrupt,
            mut queues,
            features,
            needs_reset,
            begin,
        } = activation;
        let worker = Worker {
            disk: self.disk,
            map: self.map.clone(),
            counters: Arc::clone(&self.counters),
            memory,
            queue: queues.swap_remove(REQUEST_QUEUE),
            interrupt,
            needs_reset,
            jobs: Jobs::new(QUEUE_SIZES[REQUEST_QUEUE]),
            dirty: std::mem::take(&mut self.dirty),
            write_through: features & feature(blk::VIRTIO_BLK_F_FLUSH) == 0,
            io_uring: self.io_uring,
        };
        self.worker = WorkerHalf::start(name, worker, begin)?;
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.dirty = worker.dirty;
        }
    }

    fn pause(&mut self) -> Option<Vec<QueueState>> {
        self.worker.pause()
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.worker.resume()
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as Arc<dyn Counters>
    }
}
