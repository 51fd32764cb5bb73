//! The worker half: the queues on one side, the tap on the other.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::QueueState;
use vm_memory::Permissions;
use vmm_sys_util::epoll::{EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::NetCounters;
use super::{MAX_DESCRIPTORS, MAX_FRAME_BYTES, QUEUE_SIZES, RX_QUEUE, TX_QUEUE};
use crate::devices::virtio::chain::{Buffers, Ranges};
use crate::devices::virtio::device::feature;
use crate::devices::virtio::worker::{Poller, Serve};
use crate::devices::virtio::{Activation, DeviceQueue, NeedsReset, QueueFailure};
use crate::irq::{Interrupt, InterruptCause};
use crate::memory::GuestMemory;
use crate::sys::iovec::GuestIovecs;
use crate::sys::tap::{Tap, VNET_HEADER_BYTES};

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

const STOP: u64 = 0;
const RX_KICK: u64 = 1;
const TX_KICK: u64 = 2;
const TAP: u64 = 3;

/// Frames of one direction before the other has its turn.
const ROUND_FRAMES: usize = QUEUE_SIZES[RX_QUEUE] as usize;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

#[derive(Debug)]
pub(super) struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    needs_reset: NeedsReset,
    rx: DeviceQueue,
    tx: DeviceQueue,
    tap: Tap,
    counters: Arc<NetCounters>,
    /// One frame may use several buffers.
    merges: bool,
    frame: Box<[u8]>,
    /// Bytes in `frame` of a frame that waits for buffers.
    waiting: Option<usize>,
    /// The tap may have frames (edge triggered).
    tap_readable: bool,
}

/// What became of a frame for the guest.
enum Delivery {
    Done,
    /// There are not enough buffers now.
    NoBuffers,
}

impl Serve for Worker {
    fn serve(&mut self, stop: &EventFd) {
        if self.serve_queues(stop).is_err() {
            self.needs_reset.raise();
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        vec![self.rx.state(), self.tx.state()]
    }
}

impl Worker {
    pub(super) fn new(activation: Activation, tap: Tap, counters: Arc<NetCounters>) -> Self {
        let Activation {
            memory,
            interrupt,
            mut queues,
            features,
            needs_reset,
            ..
        } = activation;
        let tx = queues.remove(TX_QUEUE);
        let rx = queues.remove(RX_QUEUE);
        Worker {
            memory,
            interrupt,
            needs_reset,
            rx,
            tx,
            tap,
            counters,
            merges: features & feature(VIRTIO_NET_F_MRG_RXBUF) != 0,
            frame: vec![0; MAX_FRAME_BYTES].into_boxed_slice(),
            waiting: None,
            tap_readable: true,
        }
    }

    /// Gives the backend back.
    pub(super) fn into_tap(self) -> Tap {
        self.tap
    }

    fn serve_queues(&mut self, stop: &EventFd) -> Result<(), QueueFailure> {
        let poller = Poller::new()?;
        poller.watch_readable(stop, STOP)?;
        poller.watch_readable(&self.rx.kick, RX_KICK)?;
        poller.watch_readable(&self.tx.kick, TX_KICK)?;
        poller.watch(&self.tap, EventSet::IN | EventSet::EDGE_TRIGGERED, TAP)?;
        // The driver may have added buffers, and the tap got frames, before this thread looked.
        self.tap_readable = true;
        let mut more = true;
        loop {
            let mut events = [EpollEvent::default(); 4];
            for event in poller.wait(if more { 0 } else { -1 }, &mut events)? {
                match event.data() {
                    STOP => return Ok(()),
                    RX_KICK => self.rx.clear_kick(),
                    TX_KICK => self.tx.clear_kick(),
                    _ => self.tap_readable = true,
                }
            }
            more = self.take_frames()?;
            more |= self.give_frames()?;
        }
    }

    /// From the guest. `true` when there may be more at once.
    fn take_frames(&mut self) -> Result<bool, QueueFailure> {
        self.tx.suppress_kicks(&self.memory)?;
        let mut n_taken = 0;
        let more = loop {
            while n_taken < ROUND_FRAMES {
                let Some(chain) = self.tx.pop(&self.memory)? else {
                    break;
                };
                n_taken += 1;
                let head = chain.head_index();
                match Buffers::parse(chain, MAX_DESCRIPTORS) {
                    Ok(Buffers { readable, .. }) if is_frame(readable.len()) => self.send(&readable),
                    _ => self.counters.bad_packets.increment(),
                }
                self.tx.add_used(&self.memory, head, 0)?;
            }
            if n_taken >= ROUND_FRAMES {
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

    fn send(&self, frame: &Ranges) {
        let sent = GuestIovecs::new(&self.memory, frame.as_slice(), Permissions::Read)
            .and_then(|iovecs| self.tap.write(&iovecs));
        match sent {
            Ok(()) => {
                self.counters.tx_packets.increment();
                self.counters.tx_bytes.add(frame.len() as u64);
            }
            // A network may lose frames.
            Err(_) => self.counters.tx_dropped.increment(),
        }
    }

    /// To the guest. `true` when there may be more at once.
    fn give_frames(&mut self) -> Result<bool, QueueFailure> {
        self.rx.suppress_kicks(&self.memory)?;
        let mut n_given = 0;
        let more = loop {
            if n_given >= ROUND_FRAMES {
                break true;
            }
            let Some(length) = self.next_frame() else {
                break false;
            };
            match self.deliver(length)? {
                Delivery::Done => {
                    self.waiting = None;
                    n_given += 1;
                }
                Delivery::NoBuffers => {
                    self.waiting = Some(length);
                    if !self.rx.expect_kicks(&self.memory)? {
                        break false;
                    }
                    // There were too few; are there enough now?
                    if matches!(self.deliver(length)?, Delivery::NoBuffers) {
                        break false;
                    }
                    self.waiting = None;
                    n_given += 1;
                }
            }
        };
        if n_given != 0 && self.rx.needs_notification(&self.memory)? {
            self.interrupt.trigger(InterruptCause::UsedBuffer);
        }
        Ok(more)
    }

    /// The length of the frame in `self.frame`: the one that waits, or the tap's next.
    fn next_frame(&mut self) -> Option<usize> {
        if self.waiting.is_some() {
            return self.waiting;
        }
        while self.tap_readable {
            match self.tap.read(&mut self.frame) {
                Ok(length) if is_frame(length) => return Some(length),
                // Not a frame: the tap was opened without the header, or this is the end of a test.
                Ok(0) => self.tap_readable = false,
                Ok(_) => self.counters.rx_dropped.increment(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Nothing now, or the interface is down: the next event tells.
                Err(_) => self.tap_readable = false,
            }
        }
        None
    }

    /// Puts the frame in `self.frame` into guest buffers, or drops it when it fits into none.
    fn deliver(&mut self, length: usize) -> Result<Delivery, QueueFailure> {
        let mut buffers: Vec<(u16, Ranges)> = Vec::new();
        let mut room = 0;
        while room < length {
            let Some(chain) = self.rx.pop(&self.memory)? else {
                for _ in &buffers {
                    self.rx.unpop();
                }
                return Ok(Delivery::NoBuffers);
            };
            let head = chain.head_index();
            let parsed = Buffers::parse(chain, MAX_DESCRIPTORS).map(|buffers| buffers.writable);
            // The first must hold the header (virtio 1.2, 5.1.6.3.1); an empty one would never make room.
            let usable = parsed.ok().filter(|ranges| ranges.len() >= VNET_HEADER_BYTES);
            let Some(ranges) = usable else {
                // Returned unused; what was collected before goes back and is popped again, in its order.
                self.counters.bad_packets.increment();
                if buffers.is_empty() {
                    self.rx.add_used(&self.memory, head, 0)?;
                    continue;
                }
                buffers.push((head, Ranges::default()));
                let unused: Vec<_> = buffers.iter().map(|(head, _)| (*head, 0)).collect();
                self.rx.add_used_together(&self.memory, &unused)?;
                self.counters.rx_dropped.increment();
                return Ok(Delivery::Done);
            };
            room += ranges.len();
            buffers.push((head, ranges));
            if !self.merges {
                break;
            }
        }
        if room < length {
            // Only without merging: a frame longer than its buffer.
            let unused: Vec<_> = buffers.iter().map(|(head, _)| (*head, 0)).collect();
            self.rx.add_used_together(&self.memory, &unused)?;
            self.counters.rx_dropped.increment();
            return Ok(Delivery::Done);
        }
        // A frame needs at most MAX_FRAME_BYTES / VNET_HEADER_BYTES buffers.
        let n_buffers = u16::try_from(buffers.len()).unwrap_or(u16::MAX);
        self.frame[NUM_BUFFERS].copy_from_slice(&n_buffers.to_le_bytes());
        let mut rest = &self.frame[..length];
        let mut used = Vec::with_capacity(buffers.len());
        for (head, ranges) in &buffers {
            let n = ranges.write(&self.memory, rest);
            rest = &rest[n..];
            used.push((*head, n));
        }
        self.rx.add_used_together(&self.memory, &used)?;
        self.counters.rx_packets.increment();
        self.counters.rx_bytes.add(length as u64);
        Ok(Delivery::Done)
    }
}

fn is_frame(length: usize) -> bool {
    (VNET_HEADER_BYTES + 1..=MAX_FRAME_BYTES).contains(&length)
}
