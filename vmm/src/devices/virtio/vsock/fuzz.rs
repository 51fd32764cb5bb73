//! Fuzz target of the connections: whole packets of a hostile guest, between acts of the host.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EpollEvent;

use super::device::{Limits, VsockCounters};
use super::handle::Connect;
use super::mux::Mux;
use super::packet::{self, HEADER_BYTES, Header};
pub use super::worker::fuzz::vsock_queue;
use crate::devices::virtio::chain::{GuestRange, Ranges};
use crate::devices::virtio::fuzz::memory;
use crate::devices::virtio::worker::Poller;

const CID: u64 = 3;
const TX_ADDRESS: u64 = 0;
const RX_ADDRESS: u64 = 0x8000;
const RX_BYTES: u32 = 4096;
const MAX_ACTS: usize = 128;
const MAX_CONNECTIONS: usize = 4;

type Streams = Arc<Mutex<Vec<UnixStream>>>;

struct Bench {
    mux: Mux,
    memory: crate::memory::GuestMemory,
    poller: Arc<Poller>,
    streams: Streams,
    now: Instant,
}

/// Acts, one after the other. The first byte of each says what: a packet (its header as on the wire with the context ids
/// filled in, then its data), a connection from the host, bytes from the host, reading at the host, hanging up, time.
///
/// # Panics
/// When the guest is sent something that is not a packet for it, or more connections live than are permitted.
pub fn vsock_packets(mut data: &[u8]) {
    let mut bench = Bench::new();
    for _ in 0..MAX_ACTS {
        let [act, argument, rest @ ..] = data else {
            break;
        };
        data = rest;
        match act % 8 {
            0..=2 => {
                let Some((header, rest)) = data.split_first_chunk::<HEADER_BYTES>() else {
                    break;
                };
                let (body, rest) = rest.split_at(usize::from(*argument).min(rest.len()));
                data = rest;
                bench.guest_sends(header, body, act % 8 == 2);
            }
            3 => bench.host_connects(u32::from(*argument)),
            4 => bench.host(*argument, |stream| drop(stream.write(&[0x77; 300]))),
            5 => bench.host(*argument, |stream| drop(stream.read(&mut [0; 300]))),
            6 => bench.hang_up(*argument),
            _ => {
                bench.now += Duration::from_secs(u64::from(*argument));
                bench.mux.expire(bench.now);
            }
        }
        bench.settle();
    }
    drop(bench.mux.into_callback());
}

impl Bench {
    fn new() -> Self {
        let streams = Streams::default();
        let accepted = Arc::clone(&streams);
        let accept = move |_port, stream: UnixStream| keep(&accepted, stream);
        let limits = Limits {
            max_connections: MAX_CONNECTIONS,
            ..Limits::default()
        };
        let counters = Arc::new(VsockCounters::new("vsock"));
        let mut mux = Mux::new(CID, limits, Box::new(accept), counters);
        let poller = Arc::new(Poller::new().expect("descriptors can be had"));
        mux.watch_with(Arc::clone(&poller));
        Bench {
            mux,
            memory: memory(&[]),
            poller,
            streams,
            now: Instant::now(),
        }
    }

    fn guest_sends(&mut self, header: &[u8; HEADER_BYTES], body: &[u8], as_it_is: bool) {
        let mut header = Header::decode(header);
        if !as_it_is {
            (header.src_cid, header.dst_cid) = (CID, super::HOST_CID);
            header.socket_type = packet::TYPE_STREAM;
            header.length = u32::try_from(body.len()).expect("a byte says how long");
        }
        let bytes = [&header.encode()[..], body].concat();
        self.memory
            .write_slice(&bytes, GuestAddress(TX_ADDRESS))
            .expect("a packet fits");
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let cut = [
            range(TX_ADDRESS, first.len()),
            range(TX_ADDRESS + first.len() as u64, second.len()),
        ];
        if let Ok((header, data)) = packet::parse(Ranges::from(cut.to_vec()), &self.memory) {
            self.mux.receive(&header, data, &self.memory);
        }
    }

    fn host_connects(&mut self, port: u32) {
        let (ours, theirs) = UnixStream::pair().expect("descriptors can be had");
        keep(&self.streams, theirs);
        let connect = Connect {
            port,
            stream: ours,
            reply: Box::new(|_| {}),
        };
        self.mux.connect(connect, self.now);
    }

    fn host(&mut self, which: u8, act: impl FnOnce(&mut UnixStream)) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let n = streams.len().max(1);
        if let Some(stream) = streams.get_mut(usize::from(which) % n) {
            act(stream);
        }
    }

    fn hang_up(&mut self, which: u8) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if !streams.is_empty() {
            let n = streams.len();
            streams.swap_remove(usize::from(which) % n);
        }
    }

    /// Tells the mux what its sockets became, and takes what it has for the guest.
    fn settle(&mut self) {
        let mut events = [EpollEvent::default(); 2 * MAX_CONNECTIONS];
        for event in self.poller.wait(0, &mut events).expect("epoll works") {
            self.mux.socket_ready(event.data(), event.event_set());
        }
        let room = Ranges::from(vec![range(RX_ADDRESS, RX_BYTES as usize)]);
        while self.mux.has_packets() {
            let Some(n) = self.mux.fill(&room, &self.memory, self.now) else {
                break;
            };
            let mut bytes = vec![0; n];
            self.memory
                .read_slice(&mut bytes, GuestAddress(RX_ADDRESS))
                .expect("not longer than its room");
            let (header, body) = bytes.split_first_chunk().expect("a header at least");
            let header = Header::decode(header);
            assert_eq!(header.dst_cid, CID, "a packet for somebody else");
            assert!(header.op.is_some(), "a packet without a meaning");
            assert_eq!(header.length as usize, body.len());
        }
    }
}

fn keep(streams: &Streams, stream: UnixStream) {
    stream.set_nonblocking(true).expect("sockets can be non-blocking");
    streams
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(stream);
}

fn range(address: u64, length: usize) -> GuestRange {
    GuestRange {
        address: GuestAddress(address),
        length: u32::try_from(length).expect("inside memory"),
    }
}
