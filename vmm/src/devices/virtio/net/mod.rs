//! virtio-net (virtio 1.2, 5.1) on a tap: one queue pair, merged receive buffers, checksum and segmentation offloads.
//!
//! Packets are moved by the kernel (vhost-net) where its descriptor is given, else by one thread, `net`. The tap speaks
//! `virtio_net_hdr` itself, so offloads pass through untouched in both ways; the kernel checks what the guest claims.

mod device;
#[cfg(test)]
mod tests;
mod worker;

#[cfg(any(test, fuzzing))]
pub(crate) use worker::fuzz;

pub use device::{Net, NetCounters, NetError};

/// Device to driver, driver to device.
const QUEUE_SIZES: [u16; 2] = [256, 256];
const RX_QUEUE: usize = 0;
const TX_QUEUE: usize = 1;
/// Longest chain accepted.
const MAX_DESCRIPTORS: usize = 256;
/// Longest frame with its header: 64 KiB of IP behind Ethernet and a VLAN tag.
const MAX_FRAME_BYTES: usize = crate::sys::tap::VNET_HEADER_BYTES + 65_535 + 18;
