//! Command and Event messages between a VMM and its owner, over one `SOCK_SEQPACKET` socket that the VMM inherits as
//! descriptor [`CONTROL_FD`]. A message is one packet of JSON, at most [`MAX_MESSAGE_BYTES`]; descriptors travel with
//! it as `SCM_RIGHTS`.
//!
//! ```text
//!  owner                              VMM
//!    | -- Start(VmConfig) + fds ------> |
//!    | <----------------- Started ----- |   vCPUs run
//!    | <--- GuestConnected{port} + fd - |   the guest connected to a host vsock port
//!    | -- Connect{id, port} + fd -----> |   fd becomes the other end of a connection to a guest port
//!    | <--- Done{id} / Failed{id} ----- |
//!    | <----------------- Exited ------ |   always the last message; then the process ends
//! ```

use serde::{Deserialize, Serialize};

use crate::config::{Extent, SliceDisk, VmConfig};

/// The descriptor number of the control socket in the VMM process.
pub const CONTROL_FD: i32 = 3;
/// Longest message, bytes.
pub const MAX_MESSAGE_BYTES: usize = 128 * 1024;
/// Most descriptors with one message (the kernel's SCM_MAX_FD).
pub const MAX_MESSAGE_FDS: usize = 253;

/// What the owner asks. `id` is the owner's and comes back in [`Event::Done`] or [`Event::Failed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Builds and starts the virtual machine. First message, once; descriptors as in [`crate::config::FdRole`].
    /// Answered by [`Event::Started`] or by [`Event::Exited`].
    Start(Box<VmConfig>),
    /// Maps files into a slice disk of a running VM; one descriptor per extent. Refused when a part of the range is
    /// mapped already; all or nothing.
    AddExtents {
        /// The owner's request id.
        id: u64,
        /// Which disk.
        disk: SliceDisk,
        /// One per descriptor.
        extents: Vec<Extent>,
    },
    /// Unmaps what is mapped inside the range (whole extents only); later I/O there fails.
    RemoveExtents {
        /// The owner's request id.
        id: u64,
        /// Which disk.
        disk: SliceDisk,
        /// First byte of the range on the disk.
        disk_offset_bytes: u64,
        /// Length of the range.
        length_bytes: u64,
    },
    /// Connects the passed unix stream socket to a port of the guest. `Done` when the guest has accepted,
    /// `Failed` when it refused.
    Connect {
        /// The owner's request id.
        id: u64,
        /// Guest vsock port.
        port: u32,
    },
    /// Stops all vCPUs at an instruction boundary.
    Pause {
        /// The owner's request id.
        id: u64,
    },
    /// Lets them run again.
    Resume {
        /// The owner's request id.
        id: u64,
    },
    /// Asks for the counters of devices and exits, answered by [`Event::Stats`].
    Stats {
        /// The owner's request id.
        id: u64,
    },
    /// Ends the VM now, whatever the guest does. (An orderly stop is asked of the guest init; the VM then exits by
    /// itself.)
    Kill,
}

/// What the VMM says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// All vCPUs run.
    Started,
    /// The guest connected to a host vsock port; the message carries one connected unix stream socket.
    GuestConnected {
        /// Host vsock port.
        port: u32,
    },
    /// The command with this id was carried out.
    Done {
        /// The owner's request id.
        id: u64,
    },
    /// The command with this id was refused or failed and changed nothing.
    Failed {
        /// The owner's request id.
        id: u64,
        /// What was tried and why it failed.
        message: String,
    },
    /// Counters.
    Stats {
        /// The owner's request id.
        id: u64,
        /// Counter name to value; names are stable (`blk_vda_read_bytes`, `vcpu_exits_mmio`...).
        counters: std::collections::BTreeMap<String, u64>,
    },
    /// The VM has ended; the last message.
    Exited(ExitReason),
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitReason {
    /// The guest powered off (ACPI sleep control, or the reset port).
    Shutdown,
    /// The guest asked for a reset, or triple-faulted.
    Reset,
    /// The guest kernel panicked (pvpanic-like notification).
    GuestPanic,
    /// [`Command::Kill`], or the control socket was closed by its owner.
    Killed,
    /// KVM could not go on with a vCPU.
    KvmError {
        /// The vCPU.
        vcpu: u32,
        /// KVM's exit reason, suberror and registers.
        message: String,
    },
    /// The VM was never started: bad configuration, missing descriptor, or a host error.
    StartFailed {
        /// What was tried and why it failed.
        message: String,
    },
}
