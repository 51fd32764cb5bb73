use super::super::testing::{Driver, HEAP, writable};
use super::super::worker::{Poller, Serve, WorkerHalf, all_empty};
use super::super::{ActivateError, Activation, Counters, VirtioDevice};
use super::*;
use crate::devices::virtio::device::COMMON_FEATURES;

/// A worker that takes one buffer from each queue whenever it is started, and waits for its stop.
struct ProbeWorker {
    memory: GuestMemory,
    queues: Vec<DeviceQueue>,
}

impl Serve for ProbeWorker {
    fn serve(&mut self, stop: &EventFd) {
        for queue in &mut self.queues {
            if let Some(chain) = queue.pop(&self.memory).unwrap() {
                let head = chain.head_index();
                queue.add_used(&self.memory, head, 0).unwrap();
            }
        }
        let poller = Poller::new().unwrap();
        poller.watch_readable(stop, 0).unwrap();
        poller.wait(-1, &mut [Default::default()]).unwrap();
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.queues.iter().map(DeviceQueue::state).collect()
    }

    fn can_sleep(&mut self) -> bool {
        all_empty(&mut self.queues, &self.memory)
    }
}

/// A device with such a worker.
struct Probe {
    worker: WorkerHalf<ProbeWorker>,
    n_resets_while_active: u32,
    written: Vec<(u64, Vec<u8>)>,
    fails: bool,
    in_kernel: bool,
    sleeps: bool,
}

impl Probe {
    fn boxed() -> Box<Self> {
        Box::new(Probe {
            worker: WorkerHalf::Inactive,
            n_resets_while_active: 0,
            written: Vec::new(),
            fails: false,
            in_kernel: false,
            sleeps: false,
        })
    }
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | 5
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 16]
    }

    fn n_busy_queues(&self) -> usize {
        1
    }

    fn can_begin_later(&self) -> bool {
        self.sleeps
    }

    fn wake(&mut self) -> Result<(), ActivateError> {
        self.worker.wake()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let n_resets = u8::try_from(self.n_resets_while_active).unwrap();
        crate::devices::virtio::device::read_config_bytes(&[n_resets, 2, 3, 4, 5, 6], offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.written.push((offset, data.to_vec()));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert_eq!(activation.queues.len(), 2);
        assert!(matches!(self.worker, WorkerHalf::Inactive));
        if self.fails {
            return Err(ActivateError::BackendLost);
        }
        let Activation {
            memory,
            queues,
            begin,
            ..
        } = activation;
        self.worker = WorkerHalf::start("probe", ProbeWorker { memory, queues }, begin)?;
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            assert!(worker.queues[0].queue.event_idx_enabled());
            self.n_resets_while_active += 1;
        }
    }

    fn pause(&mut self) -> Option<Vec<QueueState>> {
        self.worker.pause()
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.worker.resume()
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::new(TransportCounters::new("probe"))
    }

    fn kernel_raises_interrupts(&self) -> bool {
        self.in_kernel
    }
}

#[test]
fn identity_registers() {
    let mut driver = Driver::new(Probe::boxed());
    assert_eq!(driver.read(0x000).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(0x004), 2);
    assert_eq!(driver.read(0x008), 42);
    assert_eq!(driver.device_features(), COMMON_FEATURES | 5);
    assert_eq!(driver.read(0x0b0), u32::MAX, "no shared memory region");
    let mut wide = [0xff; 8];
    driver.transport.read(0, &mut wide);
    assert_eq!(wide, [0; 8], "registers are 32 bits wide");
    assert_eq!(driver.counter("virtio_protocol_errors"), 1);
}

#[test]
fn queue_registers_are_per_queue_and_bounded() {
    let mut driver = Driver::new(Probe::boxed());
    driver.negotiate(0);
    for (index, size) in [(0, 256), (1, 16), (2, 0), (u32::MAX, 0)] {
        driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, index);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), size);
        driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), u32::from(size != 0));
    }
    let before = driver.counter("virtio_protocol_errors");
    driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    for size in [0, 3, 512, 0x1_0000, u32::MAX] {
        driver.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
    }
    assert_eq!(driver.counter("virtio_protocol_errors"), before + 5);
}

#[test]
fn features_ok_is_refused_for_unknown_features_and_without_version_1() {
    let version_1 = feature(config::VIRTIO_F_VERSION_1);
    for (features, accepted) in [
        (version_1, true),
        (version_1 | 5, true),
        (5, false),
        (version_1 | 2, false),
        (u64::MAX, false),
    ] {
        let mut driver = Driver::new(Probe::boxed());
        driver.set_status(1);
        driver.set_status(3);
        driver.set_driver_features(features);
        driver.set_status(11);
        assert_eq!(driver.status(), if accepted { 11 } else { 3 }, "{features:#x}");
        // Too late to change.
        driver.set_driver_features(0);
        driver.set_status(15);
        assert_eq!(driver.status() & 4, if accepted { 4 } else { 0 });
    }
}

#[test]
fn status_steps_out_of_order_change_nothing() {
    for wrong in [2, 4, 8, 5, 9, 10, 6, 0x10, 0x40] {
        let mut driver = Driver::new(Probe::boxed());
        driver.set_status(wrong);
        assert_eq!(driver.status() & 0xe, 0, "{wrong:#x}");
    }
    let mut driver = Driver::start(Probe::boxed(), 0);
    driver.set_status(3);
    assert_eq!(driver.status(), 0xf, "bits can only be cleared all at once");
    driver.set_status(0x8f);
    assert_eq!(driver.status(), 0x8f);
}

#[test]
fn queue_setup_needs_features_ok() {
    let mut driver = Driver::new(Probe::boxed());
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn reset_while_active_stops_the_worker_and_a_new_start_works() {
    let mut driver = Driver::start(Probe::boxed(), 0);
    for n_resets in 1..=3 {
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.config(0, 1), [n_resets]);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
        driver.negotiate(0);
        driver.set_up_queues();
        driver.set_status(15);
        assert_eq!(driver.status(), 15);
    }
    assert_eq!(driver.counter("virtio_activations"), 4);
}

#[test]
fn queue_outside_memory_means_needs_reset() {
    let mut driver = Driver::new(Probe::boxed());
    driver.negotiate(0);
    driver.set_up_queues();
    driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    driver.write(reg::VIRTIO_MMIO_QUEUE_USED_HIGH, 7);
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    driver.set_status(15);
    assert_eq!(driver.status(), 0x4f);
    assert_eq!(
        driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS),
        2,
        "a configuration interrupt says so"
    );
    driver.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 2);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn failed_activation_means_needs_reset() {
    let mut probe = Probe::boxed();
    probe.fails = true;
    let mut driver = Driver::new(probe);
    driver.negotiate(0);
    driver.set_up_queues();
    driver.set_status(15);
    assert_eq!(driver.status(), 0x4f);
    assert_eq!(driver.counter("virtio_activation_failures"), 1);
}

#[test]
fn used_buffer_bit_always_reads_as_set_with_a_kernel_backend() {
    let mut probe = Probe::boxed();
    probe.in_kernel = true;
    let mut driver = Driver::new(probe);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    driver.negotiate(0);
    driver.set_up_queues();
    driver.set_status(15);
    driver.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
}

#[test]
fn kick_reaches_the_event_of_its_queue() {
    let mut driver = Driver::start(Probe::boxed(), 0);
    driver.kick(1);
    driver.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 2);
    driver.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
    let kicks = &driver.transport.kicks;
    assert!(kicks[0].read().is_err());
    assert_eq!(kicks[1].read().unwrap(), 1);
}

fn sleepy() -> Box<Probe> {
    let mut probe = Probe::boxed();
    probe.sleeps = true;
    probe
}

#[test]
fn busy_queues_are_connected_at_once_or_with_the_first_notification() {
    let driver = Driver::start(Probe::boxed(), 0);
    assert_eq!(driver.n_connected(), 1, "one of two is busy");

    let mut driver = Driver::start(sleepy(), 0);
    assert_eq!(driver.n_connected(), 0);
    driver.add(1, &[writable(HEAP, 16)]);
    driver.kick(1);
    assert_eq!(driver.n_connected(), 1);
    // Its thread began, and took what there was.
    driver.wait_used(1);
    driver.kick(0);
    assert_eq!(driver.n_connected(), 1, "once");
    // From now on notifications may go past the registers: it may not wait for one here.
    driver.set_status(0);
    driver.negotiate(0);
    driver.set_up_queues();
    driver.add(0, &[writable(HEAP, 16)]);
    driver.set_status(15);
    driver.wait_used(0);
}

#[test]
fn a_device_that_may_sleep_begins_at_once_when_it_has_buffers_already() {
    let mut driver = Driver::new(sleepy());
    driver.negotiate(0);
    driver.set_up_queues();
    driver.add(0, &[writable(HEAP, 16)]);
    driver.set_status(15);
    driver.wait_used(0);
    assert_eq!(driver.n_connected(), 0);
}

#[test]
fn a_sleeping_device_is_woken_by_its_owner_and_pauses_as_any() {
    let mut driver = Driver::start(sleepy(), 0);
    driver.add(0, &[writable(HEAP, 16)]);
    // Not notified: nothing happens, and it is where it was.
    assert!(driver.transport.pause());
    assert_eq!(driver.transport.save().queues[0].next_avail, 0);
    driver.transport.resume();
    driver.wait_used(0);

    let mut driver = Driver::start(sleepy(), 0);
    driver.add(0, &[writable(HEAP, 16)]);
    driver.transport.wake();
    driver.wait_used(0);
}

#[test]
fn config_space_reads_zero_past_its_end() {
    let mut driver = Driver::start(Probe::boxed(), 0);
    assert_eq!(driver.config(1, 2), [2, 3]);
    assert_eq!(driver.config(4, 4), [5, 6, 0, 0]);
    assert_eq!(driver.config(0xe00, 8), [0; 8]);
}
