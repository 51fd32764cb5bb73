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
//!    | <----------- Exited + fd ------- |   always the last message; then the process ends; fd is what is left of the VM
//! ```
//!
//! [`OwnerSocket`] is the owner's end, [`VmmSocket`] the VMM's. `send` and `recv` block, `try_send` and `try_recv`
//! return [`ControlError::WouldBlock`] instead, whatever the descriptor's own mode.

use std::error::Error;
use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
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
    /// Stops all vCPUs at an instruction boundary, and all devices between two requests.
    Pause {
        /// The owner's request id.
        id: u64,
    },
    /// Lets them run again.
    Resume {
        /// The owner's request id.
        id: u64,
    },
    /// Takes a snapshot of the paused VM into the two passed descriptors, empty regular files: first the state, then the
    /// memory. `Done` once it is taken: the VM may be resumed then, while a copy of this process still writes the files, as
    /// they would be now. One at a time. The VM stays paused.
    Snapshot {
        /// The owner's request id.
        id: u64,
    },
    /// `Done` when the files of the last snapshot are complete; `Failed` when they are not and will not be.
    FinishSnapshot {
        /// The owner's request id.
        id: u64,
    },
    /// Sets how much memory the guest is to give up, 0 for none. `Done` when that is a size the guest can do without, not
    /// when it has given it up: see `balloon_actual_bytes` among the counters.
    SetBalloon {
        /// The owner's request id.
        id: u64,
        /// MiB that the guest is to give up in all.
        target_mib: u64,
    },
    /// Sets how much memory the guest is to have plugged, of the [`VmConfig::hotplug_mib`] it can have. `Done` when that is
    /// a possible size, not when the guest has it: see `mem_plugged_bytes` among the counters.
    ResizeMemory {
        /// The owner's request id.
        id: u64,
        /// MiB that the guest is to have plugged in all.
        plugged_mib: u64,
    },
    /// Makes vCPUs until there are so many, at most [`VmConfig::n_possible_vcpus`]; fewer than there are is no error. They wait
    /// for the guest to start them. `Done` once they exist. The guest may stand still for a moment.
    AddVcpus {
        /// The owner's request id.
        id: u64,
        /// How many there are to be in all.
        n_vcpus: u32,
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
    /// The VM has ended; the last message. Unless it failed to start, the message carries one descriptor: the VM's.
    ///
    /// The kernel takes a VM apart when its last descriptor is closed, and waits several RCU grace periods meanwhile (20 ms
    /// and more at 250 ticks a second). With this one left to the owner, the process ends before that, and its memory is
    /// free. The owner closes it where nobody waits; it is of no other use.
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
    /// The VM was never started because its snapshot does not fit this program, this host or the configuration: it can be
    /// booted instead.
    SnapshotRefused {
        /// Why.
        message: String,
    },
    /// The VM was never started: bad configuration, missing descriptor, or a host error.
    StartFailed {
        /// What was tried and why it failed.
        message: String,
    },
}

/// An error with all its causes, as text of a message.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

/// The owner's end of a control socket.
pub type OwnerSocket = ControlSocket<Command, Event>;
/// The VMM's end of a control socket.
pub type VmmSocket = ControlSocket<Event, Command>;

/// One end of a control socket: sends `Out`, receives `In`.
#[derive(Debug)]
pub struct ControlSocket<Out, In> {
    socket: OwnedFd,
    messages: PhantomData<fn(Out) -> In>,
}

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// `try_send` or `try_recv` would have to wait.
    #[error("The control socket is not ready")]
    WouldBlock,
    /// The other end is closed.
    #[error("The control socket was closed by the other end")]
    Closed,
    /// The socket failed.
    #[error("Failed to {operation} the control socket")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A message to send, or one received, is too long. A received one is dropped, with its descriptors.
    #[error("A control message is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// More descriptors than one message can carry, or some were lost on the way (descriptor limit).
    #[error(
        "A control message has more than {MAX_MESSAGE_FDS} descriptors, or the descriptor limit is reached"
    )]
    TooManyFds,
    /// Not a message of this protocol.
    #[error("A control message could not be encoded or parsed")]
    Malformed {
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

impl ControlError {
    fn socket(operation: &'static str, errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::WouldBlock,
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            // Linux answers EMSGSIZE when a packet exceeds the socket's send buffer.
            Errno::MSGSIZE => Self::TooLong,
            Errno::TOOMANYREFS => Self::TooManyFds,
            errno => Self::Socket {
                operation,
                source: errno.into(),
            },
        }
    }
}

/// Makes a connected pair: the owner keeps the first and passes the second to the VMM as [`CONTROL_FD`]. Both are
/// close-on-exec.
///
/// # Errors
/// [`ControlError::Socket`].
pub fn pair() -> Result<(OwnerSocket, VmmSocket), ControlError> {
    let (owner, vmm) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|errno| ControlError::socket("create", errno))?;
    Ok((owner.into(), vmm.into()))
}

impl<Out: Serialize, In: DeserializeOwned> ControlSocket<Out, In> {
    /// Sends one message with copies of `fds`; waits while the socket is full.
    ///
    /// # Errors
    /// Any [`ControlError`] but `WouldBlock`; nothing was sent then.
    pub fn send(&self, message: &Out, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        self.send_with(message, fds, SendFlags::NOSIGNAL)
    }

    /// Sends one message, or returns [`ControlError::WouldBlock`].
    ///
    /// # Errors
    /// Any [`ControlError`]; nothing was sent then.
    pub fn try_send(&self, message: &Out, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        self.send_with(message, fds, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    /// Waits for one message. Its descriptors are close-on-exec.
    ///
    /// # Errors
    /// Any [`ControlError`] but `WouldBlock`.
    pub fn recv(&self) -> Result<(In, Vec<OwnedFd>), ControlError> {
        self.recv_with(RecvFlags::CMSG_CLOEXEC)
    }

    /// Takes one message, or returns [`ControlError::WouldBlock`].
    ///
    /// # Errors
    /// Any [`ControlError`].
    pub fn try_recv(&self) -> Result<(In, Vec<OwnedFd>), ControlError> {
        self.recv_with(RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT)
    }

    fn send_with(&self, message: &Out, fds: &[BorrowedFd<'_>], flags: SendFlags) -> Result<(), ControlError> {
        if fds.len() > MAX_MESSAGE_FDS {
            return Err(ControlError::TooManyFds);
        }
        let bytes = serde_json::to_vec(message).map_err(|source| ControlError::Malformed { source })?;
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(ControlError::TooLong);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ControlError::TooManyFds);
        }
        loop {
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ControlError::socket("send on", errno)),
            }
        }
    }

    fn recv_with(&self, flags: RecvFlags) -> Result<(In, Vec<OwnedFd>), ControlError> {
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match rustix::net::recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                flags,
            ) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ControlError::socket("receive from", errno)),
            }
        };
        // Taken out first, so that they are closed whatever is wrong with the rest.
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                fds.extend(passed);
            }
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(ControlError::TooLong);
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ControlError::TooManyFds);
        }
        // No message of ours is empty, so an empty packet cannot be told from the end and need not be.
        if received.bytes == 0 {
            return Err(ControlError::Closed);
        }
        let message = serde_json::from_slice(&bytes[..received.bytes])
            .map_err(|source| ControlError::Malformed { source })?;
        Ok((message, fds))
    }
}

impl<Out, In> From<OwnedFd> for ControlSocket<Out, In> {
    fn from(socket: OwnedFd) -> Self {
        Self {
            socket,
            messages: PhantomData,
        }
    }
}

impl<Out, In> From<ControlSocket<Out, In>> for OwnedFd {
    fn from(socket: ControlSocket<Out, In>) -> Self {
        socket.socket
    }
}

impl<Out, In> AsFd for ControlSocket<Out, In> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<Out, In> AsRawFd for ControlSocket<Out, In> {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
