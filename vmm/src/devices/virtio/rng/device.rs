//! The transport half.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::QueueState;

use super::worker::Worker;
use super::{QUEUE_SIZES, REQUEST_QUEUE};
use crate::devices::virtio::counters::define_counters;
use crate::devices::virtio::device::{COMMON_FEATURES, read_config_bytes};
use crate::devices::virtio::worker::WorkerHalf;
use crate::devices::virtio::{ActivateError, Activation, Counters, VirtioDevice};

define_counters!(
    /// What an entropy device counts.
    RngCounters {
        /// Random bytes given.
        bytes,
        /// Requests answered.
        requests,
        /// Chains that are no request.
        bad_requests,
    }
);

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    counters: Arc<RngCounters>,
    worker: WorkerHalf<Worker>,
}

impl Rng {
    /// An inactive device.
    pub fn new() -> Self {
        Rng {
            counters: Arc::new(RngCounters::new("rng")),
            worker: WorkerHalf::Inactive,
        }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Rng::new()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
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
        read_config_bytes(&[], offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.swap_remove(REQUEST_QUEUE);
        let worker = Worker {
            memory: activation.memory,
            interrupt: activation.interrupt,
            needs_reset: activation.needs_reset,
            queue,
            counters: Arc::clone(&self.counters),
        };
        self.worker = WorkerHalf::start("rng", worker, activation.begin)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.worker.take();
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
