//! Fuzz target of the entropy device.

use std::sync::Arc;

use super::{REQUEST_QUEUE, RngCounters, Worker};
use crate::devices::virtio::fuzz::activation;

/// Requests of a hostile driver.
pub fn rng_queue(data: &[u8]) {
    let Some((flags, image)) = data.split_first() else {
        return;
    };
    let mut activation = activation(image, 1, 0, flags & 1 != 0);
    let mut worker = Worker {
        queue: activation.queues.swap_remove(REQUEST_QUEUE),
        memory: activation.memory,
        interrupt: activation.interrupt,
        needs_reset: activation.needs_reset,
        counters: Arc::new(RngCounters::new("rng")),
    };
    // A broken ring ends the worker.
    drop(worker.process());
}
