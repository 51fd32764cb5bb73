//! One sandbox: a process that owns one microVM and serves containerd's Task and Sandbox services for it.
//!
//! ```text
//!  caller (agent, containerd)
//!    | ttrpc, unix socket
//!  service/     converts requests, nothing else
//!  sandbox/     the driver task owns all state; long work runs beside it and reports back
//!    |      \
//!  guest.rs  vmm.rs     stdio/ copies streams     resource/ host side: slices, tap, cgroup
//!    | ttrpc over vsock    | control messages
//!  eci-guest-init        eci-vmm
//! ```
//!
//! Everything runs on one tokio thread; blocking file work goes to tokio's blocking pool.
//!
//! **Invariants.** The shim waits for the guest or the VMM only under a deadline, or under the caller's own wait. What
//! they send is bounded before it is kept.

#![deny(unsafe_code)]

pub mod args;
pub mod console;
pub mod delete;
pub mod error;
pub mod events;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod guest;
pub mod persist;
pub mod phases;
pub mod resource;
pub mod run;
pub mod sandbox;
pub mod service;
pub mod start;
pub mod stdio;
pub mod sys;
pub mod timestamp;
pub mod vmm;
