//! The worker half: the queues on one side, the connections on the other.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EpollEvent;
use vmm_sys_util::eventfd::EventFd;

use super::device::{OnGuestConnect, VsockCounters};
use super::handle::Inbox;
use super::mux::{FIRST_TOKEN, Mux};
use super::packet::{self, HEADER_BYTES};
use super::{MAX_DESCRIPTORS, QUEUE_SIZES, RX_QUEUE, TX_QUEUE};
use crate::devices::virtio::chain::Buffers;
use crate::devices::virtio::worker::{Poller, clear_event};
use crate::devices::virtio::{Activation, DeviceQueue, NeedsReset, QueueFailure};
use crate::irq::{Interrupt, InterruptCause};
use crate::memory::GuestMemory;

const STOP: u64 = 0;
const RX_KICK: u64 = 1;
const TX_KICK: u64 = 2;
const INBOX: u64 = 3;
const _: () = assert!(INBOX < FIRST_TOKEN);

/// Packets of one direction before everything else has its turn.
const ROUND_PACKETS: usize = QUEUE_SIZES[RX_QUEUE] as usize;
/// Events taken at a time.
const ROUND_EVENTS: usize = 64;

pub(super) struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    needs_reset: NeedsReset,
    rx: DeviceQueue,
    tx: DeviceQueue,
    /// Kept so that its kick stays known; nothing is ever put into it.
    _event: DeviceQueue,
    inbox: Arc<Inbox>,
    counters: Arc<VsockCounters>,
    poller: Arc<Poller>,
}

impl Worker {
    pub(super) fn new(
        activation: Activation,
        inbox: Arc<Inbox>,
        counters: Arc<VsockCounters>,
    ) -> io::Result<Self> {
        let Activation {
            memory,
            interrupt,
            mut queues,
            needs_reset,
            ..
        } = activation;
        let event = queues.remove(TX_QUEUE + 1);
        let tx = queues.remove(TX_QUEUE);
        let rx = queues.remove(RX_QUEUE);
        let poller = Poller::new()?;
        poller.watch_readable(&rx.kick, RX_KICK)?;
        poller.watch_readable(&tx.kick, TX_KICK)?;
        poller.watch_readable(inbox.event(), INBOX)?;
        let poller = Arc::new(poller);
        Ok(Worker {
            memory,
            interrupt,
            needs_reset,
            rx,
            tx,
            _event: event,
            inbox,
            counters,
            poller,
        })
    }

    /// Serves queues and sockets until `stop` is readable; then all connections end.
    pub(super) fn run(mut self, mut mux: Mux, stop: &EventFd) -> OnGuestConnect {
        mux.watch_with(Arc::clone(&self.poller));
        if self.serve(&mut mux, stop).is_err() {
            self.needs_reset.raise();
        }
        self.inbox.close();
        mux.into_callback()
    }

    fn serve(&mut self, mux: &mut Mux, stop: &EventFd) -> Result<(), QueueFailure> {
        self.poller.watch_readable(stop, STOP)?;
        let poller = Arc::clone(&self.poller);
        // The driver may have added packets before this thread looked.
        let mut more = true;
        loop {
            let timeout_ms = if more {
                0
            } else {
                timeout_ms(mux.until_deadline(Instant::now()))
            };
            let mut events = [EpollEvent::default(); ROUND_EVENTS];
            for event in poller.wait(timeout_ms, &mut events)? {
                match event.data() {
                    STOP => return Ok(()),
                    RX_KICK => self.rx.clear_kick(),
                    TX_KICK => self.tx.clear_kick(),
                    INBOX => {
                        clear_event(self.inbox.event());
                        while let Some(connect) = self.inbox.pop() {
                            mux.connect(connect, Instant::now());
                        }
                    }
                    number => mux.socket_ready(number, event.event_set()),
                }
            }
            mux.expire(Instant::now());
            let congested = mux.is_congested();
            more = self.take_packets(mux)?;
            more |= self.give_packets(mux)?;
            more |= congested && !mux.is_congested();
        }
    }

    /// From the guest. `true` when there may be more at once.
    fn take_packets(&mut self, mux: &mut Mux) -> Result<bool, QueueFailure> {
        self.tx.suppress_kicks(&self.memory)?;
        let mut n_taken = 0;
        let more = loop {
            while n_taken < ROUND_PACKETS && !mux.is_congested() {
                let Some(chain) = self.tx.pop(&self.memory)? else {
                    break;
                };
                n_taken += 1;
                let head = chain.head_index();
                let packet = Buffers::parse(chain, MAX_DESCRIPTORS)
                    .and_then(|buffers| packet::parse(buffers.readable, &self.memory));
                match packet {
                    Ok((header, data)) => mux.receive(&header, data, &self.memory),
                    Err(_) => self.counters.bad_packets.increment(),
                }
                self.tx.add_used(&self.memory, head, 0)?;
            }
            if mux.is_congested() {
                // Goes on when the guest has given buffers for the resets.
                break false;
            }
            if n_taken >= ROUND_PACKETS {
                break true;
            }
            if !self.tx.expect_kicks(&self.memory)? {
                break false;
            }
        };
        if n_taken != 0 && self.tx.needs_notification(&self.memory)? {
            self.interrupt.trigger(InterruptCause::UsedBuffer);
        }
        Ok(more)
    }

    /// To the guest. `true` when there may be more at once.
    fn give_packets(&mut self, mux: &mut Mux) -> Result<bool, QueueFailure> {
        self.rx.suppress_kicks(&self.memory)?;
        let now = Instant::now();
        let mut n_given = 0;
        let mut more = true;
        while n_given < ROUND_PACKETS {
            if !mux.has_packets() {
                more = false;
                break;
            }
            let Some(chain) = self.rx.pop(&self.memory)? else {
                if self.rx.expect_kicks(&self.memory)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head_index();
            let room = Buffers::parse(chain, MAX_DESCRIPTORS).map(|buffers| buffers.writable);
            let Some(room) = room.ok().filter(|room| room.len() > HEADER_BYTES) else {
                self.counters.bad_packets.increment();
                self.rx.add_used(&self.memory, head, 0)?;
                n_given += 1;
                continue;
            };
            match mux.fill(&room, &self.memory, now) {
                Some(n) => {
                    self.rx.add_used(&self.memory, head, n)?;
                    n_given += 1;
                }
                None => self.rx.unpop(),
            }
        }
        if n_given != 0 && self.rx.needs_notification(&self.memory)? {
            self.interrupt.trigger(InterruptCause::UsedBuffer);
        }
        Ok(more)
    }
}

/// For epoll: rounded up, so that the deadline has passed when it returns; -1 for none.
fn timeout_ms(left: Option<Duration>) -> i32 {
    left.map_or(-1, |left| {
        i32::try_from(left.as_millis()).map_or(i32::MAX, |ms| ms.saturating_add(1))
    })
}
