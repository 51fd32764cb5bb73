//! virtio-vsock (virtio 1.2, 5.10): stream sockets between the guest and unix stream sockets of the host.
//!
//! One thread, `vsock`, while active. `packet.rs` and `credit.rs` are pure; `connection.rs` moves the bytes of one
//! connection; `mux.rs` knows all connections; `worker.rs` owns the queues.
//!
//! ```text
//!  host -> guest: Requested -RESPONSE-> Open       guest -> host: REQUEST -> Open (RESPONSE sent)
//!
//!  Open -host ends writing-----> SHUTDOWN(SEND) sent, after the last byte     (the other direction goes on)
//!  Open -host is gone----------> SHUTDOWN(SEND|RECEIVE) sent: Closing -RST or timeout-> forgotten
//!  Open -SHUTDOWN(SEND) came---> shutdown(WR) of the host's socket, after the last byte
//!  Open -both flags, or RST----> Draining: what the guest sent still goes to the host, then the socket is closed
//! ```
//!
//! No byte is lost: a packet of the guest goes to the host's socket at once or into a buffer of
//! [`BUFFER_BYTES`], and the guest is told of room (credit) only for what fits there. Bytes from the host are
//! taken from its socket only when a guest buffer and the guest's credit are at hand. So a slow reader on either side
//! stops nothing but its own connection.

mod connection;
mod credit;
mod device;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod handle;
mod mux;
mod packet;
#[cfg(test)]
mod tests;
mod worker;

use std::time::Duration;

pub use device::{OnGuestConnect, Vsock, VsockCounters};
pub use handle::{ConnectError, ConnectReply, VsockHandle};

/// The host's context id (`VMADDR_CID_HOST`).
const HOST_CID: u64 = 2;
/// Device to driver, driver to device, events (one only: a restored guest's connections are gone).
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const RX_QUEUE: usize = 0;
const TX_QUEUE: usize = 1;
/// Longest chain accepted: header, and a packet of Linux' largest (64 KiB) in separate pages.
const MAX_DESCRIPTORS: usize = 64;
/// Bytes that one connection may hold for a host that does not read.
const BUFFER_BYTES: u32 = 256 << 10;
/// Largest packet for the guest.
const MAX_PACKET_BYTES: usize = 64 << 10;
/// Connections of one guest, of whatever state.
const MAX_CONNECTIONS: usize = 1024;
/// Resets waiting for a guest buffer; more packets that cause some are not looked at before there is room.
const MAX_WAITING_RESETS: usize = 1024;
/// A guest's init answers at once; an emulated one within a few hundred milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a guest may take to answer a full shutdown (Linux uses the same, `VSOCK_CLOSE_TIMEOUT`).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);
