//! The host side of one sandbox: slices of the two wide disks, image files, tap, cgroup. No RPC types.

pub mod cgroup;
pub mod network;
pub mod rootfs;
pub mod slices;
pub mod volumes;
pub mod written;
