//! System calls behind safe functions: the place, beside `kvm` and `memory`, where `unsafe` may live.

pub mod iovec;
