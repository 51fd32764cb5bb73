//! Virtio devices over virtio-mmio (virtio 1.2, section 4.2): what the guest sees of its disks, network and sockets.
//!
//! Every device has two halves. The *transport half* ([`VirtioDevice`]) lives behind [`transport::MmioTransport`] and is
//! touched by vCPU threads only: identity, features, configuration space. The *worker half* owns the queues, the
//! interrupt and the backend; it is made by [`VirtioDevice::activate`], runs on a thread of its own (`blk-vda`, `vsock`,
//! `net`, `rng`, `balloon`, `mem`) and hands its backend back when the driver resets the device. So no code asks whether a device is active.
//!
//! The guest is hostile: descriptor chains become typed requests in files without I/O (`chain.rs`, `request.rs`,
//! `packet.rs`), each copied once and then checked. Bad input is counted, and fails the request or sets
//! `DEVICE_NEEDS_RESET`.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod counters;
pub mod device;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod mem;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;
mod worker;

pub use counters::Counters;
pub use device::{ActivateError, Activation, Begin, NeedsReset, VirtioDevice};
pub use queue::{DeviceQueue, QueueFailure};
