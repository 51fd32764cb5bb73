//! The driver's side, for tests: it talks to a device through registers, rings and interrupts only.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EpollEvent;

use super::VirtioDevice;
use super::transport::MmioTransport;
use super::worker::Poller;
use crate::bus::BusDevice;
use crate::irq::Interrupt;
use crate::memory::GuestMemory;

/// Guest memory of the tests, bytes.
pub(super) const MEMORY_BYTES: usize = 64 << 20;
/// Tests put their buffers from here on.
pub(super) const HEAP: u64 = 1 << 20;
/// Longest wait for a device.
const PATIENCE: Duration = Duration::from_secs(20);

const RING_AREA_BYTES: u64 = 0x1_0000;
const AVAIL_OFFSET: u64 = 0x8000;
const USED_OFFSET: u64 = 0xa000;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffer {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) writable: bool,
}

/// A buffer that the device reads.
pub(super) fn readable(address: u64, length: usize) -> Buffer {
    Buffer {
        address,
        length: u32::try_from(length).unwrap(),
        writable: false,
    }
}

/// A buffer that the device writes.
pub(super) fn writable(address: u64, length: usize) -> Buffer {
    Buffer {
        address,
        length: u32::try_from(length).unwrap(),
        writable: true,
    }
}

#[derive(Debug)]
struct Ring {
    base: u64,
    size: u16,
    free: Vec<u16>,
    avail: u16,
    used: u16,
    chains: Vec<Vec<u16>>,
}

pub(super) struct Driver {
    pub(super) transport: MmioTransport,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    rings: Vec<Ring>,
    poller: Poller,
    /// Queues whose notifications a hypervisor would signal by itself.
    n_connected: Arc<AtomicUsize>,
}

impl Driver {
    /// A driver that has not touched its device.
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let interrupt = Interrupt::new().unwrap();
        let mut transport = MmioTransport::new(device, memory.clone(), interrupt.clone()).unwrap();
        let n_connected = Arc::<AtomicUsize>::default();
        let connected = Arc::clone(&n_connected);
        transport.connect_kicks(Box::new(move |kicks| {
            connected.fetch_add(kicks.len(), Ordering::Relaxed);
            true
        }));
        let poller = Poller::new().unwrap();
        poller.watch_readable(interrupt.event_fd(), 0).unwrap();
        Driver {
            transport,
            memory,
            interrupt,
            rings: Vec::new(),
            poller,
            n_connected,
        }
    }

    pub(super) fn n_connected(&self) -> usize {
        self.n_connected.load(Ordering::Relaxed)
    }

    /// A driver whose device is active with all features that it offers, `without` these.
    pub(super) fn start(device: Box<dyn VirtioDevice>, without: u64) -> Self {
        let mut driver = Driver::new(device);
        driver.negotiate(without);
        driver.set_up_queues();
        driver.set_status(0xf);
        assert_eq!(driver.status(), 0xf);
        driver
    }

    pub(super) fn read(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn write(&mut self, register: u32, value: u32) {
        self.transport.write(u64::from(register), &value.to_le_bytes());
    }

    pub(super) fn status(&mut self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    pub(super) fn set_status(&mut self, status: u32) {
        self.write(reg::VIRTIO_MMIO_STATUS, status);
    }

    pub(super) fn device_features(&mut self) -> u64 {
        self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        let high = self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES);
        self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        u64::from(high) << 32 | u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES))
    }

    pub(super) fn set_driver_features(&mut self, features: u64) {
        for select in 0..2 {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(
                reg::VIRTIO_MMIO_DRIVER_FEATURES,
                u32::try_from(features >> (32 * select) & 0xffff_ffff).unwrap(),
            );
        }
    }

    /// Up to `FEATURES_OK`.
    pub(super) fn negotiate(&mut self, without: u64) {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        let features = self.device_features() & !without;
        self.set_driver_features(features);
        self.set_status(11);
        assert_eq!(self.status(), 11);
    }

    pub(super) fn set_up_queues(&mut self) {
        self.set_up_n_queues(u32::MAX);
    }

    /// Sets up the first `n` queues only, or all there are.
    pub(super) fn set_up_n_queues(&mut self, n: u32) {
        self.rings.clear();
        for index in 0..n {
            self.write(reg::VIRTIO_MMIO_QUEUE_SEL, index);
            let size = self.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX);
            if size == 0 {
                break;
            }
            assert_eq!(self.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
            let base = RING_AREA_BYTES * u64::from(index);
            let zeroes = vec![0; usize::try_from(RING_AREA_BYTES).unwrap()];
            self.memory.write_slice(&zeroes, GuestAddress(base)).unwrap();
            self.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
            for (register, address) in [
                (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base),
                (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + AVAIL_OFFSET),
                (reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + USED_OFFSET),
            ] {
                self.write(register, u32::try_from(address).unwrap());
                self.write(register + 4, 0);
            }
            self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(self.read(reg::VIRTIO_MMIO_QUEUE_READY), 1);
            let size = u16::try_from(size).unwrap();
            self.rings.push(Ring {
                base,
                size,
                free: (0..size).rev().collect(),
                avail: 0,
                used: 0,
                chains: vec![Vec::new(); usize::from(size)],
            });
        }
    }

    pub(super) fn config(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.transport
            .read(u64::from(reg::VIRTIO_MMIO_CONFIG) + offset, &mut data);
        data
    }

    pub(super) fn free_descriptors(&self, queue: usize) -> usize {
        self.rings[queue].free.len()
    }

    pub(super) fn queue_size(&self, queue: usize) -> usize {
        usize::from(self.rings[queue].size)
    }

    pub(super) fn write_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let address = self.rings[queue].base + 16 * u64::from(index);
        self.memory.write_obj(descriptor, GuestAddress(address)).unwrap();
    }

    /// Makes a chain of `buffers` available, without a kick.
    pub(super) fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let indices: Vec<_> = {
            let free = &mut self.rings[queue].free;
            buffers
                .iter()
                .map(|_| free.pop().expect("free descriptors"))
                .collect()
        };
        for (position, buffer) in buffers.iter().enumerate() {
            let next = indices.get(position + 1).copied();
            let flags = if next.is_some() { VRING_DESC_F_NEXT } else { 0 }
                | if buffer.writable { VRING_DESC_F_WRITE } else { 0 };
            let flags = u16::try_from(flags).unwrap();
            let descriptor = Descriptor::new(buffer.address, buffer.length, flags, next.unwrap_or(0));
            self.write_descriptor(queue, indices[position], descriptor);
        }
        let head = indices[0];
        self.rings[queue].chains[usize::from(head)] = indices;
        self.publish(queue, head);
        head
    }

    /// Puts any index into the available ring.
    pub(super) fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.base + AVAIL_OFFSET + 4 + 2 * u64::from(ring.avail % ring.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        ring.avail = ring.avail.wrapping_add(1);
        let index = GuestAddress(ring.base + AVAIL_OFFSET + 2);
        self.memory.store(ring.avail, index, Ordering::SeqCst).unwrap();
    }

    /// Sets the available index without anything behind it.
    pub(super) fn corrupt_avail_index(&mut self, queue: usize, value: u16) {
        let index = GuestAddress(self.rings[queue].base + AVAIL_OFFSET + 2);
        self.memory.store(value, index, Ordering::SeqCst).unwrap();
    }

    pub(super) fn kick(&mut self, queue: usize) {
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, u32::try_from(queue).unwrap());
    }

    /// The next used chain, if there is one: its head and the bytes written.
    pub(super) fn try_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let used_base = ring.base + USED_OFFSET;
        let index: u16 = self
            .memory
            .load(GuestAddress(used_base + 2), Ordering::SeqCst)
            .unwrap();
        if index == ring.used {
            return None;
        }
        let slot = GuestAddress(used_base + 4 + 8 * u64::from(ring.used % ring.size));
        let [head, length]: [u32; 2] = self.memory.read_obj(slot).unwrap();
        let head = u16::try_from(head).unwrap();
        ring.used = ring.used.wrapping_add(1);
        // used_event: interrupt for the next one.
        let used_event = GuestAddress(ring.base + AVAIL_OFFSET + 4 + 2 * u64::from(ring.size));
        self.memory
            .store(ring.used, used_event, Ordering::SeqCst)
            .unwrap();
        ring.free.append(&mut ring.chains[usize::from(head)]);
        Some((head, length))
    }

    /// There is a used chain.
    pub(super) fn peek_used(&self, queue: usize) -> bool {
        let ring = &self.rings[queue];
        let index: u16 = self
            .memory
            .load(GuestAddress(ring.base + USED_OFFSET + 2), Ordering::SeqCst)
            .unwrap();
        index != ring.used
    }

    /// Waits for an interrupt.
    pub(super) fn wait_interrupt(&mut self) {
        self.wait_until("an interrupt", |driver| driver.interrupt.event_fd().read().ok());
    }

    /// The next used chain; waits for the interrupt that announces it.
    pub(super) fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        self.wait_until("a used buffer", |driver| driver.try_used(queue))
    }

    /// Calls `look` after every interrupt until it finds something.
    pub(super) fn wait_until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the device did not give {what} in {PATIENCE:?}");
            let mut events = [EpollEvent::default()];
            let left_ms = i32::try_from(left.as_millis()).unwrap();
            if !self.poller.wait(left_ms, &mut events).unwrap().is_empty() {
                // Somebody else may be looking for the interrupt itself.
                if let Some(found) = look(self) {
                    return found;
                }
                let _ = self.interrupt.event_fd().read();
            }
        }
    }

    pub(super) fn wait_needs_reset(&mut self) {
        self.wait_until("NEEDS_RESET", |driver| {
            (driver.status() & 0x40 != 0).then_some(())
        });
    }

    pub(super) fn write_memory(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn read_memory(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        let mut all = std::collections::BTreeMap::new();
        self.transport.counters().collect(&mut all);
        *all.get(name)
            .unwrap_or_else(|| panic!("no counter {name} in {all:?}"))
    }
}
