//! The transport half.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::QueueState;

use super::handle::{Inbox, VsockHandle};
use super::mux::Mux;
use super::worker::Worker;
use super::{CLOSE_TIMEOUT, CONNECT_TIMEOUT, MAX_CONNECTIONS, QUEUE_SIZES};
use crate::devices::virtio::counters::define_counters;
use crate::devices::virtio::device::{COMMON_FEATURES, read_config_bytes};
use crate::devices::virtio::worker::WorkerHalf;
use crate::devices::virtio::{ActivateError, Activation, Begin, Counters, VirtioDevice};

define_counters!(
    /// What a socket device counts.
    VsockCounters {
        /// Data bytes to the guest.
        rx_bytes,
        /// Packets to the guest.
        rx_packets,
        /// Data bytes from the guest.
        tx_bytes,
        /// Packets from the guest.
        tx_packets,
        /// Connections accepted, in either direction.
        connections,
        /// Connections refused, in either direction.
        refused,
        /// Resets sent.
        resets,
        /// Chains that are no packet, and packets that the protocol does not permit there.
        bad_packets,
    }
);

/// Is given the host's end when the guest connects to a host port, on the `vsock` thread: it must not block. Dropping the
/// socket ends the connection.
pub type OnGuestConnect = Box<dyn FnMut(u32, UnixStream) + Send>;

/// Limits that tests lower.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_connections: usize,
    pub(super) connect_timeout: Duration,
    pub(super) close_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_connections: MAX_CONNECTIONS,
            connect_timeout: CONNECT_TIMEOUT,
            close_timeout: CLOSE_TIMEOUT,
        }
    }
}

/// A socket device.
pub struct Vsock {
    cid: u32,
    limits: Limits,
    inbox: Arc<Inbox>,
    counters: Arc<VsockCounters>,
    /// With the worker while there is one.
    on_guest_connect: Option<OnGuestConnect>,
    worker: WorkerHalf<Worker>,
    /// The guest has connections whose other ends are not here.
    announce_reset: bool,
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock")
            .field("cid", &self.cid)
            .finish_non_exhaustive()
    }
}

impl Vsock {
    /// An inactive device of a guest with this context id, and the handle that connects to the guest.
    ///
    /// # Errors
    /// No event descriptors left.
    pub fn new(cid: u32, on_guest_connect: OnGuestConnect) -> io::Result<(Self, VsockHandle)> {
        Vsock::with_limits(cid, on_guest_connect, Limits::default())
    }

    pub(super) fn with_limits(
        cid: u32,
        on_guest_connect: OnGuestConnect,
        limits: Limits,
    ) -> io::Result<(Self, VsockHandle)> {
        let inbox = Arc::new(Inbox::new()?);
        let handle = VsockHandle::new(Arc::clone(&inbox));
        let counters = Arc::new(VsockCounters::new("vsock"));
        let on_guest_connect = Some(on_guest_connect);
        Ok((
            Vsock {
                cid,
                limits,
                inbox,
                counters,
                on_guest_connect,
                worker: WorkerHalf::Inactive,
                announce_reset: false,
            },
            handle,
        ))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Of the third, for events, the driver takes few.
    fn n_busy_queues(&self) -> usize {
        2
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let on_guest_connect = self.on_guest_connect.take().ok_or(ActivateError::BackendLost)?;
        let mut mux = Mux::new(
            u64::from(self.cid),
            self.limits,
            on_guest_connect,
            Arc::clone(&self.counters),
        );
        if self.announce_reset {
            let mut random = [0; 4];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(
                |source| ActivateError::Host {
                    action: "draw a vsock port",
                    source: source.into(),
                },
            )?;
            mux.leave_ports(u32::from_ne_bytes(random));
        }
        let (inbox, counters) = (Arc::clone(&self.inbox), Arc::clone(&self.counters));
        let mut worker =
            Worker::new(mux, activation, inbox, counters).map_err(|source| ActivateError::Host {
                action: "watch the vsock queues",
                source,
            })?;
        if std::mem::take(&mut self.announce_reset) {
            worker.announce_reset();
        }
        self.inbox.open();
        self.worker =
            WorkerHalf::start("vsock", worker, Begin::AtOnce).inspect_err(|_| self.inbox.close())?;
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.inbox.close();
            self.on_guest_connect = Some(worker.into_callback());
        }
    }

    fn pause(&mut self) -> Option<Vec<QueueState>> {
        self.worker.pause()
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.worker.resume()
    }

    /// One byte: whether the guest had connections.
    fn save(&self) -> Vec<u8> {
        let has_connections = self.worker.paused().is_some_and(Worker::has_connections);
        vec![has_connections.into()]
    }

    fn load(&mut self, saved: &[u8]) -> bool {
        self.announce_reset = saved == [1];
        matches!(saved, [0 | 1])
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as Arc<dyn Counters>
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
