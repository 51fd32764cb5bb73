//! The worker half.

use std::sync::Arc;

use virtio_queue::QueueState;
use vmm_sys_util::epoll::EpollEvent;
use vmm_sys_util::eventfd::EventFd;

use super::device::RngCounters;
use super::{MAX_DESCRIPTORS, MAX_REQUEST_BYTES, QUEUE_SIZES, REQUEST_QUEUE};
use crate::devices::virtio::chain::{Buffers, Ranges};
use crate::devices::virtio::worker::{Poller, Serve, all_empty};
use crate::devices::virtio::{DeviceQueue, NeedsReset, QueueFailure};
use crate::irq::{Interrupt, InterruptCause};
use crate::memory::GuestMemory;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

const STOP: u64 = 0;
const KICK: u64 = 1;

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) needs_reset: NeedsReset,
    pub(super) queue: DeviceQueue,
    pub(super) counters: Arc<RngCounters>,
}

impl Serve for Worker {
    fn serve(&mut self, stop: &EventFd) {
        if self.serve_queue(stop).is_err() {
            self.needs_reset.raise();
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        vec![self.queue.state()]
    }

    fn can_sleep(&mut self) -> bool {
        all_empty([&mut self.queue], &self.memory)
    }
}

impl Worker {
    fn serve_queue(&mut self, stop: &EventFd) -> Result<(), QueueFailure> {
        let poller = Poller::new()?;
        poller.watch_readable(stop, STOP)?;
        poller.watch_readable(&self.queue.kick, KICK)?;
        // The driver may have added buffers before this thread looked.
        self.process()?;
        loop {
            let mut events = [EpollEvent::default(); 2];
            let events = poller.wait(-1, &mut events)?;
            if events.iter().any(|event| event.data() == STOP) {
                return Ok(());
            }
            self.queue.clear_kick();
            self.process()?;
        }
    }

    /// Fills at most one queue of buffers, so that `stop` is seen whatever the driver does.
    fn process(&mut self) -> Result<(), QueueFailure> {
        for _ in 0..QUEUE_SIZES[REQUEST_QUEUE] {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                break;
            };
            let head = chain.head_index();
            let length = match Buffers::parse(chain, MAX_DESCRIPTORS) {
                Ok(buffers) => self.fill(&buffers.writable),
                Err(_) => {
                    self.counters.bad_requests.increment();
                    0
                }
            };
            self.queue.add_used(&self.memory, head, length)?;
        }
        if self.queue.expect_kicks(&self.memory)? {
            self.queue.kick_again();
        }
        if self.queue.needs_notification(&self.memory)? {
            self.interrupt.trigger(InterruptCause::UsedBuffer);
        }
        Ok(())
    }

    /// Random bytes for one request, and how many.
    fn fill(&self, ranges: &Ranges) -> usize {
        let mut random = [0_u8; MAX_REQUEST_BYTES];
        let wanted = ranges.len().min(MAX_REQUEST_BYTES);
        // Fails only when interrupted before the first byte; the driver then asks again.
        let got = rustix::rand::getrandom(&mut random[..wanted], rustix::rand::GetRandomFlags::empty())
            .unwrap_or(0);
        let written = ranges.write(&self.memory, &random[..got]);
        self.counters.requests.increment();
        self.counters.bytes.add(written as u64);
        written
    }
}
