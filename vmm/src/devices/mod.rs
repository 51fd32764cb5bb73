//! The devices of the virtual machine. A device gets guest memory, an interrupt and a backend by value; it never sees a
//! KVM descriptor, its own address, or another device.

pub mod legacy;
pub mod virtio;
