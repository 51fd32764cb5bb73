//! Fuzz target of the network device.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use super::{MAX_FRAME_BYTES, NetCounters, Worker};
use crate::devices::virtio::device::feature;
use crate::devices::virtio::fuzz::activation;
use crate::sys::tap::{Tap, VNET_HEADER_BYTES};

/// Buffers and frames of a hostile driver, while frames of two lengths come from the network.
///
/// # Panics
/// When something goes out that is not a header with a frame.
pub fn net_queue(data: &[u8]) {
    let [flags, short, long, image @ ..] = data else {
        return;
    };
    let (ours, network) = UnixDatagram::pair().expect("descriptors can be had");
    network
        .set_nonblocking(true)
        .expect("sockets can be non-blocking");
    let tap = Tap::from_packet_socket(ours.into()).expect("a packet socket");
    for length in [usize::from(*short), usize::from(*long) * 32] {
        // Lost where the socket is full, as in a network.
        let _ = network.send(&vec![0xa5; length]);
    }
    let merges = feature(virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF);
    let features = if flags & 1 == 0 { 0 } else { merges };
    let activation = activation(image, 2, features, flags & 2 != 0);
    let mut worker = Worker::new(activation, tap, Arc::new(NetCounters::new("net")));
    for _ in 0..2 {
        if worker.take_frames().is_err() || worker.give_frames().is_err() {
            break;
        }
    }
    let mut frame = vec![0; MAX_FRAME_BYTES];
    while let Ok(length) = network.recv(&mut frame) {
        assert!(length > VNET_HEADER_BYTES, "{length} bytes went out");
    }
}
