//! System calls behind safe functions: the place, beside `kvm` and `memory`, where `unsafe` may live.

#![allow(unsafe_code)]

pub mod file;
pub mod fork;
pub mod inherited;
pub mod iovec;
pub mod process;
pub mod tap;
pub mod uring;
pub mod vhost;
