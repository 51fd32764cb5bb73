//! One microVM: guest memory, vCPUs, devices. Knows KVM and virtio; not containers, protobuf or tokio.

#![deny(unsafe_code)]

pub mod bus;
pub mod config;
pub mod control;
pub mod devices;
pub mod irq;
pub mod memory;
pub mod sys;
