//! Fuzz targets of transport and queues, and what those of the devices share: guest memory that is the fuzzer's input, with
//! the queues at its start. Devices run on the fuzzer's own thread, so that an input always does the same.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use super::chain::Buffers;
use super::rng::Rng;
use super::transport::MmioTransport;
use super::worker::event_fd;
use super::{Activation, Begin, DeviceQueue, NeedsReset};
use crate::bus::BusDevice;
use crate::irq::Interrupt;
use crate::memory::GuestMemory;

const MEMORY_BYTES: usize = 64 << 10;
const QUEUE_SIZE: u16 = 8;
/// Each queue has this much of the start of memory: descriptors, available ring, used ring.
const QUEUE_BYTES: u64 = 0x100;
const AVAIL_OFFSET: u64 = 0x80;
const USED_OFFSET: u64 = 0xa0;
/// More chains than a queue has, to see it wrap around.
const MAX_CHAINS: usize = 32;

/// Guest memory that begins with `image`.
pub(super) fn memory(image: &[u8]) -> GuestMemory {
    memory_and(image, &[])
}

/// The same with `more` ranges.
pub(super) fn memory_and(image: &[u8], more: &[(GuestAddress, usize)]) -> GuestMemory {
    let ranges = [&[(GuestAddress(0), MEMORY_BYTES)], more].concat();
    let memory = GuestMemory::from_ranges(&ranges).expect("memory can be had");
    let image = &image[..image.len().min(MEMORY_BYTES)];
    memory
        .write_slice(image, GuestAddress(0))
        .expect("cut to memory's size");
    memory
}

fn queue(index: u64, event_idx: bool) -> DeviceQueue {
    let mut queue = Queue::new(QUEUE_SIZE).expect("a power of two");
    let base = u32::try_from(index * QUEUE_BYTES).expect("few queues");
    let at = |offset: u64| Some(base + u32::try_from(offset).expect("small"));
    queue.set_size(QUEUE_SIZE);
    queue.set_desc_table_address(at(0), Some(0));
    queue.set_avail_ring_address(at(AVAIL_OFFSET), Some(0));
    queue.set_used_ring_address(at(USED_OFFSET), Some(0));
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    DeviceQueue::new(queue, event_fd().expect("descriptors can be had"))
}

/// What a device with `n_queues` is given by a driver that wrote `image`.
pub(super) fn activation(image: &[u8], n_queues: u64, features: u64, event_idx: bool) -> Activation {
    let interrupt = Interrupt::new().expect("descriptors can be had");
    Activation {
        memory: memory(image),
        needs_reset: NeedsReset::new(interrupt.clone()),
        interrupt,
        queues: (0..n_queues).map(|index| queue(index, event_idx)).collect(),
        features,
        begin: Begin::AtOnce,
    }
}

/// Descriptor chains of a hostile driver.
pub fn virtqueue(data: &[u8]) {
    let Some((flags, image)) = data.split_first() else {
        return;
    };
    let limit = usize::from(flags >> 1);
    let memory = memory(image);
    let mut queue = queue(0, flags & 1 != 0);
    for _ in 0..MAX_CHAINS {
        let Ok(Some(chain)) = queue.pop(&memory) else {
            break;
        };
        let head = chain.head_index();
        let n_written = match Buffers::parse(chain, limit) {
            Ok(buffers) => check(&buffers, &memory, limit),
            Err(_) => 0,
        };
        if queue.add_used(&memory, head, n_written).is_err() || queue.needs_notification(&memory).is_err() {
            break;
        }
    }
}

/// What devices rely on; the bytes that fit into the writable part.
fn check(buffers: &Buffers, memory: &GuestMemory, limit: usize) -> usize {
    let mut n_ranges = 0;
    for (ranges, access) in [
        (&buffers.readable, Permissions::Read),
        (&buffers.writable, Permissions::Write),
    ] {
        let mut length = 0;
        for range in ranges.as_slice() {
            assert!(range.length != 0, "an empty range");
            assert!(
                memory.check_range(range.address, range.len(), access),
                "outside memory"
            );
            length += range.len();
            n_ranges += 1;
        }
        assert_eq!(length, ranges.len());
    }
    assert!(n_ranges <= limit, "{n_ranges} ranges");
    let mut bytes = vec![0; buffers.readable.len().min(MEMORY_BYTES)];
    assert_eq!(buffers.readable.read(memory, &mut bytes), bytes.len());
    let n_written = buffers.writable.write(memory, &bytes);
    assert_eq!(n_written, bytes.len().min(buffers.writable.len()));
    let mut rest = buffers.writable.clone();
    let back = rest.split_back(n_written / 2).expect("not longer");
    assert_eq!(back.len() + rest.len(), buffers.writable.len());
    buffers.writable.zero_from(memory, n_written);
    n_written
}

/// Register accesses of a hostile driver: seven bytes each, for direction and width, offset, value.
pub fn virtio_registers(data: &[u8]) {
    let interrupt = Interrupt::new().expect("descriptors can be had");
    let mut transport =
        MmioTransport::new(Box::new(Rng::new()), memory(&[]), interrupt).expect("descriptors can be had");
    for access in data.chunks_exact(7).take(256) {
        let width = 1_usize << (access[0] >> 1 & 3);
        let offset = u64::from(u16::from_le_bytes([access[1], access[2]]) & 0xfff);
        let mut value = [0; 8];
        value[..4].copy_from_slice(&access[3..]);
        if access[0] & 1 == 0 {
            transport.read(offset, &mut value[..width]);
        } else {
            transport.write(offset, &value[..width]);
        }
    }
}
