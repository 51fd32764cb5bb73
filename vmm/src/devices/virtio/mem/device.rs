//! The transport half, and the owner's handle.

use std::sync::Arc;

use virtio_queue::QueueState;
use vm_memory::GuestAddress;

use super::blocks::{self, Blocks};
use super::shared::{ResizeError, Shared};
use super::worker::Worker;
use super::{DEVICE_TYPE, QUEUE_SIZES, REQUEST_QUEUE};
use crate::devices::virtio::device::{COMMON_FEATURES, read_config_bytes};
use crate::devices::virtio::worker::WorkerHalf;
use crate::devices::virtio::{ActivateError, Activation, Counters, VirtioDevice};

/// A virtio-mem device.
#[derive(Debug)]
pub struct Mem {
    shared: Arc<Shared>,
    worker: WorkerHalf<Worker>,
}

/// What the owner can do with it. Clones are the same device.
#[derive(Debug, Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

impl Mem {
    /// An inactive device with nothing plugged. Its region is part of guest memory, and `region_bytes` a multiple of 128 MiB
    /// (smaller pieces Linux can't use).
    #[must_use]
    pub fn new(address: GuestAddress, region_bytes: u64) -> (Self, MemHandle) {
        let shared = Arc::new(Shared::new(Blocks::new(address.0, region_bytes)));
        let handle = MemHandle {
            shared: Arc::clone(&shared),
        };
        let worker = WorkerHalf::Inactive;
        let device = Mem { shared, worker };
        (device, handle)
    }
}

impl MemHandle {
    /// Asks the guest to have that much of the region, in all. The guest follows as it can: growing takes milliseconds,
    /// shrinking waits until it can move what is in the way. How far it is, is among the counters (`mem_plugged_bytes`).
    ///
    /// # Errors
    /// [`ResizeError`]; then the old size stays.
    pub fn resize(&self, plugged_mib: u64) -> Result<(), ResizeError> {
        self.shared.resize(plugged_mib)
    }
}

/// Whether the guest of a snapshot has memory plugged, or is to have: by what the device saved.
#[must_use]
pub fn is_in_use(saved: &[u8]) -> bool {
    !blocks::is_untouched(saved)
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config_generation(&self) -> u32 {
        self.shared.generation()
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

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let worker = Worker {
            memory: activation.memory,
            interrupt: activation.interrupt,
            needs_reset: activation.needs_reset,
            queue: activation.queues.swap_remove(REQUEST_QUEUE),
            shared: Arc::clone(&self.shared),
        };
        let interrupt = worker.interrupt.clone();
        self.worker = WorkerHalf::start("mem", worker, activation.begin)?;
        self.shared.announce_on(Some(interrupt));
        Ok(())
    }

    /// Plugged blocks stay plugged: a driver that starts anew has them unplugged first (virtio 1.2, 5.15.5.1).
    fn reset(&mut self) {
        self.shared.announce_on(None);
        self.worker.take();
    }

    fn pause(&mut self) -> Option<Vec<QueueState>> {
        self.shared.announce_on(None);
        self.worker.pause()
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        let interrupt = self.worker.paused().map(|worker| worker.interrupt.clone());
        self.worker.resume()?;
        if interrupt.is_some() {
            self.shared.announce_on(interrupt);
        }
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        self.shared.blocks().save()
    }

    fn load(&mut self, saved: &[u8]) -> bool {
        let fits = self.shared.change(|blocks| blocks.load(saved));
        if fits && is_in_use(saved) {
            // The snapshot may have been taken before its driver was told of a size.
            self.shared.announce();
        }
        fits
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.shared) as Arc<dyn Counters>
    }
}
