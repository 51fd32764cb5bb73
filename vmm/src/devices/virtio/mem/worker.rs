//! The worker half.

use std::ops::Range;
use std::sync::Arc;

use virtio_queue::QueueState;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EpollEvent;
use vmm_sys_util::eventfd::EventFd;

use super::blocks::Verdict;
use super::request::{REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use super::shared::Shared;
use super::{MAX_DESCRIPTORS, QUEUE_SIZES, REQUEST_QUEUE};
use crate::devices::virtio::chain::Buffers;
use crate::devices::virtio::worker::{Poller, Serve, all_empty};
use crate::devices::virtio::{DeviceQueue, NeedsReset, QueueFailure};
use crate::irq::{Interrupt, InterruptCause};
use crate::memory::{GuestMemory, discard};

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
    pub(super) shared: Arc<Shared>,
}

impl Serve for Worker {
    /// A request that was begun is answered before it returns.
    fn serve(&mut self, stop: &EventFd) {
        if self.serve_queue(stop).is_err() {
            self.needs_reset.raise();
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        vec![self.queue.state()]
    }

    fn can_sleep(&mut self) -> bool {
        // A snapshot may have been taken between a request and its answer.
        !self.shared.blocks().is_in_use() && all_empty([&mut self.queue], &self.memory)
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

    /// Answers at most one queue full of requests, so that `stop` is seen whatever the driver does.
    fn process(&mut self) -> Result<(), QueueFailure> {
        for _ in 0..QUEUE_SIZES[REQUEST_QUEUE] {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                break;
            };
            let head = chain.head_index();
            let length = match Buffers::parse(chain, MAX_DESCRIPTORS) {
                Ok(buffers) if buffers.writable.len() >= RESPONSE_BYTES => self.answer(&buffers),
                _ => {
                    self.shared.counters.bad_requests.increment();
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

    /// Carries one request out; how many bytes of answer were written.
    fn answer(&self, buffers: &Buffers) -> usize {
        let mut bytes = [0; REQUEST_BYTES];
        let n_read = buffers.readable.read(&self.memory, &mut bytes);
        let request = Request::parse(&bytes).filter(|_| n_read == REQUEST_BYTES);
        let response = request.map_or(Response::Error, |request| self.carry_out(request));
        let counters = &self.shared.counters;
        match response {
            Response::Refused => counters.refused_requests.increment(),
            Response::Busy => counters.discard_failures.increment(),
            Response::Error => counters.bad_requests.increment(),
            Response::Done | Response::Plugged | Response::Unplugged | Response::Mixed => {
                counters.requests.increment();
            }
        }
        buffers.writable.write(&self.memory, &response.to_bytes())
    }

    fn carry_out(&self, request: Request) -> Response {
        match self.shared.change(|blocks| blocks.decide(request)) {
            Verdict::Answer(response) => response,
            // Only this thread plugs and unplugs, so that what was decided still holds when the memory is gone.
            Verdict::GiveBack(blocks) if self.give_back(&blocks) => {
                self.shared.change(|state| state.unplugged(blocks));
                Response::Done
            }
            Verdict::GiveBack(_) => Response::Busy,
        }
    }

    /// Returns the plugged ones of `blocks` to the host.
    fn give_back(&self, blocks: &Range<usize>) -> bool {
        let ranges: Vec<_> = {
            let state = self.shared.blocks();
            let runs = state.plugged_runs(blocks);
            runs.iter().map(|run| state.addresses(run)).collect()
        };
        ranges.into_iter().all(|range| {
            let length = range.end - range.start;
            let done = discard(&self.memory, GuestAddress(range.start), length).is_ok();
            if done {
                self.shared.counters.discarded_bytes.add(length);
            }
            done
        })
    }
}
