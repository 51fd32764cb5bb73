//! The transport half.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::{virtio_config, virtio_net as net, virtio_ring};
use virtio_queue::QueueState;

use super::worker::Worker;
use super::{QUEUE_SIZES, RX_QUEUE, TX_QUEUE};
use crate::config::NetConfig;
use crate::devices::virtio::counters::define_counters;
use crate::devices::virtio::device::{COMMON_FEATURES, feature, read_config_bytes};
use crate::devices::virtio::worker::WorkerHalf;
use crate::devices::virtio::{ActivateError, Activation, Begin, Counters, DeviceQueue, VirtioDevice};
use crate::irq::Interrupt;
use crate::memory::GuestMemory;
use crate::sys::tap::Tap;
use crate::sys::vhost::{VhostError, VhostNet, VhostQueue};

define_counters!(
    /// What a network device counts; all stay zero while the kernel moves the packets.
    NetCounters {
        /// Bytes to the guest, headers included.
        rx_bytes,
        /// Frames to the guest.
        rx_packets,
        /// Frames for the guest that fitted into no buffer.
        rx_dropped,
        /// Bytes from the guest, headers included.
        tx_bytes,
        /// Frames from the guest.
        tx_packets,
        /// Frames from the guest that the tap did not take.
        tx_dropped,
        /// Chains that are no frame.
        bad_packets,
    }
);

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The descriptor is no tap, or not one that fits.
    #[error("Failed to set up the tap: it must be opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR")]
    Tap(#[source] io::Error),
    /// The descriptor is not of vhost-net.
    #[error("Failed to set up vhost-net")]
    Vhost(#[source] VhostError),
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    features: u64,
    /// `struct virtio_net_config` up to the MTU.
    config: [u8; 12],
    counters: Arc<NetCounters>,
    vhost: Option<VhostNet>,
    /// With the worker while there is one.
    tap: Option<Tap>,
    worker: WorkerHalf<Worker>,
    in_kernel: Option<InKernel>,
}

/// What the kernel works on, kept for its events and for going on after a pause.
#[derive(Debug)]
struct InKernel {
    memory: GuestMemory,
    interrupt: Interrupt,
    queues: Vec<DeviceQueue>,
    /// Those that the kernel has to know.
    features: u64,
    runs: bool,
}

/// Offloads of frames to the guest, as the driver says it and as the tap is told.
const GUEST_OFFLOADS: [(u32, libc::c_uint); 5] = [
    (net::VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (net::VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (net::VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (net::VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (net::VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
];

/// Offloads of frames from the guest; a tap takes them all.
const HOST_OFFLOADS: [u32; 5] = [
    net::VIRTIO_NET_F_CSUM,
    net::VIRTIO_NET_F_HOST_TSO4,
    net::VIRTIO_NET_F_HOST_TSO6,
    net::VIRTIO_NET_F_HOST_ECN,
    net::VIRTIO_NET_F_HOST_UFO,
];

/// Features that whoever works on the queues has to know.
const QUEUE_FEATURES: u64 = feature(virtio_config::VIRTIO_F_VERSION_1)
    | feature(virtio_ring::VIRTIO_RING_F_INDIRECT_DESC)
    | feature(virtio_ring::VIRTIO_RING_F_EVENT_IDX)
    | feature(net::VIRTIO_NET_F_MRG_RXBUF);

impl Net {
    /// An inactive device on a tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`; with `vhost` (`/dev/vhost-net`) the
    /// kernel moves the packets.
    ///
    /// # Errors
    /// A descriptor that is not what it should be.
    pub fn new(config: &NetConfig, tap: OwnedFd, vhost: Option<OwnedFd>) -> Result<Self, NetError> {
        let tap = Tap::new(tap).map_err(NetError::Tap)?;
        let vhost = vhost.map(VhostNet::new).transpose().map_err(NetError::Vhost)?;
        Ok(Net::on_tap(config, tap, vhost))
    }

    pub(super) fn on_tap(config: &NetConfig, tap: Tap, vhost: Option<VhostNet>) -> Self {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&config.mac);
        // max_virtqueue_pairs; without VIRTIO_NET_F_MQ nobody reads it.
        bytes[8..10].copy_from_slice(&1_u16.to_le_bytes());
        bytes[10..12].copy_from_slice(&config.mtu.to_le_bytes());
        Net {
            features: features(&tap, vhost.as_ref()),
            config: bytes,
            counters: Arc::new(NetCounters::new("net")),
            vhost,
            tap: Some(tap),
            worker: WorkerHalf::Inactive,
            in_kernel: None,
        }
    }
}

impl Net {
    /// Lets the kernel work on the queues, from where they are.
    fn start_in_kernel(&mut self, in_kernel: InKernel) -> Result<(), ActivateError> {
        let (Some(vhost), Some(tap)) = (&self.vhost, &self.tap) else {
            return Err(ActivateError::BackendLost);
        };
        let queues: Vec<_> = [RX_QUEUE, TX_QUEUE]
            .map(|index| &in_kernel.queues[index])
            .map(|queue| VhostQueue {
                queue: &queue.queue,
                kick: &queue.kick,
                call: in_kernel.interrupt.event_fd(),
            })
            .into();
        vhost
            .start(in_kernel.memory.clone(), in_kernel.features, &queues, tap)
            .map_err(|error| ActivateError::Host {
                action: "start vhost-net",
                source: io::Error::other(error),
            })?;
        drop(queues);
        self.in_kernel = Some(InKernel {
            runs: true,
            ..in_kernel
        });
        Ok(())
    }
}

/// What tap and, if there is one, vhost know.
fn features(tap: &Tap, vhost: Option<&VhostNet>) -> u64 {
    let mut features = COMMON_FEATURES
        | feature(net::VIRTIO_NET_F_MAC)
        | feature(net::VIRTIO_NET_F_MTU)
        | feature(net::VIRTIO_NET_F_MRG_RXBUF);
    let mut offered = 0;
    for (bit, offload) in GUEST_OFFLOADS {
        // Each needs those before it; the kernel has lost and regained UFO over time.
        if tap.set_offloads(offered | offload).is_ok() {
            offered |= offload;
            features |= feature(bit);
        }
    }
    features |= HOST_OFFLOADS.into_iter().map(feature).sum::<u64>();
    match vhost {
        Some(vhost) => features & (vhost.features() | !QUEUE_FEATURES),
        None => features,
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let tap = self.tap.take().ok_or(ActivateError::BackendLost)?;
        let agreed = |(bit, _): &(u32, _)| activation.features & feature(*bit) != 0;
        let offloads = GUEST_OFFLOADS
            .into_iter()
            .filter(agreed)
            .fold(0, |all, (_, offload)| all | offload);
        if let Err(source) = tap.set_offloads(offloads) {
            self.tap = Some(tap);
            return Err(ActivateError::Host {
                action: "set the offloads of the tap",
                source,
            });
        }
        if self.vhost.is_some() {
            self.tap = Some(tap);
            return self.start_in_kernel(InKernel {
                memory: activation.memory,
                interrupt: activation.interrupt,
                queues: activation.queues,
                features: activation.features & QUEUE_FEATURES,
                runs: false,
            });
        }
        let worker = Worker::new(activation, tap, Arc::clone(&self.counters));
        self.worker = WorkerHalf::start("net", worker, Begin::AtOnce)?;
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.tap = Some(worker.into_tap());
        }
        if let (Some(vhost), Some(in_kernel)) = (&self.vhost, self.in_kernel.take()) {
            vhost.stop(in_kernel.queues.len());
        }
    }

    fn pause(&mut self) -> Option<Vec<QueueState>> {
        match (&self.vhost, &mut self.in_kernel) {
            (Some(vhost), Some(in_kernel)) => {
                in_kernel.runs = false;
                let memory = &in_kernel.memory;
                let positions: Vec<_> = (0..in_kernel.queues.len())
                    // All are stopped, also past a failure.
                    .map(|index| vhost.pause_queue(index).ok())
                    .collect();
                for (queue, position) in in_kernel.queues.iter_mut().zip(positions) {
                    queue.set_position(position?, memory).ok()?;
                }
                Some(in_kernel.queues.iter().map(DeviceQueue::state).collect())
            }
            _ => self.worker.pause(),
        }
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        match self.in_kernel.take() {
            Some(in_kernel) if !in_kernel.runs => self.start_in_kernel(in_kernel),
            in_kernel => {
                self.in_kernel = in_kernel;
                self.worker.resume()
            }
        }
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as Arc<dyn Counters>
    }

    fn kernel_raises_interrupts(&self) -> bool {
        self.vhost.is_some()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}
