//! The worker half.

use std::sync::Arc;

use virtio_queue::QueueState;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EpollEvent;
use vmm_sys_util::eventfd::EventFd;

use super::request::{page_ranges, stats};
use super::shared::Shared;
use super::{
    DEFLATE_QUEUE, F_REPORTING, F_STATS_QUEUE, INFLATE_QUEUE, MAX_DESCRIPTORS, N_FIXED_QUEUES, QUEUE_SIZES,
};
use crate::devices::virtio::chain::Buffers;
use crate::devices::virtio::device::feature;
use crate::devices::virtio::worker::{Poller, Serve, all_empty, clear_event};
use crate::devices::virtio::{DeviceQueue, NeedsReset, QueueFailure};
use crate::irq::{Interrupt, InterruptCause};
use crate::memory::{DiscardError, GuestMemory, discard};

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

/// Tokens from 0 on are queues.
const STOP: u64 = 100;
const TARGET_CHANGED: u64 = 101;
const STATS_WANTED: u64 = 102;

/// Where the queues are that not every driver has.
#[derive(Debug, Clone, Copy)]
pub(super) struct OptionalQueues {
    stats: Option<usize>,
    reporting: Option<usize>,
}

impl OptionalQueues {
    /// The queues of these features.
    pub(super) fn of(features: u64) -> Self {
        let mut numbers = N_FIXED_QUEUES..;
        let mut next_with = |bit| {
            if features & feature(bit) == 0 {
                return None;
            }
            numbers.next()
        };
        OptionalQueues {
            stats: next_with(F_STATS_QUEUE),
            reporting: next_with(F_REPORTING),
        }
    }
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) needs_reset: NeedsReset,
    pub(super) queues: Vec<DeviceQueue>,
    pub(super) optional: OptionalQueues,
    /// Head of the statistics buffer that waits to be sent back: that is how the driver is asked for new ones (virtio 1.2,
    /// 5.5.6.3).
    pub(super) held_stats: Option<u16>,
    /// The driver is to be asked as soon as it has given that buffer.
    pub(super) stats_due: bool,
    pub(super) shared: Arc<Shared>,
}

impl Serve for Worker {
    /// At the end a statistics buffer that is held is in its queue again, so that the queues are all the state there is.
    fn serve(&mut self, stop: &EventFd) {
        if self.serve_queues(stop).is_err() {
            self.needs_reset.raise();
        }
        if let (Some(_), Some(queue)) = (self.held_stats.take(), self.optional.stats) {
            self.queues[queue].unpop();
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.queues.iter().map(DeviceQueue::state).collect()
    }

    /// The buffer for statistics waits there most of the time.
    fn can_sleep(&mut self) -> bool {
        let stats = self.optional.stats;
        let others = self.queues.iter_mut().enumerate();
        let others = others.filter(|(index, _)| Some(*index) != stats);
        self.shared.is_settled() && all_empty(others.map(|(_, queue)| queue), &self.memory)
    }
}

impl Worker {
    fn serve_queues(&mut self, stop: &EventFd) -> Result<(), QueueFailure> {
        let poller = Poller::new()?;
        poller.watch_readable(stop, STOP)?;
        poller.watch_readable(&self.shared.target_changed, TARGET_CHANGED)?;
        poller.watch_readable(&self.shared.stats_wanted, STATS_WANTED)?;
        for (queue, token) in self.queues.iter().zip(0..) {
            poller.watch_readable(&queue.kick, token)?;
        }
        // The driver may have added buffers before this thread looked.
        for queue in 0..self.queues.len() {
            self.process(queue)?;
        }
        loop {
            let mut events = [EpollEvent::default(); 8];
            let events = poller.wait(-1, &mut events)?;
            if events.iter().any(|event| event.data() == STOP) {
                return Ok(());
            }
            for event in events {
                match event.data() {
                    TARGET_CHANGED => {
                        clear_event(&self.shared.target_changed);
                        self.interrupt.trigger(InterruptCause::ConfigChange);
                    }
                    STATS_WANTED => {
                        clear_event(&self.shared.stats_wanted);
                        self.ask_for_stats()?;
                    }
                    token => {
                        let queue = usize::try_from(token).expect("the other tokens are queue numbers");
                        self.queues[queue].clear_kick();
                        self.process(queue)?;
                    }
                }
            }
        }
    }

    /// Serves at most one queue full of requests, so that `stop` is seen whatever the driver does.
    fn process(&mut self, queue: usize) -> Result<(), QueueFailure> {
        for _ in 0..QUEUE_SIZES[queue] {
            let Some(chain) = self.queues[queue].pop(&self.memory)? else {
                break;
            };
            let head = chain.head_index();
            let parsed = Buffers::parse(chain, MAX_DESCRIPTORS);
            if parsed.is_err() {
                self.shared.counters.bad_requests.increment();
            }
            let buffers = parsed.unwrap_or_default();
            let used = if Some(queue) == self.optional.stats {
                self.shared.set_stats(&stats(&buffers.readable, &self.memory));
                // There is one such buffer. Of several, the newest is kept.
                self.held_stats.replace(head)
            } else {
                self.serve_pages(queue, &buffers);
                Some(head)
            };
            if let Some(head) = used {
                self.queues[queue].add_used(&self.memory, head, 0)?;
            }
        }
        if std::mem::take(&mut self.stats_due) {
            self.ask_for_stats()?;
        }
        let queue = &mut self.queues[queue];
        if queue.expect_kicks(&self.memory)? {
            queue.kick_again();
        }
        if queue.needs_notification(&self.memory)? {
            self.interrupt.trigger(InterruptCause::UsedBuffer);
        }
        Ok(())
    }

    /// Inflates, deflates or takes a report.
    fn serve_pages(&self, queue: usize, buffers: &Buffers) {
        let counters = &self.shared.counters;
        if Some(queue) == self.optional.reporting {
            for range in buffers.writable.as_slice() {
                counters.reported_bytes.add(range.length.into());
                self.give_back(range.address, range.length.into());
            }
            return;
        }
        let Ok(ranges) = page_ranges(&buffers.readable, &self.memory) else {
            counters.bad_requests.increment();
            return;
        };
        for range in ranges {
            let length = range.end - range.start;
            match queue {
                INFLATE_QUEUE => {
                    counters.inflated_bytes.add(length);
                    self.give_back(GuestAddress(range.start), length);
                }
                // The host gives pages when they are touched.
                DEFLATE_QUEUE => counters.deflated_bytes.add(length),
                _ => {}
            }
        }
    }

    fn give_back(&self, address: GuestAddress, length: u64) {
        let counters = &self.shared.counters;
        match discard(&self.memory, address, length) {
            Ok(()) => counters.discarded_bytes.add(length),
            Err(DiscardError::Unaligned { .. } | DiscardError::Outside { .. }) => {
                counters.bad_ranges.increment();
            }
            Err(DiscardError::Shared { .. } | DiscardError::Host { .. }) => {
                counters.discard_failures.increment();
            }
        }
    }

    /// Sends the statistics buffer back, to get it again with newer ones.
    fn ask_for_stats(&mut self) -> Result<(), QueueFailure> {
        let (Some(queue), Some(head)) = (self.optional.stats, self.held_stats.take()) else {
            self.stats_due = true;
            return Ok(());
        };
        let queue = &mut self.queues[queue];
        queue.add_used(&self.memory, head, 0)?;
        if queue.needs_notification(&self.memory)? {
            self.interrupt.trigger(InterruptCause::UsedBuffer);
        }
        Ok(())
    }
}
