//! The sandbox: one shim process and its microVM, behind the shim protocol (containerd's Task and Sandbox services).
//!
//! [`assembly`] puts a sandbox together and takes it apart, [`templates`] keeps guests that sandboxes go on from instead of
//! booting, [`bundle`] is the directory of a sandbox, [`shim`] starts, finds and buries shim processes, [`client`] speaks to
//! one, [`exec`] runs commands in its containers, [`oci`] writes what its containers are, [`sealed`] tells a captured VM that was
//! changed.

pub mod assembly;
pub mod bundle;
pub mod client;
pub mod exec;
pub mod files;
pub mod lifecycle;
pub mod oci;
pub mod sealed;
pub mod shim;
pub mod standby;
pub mod templates;
pub mod volumes;
