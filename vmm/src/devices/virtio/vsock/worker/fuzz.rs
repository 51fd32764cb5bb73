//! Fuzz target of the socket device's queues.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use vmm_sys_util::epoll::EpollEvent;

use super::super::device::Limits;
use super::{Inbox, Mux, VsockCounters, Worker};
use crate::devices::virtio::fuzz::activation;
use crate::devices::virtio::vsock::mux::FIRST_TOKEN;

const CID: u64 = 3;

/// Buffers and packets of a hostile driver, with a host that accepts everything and keeps silent.
pub fn vsock_queue(data: &[u8]) {
    let Some((flags, image)) = data.split_first() else {
        return;
    };
    let counters = Arc::new(VsockCounters::new("vsock"));
    let inbox = Arc::new(Inbox::new().expect("descriptors can be had"));
    let activation = activation(image, 3, 0, flags & 1 != 0);
    let streams: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
    let accepted = Arc::clone(&streams);
    let accept = move |_port, stream| {
        let mut streams = accepted.lock().unwrap_or_else(PoisonError::into_inner);
        streams.push(stream);
    };
    let limits = Limits {
        max_connections: 4,
        ..Limits::default()
    };
    let mux = Mux::new(CID, limits, Box::new(accept), Arc::clone(&counters));
    let mut worker = Worker::new(mux, activation, inbox, counters).expect("descriptors can be had");
    for _ in 0..2 {
        if worker.take_packets().is_err() {
            break;
        }
        let mut events = [EpollEvent::default(); 8];
        for event in worker.poller.wait(0, &mut events).expect("epoll works") {
            if event.data() >= FIRST_TOKEN {
                worker.mux.socket_ready(event.data(), event.event_set());
            }
        }
        if worker.give_packets().is_err() {
            break;
        }
        worker.mux.expire(Instant::now());
    }
    drop(worker.into_callback());
}
