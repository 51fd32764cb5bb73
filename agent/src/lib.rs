//! The agent, as a library so that it can be tested: three doors (`api`), one engine.

#![deny(unsafe_code)]

pub mod api;
pub mod capacity;
pub mod cgroup;
pub mod check;
pub mod config;
pub mod ctl;
pub mod disks;
pub mod engine;
pub mod error;
pub mod ext4;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod group;
pub mod host;
pub mod image;
pub mod logs;
pub mod network;
pub mod parts;
pub mod profile;
pub mod random;
pub mod sandbox;
pub mod scratch;
pub mod snapshots;
pub mod store;
mod sys;
pub mod tuning;
