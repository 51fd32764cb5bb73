//! One sandbox and its containers. The driver task owns all of it; [`SandboxHandle`] is how others speak to it.

pub mod container;
pub mod driver;
mod handle;
mod processes;
pub mod resize;
pub mod snapshot;
pub mod spec;
pub mod state;
pub mod status;
pub mod steps;

pub use handle::SandboxHandle;
