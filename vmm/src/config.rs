//! What a virtual machine is made of: plain data, checked once by [`VmConfig::validate`]. No I/O.

use serde::{Deserialize, Serialize};

/// Most vCPUs a virtual machine can have.
pub const MAX_VCPUS: u32 = 64;
/// Smallest guest memory that boots, in MiB.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Memory that can be plugged comes in pieces of this, in MiB: the guest kernel's memory block
/// (`MIN_MEMORY_BLOCK_SIZE`, arch/x86/mm/init_64.c).
pub const HOTPLUG_ALIGN_MIB: u64 = 128;
/// Most memory that can be plugged, in MiB.
pub const MAX_HOTPLUG_MIB: u64 = 1 << 20;
/// Length of each of the two slice disks, in bytes: an address space, not an allocation.
pub const SLICE_DISK_BYTES: u64 = 1 << 50;
/// Extents begin and end at multiples of this on the disk.
pub const EXTENT_ALIGN_BYTES: u64 = 4096;

/// A virtual machine, as its owner wants it. File descriptors travel beside the message that carries this, in the
/// order of [`FdRole`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Where the guest comes from.
    pub origin: Origin,
    /// vCPUs that exist from the start, 1 to `n_possible_vcpus`.
    pub n_vcpus: u32,
    /// vCPUs that the guest knows of, up to [`MAX_VCPUS`]. Those that do not exist from the start stay offline; a VM that is
    /// restored from this one's snapshot may have them.
    pub n_possible_vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// How much memory can be plugged beyond that while the guest runs, in MiB: a multiple of [`HOTPLUG_ALIGN_MIB`], at
    /// most [`MAX_HOTPLUG_MIB`]. Only addresses are set aside for it. With 0 the guest has no such device.
    pub hotplug_mib: u64,
    /// Kernel command line, without what the VMM itself adds (console, memory, devices). Not looked at by a restored guest.
    pub kernel_args: String,
    /// Guest vsock context id, at least 3.
    pub cid: u32,
    /// The network device; `None` for a guest without one.
    pub net: Option<NetConfig>,
    /// Extents of the read-only slice disk (`vda`) known at start.
    pub read_only_extents: Vec<Extent>,
    /// Extents of the read-write slice disk (`vdb`) known at start.
    pub read_write_extents: Vec<Extent>,
    /// Block I/O through io_uring where the kernel has it; `false` forces the synchronous engine.
    pub io_uring: bool,
}

/// Where a guest comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The kernel is booted.
    Boot,
    /// The guest goes on where a snapshot was taken. It finds another VM generation id there.
    Snapshot {
        /// A list of pages that it is known to write to is passed too ([`crate::memory::written`]).
        with_written: bool,
    },
}

/// The virtio-net device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// MAC address the guest sees.
    pub mac: [u8; 6],
    /// MTU advertised to the guest, bytes.
    pub mtu: u16,
    /// A `/dev/vhost-net` descriptor is passed too: the kernel moves the packets.
    pub vhost: bool,
}

/// Which of the two slice disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SliceDisk {
    /// `vda`: images.
    ReadOnly,
    /// `vdb`: scratch and volumes.
    ReadWrite,
}

/// A file mapped into a slice disk. Its descriptor travels with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// First byte on the disk, a multiple of [`EXTENT_ALIGN_BYTES`].
    pub disk_offset_bytes: u64,
    /// First byte in the file.
    pub file_offset_bytes: u64,
    /// Length in bytes, a multiple of [`EXTENT_ALIGN_BYTES`]. Reading past the end of the file gives zeroes.
    pub length_bytes: u64,
}

/// The descriptors that travel with [`crate::control::Command::Start`], in this order; optional ones are left out where
/// the configuration says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FdRole {
    /// `/dev/kvm`.
    Kvm,
    /// The kernel, an uncompressed ELF `vmlinux` with a PVH note; present when the guest boots.
    Kernel,
    /// The initramfs; present when the guest boots.
    Initrd,
    /// The state in a snapshot; present when the guest is restored.
    SnapshotState,
    /// The memory in a snapshot; present when the guest is restored.
    SnapshotMemory,
    /// The list of pages that its guest writes to; present when `with_written`.
    SnapshotWritten,
    /// Where the guest's serial console is written (append).
    Console,
    /// The tap, opened with `IFF_NO_PI | IFF_VNET_HDR`; present when `net` is.
    Tap,
    /// `/dev/vhost-net`; present when `net.vhost`.
    VhostNet,
    /// One per extent: first the read-only disk's, then the read-write disk's.
    Extent,
}

/// Why a [`VmConfig`] is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// vCPU counts out of range.
    #[error(
        "n_vcpus is {n_vcpus} of {n_possible}: give 1 or more, at most n_possible_vcpus, and that at most {MAX_VCPUS}"
    )]
    Vcpus {
        /// `n_vcpus`.
        n_vcpus: u32,
        /// `n_possible_vcpus`.
        n_possible: u32,
    },
    /// Too little memory to boot.
    #[error("memory_mib is {0}: give at least {MIN_MEMORY_MIB}")]
    Memory(u64),
    /// A size for plugged memory that the guest could not use.
    #[error("hotplug_mib is {0}: give a multiple of {HOTPLUG_ALIGN_MIB}, at most {MAX_HOTPLUG_MIB}")]
    Hotplug(u64),
    /// Context ids 0 to 2 are reserved (virtio 1.2, 5.10.4).
    #[error("cid is {0}: give at least 3")]
    Cid(u32),
    /// An extent that is empty, unaligned, or past the end of the disk.
    #[error(
        "extent at {offset:#x}, {length:#x} bytes: give multiples of {EXTENT_ALIGN_BYTES}, not empty, inside the disk's {SLICE_DISK_BYTES:#x} bytes"
    )]
    Extent {
        /// `disk_offset_bytes`.
        offset: u64,
        /// `length_bytes`.
        length: u64,
    },
    /// Two extents share a part of the disk.
    #[error("extents at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// `disk_offset_bytes` of the lower one.
        first: u64,
        /// `disk_offset_bytes` of the upper one.
        second: u64,
    },
}

impl Extent {
    /// Checks one extent by itself.
    ///
    /// # Errors
    /// [`ConfigError::Extent`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        let aligned = self.disk_offset_bytes.is_multiple_of(EXTENT_ALIGN_BYTES)
            && self.length_bytes.is_multiple_of(EXTENT_ALIGN_BYTES);
        let inside = self
            .disk_offset_bytes
            .checked_add(self.length_bytes)
            .is_some_and(|end| end <= SLICE_DISK_BYTES);
        if aligned && inside && self.length_bytes != 0 {
            Ok(())
        } else {
            Err(ConfigError::Extent {
                offset: self.disk_offset_bytes,
                length: self.length_bytes,
            })
        }
    }
}

impl VmConfig {
    /// Checks the whole configuration.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=self.n_possible_vcpus.min(MAX_VCPUS)).contains(&self.n_vcpus)
            || self.n_possible_vcpus > MAX_VCPUS
        {
            return Err(ConfigError::Vcpus {
                n_vcpus: self.n_vcpus,
                n_possible: self.n_possible_vcpus,
            });
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return Err(ConfigError::Memory(self.memory_mib));
        }
        if !self.hotplug_mib.is_multiple_of(HOTPLUG_ALIGN_MIB) || self.hotplug_mib > MAX_HOTPLUG_MIB {
            return Err(ConfigError::Hotplug(self.hotplug_mib));
        }
        if self.cid < 3 {
            return Err(ConfigError::Cid(self.cid));
        }
        for extents in [&self.read_only_extents, &self.read_write_extents] {
            let mut sorted = extents.clone();
            sorted.sort_by_key(|extent| extent.disk_offset_bytes);
            for extent in &sorted {
                extent.validate()?;
            }
            for pair in sorted.windows(2) {
                if pair[0].disk_offset_bytes + pair[0].length_bytes > pair[1].disk_offset_bytes {
                    return Err(ConfigError::Overlap {
                        first: pair[0].disk_offset_bytes,
                        second: pair[1].disk_offset_bytes,
                    });
                }
            }
        }
        Ok(())
    }
}
