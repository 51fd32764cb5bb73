//! The state of a whole machine beside its memory, and the file that holds it.
//!
//! ```text
//!  bytes  0..8   "ECISNAP\0"
//!         8..12  version, little endian
//!        12..16  length of the body
//!        16..20  CRC-32 of the body
//!        20..    body: the state (postcard)
//! ```
//! The checksum finds damage. It is no proof of origin: whoever passes a snapshot to a VMM vouches for it.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod short_list;

use std::io::{self, Read, Write};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use crate::config::MAX_VCPUS;
use crate::devices::legacy::ConsoleState;
use crate::devices::virtio::transport::TransportState;
use crate::kvm::{VcpuState, VmState};
use crate::memory::image::DataRange;

/// Raised whenever the state or what it means changes.
pub const VERSION: u32 = 3;

const MAGIC: [u8; 8] = *b"ECISNAP\0";
const HEADER_BYTES: usize = 20;
/// 64 vCPUs have some 600 KiB.
const MAX_BODY_BYTES: u32 = 16 << 20;

/// Everything of a machine that is not in guest memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// vCPUs the guest knows of, running or not.
    pub n_possible_vcpus: u32,
    /// Guest memory.
    pub memory_mib: u64,
    /// Addresses for memory to be plugged, in MiB.
    pub hotplug_mib: u64,
    /// Where guest memory has content.
    pub data: Vec<DataRange>,
    /// CPUID of vCPU 0: what processor, hypervisor and topology the guest has seen.
    #[serde(deserialize_with = "short_list::deserialize::<_, _, KVM_MAX_CPUID_ENTRIES>")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// Running vCPUs, by number from 0 on.
    #[serde(deserialize_with = "short_list::deserialize::<_, _, { MAX_VCPUS as usize }>")]
    pub vcpus: Vec<VcpuState>,
    /// The serial port.
    pub console: ConsoleState,
    /// Virtio devices, in the order of their slots.
    pub devices: Vec<TransportState>,
}

/// Why a snapshot is not used. The VM can be booted instead.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It cannot be read or written.
    #[error("Failed to {operation} the snapshot's state")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something else.
    #[error("the file is no snapshot")]
    NotASnapshot,
    /// Of another version of this program.
    #[error("the snapshot has version {found}, this program reads version {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// It ends too early.
    #[error("the snapshot is truncated: {found} bytes of {expected}")]
    Truncated {
        /// Bytes of the body that are there.
        found: usize,
        /// Bytes that there should be.
        expected: usize,
    },
    /// Its checksum is wrong.
    #[error("the snapshot is damaged: its checksum is {found:#010x} instead of {expected:#010x}")]
    Damaged {
        /// Of what is there.
        found: u32,
        /// In the header.
        expected: u32,
    },
    /// The checksum is right and the body is not.
    #[error("the snapshot's state cannot be decoded")]
    Encoding(#[source] postcard::Error),
    /// Another processor or KVM.
    #[error(
        "the snapshot was taken on another processor or KVM: CPUID leaf {leaf:#x}.{index:#x} was {saved:#x?} and is {here:#x?}"
    )]
    Processor {
        /// The first leaf that differs.
        leaf: u32,
        /// Its index.
        index: u32,
        /// EAX to EDX then; zeroes when it was not there.
        saved: [u32; 4],
        /// EAX to EDX now.
        here: [u32; 4],
    },
    /// Another shape of machine is wanted.
    #[error("the snapshot is of a machine with {saved} {what}, {wanted} are wanted")]
    Shape {
        /// What of.
        what: &'static str,
        /// In the snapshot.
        saved: u64,
        /// In the configuration.
        wanted: u64,
    },
}

impl MachineState {
    /// Writes the state.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn write(&self, mut file: impl Write) -> Result<(), SnapshotError> {
        let body = postcard::to_allocvec(self).map_err(SnapshotError::Encoding)?;
        let length = u32::try_from(body.len())
            .ok()
            .filter(|length| *length <= MAX_BODY_BYTES)
            .ok_or_else(|| io_error("write")(io::ErrorKind::FileTooLarge.into()))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend(MAGIC);
        for word in [VERSION, length, crc32fast::hash(&body)] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(body);
        file.write_all(&bytes).map_err(io_error("write"))
    }

    /// Reads a state and checks all that can be checked without a machine.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn read(mut file: impl Read) -> Result<Self, SnapshotError> {
        let mut header = [0; HEADER_BYTES];
        let n = read_up_to(&mut file, &mut header)?;
        if n < HEADER_BYTES || header[..8] != MAGIC {
            return Err(SnapshotError::NotASnapshot);
        }
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (version, length, checksum) = (word(8), word(12), word(16));
        if version != VERSION {
            return Err(SnapshotError::Version { found: version });
        }
        if length > MAX_BODY_BYTES {
            return Err(SnapshotError::NotASnapshot);
        }
        let expected = length as usize;
        let mut body = vec![0; expected];
        let found = read_up_to(&mut file, &mut body)?;
        if found < expected {
            return Err(SnapshotError::Truncated { found, expected });
        }
        let found = crc32fast::hash(&body);
        if found != checksum {
            return Err(SnapshotError::Damaged {
                found,
                expected: checksum,
            });
        }
        postcard::from_bytes(&body).map_err(SnapshotError::Encoding)
    }

    /// Checks that the guest would find the processor it knows.
    ///
    /// # Errors
    /// [`SnapshotError::Processor`].
    pub fn check_processor(&self, here: &[kvm_cpuid_entry2]) -> Result<(), SnapshotError> {
        let registers =
            |entry: Option<&kvm_cpuid_entry2>| entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
        let find = |entries: &[kvm_cpuid_entry2], of: &kvm_cpuid_entry2| {
            let found = entries
                .iter()
                .find(|entry| (entry.function, entry.index) == (of.function, of.index));
            registers(found)
        };
        for entry in self.cpuid.iter().chain(here) {
            let (saved, here) = (find(&self.cpuid, entry), find(here, entry));
            if saved != here {
                return Err(SnapshotError::Processor {
                    leaf: entry.function,
                    index: entry.index,
                    saved,
                    here,
                });
            }
        }
        Ok(())
    }
}

fn io_error(operation: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::Io { operation, source }
}

/// Reads until the buffer is full or the file ends: how many bytes.
fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> Result<usize, SnapshotError> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read(&mut buffer[n..]) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error("read")(error)),
        }
    }
    Ok(n)
}
