use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::device::feature;
use crate::devices::virtio::testing::{Driver, HEAP, MEMORY_BYTES, readable, writable};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

/// Pages that the tests give up; the page numbers stand at `HEAP`.
const PAGES: u64 = 16 << 20;
const STATS_BUFFER: u64 = HEAP + 0x4000;

fn start() -> (Driver, BalloonHandle) {
    start_without(0)
}

fn start_without(features: u64) -> (Driver, BalloonHandle) {
    let (device, handle) = Balloon::new(32).unwrap();
    (Driver::start(Box::new(device), features), handle)
}

fn write_pfns(driver: &Driver, addresses: &[u64]) -> usize {
    let bytes: Vec<u8> = addresses
        .iter()
        .flat_map(|address| u32::try_from(address >> 12).unwrap().to_le_bytes())
        .collect();
    driver.write_memory(HEAP, &bytes);
    bytes.len()
}

/// Sends page numbers through a queue and waits for their return.
fn send(driver: &mut Driver, queue: usize, addresses: &[u64]) {
    let length = write_pfns(driver, addresses);
    driver.add(queue, &[readable(HEAP, length)]);
    driver.kick(queue);
    assert_eq!(driver.wait_used(queue).1, 0);
}

#[test]
fn inflating_gives_pages_back_and_deflating_takes_them() {
    let (mut driver, _handle) = start();
    driver.write_memory(PAGES, &[7; 0x6000]);
    // Not in order, and one twice.
    let pages = [PAGES + 0x3000, PAGES, PAGES + 0x1000, PAGES];
    send(&mut driver, INFLATE, &pages);
    assert_eq!(driver.read_memory(PAGES, 0x2000), [0; 0x2000]);
    assert_eq!(driver.read_memory(PAGES + 0x2000, 0x1000), [7; 0x1000]);
    assert_eq!(driver.read_memory(PAGES + 0x3000, 0x1000), [0; 0x1000]);
    assert_eq!(driver.read_memory(PAGES + 0x4000, 0x2000), [7; 0x2000]);
    assert_eq!(driver.counter("balloon_inflated_bytes"), 0x3000);
    assert_eq!(driver.counter("balloon_discarded_bytes"), 0x3000);
    driver.write_memory(PAGES, &[8; 0x1000]);
    send(&mut driver, DEFLATE, &pages[..2]);
    // What is taken back is left alone.
    assert_eq!(driver.read_memory(PAGES, 0x1000), [8; 0x1000]);
    assert_eq!(driver.counter("balloon_deflated_bytes"), 0x2000);
    assert_eq!(driver.counter("balloon_discarded_bytes"), 0x3000);
}

#[test]
fn reported_pages_are_given_back() {
    let (mut driver, _handle) = start();
    driver.write_memory(PAGES, &[7; 0x8000]);
    driver.add(
        REPORTING,
        &[writable(PAGES, 0x2000), writable(PAGES + 0x4000, 0x1000)],
    );
    driver.kick(REPORTING);
    assert_eq!(driver.wait_used(REPORTING).1, 0);
    assert_eq!(driver.read_memory(PAGES, 0x2000), [0; 0x2000]);
    assert_eq!(driver.read_memory(PAGES + 0x2000, 0x2000), [7; 0x2000]);
    assert_eq!(driver.read_memory(PAGES + 0x4000, 0x1000), [0; 0x1000]);
    assert_eq!(driver.counter("balloon_reported_bytes"), 0x3000);
    assert_eq!(driver.counter("balloon_discarded_bytes"), 0x3000);
}

#[test]
fn hostile_ranges_are_counted_and_touch_nothing() {
    let (mut driver, _handle) = start();
    driver.write_memory(PAGES, &[7; 0x4000]);
    let end = MEMORY_BYTES as u64;
    // Page numbers behind the end of memory, up to the last there is; a page of RAM among them still counts.
    send(&mut driver, INFLATE, &[end, PAGES, u64::from(u32::MAX) << 12]);
    assert_eq!(driver.counter("balloon_bad_ranges"), 2);
    assert_eq!(driver.counter("balloon_discarded_bytes"), 0x1000);
    // A range that begins in memory and ends outside is refused as a whole.
    send(&mut driver, INFLATE, &[end - 0x1000, end]);
    assert_eq!(driver.counter("balloon_bad_ranges"), 3);
    // Not whole page numbers; more than one request may have; nothing at all.
    driver.add(INFLATE, &[readable(HEAP, 6)]);
    driver.add(INFLATE, &[readable(HEAP, 4 * (request::MAX_PFNS + 1))]);
    driver.add(INFLATE, &[readable(HEAP, 0)]);
    // Outside of memory; a chain that is writable first.
    driver.add(INFLATE, &[readable(1 << 40, 8)]);
    driver.add(INFLATE, &[writable(HEAP, 8), readable(HEAP, 8)]);
    driver.kick(INFLATE);
    for _ in 0..5 {
        assert_eq!(driver.wait_used(INFLATE).1, 0);
    }
    assert_eq!(driver.counter("balloon_bad_requests"), 4);
    // Reports: not a page, across the end of memory, outside.
    driver.add(REPORTING, &[writable(PAGES + 0x1000, 0x800)]);
    driver.add(REPORTING, &[writable(PAGES + 0x1800, 0x1000)]);
    driver.add(REPORTING, &[writable(end - 0x1000, 0x2000)]);
    driver.add(REPORTING, &[writable(1 << 40, 0x1000)]);
    driver.kick(REPORTING);
    for _ in 0..4 {
        assert_eq!(driver.wait_used(REPORTING).1, 0);
    }
    assert_eq!(driver.counter("balloon_bad_ranges"), 5);
    assert_eq!(driver.counter("balloon_bad_requests"), 6);
    assert_eq!(driver.read_memory(PAGES + 0x1000, 0x3000), [7; 0x3000]);
    assert_eq!(driver.counter("balloon_discarded_bytes"), 0x1000);
    assert_eq!(driver.status(), 0xf);
}

#[test]
fn the_target_is_told_and_the_actual_size_comes_back() {
    let (mut driver, handle) = start();
    assert_eq!(driver.config(0, 8), [0; 8]);
    handle.set_target(3).unwrap();
    driver.transport.wake();
    driver.wait_until("a configuration change", |driver| {
        (driver.interrupt.status() & 2 != 0).then_some(())
    });
    assert_eq!(driver.config(0, 4), 768_u32.to_le_bytes());
    let config = u64::from(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG);
    driver.write(u32::try_from(config + 4).unwrap(), 500);
    assert_eq!(driver.config(4, 4), 500_u32.to_le_bytes());
    // The target is not the driver's to write, and half a number is none.
    driver.write(u32::try_from(config).unwrap(), 1);
    crate::bus::BusDevice::write(&mut driver.transport, config + 4, &[1, 1]);
    assert_eq!(driver.config(0, 4), 768_u32.to_le_bytes());
    assert_eq!(driver.config(4, 4), 500_u32.to_le_bytes());
    assert_eq!(driver.counter("balloon_target_bytes"), 3 << 20);
    assert_eq!(driver.counter("balloon_actual_bytes"), 500 << 12);
    let error = handle.set_target(33).unwrap_err();
    assert_eq!(
        error,
        BalloonError::TooLarge {
            target_mib: 33,
            limit_mib: 32
        }
    );
    assert_eq!(driver.config(0, 4), 768_u32.to_le_bytes());
    // A driver that comes anew has an empty balloon, and the owner's wish stands.
    driver.set_status(0);
    assert_eq!(driver.config(0, 8), [0, 3, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn statistics_are_asked_for_by_returning_their_buffer() {
    let (mut driver, _handle) = start();
    let stats = |free: u64, cache: u64| {
        let mut bytes = Vec::new();
        for (tag, value) in [(4_u16, free), (999, 1), (7, cache)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes
    };
    driver.write_memory(STATS_BUFFER, &stats(1000, 2000));
    driver.add(STATS, &[readable(STATS_BUFFER, 30)]);
    driver.kick(STATS);
    // It stays until somebody asks. (The worker has seen it when a second request after it is back.)
    send(&mut driver, INFLATE, &[PAGES]);
    send(&mut driver, INFLATE, &[PAGES]);
    assert!(!driver.peek_used(STATS));
    for (free, cache) in [(1000, 2000), (3000, 4000)] {
        // Asking returns the buffer, once it is there.
        driver.wait_until("the statistics buffer", |driver| {
            driver.counter("balloon_guest_free_bytes");
            driver.try_used(STATS)
        });
        assert_eq!(driver.counter("balloon_guest_free_bytes"), free);
        assert_eq!(driver.counter("balloon_guest_cache_bytes"), cache);
        driver.write_memory(STATS_BUFFER, &stats(3000, 4000));
        driver.add(STATS, &[readable(STATS_BUFFER, 30)]);
        driver.kick(STATS);
    }
    // A second buffer sends the first one back, and none is kept twice.
    driver.add(STATS, &[readable(STATS_BUFFER, 7)]);
    driver.kick(STATS);
    driver.wait_used(STATS);
    assert_eq!(driver.counter("balloon_guest_total_bytes"), 0);
}

#[test]
fn a_driver_without_statistics_has_its_reports_in_the_third_queue() {
    let (mut driver, _handle) = start_without(feature(F_STATS_QUEUE));
    driver.write_memory(PAGES, &[7; 0x1000]);
    driver.add(2, &[writable(PAGES, 0x1000)]);
    driver.kick(2);
    driver.wait_used(2);
    assert_eq!(driver.read_memory(PAGES, 0x1000), [0; 0x1000]);
}

#[test]
fn a_driver_sets_up_only_the_queues_it_has() {
    let (device, _handle) = Balloon::new(32).unwrap();
    let mut driver = Driver::new(Box::new(device));
    driver.negotiate(feature(F_STATS_QUEUE) | feature(F_REPORTING));
    driver.set_up_n_queues(2);
    driver.set_status(0xf);
    assert_eq!(driver.status(), 0xf);
    driver.write_memory(PAGES, &[7; 0x1000]);
    send(&mut driver, INFLATE, &[PAGES]);
    assert_eq!(driver.read_memory(PAGES, 0x1000), [0; 0x1000]);
}

#[test]
fn a_pause_keeps_the_statistics_buffer_and_a_clone_the_sizes() {
    let (mut driver, _handle) = start();
    driver.add(STATS, &[readable(HEAP, 30)]);
    driver.kick(STATS);
    for _ in 0..2 {
        assert!(driver.transport.pause());
        assert!(!driver.peek_used(STATS));
        driver.transport.resume();
        send(&mut driver, INFLATE, &[PAGES]);
    }
    driver.counter("balloon_guest_free_bytes");
    driver.wait_used(STATS);

    let (mut device, _handle) = Balloon::new(32).unwrap();
    let (mut clone, _handle) = Balloon::new(32).unwrap();
    assert!(device.load(&[0, 3, 0, 0, 7, 0, 0, 0]));
    assert!(clone.load(&device.save()));
    let mut config = [0; 8];
    clone.read_config(0, &mut config);
    assert_eq!(config, [0, 3, 0, 0, 7, 0, 0, 0]);
    assert!(!clone.load(&[0; 7]) && !clone.load(&[0; 12]) && !clone.load(&[]));
}

#[test]
fn unbelievable_ring_index_means_needs_reset_and_reset_helps() {
    let (mut driver, _handle) = start();
    driver.corrupt_avail_index(REPORTING, 1000);
    driver.kick(REPORTING);
    driver.wait_needs_reset();
    driver.negotiate(0);
    driver.set_up_queues();
    driver.set_status(15);
    send(&mut driver, INFLATE, &[PAGES]);
}
