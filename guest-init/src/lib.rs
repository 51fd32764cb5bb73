//! The guest init: PID 1 of the microVM, as a library so that it can be tested without one.
//!
//! One thread runs everything (a tokio current-thread runtime). `service` is the way in, `sandbox` owns the state:
//! `identity` gives it one, and only then there are `containers`; `container` and `storage` do the work, `reaper` is the only place that waits for children, `sys` the only one with
//! `unsafe`. The host is trusted here; what an image brings is not.
#![deny(unsafe_code)]

pub mod boot;
pub mod care;
pub mod container;
pub mod containers;
pub mod error;
pub mod events;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod identity;
pub mod log;
pub mod network;
pub mod reaper;
pub mod reclaim;
pub mod resize;
pub mod sandbox;
pub mod service;
pub mod stats;
pub mod storage;
pub mod stream;
pub mod sys;
