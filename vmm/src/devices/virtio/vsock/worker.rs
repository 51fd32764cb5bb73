//! The worker half: the queues on one side, the connections on the other.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::QueueState;
use vmm_sys_util::epoll::EpollEvent;
use vmm_sys_util::eventfd::EventFd;

use super::device::{OnGuestConnect, VsockCounters};
use super::handle::Inbox;
use super::mux::{FIRST_TOKEN, Mux};
use super::packet::{self, HEADER_BYTES};
use super::{MAX_DESCRIPTORS, QUEUE_SIZES, RX_QUEUE, TX_QUEUE};
use crate::devices::virtio::chain::Buffers;
use crate::devices::virtio::worker::{Poller, Serve, clear_event};
use crate::devices::virtio::{Activation, DeviceQueue, NeedsReset, QueueFailure};
use crate::irq::{Interrupt, InterruptCause};
use crate::memory::GuestMemory;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

const STOP: u64 = 0;
const RX_KICK: u64 = 1;
const TX_KICK: u64 = 2;
const INBOX: u64 = 3;
const EVENT_KICK: u64 = 4;
const _: () = assert!(EVENT_KICK < FIRST_TOKEN);

/// Packets of one direction before everything else has its turn.
const ROUND_PACKETS: usize = QUEUE_SIZES[RX_QUEUE] as usize;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, the id of the only event there is.
const EVENT_TRANSPORT_RESET: u32 = 0;
/// Events taken at a time.
const ROUND_EVENTS: usize = 64;

pub(super) struct Worker {
    mux: Mux,
    memory: GuestMemory,
    interrupt: Interrupt,
    needs_reset: NeedsReset,
    rx: DeviceQueue,
    tx: DeviceQueue,
    event: DeviceQueue,
    /// The driver has not seen yet that all its connections are gone: buffers it had added to the event queue when it was
    /// told. It adds another once it has closed them, and it would close a new one with them.
    reset_unseen: Option<u16>,
    inbox: Arc<Inbox>,
    counters: Arc<VsockCounters>,
    poller: Arc<Poller>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl Serve for Worker {
    fn serve(&mut self, stop: &EventFd) {
        if self.serve_queues(stop).is_err() {
            self.inbox.close();
            self.needs_reset.raise();
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        vec![self.rx.state(), self.tx.state(), self.event.state()]
    }
}

impl Worker {
    pub(super) fn new(
        mut mux: Mux,
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
        poller.watch_readable(&event.kick, EVENT_KICK)?;
        let poller = Arc::new(poller);
        mux.watch_with(Arc::clone(&poller));
        Ok(Worker {
            mux,
            memory,
            interrupt,
            needs_reset,
            rx,
            tx,
            event,
            reset_unseen: None,
            inbox,
            counters,
            poller,
        })
    }

    /// Tells the driver that all connections it knows are gone (virtio 1.2, 5.10.6.7). A driver that has given no buffer
    /// for events learns it connection by connection, by resets.
    pub(super) fn announce_reset(&mut self) {
        if self.send_reset_event().is_err() {
            self.needs_reset.raise();
        }
    }

    fn send_reset_event(&mut self) -> Result<(), QueueFailure> {
        let Some(chain) = self.event.pop(&self.memory)? else {
            return Ok(());
        };
        let head = chain.head_index();
        let written = Buffers::parse(chain, MAX_DESCRIPTORS).map_or(0, |buffers| {
            buffers
                .writable
                .write(&self.memory, &EVENT_TRANSPORT_RESET.to_le_bytes())
        });
        // Before the driver can see the event.
        self.reset_unseen = Some(self.event.expect_another(&self.memory)?);
        self.event.add_used(&self.memory, head, written)?;
        if self.event.needs_notification(&self.memory)? {
            self.interrupt.trigger(InterruptCause::UsedBuffer);
        }
        Ok(())
    }

    /// The guest has connections.
    pub(super) fn has_connections(&self) -> bool {
        self.mux.has_connections()
    }

    /// Ends all connections, and gives back what outlives them.
    pub(super) fn into_callback(self) -> OnGuestConnect {
        self.mux.into_callback()
    }

    fn serve_queues(&mut self, stop: &EventFd) -> Result<(), QueueFailure> {
        let poller = Arc::clone(&self.poller);
        poller.watch_readable(stop, STOP)?;
        let result = self.serve_until_stopped(&poller);
        // The next pause has another event.
        poller.unwatch(stop);
        result
    }

    fn serve_until_stopped(&mut self, poller: &Poller) -> Result<(), QueueFailure> {
        // The driver may have added packets before this thread looked.
        let mut more = true;
        loop {
            let timeout_ms = if more {
                0
            } else {
                timeout_ms(self.mux.until_deadline(Instant::now()))
            };
            let mut events = [EpollEvent::default(); ROUND_EVENTS];
            for event in poller.wait(timeout_ms, &mut events)? {
                match event.data() {
                    STOP => return Ok(()),
                    RX_KICK => self.rx.clear_kick(),
                    TX_KICK => self.tx.clear_kick(),
                    EVENT_KICK => self.event.clear_kick(),
                    INBOX => {
                        clear_event(self.inbox.event());
                        while let Some(connect) = self.inbox.pop() {
                            self.mux.connect(connect, Instant::now());
                        }
                    }
                    number => self.mux.socket_ready(number, event.event_set()),
                }
            }
            self.mux.expire(Instant::now());
            let congested = self.mux.is_congested();
            more = self.take_packets()?;
            more |= self.give_packets()?;
            more |= congested && !self.mux.is_congested();
        }
    }

    /// From the guest. `true` when there may be more at once.
    fn take_packets(&mut self) -> Result<bool, QueueFailure> {
        self.tx.suppress_kicks(&self.memory)?;
        let mut n_taken = 0;
        let more = loop {
            while n_taken < ROUND_PACKETS && !self.mux.is_congested() {
                let Some(chain) = self.tx.pop(&self.memory)? else {
                    break;
                };
                n_taken += 1;
                let head = chain.head_index();
                let packet = Buffers::parse(chain, MAX_DESCRIPTORS)
                    .and_then(|buffers| packet::parse(buffers.readable, &self.memory));
                match packet {
                    Ok((header, data)) => self.mux.receive(&header, data, &self.memory),
                    Err(_) => self.counters.bad_packets.increment(),
                }
                self.tx.add_used(&self.memory, head, 0)?;
            }
            if self.mux.is_congested() {
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
    fn give_packets(&mut self) -> Result<bool, QueueFailure> {
        if let Some(added) = self.reset_unseen {
            if self.event.added(&self.memory)? == added {
                // Goes on with the kick of the event queue.
                return Ok(false);
            }
            self.reset_unseen = None;
        }
        self.rx.suppress_kicks(&self.memory)?;
        let now = Instant::now();
        let mut n_given = 0;
        let mut more = true;
        while n_given < ROUND_PACKETS {
            if !self.mux.has_packets() {
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
            match self.mux.fill(&room, &self.memory, now) {
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
