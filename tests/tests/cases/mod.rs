//! The cases, each a sentence about the system.

pub(crate) mod allowed;
pub(crate) mod cni;
pub(crate) mod death;
pub(crate) mod doors;
pub(crate) mod exec;
pub(crate) mod fork;
pub(crate) mod full;
pub(crate) mod https;
pub(crate) mod ipv6;
pub(crate) mod life;
pub(crate) mod lifecycle;
pub(crate) mod network;
pub(crate) mod nfs;
pub(crate) mod processes;
pub(crate) mod recovery;
pub(crate) mod refresh;
pub(crate) mod refusals;
pub(crate) mod resize;
pub(crate) mod standby;
pub(crate) mod update;
pub(crate) mod volumes;

/// A container's script that says something and goes on until it is told to end.
const SAY_HELLO: &str = "echo hello; trap 'exit 0' TERM; sleep 100000 & wait";
