//! All connections of a guest: which packet belongs to whom, and whose turn it is to send.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Key, State, Violation};
use super::device::{Limits, OnGuestConnect, VsockCounters};
use super::handle::{Connect, ConnectError};
use super::packet::{HEADER_BYTES, Header, Op, TYPE_STREAM};
use super::{HOST_CID, MAX_WAITING_RESETS};
use crate::devices::virtio::chain::Ranges;
use crate::devices::virtio::worker::Poller;
use crate::memory::GuestMemory;

/// Connections are polled under numbers from here on.
pub(super) const FIRST_TOKEN: u64 = 16;
/// Host ports of connections to the guest begin here, where no service listens.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The connections of one activation.
pub(super) struct Mux {
    guest_cid: u64,
    limits: Limits,
    on_guest_connect: OnGuestConnect,
    counters: Arc<VsockCounters>,
    poller: Option<Arc<Poller>>,
    /// By number. Numbers are never used twice, so a late event cannot meet another connection.
    connections: HashMap<u64, Connection>,
    /// The connections the guest can send packets for.
    numbers: HashMap<Key, u64>,
    next_number: u64,
    next_host_port: u32,
    /// Whose turn it is; each is in it at most once.
    ready: VecDeque<u64>,
    /// Resets that belong to no connection.
    resets: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, u64)>,
}

impl Mux {
    pub(super) fn new(
        guest_cid: u64,
        limits: Limits,
        on_guest_connect: OnGuestConnect,
        counters: Arc<VsockCounters>,
    ) -> Self {
        Mux {
            guest_cid,
            limits,
            on_guest_connect,
            counters,
            poller: None,
            connections: HashMap::new(),
            numbers: HashMap::new(),
            next_number: FIRST_TOKEN,
            next_host_port: FIRST_HOST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
        }
    }

    /// Connections to the guest begin at a host port no earlier one is likely to have had: a guest that was restored keeps
    /// the sockets of the captured VM's connections until their owners close them, and refuses what comes from their
    /// ports.
    pub(super) fn leave_ports(&mut self, random: u32) {
        self.next_host_port = FIRST_HOST_PORT + random % (u32::MAX - FIRST_HOST_PORT);
    }

    /// Sockets are watched by this from now on.
    pub(super) fn watch_with(&mut self, poller: Arc<Poller>) {
        self.poller = Some(poller);
    }

    // === Events ===

    /// The host wants to connect to a guest port.
    pub(super) fn connect(&mut self, connect: Connect, now: Instant) {
        if self.connections.len() >= self.limits.max_connections {
            self.counters.refused.increment();
            (connect.reply)(Err(ConnectError::TooMany));
            return;
        }
        let key = Key {
            host_port: self.free_host_port(connect.port),
            guest_port: connect.port,
        };
        let connection = Connection::requested(key, connect.stream, connect.reply);
        match self.insert(connection) {
            Ok(number) => {
                self.set_deadline(number, now + self.limits.connect_timeout);
                self.schedule(number);
            }
            Err(connection) => connection.close(ConnectError::BadSocket),
        }
    }

    /// A socket's readiness changed.
    pub(super) fn socket_ready(&mut self, number: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        connection.on_ready(events);
        if matches!(connection.state, State::Draining) && connection.is_drained() {
            self.remove(number, ConnectError::Refused);
        } else {
            self.schedule(number);
        }
    }

    /// The guest sent a packet.
    pub(super) fn receive(&mut self, header: &Header, data: Ranges, memory: &GuestMemory) {
        self.counters.tx_packets.increment();
        let addressed_to_us = header.dst_cid == HOST_CID && header.socket_type == TYPE_STREAM;
        if header.src_cid != self.guest_cid || !addressed_to_us {
            self.counters.bad_packets.increment();
            // A reset goes to the guest whoever it pretends to be.
            self.refuse(&Header {
                src_cid: self.guest_cid,
                ..*header
            });
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let known = self.numbers.get(&key).copied();
        match (header.op, known) {
            (Some(Op::Request), known) => self.accept(header, key, known),
            (_, None) => self.refuse(header),
            (Some(op), Some(number)) => {
                if self.deliver(header, op, number, data, memory).is_err() {
                    self.counters.bad_packets.increment();
                    self.refuse(header);
                    self.remove(number, ConnectError::Refused);
                }
            }
            (None, Some(number)) => {
                self.counters.bad_packets.increment();
                self.refuse(header);
                self.remove(number, ConnectError::Refused);
            }
        }
    }

    fn deliver(
        &mut self,
        header: &Header,
        op: Op,
        number: u64,
        data: Ranges,
        memory: &GuestMemory,
    ) -> Result<(), Violation> {
        let connection = self.connections.get_mut(&number).ok_or(Violation)?;
        connection.peer_says(header.buf_alloc, header.fwd_cnt);
        match op {
            Op::Response => {
                connection.on_response()?;
                self.counters.connections.increment();
                self.clear_deadline(number);
            }
            Op::Data => {
                self.counters.tx_bytes.add(data.len() as u64);
                connection.on_data(data, memory)?;
            }
            Op::Shutdown => {
                connection.on_shutdown(header.flags)?;
                if connection.guest_is_done() {
                    self.refuse(header);
                    self.detach(number);
                    return Ok(());
                }
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => connection.on_credit_request(),
            Op::Reset => {
                self.detach(number);
                return Ok(());
            }
            Op::Request => return Err(Violation),
        }
        self.schedule(number);
        Ok(())
    }

    /// The guest connects to a host port.
    fn accept(&mut self, header: &Header, key: Key, known: Option<u64>) {
        if let Some(number) = known {
            let closing = self
                .connections
                .get(&number)
                .is_some_and(|connection| matches!(connection.state, State::Closing));
            self.remove(number, ConnectError::Refused);
            if !closing {
                // Both sides disagree about an open connection: neither can go on.
                self.counters.bad_packets.increment();
                self.refuse(header);
                return;
            }
        }
        if self.connections.len() >= self.limits.max_connections {
            self.counters.refused.increment();
            self.refuse(header);
            return;
        }
        let inserted = UnixStream::pair().ok().and_then(|(ours, theirs)| {
            let mut connection = Connection::accepted(key, ours);
            connection.peer_says(header.buf_alloc, header.fwd_cnt);
            Some((self.insert(connection).ok()?, theirs))
        });
        match inserted {
            Some((number, theirs)) => {
                self.counters.connections.increment();
                (self.on_guest_connect)(key.host_port, theirs);
                self.schedule(number);
            }
            None => {
                self.counters.refused.increment();
                self.refuse(header);
            }
        }
    }

    /// Ends what waited too long.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, number)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.remove(&(deadline, number));
            let Some(connection) = self.connections.get(&number) else {
                continue;
            };
            let key = connection.key;
            self.counters.resets.increment();
            self.push_reset(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: key.host_port,
                dst_port: key.guest_port,
                length: 0,
                socket_type: TYPE_STREAM,
                op: Some(Op::Reset),
                flags: 0,
                buf_alloc: 0,
                fwd_cnt: 0,
            });
            self.remove(number, ConnectError::TimedOut);
        }
    }

    /// How long nothing needs to be done about time.
    pub(super) fn until_deadline(&self, now: Instant) -> Option<Duration> {
        self.deadlines
            .first()
            .map(|(deadline, _)| deadline.saturating_duration_since(now))
    }

    // === To the guest ===

    /// [`Mux::fill`] may have a packet.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Packets of the guest that cause resets must wait.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= MAX_WAITING_RESETS
    }

    /// Puts the next packet into a guest buffer longer than a header: the bytes written.
    pub(super) fn fill(&mut self, room: &Ranges, memory: &GuestMemory, now: Instant) -> Option<usize> {
        if let Some(header) = self.resets.pop_front() {
            room.write(memory, &header.encode());
            return Some(HEADER_BYTES);
        }
        while let Some(number) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&number) else {
                continue;
            };
            connection.queued = false;
            let filled = connection.fill(self.guest_cid, room, memory);
            let closing = matches!(connection.state, State::Closing);
            if let Some(n) = filled {
                self.counters.rx_packets.increment();
                self.counters.rx_bytes.add((n - HEADER_BYTES) as u64);
                if closing {
                    self.set_deadline(number, now + self.limits.close_timeout);
                }
                self.schedule(number);
                return filled;
            }
        }
        None
    }

    // === The set of connections ===

    /// There are connections, of whatever state, or answers about some on their way.
    pub(super) fn has_connections(&self) -> bool {
        !self.connections.is_empty() || self.has_packets()
    }

    /// Ends all connections, and gives back what outlives them.
    pub(super) fn into_callback(mut self) -> OnGuestConnect {
        for (_, connection) in self.connections.drain() {
            connection.close(ConnectError::DeviceReset);
        }
        self.on_guest_connect
    }

    fn insert(&mut self, connection: Connection) -> Result<u64, Box<Connection>> {
        let number = self.next_number;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let watched = self
            .poller
            .as_ref()
            .is_some_and(|poller| poller.watch(&connection.stream, events, number).is_ok());
        if !watched {
            return Err(Box::new(connection));
        }
        self.next_number += 1;
        self.numbers.insert(connection.key, number);
        self.connections.insert(number, connection);
        Ok(number)
    }

    /// The guest is done with a connection; the host may still have to take its last bytes.
    fn detach(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if connection.is_drained() || matches!(connection.state, State::Requested(_)) {
            if matches!(connection.state, State::Requested(_)) {
                self.counters.refused.increment();
            }
            self.remove(number, ConnectError::Refused);
            return;
        }
        connection.state = State::Draining;
        let key = connection.key;
        self.numbers.remove(&key);
        self.clear_deadline(number);
    }

    fn remove(&mut self, number: u64, error: ConnectError) {
        self.clear_deadline(number);
        let Some(connection) = self.connections.remove(&number) else {
            return;
        };
        // A draining connection has given its ports up; they may be another's now.
        if self.numbers.get(&connection.key) == Some(&number) {
            self.numbers.remove(&connection.key);
        }
        if let Some(poller) = &self.poller {
            poller.unwatch(&connection.stream);
        }
        connection.close(error);
    }

    fn schedule(&mut self, number: u64) {
        if let Some(connection) = self.connections.get_mut(&number)
            && !connection.queued
            && connection.wants_to_send()
        {
            connection.queued = true;
            self.ready.push_back(number);
        }
    }

    /// Answers a packet with a reset, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != Some(Op::Reset) {
            self.counters.resets.increment();
            self.push_reset(header.reset());
        }
    }

    fn push_reset(&mut self, header: Header) {
        // Full only when deadlines pass while the guest gives no buffers: then it would not see them either.
        if self.resets.len() < 2 * MAX_WAITING_RESETS {
            self.resets.push_back(header);
        }
    }

    fn set_deadline(&mut self, number: u64, deadline: Instant) {
        self.clear_deadline(number);
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.deadline = Some(deadline);
            self.deadlines.insert((deadline, number));
        }
    }

    fn clear_deadline(&mut self, number: u64) {
        if let Some(connection) = self.connections.get_mut(&number)
            && let Some(deadline) = connection.deadline.take()
        {
            self.deadlines.remove(&(deadline, number));
        }
    }

    fn free_host_port(&mut self, guest_port: u32) -> u32 {
        // There are far fewer connections than ports.
        loop {
            let host_port = self.next_host_port;
            self.next_host_port = self.next_host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.numbers.contains_key(&Key {
                host_port,
                guest_port,
            }) {
                return host_port;
            }
        }
    }
}
