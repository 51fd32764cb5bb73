//! The transport half, and the owner's handle.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::QueueState;

use super::shared::Shared;
use super::worker::{OptionalQueues, Worker};
use super::{F_DEFLATE_ON_OOM, F_REPORTING, F_STATS_QUEUE, N_FIXED_QUEUES, PFN_SHIFT, QUEUE_SIZES};
use crate::devices::virtio::device::{COMMON_FEATURES, feature, read_config_bytes};
use crate::devices::virtio::worker::WorkerHalf;
use crate::devices::virtio::{ActivateError, Activation, Counters, VirtioDevice};

/// Offset of `actual`, all that the driver may write.
const ACTUAL_OFFSET: u64 = 4;

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    worker: WorkerHalf<Worker>,
}

/// What the owner can do with a balloon. Clones are the same balloon.
#[derive(Debug, Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
    limit_mib: u64,
}

/// Why a balloon does not take a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BalloonError {
    /// It would take what the guest needs to live.
    #[error("a balloon of {target_mib} MiB is too large for this guest: give at most {limit_mib} MiB")]
    TooLarge {
        /// What was asked for.
        target_mib: u64,
        /// What can be.
        limit_mib: u64,
    },
}

impl Balloon {
    /// An inactive, empty balloon that the owner can blow up to `limit_mib`.
    ///
    /// # Errors
    /// No event descriptors left.
    pub fn new(limit_mib: u64) -> io::Result<(Self, BalloonHandle)> {
        let shared = Arc::new(Shared::new()?);
        let handle = BalloonHandle {
            shared: Arc::clone(&shared),
            limit_mib,
        };
        let worker = WorkerHalf::Inactive;
        Ok((Balloon { shared, worker }, handle))
    }
}

impl BalloonHandle {
    /// Asks the guest to give up that much memory in all, 0 to take everything back. The guest does so when it can; how
    /// far it is, is among the counters (`balloon_actual_bytes`, the guest's own account). The device is to be woken then, see
    /// [`VirtioDevice::wake`].
    ///
    /// # Errors
    /// [`BalloonError`]; then the old target stays.
    pub fn set_target(&self, target_mib: u64) -> Result<(), BalloonError> {
        let too_large = BalloonError::TooLarge {
            target_mib,
            limit_mib: self.limit_mib,
        };
        if target_mib > self.limit_mib {
            return Err(too_large);
        }
        // The configuration has 32 bits for the number of pages, which is 16 TiB.
        let pages = u32::try_from(target_mib << (20 - PFN_SHIFT)).map_err(|_| too_large)?;
        self.shared.set_target(pages);
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | feature(F_STATS_QUEUE) | feature(F_DEFLATE_ON_OOM) | feature(F_REPORTING)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn n_queues(&self, features: u64) -> usize {
        let has = |bit| usize::from(features & feature(bit) != 0);
        N_FIXED_QUEUES + has(F_STATS_QUEUE) + has(F_REPORTING)
    }

    fn n_busy_queues(&self) -> usize {
        0
    }

    fn can_begin_later(&self) -> bool {
        true
    }

    fn wake(&mut self) -> Result<(), ActivateError> {
        self.worker.wake()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(bytes)) = (offset, data.try_into()) {
            self.shared.set_actual(u32::from_le_bytes(bytes));
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let worker = Worker {
            memory: activation.memory,
            interrupt: activation.interrupt,
            needs_reset: activation.needs_reset,
            optional: OptionalQueues::of(activation.features),
            queues: activation.queues,
            held_stats: None,
            stats_due: false,
            shared: Arc::clone(&self.shared),
        };
        self.worker = WorkerHalf::start("balloon", worker, activation.begin)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.worker.take();
        // Pages in a balloon are the guest's again after a reset (virtio 1.2, 5.5.6).
        self.shared.set_actual(0);
    }

    fn pause(&mut self) -> Option<Vec<QueueState>> {
        self.worker.pause()
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.worker.resume()
    }

    /// The configuration space.
    fn save(&self) -> Vec<u8> {
        self.shared.config().to_vec()
    }

    fn load(&mut self, saved: &[u8]) -> bool {
        let ([target, actual], []) = saved.as_chunks() else {
            return false;
        };
        self.shared
            .load(u32::from_le_bytes(*target), u32::from_le_bytes(*actual));
        true
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.shared) as Arc<dyn Counters>
    }
}
