//! One microVM: guest memory, vCPUs, devices. Knows KVM and virtio; not containers, protobuf or tokio.

pub mod config;
pub mod control;
