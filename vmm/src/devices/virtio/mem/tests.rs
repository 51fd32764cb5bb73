use vm_memory::GuestAddress;

use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::{Driver, HEAP, readable, writable};

const REGION: u64 = 32 << 20;
const REGION_BYTES: u64 = 32 << 20;
const BLOCK: u64 = 2 << 20;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: [u8; 10] = answer(0, 0);
const NACK: [u8; 10] = answer(1, 0);
const ERROR: [u8; 10] = answer(3, 0);
const UNPLUGGED: [u8; 10] = answer(0, 1);
const MIXED: [u8; 10] = answer(0, 2);

const fn answer(kind: u8, state: u8) -> [u8; 10] {
    [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
}

fn start() -> (Driver, MemHandle) {
    let (device, handle) = Mem::new(GuestAddress(REGION), REGION_BYTES);
    (Driver::start(Box::new(device), 0), handle)
}

/// Sends a request and returns the answer, `None` for one without.
fn ask(driver: &mut Driver, kind: u16, address: u64, n_blocks: u16) -> Option<[u8; 10]> {
    let mut request = [0; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&n_blocks.to_le_bytes());
    driver.write_memory(HEAP, &request);
    driver.write_memory(HEAP + 0x1000, &[0xff; 10]);
    driver.add(0, &[readable(HEAP, 24), writable(HEAP + 0x1000, 10)]);
    driver.kick(0);
    let length = driver.wait_used(0).1;
    (length != 0).then(|| driver.read_memory(HEAP + 0x1000, 10).try_into().unwrap())
}

fn u64_at(driver: &mut Driver, offset: u64) -> u64 {
    u64::from_le_bytes(driver.config(offset, 8).try_into().unwrap())
}

#[test]
fn the_region_is_described() {
    let (mut driver, _handle) = start();
    let fields = [0, 8, 16, 24, 32, 40, 48].map(|offset| u64_at(&mut driver, offset));
    assert_eq!(fields, [BLOCK, 0, REGION, REGION_BYTES, 0, 0, 0]);
}

#[test]
fn the_guest_grows_to_what_is_requested_and_shrinks() {
    let (mut driver, handle) = start();
    // Nothing is requested yet, and nothing usable.
    assert_eq!(ask(&mut driver, PLUG, REGION, 1), Some(ERROR));
    let generation = driver.read(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION);
    handle.resize(8).unwrap();
    driver.wait_until("a configuration change", |driver| {
        (driver.interrupt.status() & 2 != 0).then_some(())
    });
    assert_ne!(
        driver.read(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION),
        generation
    );
    assert_eq!(u64_at(&mut driver, 48), 8 << 20);
    assert_eq!(ask(&mut driver, PLUG, REGION, 3), Some(ACK));
    assert_eq!(u64_at(&mut driver, 40), 6 << 20);
    assert_eq!(ask(&mut driver, PLUG, REGION + 6 * BLOCK, 2), Some(NACK));
    assert_eq!(ask(&mut driver, PLUG, REGION + 6 * BLOCK, 1), Some(ACK));
    assert_eq!(driver.counter("mem_plugged_bytes"), 8 << 20);
    assert_eq!(ask(&mut driver, STATE, REGION, 3), Some(ACK));
    assert_eq!(ask(&mut driver, STATE, REGION, 4), Some(MIXED));
    assert_eq!(ask(&mut driver, STATE, REGION + 3 * BLOCK, 3), Some(UNPLUGGED));

    // Shrinking takes nothing away by itself; what is unplugged is gone, and its neighbours stay.
    driver.write_memory(REGION, &[7; 3 * (2 << 20)]);
    handle.resize(4).unwrap();
    assert_eq!(u64_at(&mut driver, 40), 8 << 20);
    assert_eq!(ask(&mut driver, PLUG, REGION + 10 * BLOCK, 1), Some(NACK));
    assert_eq!(ask(&mut driver, UNPLUG, REGION + BLOCK, 1), Some(ACK));
    assert_eq!(driver.read_memory(REGION + BLOCK - 1, 1), [7]);
    assert_eq!(driver.read_memory(REGION + BLOCK, 0x1000), [0; 0x1000]);
    assert_eq!(driver.read_memory(REGION + 2 * BLOCK - 1, 2), [0, 7]);
    assert_eq!(driver.counter("mem_discarded_bytes"), BLOCK);
    assert_eq!(u64_at(&mut driver, 40), 6 << 20);

    handle.resize(0).unwrap();
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), Some(ACK));
    assert_eq!(driver.read_memory(REGION, 0x1000), [0; 0x1000]);
    assert_eq!(driver.read_memory(REGION + 2 * BLOCK, 0x1000), [0; 0x1000]);
    assert_eq!(driver.counter("mem_discarded_bytes"), 4 * BLOCK);
    assert_eq!([u64_at(&mut driver, 32), u64_at(&mut driver, 40)], [0, 0]);
}

#[test]
fn sizes_the_region_cannot_have_are_refused() {
    let (mut driver, handle) = start();
    handle.resize(6).unwrap();
    assert_eq!(
        handle.resize(33),
        Err(ResizeError::TooLarge {
            plugged_mib: 33,
            region_mib: 32
        })
    );
    assert_eq!(
        handle.resize(7),
        Err(ResizeError::NotWholeBlocks {
            plugged_mib: 7,
            block_mib: 2
        })
    );
    assert_eq!(
        handle.resize(u64::MAX),
        Err(ResizeError::TooLarge {
            plugged_mib: u64::MAX,
            region_mib: 32
        })
    );
    assert_eq!(u64_at(&mut driver, 48), 6 << 20);
}

#[test]
fn hostile_requests_are_counted_and_change_nothing() {
    let (mut driver, handle) = start();
    handle.resize(8).unwrap();
    assert_eq!(ask(&mut driver, PLUG, REGION, 2), Some(ACK));
    driver.write_memory(REGION, &[7; 2 * (2 << 20)]);
    let before = REGION - BLOCK;
    driver.write_memory(before, &[7; 2 << 20]);
    let all = u16::try_from(REGION_BYTES / BLOCK).unwrap();
    let wrong = [
        // Before the region, into it, behind it, around the address space; half a block; no block; too many.
        (PLUG, before, 1),
        (UNPLUG, before, 2),
        (UNPLUG, 0, 1),
        (PLUG, REGION + REGION_BYTES, 1),
        (STATE, REGION + REGION_BYTES - BLOCK, 2),
        (PLUG, u64::MAX - BLOCK + 1, u16::MAX),
        (UNPLUG, REGION + BLOCK / 2, 1),
        (UNPLUG, REGION + 1, 1),
        (PLUG, REGION + 4 * BLOCK, 0),
        (UNPLUG, REGION, 0),
        (STATE, REGION, u16::MAX),
        // Plugged already, wholly or in part; not plugged.
        (PLUG, REGION, 1),
        (PLUG, REGION + BLOCK, 2),
        (UNPLUG, REGION + BLOCK, 2),
        (UNPLUG, REGION + 2 * BLOCK, 1),
        (UNPLUG, REGION, all),
        // No such request.
        (4, REGION, 1),
        (u16::MAX, REGION, 1),
    ];
    for (kind, address, n_blocks) in wrong {
        let answer = ask(&mut driver, kind, address, n_blocks);
        assert_eq!(answer, Some(ERROR), "{kind} {address:#x} {n_blocks}");
    }
    let n_wrong = wrong.len() as u64;
    assert_eq!(driver.counter("mem_bad_requests"), n_wrong);
    // More than the owner wants.
    for _ in 0..3 {
        assert_eq!(ask(&mut driver, PLUG, REGION + 2 * BLOCK, 3), Some(NACK));
    }
    assert_eq!(driver.counter("mem_refused_requests"), 3);
    // Short requests, no room for the answer, wrong order, outside of memory: returned without an answer, or as an error.
    driver.add(0, &[readable(HEAP, 23), writable(HEAP + 0x1000, 10)]);
    driver.add(0, &[readable(HEAP, 24), writable(HEAP + 0x1000, 9)]);
    driver.add(0, &[readable(HEAP, 24)]);
    driver.add(0, &[writable(HEAP + 0x1000, 10), readable(HEAP, 24)]);
    driver.add(0, &[readable(1 << 40, 24), writable(HEAP + 0x1000, 10)]);
    driver.kick(0);
    let lengths = [(); 5].map(|()| driver.wait_used(0).1);
    assert_eq!(lengths, [10, 0, 0, 0, 0]);
    assert_eq!(driver.counter("mem_bad_requests"), n_wrong + 5);
    // All is as it was.
    assert_eq!(driver.counter("mem_plugged_bytes"), 2 * BLOCK);
    assert_eq!(driver.counter("mem_discarded_bytes"), 0);
    assert_eq!(driver.read_memory(REGION, 0x1000), [7; 0x1000]);
    assert_eq!(driver.read_memory(before, 0x1000), [7; 0x1000]);
}

#[test]
fn a_new_driver_finds_what_was_plugged_and_can_start_afresh() {
    let (mut driver, handle) = start();
    handle.resize(4).unwrap();
    assert_eq!(ask(&mut driver, PLUG, REGION, 2), Some(ACK));
    driver.corrupt_avail_index(0, 1000);
    driver.kick(0);
    driver.wait_needs_reset();
    driver.negotiate(0);
    driver.set_up_queues();
    driver.set_status(0xf);
    assert_eq!(u64_at(&mut driver, 40), 2 * BLOCK);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), Some(ACK));
    assert_eq!(ask(&mut driver, PLUG, REGION + BLOCK, 2), Some(ACK));
}

#[test]
fn a_device_that_rested_through_a_pause_answers_the_first_request() {
    let (mut driver, handle) = start();
    for _ in 0..2 {
        assert!(driver.transport.pause());
        // Announced when the device goes on.
        handle.resize(4).unwrap();
        assert_eq!(driver.interrupt.status() & 2, 0, "interrupted while paused");
        driver.transport.resume();
        assert_eq!(driver.interrupt.status() & 2, 2);
        driver.interrupt.acknowledge(2);
    }
    assert_eq!(ask(&mut driver, PLUG, REGION, 2), Some(ACK));
    assert!(driver.transport.pause());
    let saved = driver.transport.save();
    driver.transport.resume();
    assert_eq!(ask(&mut driver, UNPLUG, REGION, 1), Some(ACK));

    // A clone with memory plugged looks at what was asked of it, without being kicked.
    let of_mem = saved.of_device(DEVICE_TYPE).unwrap();
    assert!(is_in_use(of_mem) && saved.of_device(DEVICE_TYPE + 1).is_none());
    let (mut clone, _handle) = Mem::new(GuestAddress(REGION), REGION_BYTES);
    assert!(clone.load(of_mem));
    let clone = Driver::start(Box::new(clone), 0);
    assert_eq!(clone.interrupt.status() & 2, 2, "not told of its size");
    assert_eq!(clone.counter("mem_plugged_bytes"), 2 * BLOCK);
}
