use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::devices::virtio::testing::{Driver, HEAP, MEMORY_BYTES, readable, writable};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

fn start() -> Driver {
    Driver::start(Box::new(Rng::new()), 0)
}

#[test]
fn buffers_are_filled_with_different_bytes() {
    let mut driver = start();
    driver.add(0, &[writable(HEAP, 32), writable(HEAP + 0x1000, 32)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 64);
    let (first, second) = (
        driver.read_memory(HEAP, 32),
        driver.read_memory(HEAP + 0x1000, 32),
    );
    assert_ne!(first, second);
    assert_ne!(first, [0; 32]);
    assert_eq!(driver.read_memory(HEAP + 32, 8), [0; 8]);
    assert_eq!(driver.counter("rng_bytes"), 64);
}

#[test]
fn works_without_event_index_and_over_many_rounds() {
    let event_idx = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    for without in [0, event_idx] {
        let mut driver = Driver::start(Box::new(Rng::new()), without);
        for round in 0..300 {
            driver.add(0, &[writable(HEAP, 16)]);
            if round % 3 == 0 {
                driver.add(0, &[writable(HEAP, 16)]);
                driver.kick(0);
                assert_eq!(driver.wait_used(0).1, 16);
            }
            driver.kick(0);
            assert_eq!(driver.wait_used(0).1, 16);
        }
    }
}

#[test]
fn one_request_is_bounded() {
    let mut driver = start();
    driver.add(0, &[writable(HEAP, 16 << 20)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 4096);
}

#[test]
fn hostile_chains_are_counted_and_returned_empty() {
    let mut driver = start();
    // Nothing writable; outside of memory; across its end; wrapping around the address space; writable before readable.
    driver.add(0, &[readable(HEAP, 8)]);
    driver.add(0, &[writable(1 << 40, 8)]);
    driver.add(0, &[writable(MEMORY_BYTES as u64 - 4, 8)]);
    driver.add(0, &[writable(u64::MAX - 3, 8)]);
    driver.add(0, &[writable(HEAP, 8), readable(HEAP, 8)]);
    driver.add(0, &[writable(HEAP, 0)]);
    for _ in 0..6 {
        driver.kick(0);
        assert_eq!(driver.wait_used(0).1, 0);
    }
    assert_eq!(driver.counter("rng_bad_requests"), 4);
    assert_eq!(driver.read_memory(HEAP, 8), [0; 8]);
    // A chain that loops, and one that points out of the table.
    driver.write_descriptor(0, 40, Descriptor::new(HEAP, 8, NEXT | WRITE, 41));
    driver.write_descriptor(0, 41, Descriptor::new(HEAP, 8, NEXT | WRITE, 40));
    driver.write_descriptor(0, 42, Descriptor::new(HEAP, 8, NEXT | WRITE, 999));
    // An indirect table that is not there.
    driver.write_descriptor(0, 43, Descriptor::new(1 << 40, 64, 4, 0));
    for head in 40..44 {
        driver.publish(0, head);
        driver.kick(0);
        assert_eq!(driver.wait_used(0), (head, 0));
    }
    // It still works.
    driver.add(0, &[writable(HEAP, 8)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 8);
}

#[test]
fn unbelievable_ring_index_means_needs_reset_and_reset_helps() {
    let mut driver = start();
    driver.corrupt_avail_index(0, 1000);
    driver.kick(0);
    driver.wait_needs_reset();
    driver.negotiate(0);
    driver.set_up_queues();
    driver.set_status(15);
    driver.add(0, &[writable(HEAP, 8)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 8);
}

#[test]
fn head_outside_the_table_means_needs_reset() {
    let mut driver = start();
    driver.publish(0, 64);
    driver.kick(0);
    driver.wait_needs_reset();
}
