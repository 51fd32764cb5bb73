//! What a virtio device is to its transport, and what it is given when its driver is ready.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::QueueState;

use super::{Counters, DeviceQueue};
use crate::irq::{Interrupt, InterruptCause};
use crate::memory::GuestMemory;

/// Feature bits every device here offers: virtio 1.x, indirect descriptors and notification suppression by index.
pub const COMMON_FEATURES: u64 = feature(virtio_bindings::virtio_config::VIRTIO_F_VERSION_1)
    | feature(virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC)
    | feature(virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX);

/// The mask of one feature bit given by its number.
pub const fn feature(bit: u32) -> u64 {
    1 << bit
}

/// Everything a worker half needs, handed over when the driver sets `DRIVER_OK`.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The device's interrupt.
    pub interrupt: Interrupt,
    /// As many as [`VirtioDevice::n_queues`] says, in the order of [`VirtioDevice::queue_max_sizes`].
    pub queues: Vec<DeviceQueue>,
    /// The features both sides agreed on, a subset of [`VirtioDevice::features`].
    pub features: u64,
    /// Tells the driver that the device cannot go on.
    pub needs_reset: NeedsReset,
    /// When the worker half gets its thread.
    pub begin: Begin,
}

/// When a worker half gets its thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Now.
    AtOnce,
    /// When the driver notifies the device, which [`VirtioDevice::wake`] then tells it, or now when it can't wait for that.
    WhenNotified,
}

/// Sets `DEVICE_NEEDS_RESET` in the device status (virtio 1.2, 2.1.2).
#[derive(Debug, Clone)]
pub struct NeedsReset {
    flag: Arc<AtomicBool>,
    interrupt: Interrupt,
}

impl NeedsReset {
    pub(super) fn new(interrupt: Interrupt) -> Self {
        NeedsReset {
            flag: Arc::default(),
            interrupt,
        }
    }

    /// Sets the bit and notifies the driver. The worker does nothing more until it is stopped by the reset.
    pub fn raise(&self) {
        if !self.flag.swap(true, Ordering::AcqRel) {
            self.interrupt.trigger(InterruptCause::ConfigChange);
        }
    }

    /// The bit is set.
    pub fn is_raised(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }

    pub(super) fn clear(&self) {
        self.flag.store(false, Ordering::Release);
    }
}

/// Why a device could not start. The driver sees `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left a queue unconfigured, or placed it outside of memory.
    #[error("queue {index} is not set up or not inside guest memory")]
    Queue {
        /// The queue.
        index: usize,
    },
    /// A host resource could not be made.
    #[error("Failed to {action}")]
    Host {
        /// What was tried, as verb and object.
        action: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The backend was lost in an earlier failure.
    #[error("the backend of this device was lost in an earlier failure")]
    BackendLost,
}

/// The transport half of a device.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Features offered, [`COMMON_FEATURES`] included. Constant.
    fn features(&self) -> u64;

    /// Largest size of each queue, powers of two. Constant.
    fn queue_max_sizes(&self) -> &[u16];

    /// How many of the queues a driver with these features sets up, from the first on: all, unless some come with a
    /// feature only.
    fn n_queues(&self, _features: u64) -> usize {
        self.queue_max_sizes().len()
    }

    /// How many of the queues, from the first on, the driver notifies often. They get an event that KVM signals by itself;
    /// a notification of the others is an exit to this process. Constant.
    fn n_busy_queues(&self) -> usize {
        self.queue_max_sizes().len()
    }

    /// The worker half can wait for [`VirtioDevice::wake`], see [`Begin`]. Constant.
    fn can_begin_later(&self) -> bool {
        false
    }

    /// Gives the worker half its thread, when it waits for that.
    ///
    /// # Errors
    /// The device is inactive then.
    fn wake(&mut self) -> Result<(), ActivateError> {
        Ok(())
    }

    /// `ConfigGeneration`: differs whenever fields of the configuration space that the driver reads in several accesses
    /// may have changed in between (virtio 1.2, 2.5.1).
    fn config_generation(&self) -> u32 {
        0
    }

    /// Fills `data` from the configuration space at `offset`; bytes past its end read as zero. Any offset and length.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the configuration space; ignored where the device has nothing writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts the worker half. Called in the inactive state only: at first, or after [`VirtioDevice::reset`]. The queues
    /// of a restored device are where its worker half was paused.
    ///
    /// # Errors
    /// The device stays inactive.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the worker half, if there is one, and takes its backend back. When it returns, guest memory and
    /// interrupt are used no more.
    fn reset(&mut self);

    /// Stops the worker half between two requests and tells where it is in each queue; `None` when it is inactive.
    /// When it returns, guest memory and interrupt are used no more until [`VirtioDevice::resume`].
    fn pause(&mut self) -> Option<Vec<QueueState>>;

    /// Lets a paused worker half go on; does nothing when there is none.
    ///
    /// # Errors
    /// The device is inactive then.
    fn resume(&mut self) -> Result<(), ActivateError>;

    /// What of a paused device is neither in its registers nor in its queues, for a snapshot: nothing, for most.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes what [`VirtioDevice::save`] of such a device gave, before it is activated; `false` when it does not fit.
    fn load(&mut self, saved: &[u8]) -> bool {
        saved.is_empty()
    }

    /// What the device counted since it was made.
    fn counters(&self) -> Arc<dyn Counters>;

    /// Interrupts come from the kernel, which cannot set `InterruptStatus`: the used-buffer bit then always reads
    /// as set (a spurious look at the rings is harmless).
    fn kernel_raises_interrupts(&self) -> bool {
        false
    }
}

/// Copies from a configuration structure for [`VirtioDevice::read_config`].
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
    else {
        return;
    };
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
}
