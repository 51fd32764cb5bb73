//! One microVM: guest memory, vCPUs, devices. Knows KVM and virtio; not containers, protobuf or tokio.

#![deny(unsafe_code)]

pub mod arch;
pub mod builder;
pub mod bus;
pub mod config;
pub mod control;
pub mod devices;
pub mod event_loop;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod irq;
pub mod kvm;
pub mod memory;
pub mod rate_limiter;
pub mod reporter;
pub mod resources;
pub mod snapshot;
pub mod sys;
pub mod vcpu;
pub mod vm;
