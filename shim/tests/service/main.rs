//! The shim's services through its socket, with a fake VMM and a fake guest behind it.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails; clippy knows only functions marked as tests"
)]

mod bench;
mod fake_guest;
mod fake_vmm;
mod lifecycle;
mod resize;
mod server;
mod snapshot;
mod stdio;
