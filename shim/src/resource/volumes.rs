//! Volumes that are files of their own, on the read-write disk. Each has a place that is wide enough for any volume, so that
//! it can grow where it is. And volumes on NFS servers, which are the guest's business alone.

use std::{
    fs::{File, OpenOptions},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vmm::config::{Extent, SLICE_DISK_BYTES, SliceDisk};

use super::slices::Slice;
use crate::{
    error::{Error, ErrorKind, Result},
    guest::{Guest, NfsDirectory},
    vmm::VmmClient,
};

/// Places on the disk: the first is the scratch slice's, in partition 1.
const N_PLACES: usize = protocol::MAX_ATTACHED_VOLUMES + 1;
/// Length of a place.
const PLACE_BYTES: u64 = (SLICE_DISK_BYTES / N_PLACES as u64) >> 40 << 40;

/// A volume to attach.
#[derive(Debug, Clone)]
pub enum VolumeSpec {
    /// It is a file.
    File(FileVolume),
    /// It is on a server: its name, and where.
    Nfs(String, NfsDirectory),
}

/// A volume that is a file of its own.
#[derive(Debug, Clone)]
pub struct FileVolume {
    /// Its name.
    pub name: String,
    /// A file with an ext4 file system, or a device's.
    pub path: PathBuf,
    /// Containers see an empty directory.
    pub is_empty_dir: bool,
    /// Containers see a device.
    pub is_device: bool,
    /// Group that owns it.
    pub gid: Option<u32>,
}

/// The volumes of one VM.
#[derive(Debug, Default)]
pub struct Volumes {
    /// Held while one is attached: they are few.
    attached: tokio::sync::Mutex<Vec<Attached>>,
    /// The guest was asked to mount a volume from a server: it may go on trying after it has said that it failed.
    has_nfs: AtomicBool,
}

#[derive(Debug)]
struct Attached {
    name: String,
    /// Device and inode.
    file: (u64, u64),
    /// What the VMM has mapped.
    mapped_bytes: u64,
    /// What the guest has mounted.
    mounted_bytes: u64,
}

impl Volumes {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Whether there are none, and none is being attached.
    pub fn is_empty(&self) -> bool {
        !self.has_nfs.load(Ordering::Relaxed)
            && self.attached.try_lock().is_ok_and(|attached| attached.is_empty())
    }

    /// Gives the guest a volume.
    ///
    /// # Errors
    /// As [`Self::attach_file`], and for a volume on a server what the guest answers.
    pub async fn attach(&self, spec: VolumeSpec, guest: &Guest, vmm: &VmmClient) -> Result<()> {
        match spec {
            VolumeSpec::File(file) => self.attach_file(file, guest, vmm).await,
            VolumeSpec::Nfs(name, directory) => {
                self.has_nfs.store(true, Ordering::Relaxed);
                guest.attach_nfs(name, directory).await
            }
        }
    }

    /// Maps the volume's file and has the guest mount it. When it is there, only what the file has grown by is new.
    ///
    /// # Errors
    /// `InvalidArgument` for a file that cannot be a volume, `FailedPrecondition` when the volume is there with another
    /// file; what VMM and guest answer. The next call goes on where this one failed.
    async fn attach_file(&self, spec: FileVolume, guest: &Guest, vmm: &VmmClient) -> Result<()> {
        let path = spec.path.clone();
        let opened = tokio::task::spawn_blocking(move || open(&path)).await;
        let (file, key, length_bytes) = opened
            .unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "open a volume", error)))?;
        let mut attached = self.attached.lock().await;
        let index = place(&mut attached, &spec, key, length_bytes)?;
        let volume = &mut attached[index];
        let slice = Slice {
            partition: u32::try_from(index).unwrap_or(u32::MAX).saturating_add(2),
            offset_bytes: (index as u64 + 1) * PLACE_BYTES,
            length_bytes,
            files: Vec::new(),
        };
        if volume.mapped_bytes < length_bytes {
            let grown = Extent {
                disk_offset_bytes: slice.offset_bytes + volume.mapped_bytes,
                file_offset_bytes: volume.mapped_bytes,
                length_bytes: length_bytes - volume.mapped_bytes,
            };
            let fds = [OwnedFd::from(file)];
            vmm.add_extents(SliceDisk::ReadWrite, vec![grown], &fds)
                .await
                .map_err(|error| error.context(format!("map volume {:?} into the VM", spec.name)))?;
            volume.mapped_bytes = length_bytes;
        }
        if volume.mounted_bytes < length_bytes {
            guest.attach_volume(&spec, &slice).await?;
            volume.mounted_bytes = length_bytes;
        }
        Ok(())
    }
}

/// Finds the volume, or a place for it.
fn place(
    attached: &mut Vec<Attached>,
    spec: &FileVolume,
    file: (u64, u64),
    length_bytes: u64,
) -> Result<usize> {
    let refuse = |why: &str| {
        let text = format!("volume {:?} {why}", spec.name);
        Err(Error::new(ErrorKind::FailedPrecondition, text))
    };
    if let Some(index) = attached.iter().position(|volume| volume.name == spec.name) {
        let volume = &attached[index];
        if volume.file != file {
            return refuse("is attached already, with another file");
        }
        if volume.mapped_bytes > length_bytes {
            return refuse("has become shorter; a volume can only grow");
        }
        return Ok(index);
    }
    if attached.iter().any(|volume| volume.file == file) {
        return refuse("has the file of another volume");
    }
    if attached.len() >= protocol::MAX_ATTACHED_VOLUMES {
        return refuse("finds no place: the sandbox has 20 volumes");
    }
    attached.push(Attached {
        name: spec.name.clone(),
        file,
        mapped_bytes: 0,
        mounted_bytes: 0,
    });
    Ok(attached.len() - 1)
}

fn open(path: &std::path::Path) -> Result<(File, (u64, u64), u64)> {
    let failed = |error| Error::io(format!("open volume file {}", path.display()), error);
    let metadata = std::fs::metadata(path).map_err(failed)?;
    let length_bytes = metadata.len() / protocol::SLICE_ALIGN_BYTES * protocol::SLICE_ALIGN_BYTES;
    if !metadata.is_file() || !(1..=PLACE_BYTES).contains(&length_bytes) {
        let text = format!(
            "volume file {} is not a file of {} to {PLACE_BYTES} bytes",
            path.display(),
            protocol::SLICE_ALIGN_BYTES
        );
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(failed)?;
    Ok((file, (metadata.dev(), metadata.ino()), length_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_hold_the_largest_volume_and_stay_on_the_disk() {
        const { assert!(PLACE_BYTES >= 32 << 40) };
        assert!(PLACE_BYTES * N_PLACES as u64 <= SLICE_DISK_BYTES);
    }

    #[test]
    fn a_volume_keeps_its_place_and_its_file() {
        let mut attached = Vec::new();
        let spec = |name: &str| FileVolume {
            name: name.into(),
            path: "/v".into(),
            is_empty_dir: false,
            is_device: false,
            gid: None,
        };
        assert_eq!(place(&mut attached, &spec("a"), (1, 1), 4096).unwrap(), 0);
        assert_eq!(place(&mut attached, &spec("b"), (1, 2), 4096).unwrap(), 1);
        assert_eq!(place(&mut attached, &spec("a"), (1, 1), 8192).unwrap(), 0);
        attached[0].mapped_bytes = 8192;
        for (name, file, length, why) in [
            ("a", (1, 3), 8192, "another file"),
            ("a", (1, 1), 4096, "only grow"),
            ("c", (1, 1), 8192, "of another volume"),
        ] {
            let error = place(&mut attached, &spec(name), file, length).unwrap_err();
            assert!(error.chain().contains(why), "{}", error.chain());
        }
        for n in 2..20 {
            place(&mut attached, &spec(&n.to_string()), (2, n), 4096).unwrap();
        }
        let error = place(&mut attached, &spec("z"), (3, 3), 4096).unwrap_err();
        assert!(error.chain().contains("20 volumes"));
    }
}
