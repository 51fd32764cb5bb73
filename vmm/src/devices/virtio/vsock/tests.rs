use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;

use super::device::Limits;
use super::packet::{HEADER_BYTES, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::{Driver, HEAP, MEMORY_BYTES, readable, writable};

const CID: u64 = 7;
const RX_BUFFER_BYTES: usize = 4096;
const RX_AREA: u64 = HEAP;
const TX_AREA: u64 = HEAP + (16 << 20);
const PATIENCE: Duration = Duration::from_secs(20);

/// The guest's kernel: keeps buffers in the receive queue and speaks packets.
struct Guest {
    driver: Driver,
    handle: VsockHandle,
    accepted: Receiver<(u32, UnixStream)>,
    /// Buffer number by head.
    posted: Vec<Option<u64>>,
    inbound: VecDeque<(Header, Vec<u8>)>,
}

impl Guest {
    fn new() -> Self {
        Guest::with_limits(Limits::default())
    }

    fn with_limits(limits: Limits) -> Self {
        let mut guest = Guest::without_buffers(limits);
        guest.post_buffers(64);
        guest
    }

    fn without_buffers(limits: Limits) -> Self {
        Guest::with_device(limits, |_| {}, |_| {})
    }

    fn with_device(
        limits: Limits,
        prepare: impl FnOnce(&mut Vsock),
        before_ok: impl FnOnce(&mut Driver),
    ) -> Self {
        let (sender, accepted) = channel();
        let on_guest_connect = Box::new(move |port, stream| sender.send((port, stream)).unwrap());
        let (mut vsock, handle) = Vsock::with_limits(7, on_guest_connect, limits).unwrap();
        prepare(&mut vsock);
        let mut driver = Driver::new(Box::new(vsock));
        driver.negotiate(0);
        driver.set_up_queues();
        before_ok(&mut driver);
        driver.set_status(0xf);
        assert_eq!(driver.status(), 0xf);
        Guest {
            driver,
            handle,
            accepted,
            posted: vec![None; 256],
            inbound: VecDeque::new(),
        }
    }

    fn post_buffers(&mut self, n: u64) {
        for number in 0..n {
            self.post(number);
        }
        self.driver.kick(RX_QUEUE);
    }

    fn post(&mut self, number: u64) {
        let address = RX_AREA + number * RX_BUFFER_BYTES as u64;
        let head = self.driver.add(RX_QUEUE, &[writable(address, RX_BUFFER_BYTES)]);
        self.posted[usize::from(head)] = Some(number);
    }

    /// Sends a packet cut into descriptors at `cuts`.
    fn send_cut(&mut self, header: Header, data: &[u8], cuts: &[usize]) {
        let bytes = [&header.encode()[..], data].concat();
        self.driver.write_memory(TX_AREA, &bytes);
        let mut cuts: Vec<_> = cuts
            .iter()
            .map(|cut| cut % bytes.len())
            .chain([0, bytes.len()])
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        let chain: Vec<_> = cuts
            .windows(2)
            .map(|cut| readable(TX_AREA + cut[0] as u64, cut[1] - cut[0]))
            .collect();
        self.driver.add(TX_QUEUE, &chain);
        self.driver.kick(TX_QUEUE);
        self.driver.wait_used(TX_QUEUE);
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.send_cut(header, data, &[HEADER_BYTES]);
    }

    /// The next packet for the guest, if there is one.
    fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        while let Some((head, length)) = self.driver.try_used(RX_QUEUE) {
            let number = self.posted[usize::from(head)].take().unwrap();
            let bytes = self.driver.read_memory(
                RX_AREA + number * RX_BUFFER_BYTES as u64,
                usize::try_from(length).unwrap(),
            );
            let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.dst_cid, CID);
            assert_eq!(header.length as usize, bytes.len() - HEADER_BYTES);
            self.inbound.push_back((header, bytes[HEADER_BYTES..].to_vec()));
            self.post(number);
            self.driver.kick(RX_QUEUE);
        }
        self.inbound.pop_front()
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            self.driver
                .wait_until("a packet", |driver| driver.peek_used(RX_QUEUE).then_some(()));
        }
    }

    /// The next packet that is not about credit.
    fn receive_op(&mut self) -> (Option<Op>, u32) {
        loop {
            let (header, _) = self.receive();
            if !matches!(header.op, Some(Op::CreditUpdate | Op::CreditRequest)) {
                return (header.op, header.flags);
            }
        }
    }

    fn expect_op(&mut self, op: Op) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, Some(op), "{header:?}");
        header
    }

    /// Connects to a host port.
    fn connect(&mut self, guest_port: u32, host_port: u32) -> (Socket, UnixStream) {
        let mut socket = Socket::new(guest_port, host_port);
        self.send(socket.header(Op::Request), &[]);
        let response = self.expect_op(Op::Response);
        assert_eq!((response.src_port, response.dst_port), (host_port, guest_port));
        socket.take_in(&response);
        let (port, stream) = self.accepted.recv_timeout(PATIENCE).unwrap();
        assert_eq!(port, host_port);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (socket, stream)
    }

    /// Lets the host connect, up to the request.
    fn connect_from_host(
        &mut self,
        guest_port: u32,
    ) -> (Socket, UnixStream, Receiver<Result<(), ConnectError>>) {
        let (stream, reply) = connect_from_host(&self.handle, guest_port);
        let request = self.expect_op(Op::Request);
        assert_eq!(request.dst_port, guest_port);
        let mut socket = Socket::new(guest_port, request.src_port);
        socket.take_in(&request);
        (socket, stream, reply)
    }

    fn send_data(&mut self, socket: &mut Socket, data: &[u8]) {
        for part in data.chunks(RX_BUFFER_BYTES) {
            let header = socket.data_header(part.len());
            self.send(header, part);
        }
    }
}

fn connect_from_host(handle: &VsockHandle, port: u32) -> (UnixStream, Receiver<Result<(), ConnectError>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let (sender, reply) = channel();
    handle.connect(port, theirs, Box::new(move |result| sender.send(result).unwrap()));
    (ours, reply)
}

/// A socket of the guest with its flow control.
#[derive(Debug, Clone)]
struct Socket {
    guest_port: u32,
    host_port: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
    peer_alloc: u32,
    peer_fwd: u32,
}

impl Socket {
    fn new(guest_port: u32, host_port: u32) -> Self {
        Socket {
            guest_port,
            host_port,
            buf_alloc: 64 << 10,
            fwd_cnt: 0,
            sent: 0,
            peer_alloc: 0,
            peer_fwd: 0,
        }
    }

    fn header(&self, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: self.guest_port,
            dst_port: self.host_port,
            length: 0,
            socket_type: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn data_header(&mut self, length: usize) -> Header {
        let length = u32::try_from(length).unwrap();
        self.sent = self.sent.wrapping_add(length);
        Header {
            length,
            ..self.header(Op::Data)
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(Op::Shutdown)
        }
    }

    fn take_in(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_fwd = header.fwd_cnt;
    }

    fn credit(&self) -> usize {
        (self.peer_alloc - self.sent.wrapping_sub(self.peer_fwd)) as usize
    }
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i * 13 + i / 251 + seed * 17) % 256).unwrap())
        .collect()
}

fn read_exactly(stream: &mut UnixStream, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn config_is_the_cid() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.config(0, 8), CID.to_le_bytes());
}

#[test]
fn guest_connects_and_both_sides_talk() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.connect(1000, 52);
    guest.send_data(&mut socket, b"hello host");
    assert_eq!(read_exactly(&mut stream, 10), b"hello host");
    stream.write_all(b"hello guest").unwrap();
    let (header, data) = guest.receive();
    assert_eq!((header.op, &data[..]), (Some(Op::Data), &b"hello guest"[..]));
    assert_eq!(guest.driver.counter("vsock_connections"), 1);
}

#[test]
fn host_connects_when_the_guest_accepts() {
    let mut guest = Guest::new();
    let (mut socket, mut stream, reply) = guest.connect_from_host(99);
    // Bytes written early wait for the answer.
    stream.write_all(b"early").unwrap();
    assert!(reply.try_recv().is_err());
    guest.send(socket.header(Op::Response), &[]);
    assert_eq!(reply.recv_timeout(PATIENCE).unwrap(), Ok(()));
    assert_eq!(guest.receive().1, b"early");
    guest.send_data(&mut socket, b"answer");
    assert_eq!(read_exactly(&mut stream, 6), b"answer");
}

#[test]
fn host_connection_that_the_guest_refuses_fails() {
    let mut guest = Guest::new();
    let (socket, mut stream, reply) = guest.connect_from_host(99);
    guest.send(socket.header(Op::Reset), &[]);
    assert_eq!(reply.recv_timeout(PATIENCE).unwrap(), Err(ConnectError::Refused));
    assert_eq!(read_to_end(&mut stream), b"");
}

#[test]
fn host_connection_without_answer_times_out() {
    let limits = Limits {
        connect_timeout: Duration::from_millis(50),
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let (socket, _stream, reply) = guest.connect_from_host(99);
    assert_eq!(reply.recv_timeout(PATIENCE).unwrap(), Err(ConnectError::TimedOut));
    guest.expect_op(Op::Reset);
    // The answer comes too late.
    guest.send(socket.header(Op::Response), &[]);
    guest.expect_op(Op::Reset);
}

#[test]
fn host_connection_without_a_driver_fails_at_once() {
    let (vsock, handle) = Vsock::new(7, Box::new(|_, _| ())).unwrap();
    let _driver = Driver::new(Box::new(vsock));
    let (_stream, reply) = connect_from_host(&handle, 1);
    assert_eq!(reply.try_recv().unwrap(), Err(ConnectError::NotActive));
}

#[test]
fn packets_nobody_expects_are_reset() {
    let mut guest = Guest::new();
    let stranger = Socket::new(5, 6);
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(stranger.header(op), &[]);
        let reset = guest.expect_op(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (6, 5));
    }
    // A reset is never answered; neither is a packet that cannot be read. What follows is.
    guest.send(stranger.header(Op::Reset), &[]);
    guest.send(
        Header {
            length: 100,
            ..stranger.header(Op::Data)
        },
        b"too short",
    );
    for header in [
        Header {
            dst_cid: 3,
            ..stranger.header(Op::Request)
        },
        Header {
            socket_type: 2,
            ..stranger.header(Op::Request)
        },
        Header {
            src_cid: 1,
            ..stranger.header(Op::Request)
        },
        Header {
            op: None,
            ..stranger.header(Op::Data)
        },
    ] {
        guest.send(header, &[]);
        let (reset, _) = loop {
            let packet = guest.try_receive();
            if let Some(packet) = packet {
                break packet;
            }
            guest.driver.wait_interrupt();
        };
        assert_eq!(reset.op, Some(Op::Reset));
    }
    assert!(guest.accepted.try_recv().is_err());
    assert_eq!(guest.driver.counter("vsock_resets"), 9);
}

impl Guest {
    fn half_close_guest_first(&mut self, socket: &Socket, stream: &mut UnixStream) {
        self.send(socket.shutdown(SHUTDOWN_SEND), &[]);
        assert_eq!(read_to_end(stream), b"");
    }
}

#[test]
fn half_close_of_the_guest_leaves_the_other_direction() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.connect(1000, 52);
    guest.send_data(&mut socket, b"last words");
    assert_eq!(read_exactly(&mut stream, 10), b"last words");
    guest.half_close_guest_first(&socket, &mut stream);
    stream.write_all(b"still here").unwrap();
    assert_eq!(guest.receive().1, b"still here");
    drop(stream);
    assert_eq!(guest.receive_op(), (Some(Op::Shutdown), SHUTDOWN_BOTH));
    guest.send(socket.header(Op::Reset), &[]);
    // The ports are free again.
    guest.connect(1000, 52);
}

#[test]
fn half_close_of_the_host_leaves_the_other_direction() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.connect(1000, 52);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive().1, b"last words");
    assert_eq!(guest.receive_op(), (Some(Op::Shutdown), SHUTDOWN_SEND));
    guest.send_data(&mut socket, b"still here");
    guest.send(socket.shutdown(SHUTDOWN_BOTH), &[]);
    assert_eq!(guest.receive_op().0, Some(Op::Reset));
    assert_eq!(read_to_end(&mut stream), b"still here");
}

#[test]
fn guest_that_receives_no_more_fails_the_hosts_writes() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.connect(1000, 52);
    guest.send(socket.shutdown(SHUTDOWN_RECEIVE), &[]);
    guest.send_data(&mut socket, b"x");
    assert_eq!(read_exactly(&mut stream, 1), b"x");
    assert_eq!(
        stream.write(b"y").unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe
    );
}

#[test]
fn guest_closes_with_undelivered_bytes_and_none_is_lost() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.connect(1000, 52);
    // Unread bytes of the host must not turn the end of the stream into an error.
    stream.write_all(b"never read by the guest").unwrap();
    let data = pattern(BUFFER_BYTES as usize, 1);
    guest.send_data(&mut socket, &data);
    guest.send(socket.shutdown(SHUTDOWN_BOTH), &[]);
    while guest.receive_op().0 != Some(Op::Reset) {}
    guest.send(socket.header(Op::Reset), &[]);
    // The same ports at once, while the old bytes are still on their way.
    let (mut again, mut stream_again) = guest.connect(1000, 52);
    guest.send_data(&mut again, b"new");
    assert_eq!(read_exactly(&mut stream_again, 3), b"new");
    assert!(read_to_end(&mut stream) == data);
}

#[test]
fn host_closes_with_undelivered_bytes_and_none_is_lost() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.connect(1000, 52);
    let data = pattern(150_000, 2);
    let writer = {
        let data = data.clone();
        thread::spawn(move || stream.write_all(&data).unwrap())
    };
    let mut seen = Vec::new();
    let flags = loop {
        let (header, bytes) = guest.receive();
        seen.extend_from_slice(&bytes);
        match header.op.unwrap() {
            Op::Shutdown => break header.flags,
            // The credit of a guest that takes its time.
            Op::CreditRequest => {
                socket.fwd_cnt = u32::try_from(seen.len()).unwrap();
                guest.send(socket.header(Op::CreditUpdate), &[]);
            }
            _ => {}
        }
    };
    writer.join().unwrap();
    assert_eq!(flags, SHUTDOWN_BOTH);
    assert!(seen == data);
}

#[test]
fn guest_that_ignores_its_credit_is_reset() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.connect(1000, 52);
    let data = pattern(BUFFER_BYTES as usize * 3, 3);
    for part in data.chunks(60_000) {
        let header = socket.data_header(part.len());
        guest.send(header, part);
    }
    while guest.receive_op().0 != Some(Op::Reset) {}
    // What came before is the host's all the same... up to the reset, and in order.
    let seen = read_to_end(&mut stream);
    assert!(data.starts_with(&seen));
}

#[test]
fn slow_reader_holds_up_nobody_else() {
    let mut guest = Guest::new();
    let (mut slow, mut slow_stream) = guest.connect(1, 10);
    let (mut fast, mut fast_stream) = guest.connect(2, 10);
    let stuck = pattern(BUFFER_BYTES as usize, 4);
    guest.send_data(&mut slow, &stuck);
    for round in 0..50 {
        let data = pattern(3000, round);
        guest.send_data(&mut fast, &data);
        assert!(read_exactly(&mut fast_stream, 3000) == data);
        fast_stream.write_all(&data).unwrap();
        let mut echoed = Vec::new();
        while echoed.len() < data.len() {
            let (header, bytes) = guest.receive();
            if header.dst_port == 2 {
                echoed.extend(bytes);
            }
        }
        assert!(echoed == data);
        fast.fwd_cnt += 3000;
    }
    assert!(read_exactly(&mut slow_stream, stuck.len()) == stuck);
}

#[test]
fn connections_are_limited() {
    let limits = Limits {
        max_connections: 3,
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let mut open: Vec<_> = (0..3).map(|port| guest.connect(port, 1)).collect();
    guest.send(Socket::new(50, 1).header(Op::Request), &[]);
    guest.expect_op(Op::Reset);
    let (_stream, reply) = connect_from_host(&guest.handle, 5);
    assert_eq!(reply.recv_timeout(PATIENCE).unwrap(), Err(ConnectError::TooMany));
    let (socket, stream) = open.pop().unwrap();
    drop(stream);
    assert_eq!(guest.receive_op().0, Some(Op::Shutdown));
    guest.send(socket.header(Op::Reset), &[]);
    guest.connect(50, 1);
}

#[test]
fn guest_that_never_answers_a_full_shutdown_is_forgotten() {
    let limits = Limits {
        max_connections: 1,
        close_timeout: Duration::from_millis(50),
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    drop(guest.connect(1, 1));
    assert_eq!(guest.receive_op(), (Some(Op::Shutdown), SHUTDOWN_BOTH));
    assert_eq!(guest.receive_op().0, Some(Op::Reset));
    guest.connect(2, 1);
}

#[test]
fn flood_without_receive_buffers_is_held_back_and_answered_later() {
    let mut guest = Guest::without_buffers(Limits::default());
    let stranger = Socket::new(5, 6);
    guest
        .driver
        .write_memory(TX_AREA, &stranger.header(Op::Data).encode());
    let n_packets = 3 * MAX_WAITING_RESETS;
    let mut n_sent = 0;
    let mut n_received = 0;
    // First until the device takes no more, then with buffers.
    while n_sent < MAX_WAITING_RESETS + guest.driver.queue_size(TX_QUEUE) {
        if guest.driver.free_descriptors(TX_QUEUE) != 0 {
            guest.driver.add(TX_QUEUE, &[readable(TX_AREA, HEADER_BYTES)]);
            guest.driver.kick(TX_QUEUE);
            n_sent += 1;
        } else {
            guest.driver.wait_used(TX_QUEUE);
        }
    }
    assert!(guest.driver.counter("vsock_resets") <= MAX_WAITING_RESETS as u64);
    guest.post_buffers(64);
    while n_received < n_packets {
        while guest.driver.try_used(TX_QUEUE).is_some() {}
        while n_sent < n_packets && guest.driver.free_descriptors(TX_QUEUE) != 0 {
            guest.driver.add(TX_QUEUE, &[readable(TX_AREA, HEADER_BYTES)]);
            guest.driver.kick(TX_QUEUE);
            n_sent += 1;
        }
        guest.expect_op(Op::Reset);
        n_received += 1;
    }
}

#[test]
fn hostile_chains_are_counted_and_the_device_lives_on() {
    let mut guest = Guest::without_buffers(Limits::default());
    let header = Socket::new(1, 1).header(Op::Request).encode();
    guest.driver.write_memory(TX_AREA, &header);
    for chain in [
        vec![readable(TX_AREA, HEADER_BYTES - 1)],
        vec![writable(TX_AREA, HEADER_BYTES)],
        vec![readable(1 << 50, HEADER_BYTES)],
        vec![readable(MEMORY_BYTES as u64 - 10, HEADER_BYTES)],
        vec![readable(TX_AREA, 0)],
    ] {
        guest.driver.add(TX_QUEUE, &chain);
        guest.driver.kick(TX_QUEUE);
        assert_eq!(guest.driver.wait_used(TX_QUEUE).1, 0);
    }
    guest
        .driver
        .write_descriptor(TX_QUEUE, 100, Descriptor::new(TX_AREA, 20, 1, 100));
    guest.driver.publish(TX_QUEUE, 100);
    guest.driver.kick(TX_QUEUE);
    assert_eq!(guest.driver.wait_used(TX_QUEUE), (100, 0));
    assert_eq!(guest.driver.counter("vsock_bad_packets"), 6);
    // Buffers that take no packet.
    guest.driver.add(RX_QUEUE, &[writable(RX_AREA, 10)]);
    guest.driver.add(RX_QUEUE, &[readable(RX_AREA, 4096)]);
    guest.driver.add(RX_QUEUE, &[writable(1 << 50, 4096)]);
    guest.send(Socket::new(1, 1).header(Op::Data), &[]);
    for _ in 0..3 {
        assert_eq!(guest.driver.wait_used(RX_QUEUE).1, 0);
    }
    guest.post_buffers(8);
    guest.expect_op(Op::Reset);
    guest.connect(1, 1);
    guest.driver.corrupt_avail_index(TX_QUEUE, 40_000);
    guest.driver.kick(TX_QUEUE);
    guest.driver.wait_needs_reset();
    // Nobody waits for ever on a device that is out of order.
    let (_stream, reply) = connect_from_host(&guest.handle, 1);
    assert!(reply.recv_timeout(PATIENCE).unwrap().is_err());
}

#[test]
fn reset_ends_connections_and_a_new_driver_starts_afresh() {
    let mut guest = Guest::new();
    let (_socket, mut stream) = guest.connect(1, 1);
    let (_requested, _waiting, reply) = guest.connect_from_host(9);
    guest.driver.negotiate(0);
    assert_eq!(
        reply.recv_timeout(PATIENCE).unwrap(),
        Err(ConnectError::DeviceReset)
    );
    assert_eq!(read_to_end(&mut stream), b"");
    guest.driver.set_up_queues();
    guest.driver.set_status(15);
    guest.posted.fill(None);
    guest.post_buffers(64);
    guest.connect(1, 1);
}

/// What one side does with its direction of a connection.
#[derive(Debug, Clone)]
struct Script {
    length: usize,
    /// Sizes of its writes, taken in turn.
    writes: Vec<usize>,
    /// Sizes of its reads.
    reads: Vec<usize>,
}

fn script(max_length: usize) -> impl Strategy<Value = Script> {
    let sizes = || proptest::collection::vec(prop_oneof![1_usize..64, 1_usize..70_000], 1..8);
    (0..max_length, sizes(), sizes()).prop_map(|(length, writes, reads)| Script {
        length,
        writes,
        reads,
    })
}

/// Plays both scripts, in both directions at once; each side ends its direction after its last byte.
fn play(host: &Script, guest_script: &Script, buf_alloc: u32, cuts: &[usize]) -> Result<(), TestCaseError> {
    let mut guest = Guest::new();
    let (mut socket, stream) = guest.connect(1000, 52);
    socket.buf_alloc = buf_alloc;
    guest.send(socket.header(Op::CreditUpdate), &[]);
    let (to_guest, to_host) = (pattern(host.length, 1), pattern(guest_script.length, 2));

    let writer = {
        let (mut stream, data, sizes) = (stream.try_clone().unwrap(), to_guest.clone(), host.writes.clone());
        thread::spawn(move || {
            let mut rest = &data[..];
            for size in sizes.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (part, after) = rest.split_at(rest.len().min(*size));
                stream.write_all(part).unwrap();
                rest = after;
            }
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let reader = {
        let (mut stream, sizes) = (stream, host.reads.clone());
        thread::spawn(move || {
            let mut seen = Vec::new();
            let mut buffer = vec![0; 70_000];
            for size in sizes.iter().cycle() {
                match stream.read(&mut buffer[..*size]).unwrap() {
                    0 => break,
                    n => seen.extend_from_slice(&buffer[..n]),
                }
            }
            seen
        })
    };

    let mut seen = Vec::new();
    let mut rest = &to_host[..];
    let mut writes = guest_script.writes.iter().cycle();
    let mut reads = guest_script.reads.iter().cycle();
    let (mut ended, mut host_ended, mut closed) = (false, false, false);
    while !closed {
        while let Some((header, data)) = guest.try_receive() {
            socket.take_in(&header);
            seen.extend_from_slice(&data);
            match header.op.unwrap() {
                Op::Shutdown => {
                    host_ended |= header.flags & SHUTDOWN_SEND != 0;
                    closed |= header.flags == SHUTDOWN_BOTH;
                }
                Op::Data => prop_assert!(!host_ended, "data after the end"),
                Op::CreditUpdate | Op::CreditRequest => {}
                op => prop_assert!(false, "unexpected {:?}", op),
            }
            let taken = socket.fwd_cnt as usize;
            prop_assert!(
                seen.len() - taken <= buf_alloc as usize,
                "more than the guest's buffer"
            );
        }
        // The guest's application reads some of it.
        let unread = seen.len() - socket.fwd_cnt as usize;
        if unread != 0 {
            socket.fwd_cnt += u32::try_from(unread.min(*reads.next().unwrap())).unwrap();
            guest.send(socket.header(Op::CreditUpdate), &[]);
        }
        let n = rest
            .len()
            .min(*writes.next().unwrap())
            .min(socket.credit())
            .min(MAX_PACKET_BYTES);
        if n != 0 {
            let (part, after) = rest.split_at(n);
            let header = socket.data_header(n);
            guest.send_cut(header, part, cuts);
            rest = after;
        } else if rest.is_empty() && !ended {
            ended = true;
            guest.send(socket.shutdown(SHUTDOWN_SEND), &[]);
        } else if unread == 0 && !closed {
            guest
                .driver
                .wait_until("a packet", |driver| driver.peek_used(RX_QUEUE).then_some(()));
        }
    }
    writer.join().unwrap();
    prop_assert!(reader.join().unwrap() == to_host, "guest to host");
    prop_assert!(seen == to_guest, "host to guest");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the sizes of writes, reads, packets, descriptors and buffers: all bytes, in order, then the end.
    #[test]
    fn no_byte_is_lost(
        host in script(400_000),
        guest in script(400_000),
        buf_alloc in prop_oneof![1_u32..5000, 5000_u32..300_000],
        cuts in proptest::collection::vec(0_usize..70_000, 0..5),
    ) {
        // A tiny buffer makes a packet of every few bytes.
        let host = Script { length: host.length.min(buf_alloc as usize * 400), ..host };
        play(&host, &guest, buf_alloc, &cuts)?;
    }
}

#[test]
fn hundred_thousand_lines_both_ways() {
    let lines = |who: &str| {
        (0..100_000)
            .map(|i| format!("{who} line {i}\n"))
            .collect::<String>()
            .into_bytes()
    };
    let (to_guest, to_host) = (lines("host"), lines("guest"));
    let mut guest = Guest::new();
    let (mut socket, stream) = guest.connect(1000, 52);
    let writer = {
        let (mut stream, data) = (stream.try_clone().unwrap(), to_guest.clone());
        thread::spawn(move || {
            // Line by line, as programs do.
            for line in data.split_inclusive(|&byte| byte == b'\n') {
                stream.write_all(line).unwrap();
            }
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let reader = {
        let mut stream = stream;
        thread::spawn(move || read_to_end(&mut stream))
    };
    let mut seen = Vec::new();
    let mut lines = to_host.split_inclusive(|&byte| byte == b'\n').peekable();
    let mut closed = false;
    while !closed {
        while let Some((header, data)) = guest.try_receive() {
            socket.take_in(&header);
            seen.extend_from_slice(&data);
            closed |= header.op == Some(Op::Shutdown) && header.flags == SHUTDOWN_BOTH;
        }
        if seen.len() - socket.fwd_cnt as usize > 30_000 {
            socket.fwd_cnt = u32::try_from(seen.len()).unwrap();
            guest.send(socket.header(Op::CreditUpdate), &[]);
        }
        match lines.peek() {
            Some(line) if line.len() <= socket.credit() => {
                let line = lines.next().unwrap();
                let header = socket.data_header(line.len());
                guest.send(header, line);
                if lines.peek().is_none() {
                    guest.send(socket.shutdown(SHUTDOWN_SEND), &[]);
                }
            }
            _ if closed => {}
            _ => guest
                .driver
                .wait_until("a packet", |driver| driver.peek_used(RX_QUEUE).then_some(())),
        }
    }
    writer.join().unwrap();
    assert!(reader.join().unwrap() == to_host);
    assert!(seen == to_guest);
}

fn restored(device: &mut Vsock) {
    assert!(device.load(&[1]));
}

#[test]
fn a_restored_device_connects_from_ports_of_its_own() {
    let ports: std::collections::HashSet<_> = (0..3)
        .map(|_| {
            let mut guest = Guest::with_device(Limits::default(), restored, |_| {});
            guest.post_buffers(4);
            let (connection, stream, reply) = guest.connect_from_host(1024);
            // The reply comes when the device ends.
            drop((guest, stream, reply));
            connection.host_port
        })
        .collect();
    assert_eq!(ports.len(), 3, "{ports:?}");
}

#[test]
fn nothing_is_sent_before_a_restored_guest_has_closed_what_it_had() {
    const EVENT_QUEUE: usize = 2;
    let post_event = |driver: &mut Driver, number: u64| {
        driver.add(EVENT_QUEUE, &[writable(TX_AREA + (1 << 20) + number * 8, 8)]);
    };
    let mut guest = Guest::with_device(Limits::default(), restored, |driver| {
        post_event(driver, 0);
        post_event(driver, 1);
    });
    guest.post_buffers(4);
    let (_stream, reply) = connect_from_host(&guest.handle, 1024);
    guest.driver.wait_used(EVENT_QUEUE);
    // A packet that was looked at: the device had its turn since.
    for _ in 0..3 {
        guest.send(Socket::new(1, 2).header(Op::Reset), &[]);
    }
    assert!(guest.try_receive().is_none());
    post_event(&mut guest.driver, 2);
    guest.driver.kick(EVENT_QUEUE);
    assert_eq!(guest.expect_op(Op::Request).dst_port, 1024);
    drop(guest);
    drop(reply);
}
