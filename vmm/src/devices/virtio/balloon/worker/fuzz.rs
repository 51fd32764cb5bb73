//! Fuzz target of the balloon.

use std::sync::Arc;

use super::{F_REPORTING, F_STATS_QUEUE, N_FIXED_QUEUES, OptionalQueues, Serve, Shared, Worker};
use crate::devices::virtio::device::feature;
use crate::devices::virtio::fuzz::activation;
use crate::devices::virtio::worker::event_fd;

/// Pages and statistics of a hostile driver, up to the end that a snapshot makes.
///
/// # Panics
/// When a request is in a queue's past and was not answered.
pub fn balloon_queues(data: &[u8]) {
    let Some((flags, image)) = data.split_first() else {
        return;
    };
    let mut features = 0;
    let mut n_queues = N_FIXED_QUEUES as u64;
    for (flag, bit) in [(1, F_STATS_QUEUE), (2, F_REPORTING)] {
        if flags & flag != 0 {
            features |= feature(bit);
            n_queues += 1;
        }
    }
    let activation = activation(image, n_queues, features, flags & 4 != 0);
    let mut worker = Worker {
        memory: activation.memory,
        interrupt: activation.interrupt,
        needs_reset: activation.needs_reset,
        queues: activation.queues,
        optional: OptionalQueues::of(features),
        held_stats: None,
        stats_due: flags & 8 != 0,
        shared: Arc::new(Shared::new().expect("descriptors can be had")),
    };
    for queue in 0..worker.queues.len() {
        if worker.process(queue).is_err() {
            return;
        }
    }
    if flags & 16 != 0 && worker.ask_for_stats().is_err() {
        return;
    }
    let stop = event_fd().expect("descriptors can be had");
    stop.write(1).expect("it was zero");
    worker.serve(&stop);
    if worker.needs_reset.is_raised() {
        return;
    }
    for state in worker.queue_states() {
        assert_eq!(state.next_avail, state.next_used);
    }
}
