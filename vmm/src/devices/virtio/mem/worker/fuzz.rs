//! Fuzz target of the device that plugs memory.

use std::sync::Arc;

use vm_memory::GuestAddress;

use super::{REQUEST_QUEUE, Shared, Worker};
use crate::devices::virtio::fuzz::{activation, memory_and};
use crate::devices::virtio::mem::blocks::Blocks;

const REGION: u64 = 32 << 20;
const N_BLOCKS: u8 = 8;
const BLOCK_MIB: u32 = 2;
const REGION_BYTES: u32 = (N_BLOCKS as u32 * BLOCK_MIB) << 20;

/// Requests of a hostile driver for memory that it may partly have.
///
/// # Panics
/// When the driver got more than it may have, or a state does not survive a snapshot.
pub fn mem_queue(data: &[u8]) {
    let [flags, size, image @ ..] = data else {
        return;
    };
    let mut activation = activation(image, 1, 0, flags & 1 != 0);
    let shared = Arc::new(Shared::new(region()));
    let requested_mib = u64::from(size % (N_BLOCKS + 1)) * u64::from(BLOCK_MIB);
    shared
        .resize(requested_mib)
        .expect("whole blocks, no more than there are");
    let mut worker = Worker {
        memory: memory_and(image, &[(GuestAddress(REGION), REGION_BYTES as usize)]),
        interrupt: activation.interrupt,
        needs_reset: activation.needs_reset,
        queue: activation.queues.swap_remove(REQUEST_QUEUE),
        shared: Arc::clone(&shared),
    };
    // A broken ring ends the worker.
    drop(worker.process());
    let blocks = shared.blocks();
    assert!(
        blocks.plugged_bytes() <= requested_mib << 20,
        "more than it may have"
    );
    let mut again = region();
    assert!(again.load(&blocks.save()), "it cannot go on from its own state");
    assert_eq!(again.plugged_bytes(), blocks.plugged_bytes());
}

fn region() -> Blocks {
    Blocks::new(REGION, REGION_BYTES.into())
}
