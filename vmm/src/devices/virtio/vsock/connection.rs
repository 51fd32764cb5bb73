//! One connection: bytes between a unix socket and the guest, and the order in which its packets go out.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, SendFlags};
use vm_memory::Permissions;
use vmm_sys_util::epoll::EventSet;

use super::credit::Credit;
use super::handle::{ConnectError, ConnectReply};
use super::packet::{HEADER_BYTES, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::{BUFFER_BYTES, HOST_CID, MAX_PACKET_BYTES};
use crate::devices::virtio::chain::Ranges;
use crate::memory::GuestMemory;
use crate::sys::file;
use crate::sys::iovec::GuestIovecs;

/// A drained backlog gives its memory back when it had grown beyond this.
const KEPT_BACKLOG_BYTES: usize = 16 << 10;

/// The two ports: unique among connections that the guest can still send packets for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

pub(super) enum State {
    /// The guest is asked to accept.
    Requested(ConnectReply),
    /// Both sides may send.
    Open,
    /// The guest was told that the host is gone.
    Closing,
    /// The guest is gone; what it sent still goes to the host.
    Draining,
}

/// The guest did what the protocol forbids: the connection is to be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Violation;

pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) stream: UnixStream,
    pub(super) state: State,
    /// When patience with the guest ends, in `Requested` and `Closing`.
    pub(super) deadline: Option<Instant>,
    /// In the list of connections that have something to send.
    pub(super) queued: bool,
    credit: Credit,
    /// From the guest, not yet taken by the host's socket; at most [`BUFFER_BYTES`].
    backlog: VecDeque<u8>,
    /// What the socket was last seen to be ready for (edge triggered).
    readable: bool,
    writable: bool,
    /// Both directions of the socket are closed.
    hung_up: bool,
    /// No more bytes come from the host.
    host_ended: bool,
    /// The host takes no more bytes; what the guest sends is dropped.
    host_refuses: bool,
    /// The host's socket was told that no more bytes come.
    write_shut_down: bool,
    /// Shutdown flags of the guest.
    guest_flags: u32,
    /// Shutdown flags that the guest was sent, and is to be sent.
    sent_flags: u32,
    due_flags: u32,
    /// The opening packet (request or response) is to be sent.
    opening_due: bool,
    credit_update_due: bool,
    /// The guest was asked for credit and has not given any since.
    credit_requested: bool,
}

impl Connection {
    /// A connection that the guest asked for.
    pub(super) fn accepted(key: Key, stream: UnixStream) -> Self {
        Connection::new(key, stream, State::Open)
    }

    /// A connection that the host asks for.
    pub(super) fn requested(key: Key, stream: UnixStream, reply: ConnectReply) -> Self {
        Connection::new(key, stream, State::Requested(reply))
    }

    fn new(key: Key, stream: UnixStream, state: State) -> Self {
        Connection {
            key,
            stream,
            state,
            deadline: None,
            queued: false,
            credit: Credit::new(),
            backlog: VecDeque::new(),
            readable: false,
            // Until the socket says otherwise.
            writable: true,
            hung_up: false,
            host_ended: false,
            host_refuses: false,
            write_shut_down: false,
            guest_flags: 0,
            sent_flags: 0,
            due_flags: 0,
            opening_due: true,
            credit_update_due: false,
            credit_requested: false,
        }
    }

    /// Takes in what every packet of the guest says about its buffer.
    pub(super) fn peer_says(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.credit.peer_says(buf_alloc, fwd_cnt);
        if self.credit.available() != 0 {
            self.credit_requested = false;
        }
    }

    /// The guest accepted.
    pub(super) fn on_response(&mut self) -> Result<(), Violation> {
        match std::mem::replace(&mut self.state, State::Open) {
            State::Requested(reply) => {
                reply(Ok(()));
                Ok(())
            }
            state => {
                self.state = state;
                Err(Violation)
            }
        }
    }

    /// The guest sent data.
    pub(super) fn on_data(&mut self, mut data: Ranges, memory: &GuestMemory) -> Result<(), Violation> {
        if matches!(self.state, State::Requested(_)) || self.guest_flags & SHUTDOWN_SEND != 0 {
            return Err(Violation);
        }
        if !self.credit.receive(count(data.len())) {
            return Err(Violation);
        }
        while self.backlog.is_empty() && self.writable && !self.host_refuses && !data.is_empty() {
            let sent = GuestIovecs::new(memory, data.as_slice(), Permissions::Read)
                .and_then(|from| file::send(&self.stream, &from));
            match sent {
                Ok(n) => {
                    self.credit.forward(count(n));
                    data.split_front(n).map_err(|_| Violation)?;
                }
                Err(e) => self.on_send_error(&e),
            }
        }
        if self.host_refuses {
            self.credit.forward(count(data.len()));
            return Ok(());
        }
        let mut chunk = [0; 4096];
        while !data.is_empty() {
            let n = data.len().min(chunk.len());
            let part = data.split_front(n).map_err(|_| Violation)?;
            if part.read(memory, &mut chunk[..n]) != n {
                return Err(Violation);
            }
            self.backlog.extend(&chunk[..n]);
        }
        debug_assert!(self.backlog.len() <= BUFFER_BYTES as usize);
        Ok(())
    }

    /// The guest ends one or both directions.
    pub(super) fn on_shutdown(&mut self, flags: u32) -> Result<(), Violation> {
        if matches!(self.state, State::Requested(_)) {
            return Err(Violation);
        }
        self.guest_flags |= flags & SHUTDOWN_BOTH;
        if self.guest_flags & SHUTDOWN_RECEIVE != 0 && !self.host_ended {
            self.host_ended = true;
            // The host's next write fails. An error means that the socket is closed already.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.settle();
        Ok(())
    }

    /// The guest wants to know its credit.
    pub(super) fn on_credit_request(&mut self) {
        self.credit_update_due = true;
    }

    /// The guest ended both directions.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_flags == SHUTDOWN_BOTH
    }

    /// Nothing is left that could still be delivered to the host.
    pub(super) fn is_drained(&self) -> bool {
        self.backlog.is_empty()
    }

    /// The socket's readiness changed.
    pub(super) fn on_ready(&mut self, events: EventSet) {
        let closed = EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | closed);
        self.writable |= events.intersects(EventSet::OUT | closed);
        self.hung_up |= events.contains(EventSet::HANG_UP);
        self.flush();
    }

    /// Gives the backlog to the host's socket as far as it takes it.
    fn flush(&mut self) {
        while self.writable && !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match rustix::net::send(&self.stream, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => {
                    self.backlog.drain(..n);
                    self.credit.forward(count(n));
                }
                Err(e) => self.on_send_error(&e.into()),
            }
        }
        self.settle();
    }

    fn on_send_error(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.writable = false,
            io::ErrorKind::Interrupted => {}
            // Nobody reads any more.
            _ => {
                self.host_refuses = true;
                self.credit.forward(count(self.backlog.len()));
                self.backlog.clear();
                self.due_flags |= SHUTDOWN_RECEIVE;
            }
        }
    }

    /// Does what had to wait until the backlog was empty.
    fn settle(&mut self) {
        if !self.backlog.is_empty() {
            return;
        }
        if self.backlog.capacity() > KEPT_BACKLOG_BYTES {
            self.backlog = VecDeque::new();
        }
        if self.guest_flags & SHUTDOWN_SEND != 0 && !self.write_shut_down {
            self.write_shut_down = true;
            // An error means that the socket is closed already.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// A packet may be ready for the guest; if there is none after all, [`Connection::fill`] finds out and this is
    /// `false` until something happens.
    pub(super) fn wants_to_send(&self) -> bool {
        match self.state {
            State::Requested(_) => self.opening_due,
            State::Closing | State::Draining => false,
            State::Open => {
                self.opening_due
                    || self.credit_update_due
                    || self.credit.update_due()
                    || self.flags_to_send() != 0
                    || (self.may_read() && (self.credit.available() != 0 || !self.credit_requested))
            }
        }
    }

    fn may_read(&self) -> bool {
        self.readable && !self.host_ended
    }

    /// Flags that the guest has to hear of.
    fn flags_to_send(&self) -> u32 {
        let gone = if self.hung_up && self.host_ended {
            SHUTDOWN_BOTH
        } else {
            0
        };
        (self.due_flags | gone) & !self.sent_flags
    }

    /// Puts the next packet into a guest buffer: the bytes written, or `None` when there is no packet.
    /// `room` holds more than a header.
    pub(super) fn fill(&mut self, guest_cid: u64, room: &Ranges, memory: &GuestMemory) -> Option<usize> {
        let mut data_room = room.clone();
        let header_room = data_room.split_front(HEADER_BYTES).ok()?;
        let (op, flags, length) = self.next_packet(data_room, memory)?;
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            length: count(length),
            socket_type: TYPE_STREAM,
            op: Some(op),
            flags,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.credit.announce(),
        };
        self.credit_update_due = false;
        header_room.write(memory, &header.encode());
        Some(HEADER_BYTES + length)
    }

    /// Decides on the next packet; data is then already in `data_room`.
    fn next_packet(&mut self, data_room: Ranges, memory: &GuestMemory) -> Option<(Op, u32, usize)> {
        if std::mem::take(&mut self.opening_due) {
            let op = if matches!(self.state, State::Requested(_)) {
                Op::Request
            } else {
                Op::Response
            };
            return Some((op, 0, 0));
        }
        if !matches!(self.state, State::Open) {
            return None;
        }
        if self.may_read() {
            if self.credit.available() == 0 {
                if !std::mem::replace(&mut self.credit_requested, true) {
                    return Some((Op::CreditRequest, 0, 0));
                }
            } else if let Some(n) = self.read_host(data_room, memory) {
                self.credit.sent(count(n));
                return Some((Op::Data, 0, n));
            }
        }
        let new_flags = self.flags_to_send();
        if new_flags != 0 {
            self.sent_flags |= new_flags;
            if self.sent_flags == SHUTDOWN_BOTH {
                self.state = State::Closing;
            }
            return Some((Op::Shutdown, self.sent_flags, 0));
        }
        (self.credit_update_due || self.credit.update_due()).then_some((Op::CreditUpdate, 0, 0))
    }

    /// Moves bytes from the host's socket to the guest; `None` when there are none now, or no more at all.
    fn read_host(&mut self, mut room: Ranges, memory: &GuestMemory) -> Option<usize> {
        let credit = usize::try_from(self.credit.available()).unwrap_or(usize::MAX);
        room.truncate(room.len().min(credit).min(MAX_PACKET_BYTES));
        let received = GuestIovecs::new(memory, room.as_slice(), Permissions::Write)
            .and_then(|into| file::receive(&self.stream, &into));
        match received {
            Ok(0) => {
                self.host_ended = true;
                self.due_flags |= SHUTDOWN_SEND;
                None
            }
            Ok(n) => Some(n),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            // The host closed its socket with unread bytes in it. What it wrote was read before this.
            Err(_) => {
                self.host_ended = true;
                self.due_flags |= SHUTDOWN_BOTH;
                None
            }
        }
    }

    /// Ends the connection for the host: it reads what was sent, then the end of the stream.
    pub(super) fn close(self, error: ConnectError) {
        let _ = self.stream.shutdown(Shutdown::Both);
        // Unread bytes of the host would make its last read an error (ECONNRESET) instead of the end. After the shutdown no
        // more come, so the socket's buffer bounds this.
        let mut unread = [0_u8; 16 << 10];
        while matches!(rustix::net::recv(&self.stream, &mut unread, RecvFlags::DONTWAIT), Ok((n, _)) if n != 0)
        {
        }
        if let State::Requested(reply) = self.state {
            reply(Err(error));
        }
    }
}

/// Byte counts of packets and buffers, which are far below 4 GiB.
fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
