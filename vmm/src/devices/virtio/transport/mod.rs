//! The virtio-mmio register block, version 2 (virtio 1.2, section 4.2.2), and the device status state machine.
//!
//! ```text
//!  0 -ACKNOWLEDGE-> -DRIVER-> (features) -FEATURES_OK-> (queues) -DRIVER_OK-> active
//!  ^                                                                            |
//!  +------------------------------- write of 0 (reset), any time ---------------+
//! ```
//! Steps out of order, cleared bits and register accesses that the current step does not permit change nothing and
//! are counted. `FEATURES_OK` is refused (does not stick) for features that were not offered or without
//! `VIRTIO_F_VERSION_1`. A device that cannot be activated shows `DEVICE_NEEDS_RESET`.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config as config;
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::counters::define_counters;
use super::device::feature;
use super::worker::{clear_event, event_fd};
use super::{ActivateError, Activation, Begin, Counters, DeviceQueue, NeedsReset, VirtioDevice};
use crate::bus::BusDevice;
use crate::irq::Interrupt;
use crate::memory::GuestMemory;

#[cfg(test)]
mod tests;

/// Length of the register block with configuration space, bytes.
pub const MMIO_REGION_BYTES: u64 = 0x1000;
/// Offset of `QueueNotify`: an ioeventfd per queue goes here, with the queue's index as 4 byte datamatch.
pub const QUEUE_NOTIFY_OFFSET: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Not assigned to anyone; Linux only prints it.
const VENDOR_ID: u32 = 0;

const ACKNOWLEDGE: u32 = config::VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = config::VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = config::VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = config::VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = config::VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = config::VIRTIO_CONFIG_S_FAILED;

define_counters!(
    /// What goes wrong between a driver and its transport.
    TransportCounters {
        /// Register accesses that the specification does not permit there, or then.
        protocol_errors,
        /// Activations.
        activations,
        /// Activations that failed.
        activation_failures,
        /// Devices whose notifications KVM does not signal, but should.
        kicks_not_connected,
    }
);

/// A device behind its registers. Lives on the MMIO bus.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Interrupt,
    needs_reset: NeedsReset,
    /// One per queue, the same over resets: they are registered with KVM once.
    kicks: Vec<EventFd>,
    queues: Vec<Queue>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    /// Connects the kicks of busy queues with KVM, until that is done. All notifications come to [`Self::kick`] before.
    connect: Option<ConnectKicks>,
    counters: Arc<TransportCounters>,
}

/// Connects kicks, of the queues from the first on, with KVM; `false` when it can't, and then they go on coming through the
/// registers.
pub type ConnectKicks = Box<dyn Fn(&[EventFd]) -> bool + Send>;

/// A device's registers and queues, for a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    device_type: u32,
    /// What it offered.
    device_features: u64,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    interrupt_status: u32,
    needs_reset: bool,
    queues: Vec<SavedQueue>,
    /// The device's own, see [`VirtioDevice::save`].
    device: Vec<u8>,
}

impl TransportState {
    /// What the device itself saved, when it is one of this type.
    #[must_use]
    pub fn of_device(&self, device_type: u32) -> Option<&[u8]> {
        (self.device_type == device_type).then_some(&self.device)
    }
}

/// One queue of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        SavedQueue {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl From<SavedQueue> for QueueState {
    fn from(saved: SavedQueue) -> Self {
        QueueState {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx_enabled,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        }
    }
}

/// Why a saved state does not fit a device.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another kind of device is in that place.
    #[error("the snapshot has virtio device {saved} where this VM has device {here}")]
    OtherDevice {
        /// Its device id (virtio 1.2, section 5).
        saved: u32,
        /// The id here.
        here: u32,
    },
    /// The host offers other features than when the snapshot was taken.
    #[error(
        "virtio device {device_type} offered features {saved:#x} in the snapshot and offers {here:#x} here"
    )]
    Features {
        /// Device id.
        device_type: u32,
        /// Then.
        saved: u64,
        /// Now.
        here: u64,
    },
    /// A queue that cannot be.
    #[error("the snapshot has an impossible queue of virtio device {device_type}")]
    Queue {
        /// Device id.
        device_type: u32,
    },
    /// The device itself cannot be what it was.
    #[error("the snapshot's state of virtio device {device_type} does not fit this one")]
    DeviceState {
        /// Device id.
        device_type: u32,
    },
    /// The device did not start.
    #[error("Failed to start virtio device {device_type} from the snapshot")]
    Activate {
        /// Device id.
        device_type: u32,
        /// The cause.
        #[source]
        source: ActivateError,
    },
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device_type", &self.device.device_type())
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind registers, in its reset state.
    ///
    /// # Errors
    /// No event descriptors left.
    ///
    /// # Panics
    /// When a queue size of the device is not a power of two.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory, interrupt: Interrupt) -> io::Result<Self> {
        let sizes = device.queue_max_sizes();
        let kicks = sizes.iter().map(|_| event_fd()).collect::<io::Result<_>>()?;
        let queues = sizes
            .iter()
            .map(|&size| Queue::new(size).expect("queue sizes are constants and powers of two"))
            .collect();
        let needs_reset = NeedsReset::new(interrupt.clone());
        Ok(MmioTransport {
            device,
            memory,
            interrupt,
            needs_reset,
            kicks,
            queues,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            connect: None,
            counters: Arc::new(TransportCounters::new("virtio")),
        })
    }

    /// Has KVM signal the events of busy queues from now on, or from the first notification on where the device can sleep until
    /// then. `connect` registers them as ioeventfds at [`QUEUE_NOTIFY_OFFSET`] with the index as datamatch. What is not connected is
    /// an exit to this process, and as good.
    pub fn connect_kicks(&mut self, connect: ConnectKicks) {
        self.connect = Some(connect);
        if !self.device.can_begin_later() {
            self.connect_now();
        }
    }

    fn connect_now(&mut self) {
        if let Some(connect) = self.connect.take() {
            let busy = &self.kicks[..self.device.n_busy_queues().min(self.kicks.len())];
            if !busy.is_empty() && !connect(busy) {
                self.counters.kicks_not_connected.increment();
            }
        }
    }

    /// Gives a device that waits for its driver's first notification its thread: its owner has something for it.
    pub fn wake(&mut self) {
        if self.device.wake().is_err() {
            self.needs_reset.raise();
        }
    }

    /// The device's interrupt, whose event is to be registered as irqfd.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Device ID (virtio 1.2, section 5).
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// The device's counters.
    pub fn counters(&self) -> Arc<dyn Counters> {
        Arc::new(Both {
            device: self.device.counters(),
            transport: Arc::clone(&self.counters),
        })
    }

    /// Stops the device between two requests. Guest memory and interrupt are used no more until [`Self::resume`]. `false` when
    /// the device was lost meanwhile, so that its driver must reset it.
    #[must_use]
    pub fn pause(&mut self) -> bool {
        let states = self.device.pause();
        let is_active = self.status & DRIVER_OK != 0 && !self.needs_reset.is_raised();
        if is_active && states.is_none() {
            self.needs_reset.raise();
            return false;
        }
        for (queue, state) in self.queues.iter_mut().zip(states.into_iter().flatten()) {
            // A state that came from a queue is one.
            if let Ok(paused) = Queue::try_from(state) {
                *queue = paused;
            }
        }
        true
    }

    /// Lets a paused device go on.
    pub fn resume(&mut self) {
        if self.device.resume().is_err() {
            self.needs_reset.raise();
        }
    }

    /// Registers and queues of a paused device.
    #[must_use]
    pub fn save(&self) -> TransportState {
        TransportState {
            device_type: self.device.device_type(),
            device_features: self.device.features(),
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt.status(),
            needs_reset: self.needs_reset.is_raised(),
            queues: self.queues.iter().map(|queue| queue.state().into()).collect(),
            device: self.device.save(),
        }
    }

    /// Puts a device that no driver has seen yet into a saved state, and starts it when it was active.
    ///
    /// # Errors
    /// [`RestoreError`]; the device is in its reset state or needs a reset.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let device_type = self.device.device_type();
        if state.device_type != device_type || state.queues.len() != self.queues.len() {
            return Err(RestoreError::OtherDevice {
                saved: state.device_type,
                here: device_type,
            });
        }
        if state.device_features != self.device.features() {
            return Err(RestoreError::Features {
                device_type,
                saved: state.device_features,
                here: self.device.features(),
            });
        }
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            let max_size = queue.max_size();
            *queue = Some(saved)
                .filter(|saved| saved.max_size == max_size)
                .and_then(|saved| Queue::try_from(QueueState::from(*saved)).ok())
                .ok_or(RestoreError::Queue { device_type })?;
        }
        if !self.device.load(&state.device) {
            return Err(RestoreError::DeviceState { device_type });
        }
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.interrupt.set_status(state.interrupt_status);
        if state.needs_reset {
            self.needs_reset.raise();
        } else if self.status & DRIVER_OK != 0 {
            self.counters.activations.increment();
            self.activate()
                .map_err(|source| RestoreError::Activate { device_type, source })?;
        }
        // An interrupt that was on its way when the device was saved has its status bit set, or comes from the kernel,
        // which does not tell. One too many does no harm.
        if state.interrupt_status != 0
            || (self.status & DRIVER_OK != 0 && self.device.kernel_raises_interrupts())
        {
            self.interrupt.raise_line();
        }
        Ok(())
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR_ID,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.device.features(), self.device_features_select),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected_queue()
                .map_or(0, |queue| u32::from(queue.max_size())),
            reg::VIRTIO_MMIO_QUEUE_READY => self.selected_queue().map_or(0, |queue| u32::from(queue.ready())),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => {
                let kernel = self.status & DRIVER_OK != 0 && self.device.kernel_raises_interrupts();
                self.interrupt.status() | if kernel { reg::VIRTIO_MMIO_INT_VRING } else { 0 }
            }
            reg::VIRTIO_MMIO_STATUS => {
                self.status
                    | if self.needs_reset.is_raised() {
                        NEEDS_RESET
                    } else {
                        0
                    }
            }
            // A region that does not exist has length and address -1.
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.device.config_generation(),
            _ => self.protocol_error(),
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NUM => match u16::try_from(value) {
                Ok(size) => self.configure_queue(|queue| !queue.ready() && queue.try_set_size(size).is_ok()),
                Err(_) => {
                    self.protocol_error();
                }
            },
            reg::VIRTIO_MMIO_QUEUE_READY => self.configure_queue(|queue| {
                queue.set_ready(value == 1);
                value <= 1
            }),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => self.set_ring(|q| q.set_desc_table_address(Some(value), None)),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.set_ring(|q| q.set_desc_table_address(None, Some(value)));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.set_ring(|q| q.set_avail_ring_address(Some(value), None));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.set_ring(|q| q.set_avail_ring_address(None, Some(value)));
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => self.set_ring(|q| q.set_used_ring_address(Some(value), None)),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_ring(|q| q.set_used_ring_address(None, Some(value))),
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            reg::VIRTIO_MMIO_SHM_SEL => {}
            _ => {
                self.protocol_error();
            }
        }
    }

    fn protocol_error(&self) -> u32 {
        self.counters.protocol_errors.increment();
        0
    }

    fn selected_queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn write_driver_features(&mut self, value: u32) {
        let negotiating = self.status & (DRIVER | FEATURES_OK | FAILED) == DRIVER;
        match self.driver_features_select {
            0 if negotiating => {
                self.driver_features = (self.driver_features & !u64::from(u32::MAX)) | u64::from(value);
            }
            1 if negotiating => {
                self.driver_features =
                    (self.driver_features & u64::from(u32::MAX)) | (u64::from(value) << 32);
            }
            // Bits above 63 do not exist; a driver may write zeroes there.
            _ if negotiating && value == 0 => {}
            _ => {
                self.protocol_error();
            }
        }
    }

    /// Changes the selected queue, which is possible between `FEATURES_OK` and `DRIVER_OK` and while it is not ready
    /// (except for taking the readiness back).
    fn configure_queue(&mut self, change: impl FnOnce(&mut Queue) -> bool) {
        let configurable = self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK;
        let queue = usize::try_from(self.queue_select)
            .ok()
            .and_then(|index| self.queues.get_mut(index));
        let done = match queue {
            Some(queue) if configurable => change(queue),
            _ => false,
        };
        if !done {
            self.protocol_error();
        }
    }

    fn set_ring(&mut self, change: impl FnOnce(&mut Queue)) {
        self.configure_queue(|queue| {
            let configurable = !queue.ready();
            if configurable {
                change(queue);
            }
            configurable
        });
    }

    fn kick(&mut self, index: u32) {
        let kick = usize::try_from(index)
            .ok()
            .and_then(|index| self.kicks.get(index));
        match kick {
            // A kick before DRIVER_OK is kept by the event, as it is when it comes through an ioeventfd.
            Some(kick) => {
                // A full counter is readable, which is all a kick has to achieve.
                let _ = kick.write(1);
                self.connect_now();
                self.wake();
            }
            None => {
                self.protocol_error();
            }
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // The driver may not clear bits (virtio 1.2, 2.1.1), but need not repeat what the device set.
        if value & self.status & !(NEEDS_RESET | FAILED) != self.status & !(NEEDS_RESET | FAILED) {
            self.protocol_error();
            return;
        }
        if value & FAILED != 0 {
            self.status |= FAILED;
            return;
        }
        let steps = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
        let mut required = 0;
        for step in steps {
            if value & step != 0 && self.status & step == 0 {
                if self.status & (required | FAILED) != required || !self.take_step(step) {
                    self.protocol_error();
                    return;
                }
                self.status |= step;
            }
            required |= step;
        }
    }

    /// Does what a new status bit asks for; `false` refuses the bit.
    fn take_step(&mut self, step: u32) -> bool {
        match step {
            FEATURES_OK => {
                self.driver_features & !self.device.features() == 0
                    && self.driver_features & feature(config::VIRTIO_F_VERSION_1) != 0
            }
            DRIVER_OK => {
                // The bit sticks even when the device cannot start: the driver learns it from NEEDS_RESET.
                self.counters.activations.increment();
                if self.activate().is_err() {
                    self.counters.activation_failures.increment();
                    self.needs_reset.raise();
                }
                true
            }
            _ => true,
        }
    }

    fn activate(&mut self) -> Result<(), ActivateError> {
        let event_idx =
            self.driver_features & feature(virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX) != 0;
        let n_queues = self.device.n_queues(self.driver_features);
        let mut queues = Vec::with_capacity(n_queues);
        for (index, (queue, kick)) in self.queues.iter().zip(&self.kicks).take(n_queues).enumerate() {
            if !queue.is_valid(&self.memory) {
                return Err(ActivateError::Queue { index });
            }
            let mut queue = Queue::try_from(queue.state()).map_err(|_| ActivateError::Queue { index })?;
            queue.set_event_idx(event_idx);
            let kick = kick.try_clone().map_err(|source| ActivateError::Host {
                action: "duplicate a kick event",
                source,
            })?;
            queues.push(DeviceQueue::new(queue, kick));
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            interrupt: self.interrupt.clone(),
            queues,
            features: self.driver_features,
            needs_reset: self.needs_reset.clone(),
            begin: match &self.connect {
                Some(_) => Begin::WhenNotified,
                // A notification may not come here.
                None => Begin::AtOnce,
            },
        })
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        for kick in &self.kicks {
            clear_event(kick);
        }
        self.needs_reset.clear();
        self.interrupt.acknowledge(u32::MAX);
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            Some(config_offset) => self.device.read_config(config_offset, data),
            None => match (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
                (Ok(offset), Ok(data)) => *data = self.read_register(offset).to_le_bytes(),
                _ => {
                    self.protocol_error();
                }
            },
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            Some(config_offset) if self.status & DRIVER != 0 => self.device.write_config(config_offset, data),
            Some(_) => {
                self.protocol_error();
            }
            None => match (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
                (Ok(offset), Ok(data)) => self.write_register(offset, u32::from_le_bytes(data)),
                _ => {
                    self.protocol_error();
                }
            },
        }
    }
}

/// The 32 bits of `features` that the guest selected.
fn half(features: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted & u64::from(u32::MAX)).expect("masked to 32 bits")
}

/// The counters of a device, and of its transport under names that begin with the device's.
#[derive(Debug)]
struct Both {
    device: Arc<dyn Counters>,
    transport: Arc<TransportCounters>,
}

impl Counters for Both {
    fn collect(&self, into: &mut BTreeMap<String, u64>) {
        self.device.collect(into);
        // Over all devices: one number each is enough to see a misbehaving driver.
        let mut transport = BTreeMap::new();
        self.transport.collect(&mut transport);
        for (name, value) in transport {
            *into.entry(name).or_default() += value;
        }
    }
}
