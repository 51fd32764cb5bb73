//! The agent, as a library so that it can be tested: three doors (`api`), one engine.

#![forbid(unsafe_code)]

pub mod api;
pub mod config;
pub mod ctl;
pub mod engine;
pub mod error;
pub mod group;
pub mod image;
