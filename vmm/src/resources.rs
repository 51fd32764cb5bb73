//! The descriptors that come with a VM's configuration, each under its name.

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::config::{FdRole, Origin, VmConfig};

/// Everything from outside that a VM uses. It opens nothing itself.
#[derive(Debug)]
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// What the guest begins with.
    pub origin: OriginFiles,
    /// Where the serial console is written.
    pub console: File,
    /// The tap, when the VM has a network device.
    pub tap: Option<OwnedFd>,
    /// `/dev/vhost-net`, when the kernel is to move the packets.
    pub vhost_net: Option<OwnedFd>,
    /// One per extent of the read-only disk.
    pub read_only: Vec<OwnedFd>,
    /// One per extent of the read-write disk.
    pub read_write: Vec<OwnedFd>,
}

/// What a guest begins with.
#[derive(Debug)]
pub enum OriginFiles {
    /// It boots.
    Boot {
        /// The kernel.
        kernel: File,
        /// The initramfs.
        initrd: File,
    },
    /// It is restored.
    Snapshot {
        /// Everything but memory.
        state: File,
        /// Memory.
        memory: File,
        /// Which pages the guest writes to.
        written: Option<File>,
    },
}

/// The descriptors do not fit the configuration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ResourceError {
    /// Too few.
    #[error("{passed} descriptors were passed; the one for {missing:?} is missing")]
    Missing {
        /// How many there were.
        passed: usize,
        /// The first that is not there.
        missing: FdRole,
    },
    /// Too many.
    #[error("{passed} descriptors were passed, {expected} expected")]
    Unexpected {
        /// How many there were.
        passed: usize,
        /// How many the configuration asks for.
        expected: usize,
    },
}

impl Resources {
    /// Names the descriptors by their order ([`FdRole`]).
    ///
    /// # Errors
    /// [`ResourceError`].
    pub fn assign(config: &VmConfig, fds: Vec<OwnedFd>) -> Result<Self, ResourceError> {
        let passed = fds.len();
        let mut fds = fds.into_iter();
        let mut next = |missing| fds.next().ok_or(ResourceError::Missing { passed, missing });
        let vhost = config.net.as_ref().is_some_and(|net| net.vhost);
        let resources = Self {
            kvm: next(FdRole::Kvm)?,
            origin: match config.origin {
                Origin::Boot => OriginFiles::Boot {
                    kernel: next(FdRole::Kernel)?.into(),
                    initrd: next(FdRole::Initrd)?.into(),
                },
                Origin::Snapshot { with_written } => OriginFiles::Snapshot {
                    state: next(FdRole::SnapshotState)?.into(),
                    memory: next(FdRole::SnapshotMemory)?.into(),
                    written: with_written
                        .then(|| next(FdRole::SnapshotWritten))
                        .transpose()?
                        .map(File::from),
                },
            },
            console: next(FdRole::Console)?.into(),
            tap: config.net.is_some().then(|| next(FdRole::Tap)).transpose()?,
            vhost_net: vhost.then(|| next(FdRole::VhostNet)).transpose()?,
            read_only: config
                .read_only_extents
                .iter()
                .map(|_| next(FdRole::Extent))
                .collect::<Result<_, _>>()?,
            read_write: config
                .read_write_extents
                .iter()
                .map(|_| next(FdRole::Extent))
                .collect::<Result<_, _>>()?,
        };
        match fds.len() {
            0 => Ok(resources),
            unexpected => Err(ResourceError::Unexpected {
                passed,
                expected: passed - unexpected,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Extent, NetConfig};
    use std::os::fd::AsRawFd;

    fn fds(n: usize) -> Vec<OwnedFd> {
        (0..n).map(|_| tempfile::tempfile().unwrap().into()).collect()
    }

    fn config(net: bool, vhost: bool, n_extents: u64) -> VmConfig {
        let extent = |index| Extent {
            disk_offset_bytes: index << 20,
            file_offset_bytes: 0,
            length_bytes: 4096,
        };
        VmConfig {
            origin: Origin::Boot,
            n_vcpus: 1,
            n_possible_vcpus: 1,
            memory_mib: 64,
            hotplug_mib: 0,
            kernel_args: String::new(),
            cid: 3,
            net: net.then_some(NetConfig {
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                vhost,
            }),
            read_only_extents: (0..n_extents).map(extent).collect(),
            read_write_extents: vec![extent(0)],
            io_uring: true,
        }
    }

    #[test]
    fn descriptors_get_their_names_by_order() {
        let passed = fds(9);
        let numbers: Vec<_> = passed.iter().map(AsRawFd::as_raw_fd).collect();
        let resources = Resources::assign(&config(true, true, 2), passed).unwrap();
        assert_eq!(resources.kvm.as_raw_fd(), numbers[0]);
        assert_eq!(resources.console.as_raw_fd(), numbers[3]);
        assert_eq!(resources.vhost_net.unwrap().as_raw_fd(), numbers[5]);
        assert_eq!(resources.read_only[1].as_raw_fd(), numbers[7]);
        assert_eq!(resources.read_write[0].as_raw_fd(), numbers[8]);
    }

    #[test]
    fn a_list_of_written_pages_comes_third() {
        let passed = fds(6);
        let third = passed[3].as_raw_fd();
        let with = |with_written| VmConfig {
            origin: Origin::Snapshot { with_written },
            ..config(false, false, 0)
        };
        let resources = Resources::assign(&with(true), passed).unwrap();
        let OriginFiles::Snapshot {
            written: Some(written),
            ..
        } = resources.origin
        else {
            panic!("{:?}", resources.origin);
        };
        assert_eq!(written.as_raw_fd(), third);
        let without = Resources::assign(&with(false), fds(5)).unwrap();
        assert!(matches!(
            without.origin,
            OriginFiles::Snapshot { written: None, .. }
        ));
    }

    #[test]
    fn wrong_numbers_are_refused_by_name() {
        let missing = |config: &VmConfig, n| Resources::assign(config, fds(n)).unwrap_err();
        let error = ResourceError::Missing {
            passed: 4,
            missing: FdRole::Tap,
        };
        assert_eq!(missing(&config(true, false, 0), 4), error);
        let error = ResourceError::Missing {
            passed: 4,
            missing: FdRole::Extent,
        };
        assert_eq!(missing(&config(false, false, 0), 4), error);
        let error = ResourceError::Unexpected {
            passed: 6,
            expected: 5,
        };
        assert_eq!(missing(&config(false, false, 0), 6), error);
    }
}
