//! What a snapshot of a running sandbox consists of: the VM as its VMM wrote it, the scratch disk, and a record of what this
//! shim knows of both.
//!
//! ```text
//!  <directory>/state, memory   the VM (crate `vmm`)
//!              scratch         the scratch disk at the same moment
//!              sandbox.json    SnapshotRecord; written last, so a directory without it holds no snapshot
//! ```
//! Images are named, not copied. Who passes a snapshot vouches for it: a shim checks that it fits, not where it is from.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::spec::SandboxSpec;
use crate::error::{Error, ErrorKind, Result};

/// The scratch disk in a snapshot.
pub const SCRATCH_FILE: &str = "scratch";
const RECORD_FILE: &str = "sandbox.json";
/// Raised whenever the record or what it means changes.
const FORMAT: u32 = 2;
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRecord {
    format: u32,
    /// The VM.
    pub shape: Shape,
    /// Length of the scratch slice.
    pub scratch_bytes: u64,
    /// What is on the read-only disk.
    pub images: Vec<CapturedImage>,
    /// Containers whose init process runs, by id.
    pub containers: HashMap<String, CapturedContainer>,
}

/// What a snapshot and the VM made from it must have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// vCPUs that exist, whether the guest uses them or not.
    pub n_vcpus: u32,
    /// vCPUs that the sandbox is to have.
    pub n_online: u32,
    /// vCPUs the guest knows of.
    pub n_possible_vcpus: u32,
    /// Memory that the guest began with.
    pub memory_mib: u64,
    /// Memory that can be plugged beside.
    pub hotplug_mib: u64,
    /// Of it, what is plugged.
    pub plugged_mib: u64,
    /// Memory that the sandbox is to have in all.
    pub size_mib: u64,
    /// Limit of all containers together; 0: none.
    pub containers_memory_bytes: u64,
    /// It has an interface.
    pub has_interface: bool,
}

/// An image slice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapturedImage {
    /// Partition number.
    pub partition: u32,
    /// First byte on the disk.
    pub offset_bytes: u64,
    /// The files, in order.
    pub paths: Vec<PathBuf>,
}

/// A container that a clone has from its begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapturedContainer {
    /// Its image's.
    pub partition: u32,
    /// Its init process has a terminal.
    pub terminal: bool,
}

impl SnapshotRecord {
    /// A record of this format.
    #[must_use]
    pub fn new(
        shape: Shape,
        scratch_bytes: u64,
        images: Vec<CapturedImage>,
        containers: HashMap<String, CapturedContainer>,
    ) -> Self {
        Self {
            format: FORMAT,
            shape,
            scratch_bytes,
            images,
            containers,
        }
    }

    /// Makes the directory a snapshot. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(RECORD_FILE);
        let bytes = serde_json::to_vec(self)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "write a snapshot's record", error))?;
        create(&path)
            .and_then(|mut file| file.write_all(&bytes))
            .map_err(|error| Error::io(format!("write {}", path.display()), error))
    }

    /// Reads the record of a snapshot. Blocks.
    ///
    /// # Errors
    /// `FailedPrecondition` for what is no snapshot or has another format.
    pub fn read(directory: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let path = directory.join(RECORD_FILE);
        let refuse = |why: String| {
            Error::new(
                ErrorKind::FailedPrecondition,
                format!("{} is no snapshot's record: {why}", path.display()),
            )
        };
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_RECORD_BYTES).read_to_end(&mut bytes))
            .map_err(|error| refuse(error.to_string()))?;
        let Format { format } = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
        if format != FORMAT {
            return Err(refuse(format!(
                "it has format {format}, this shim reads {FORMAT}"
            )));
        }
        serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))
    }

    /// Checks that the sandbox that is wanted can be made from this.
    ///
    /// # Errors
    /// `FailedPrecondition`, naming what differs.
    pub fn check(&self, spec: &SandboxSpec) -> Result<()> {
        let wanted = [
            ("vCPUs", u64::from(self.shape.n_online), u64::from(spec.n_vcpus)),
            ("MiB of memory", self.shape.size_mib, u64::from(spec.memory_mib)),
            (
                "network interfaces",
                self.shape.has_interface.into(),
                spec.tap.is_some().into(),
            ),
        ];
        for (what, captured, wanted) in wanted {
            if captured != wanted {
                let text = format!("the snapshot has {captured} {what}, {wanted} are wanted");
                return Err(Error::new(ErrorKind::FailedPrecondition, text));
            }
        }
        Ok(())
    }
}

/// A new file, for its owner alone.
///
/// # Errors
/// Those of open(2); what is there is not touched.
pub fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> SnapshotRecord {
        let shape = Shape {
            n_vcpus: 2,
            n_online: 1,
            n_possible_vcpus: 2,
            memory_mib: 256,
            hotplug_mib: 512,
            plugged_mib: 128,
            size_mib: 384,
            containers_memory_bytes: 0,
            has_interface: true,
        };
        let image = CapturedImage {
            partition: 1,
            offset_bytes: 1 << 20,
            paths: vec!["/images/a".into()],
        };
        let container = CapturedContainer {
            partition: 1,
            terminal: false,
        };
        SnapshotRecord::new(shape, 1 << 30, vec![image], [("c1".to_owned(), container)].into())
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let refused = |directory: &Path| SnapshotRecord::read(directory).unwrap_err();
        assert!(refused(directory.path()).chain().contains("sandbox.json"));
        record().write(directory.path()).unwrap();
        assert_eq!(SnapshotRecord::read(directory.path()).unwrap(), record());
        assert!(record().write(directory.path()).is_err(), "overwritten");
        let path = directory.path().join(RECORD_FILE);
        for (content, why) in [
            ("{\"format\":9,\"new\":1}", "format 9"),
            ("{\"format\":2}", "missing field"),
            ("{", "EOF"),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = refused(directory.path());
            assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
            assert!(error.chain().contains(why), "{}", error.chain());
        }
    }
}
