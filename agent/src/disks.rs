//! Disks: image files with a journalled ext4 file system, or empty ones for who wants a device, which may outlive the group
//! that uses them. Who uses which is
//! in the records of the groups; a file that no record names is a disk that was kept. Calls block.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

use crate::{
    error::{Error, ErrorKind, Result},
    ext4::{self, failed},
    group::disk::DiskId,
};

const GIB: u64 = 1 << 30;
/// What ends the name of a disk that was made with a file system.
const FORMATTED: &str = "ext4";
/// And of one that was made without.
const EMPTY: &str = "raw";

/// A disk as the host's file system has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    /// Which.
    pub id: DiskId,
    /// Length.
    pub size_bytes: u64,
    /// What it takes on the host.
    pub used_bytes: u64,
}

/// The folder of disks.
#[derive(Debug, Clone)]
pub struct Disks {
    dir: PathBuf,
}

impl Disks {
    /// Makes the folder when it is not there, and clears what was not finished when an agent ended.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(dir: PathBuf) -> Result<Self> {
        let action = format!("open the disks in {}", dir.display());
        std::fs::create_dir_all(&dir).map_err(failed(action.clone()))?;
        for entry in std::fs::read_dir(&dir).map_err(failed(action))?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == ext4::DRAFT) {
                std::fs::remove_file(&path).map_err(failed(format!("remove {}", path.display())))?;
            }
        }
        Ok(Self { dir })
    }

    /// The file of a disk that was made with a file system, and of one that was made without.
    fn paths(&self, id: &DiskId) -> [PathBuf; 2] {
        [FORMATTED, EMPTY].map(|extension| self.dir.join(format!("{id}.{extension}")))
    }

    /// Whether there is such a disk.
    pub fn exists(&self, id: &DiskId) -> bool {
        self.paths(id).iter().any(|path| path.is_file())
    }

    /// Makes a disk, unless it is there.
    ///
    /// # Errors
    /// As [`ext4::make`].
    pub fn create(&self, id: &DiskId, gib: u32) -> Result<PathBuf> {
        let [path, _] = self.paths(id);
        ext4::make(&path, u64::from(gib) * GIB, "disk", ext4::LASTING)?;
        Ok(path)
    }

    /// Makes a disk with nothing on it, unless it is there. It has its length at once or is not there.
    ///
    /// # Errors
    /// `ResourceExhausted` when the host takes no file of this length.
    pub fn create_empty(&self, id: &DiskId, gib: u32) -> Result<PathBuf> {
        let [_, path] = self.paths(id);
        ext4::make_empty(&path, u64::from(gib) * GIB)?;
        Ok(path)
    }

    /// The file of a disk.
    ///
    /// # Errors
    /// `DiskNotFound` names the file.
    pub fn find(&self, id: &DiskId) -> Result<PathBuf> {
        let paths = self.paths(id);
        let [formatted, empty] = &paths;
        let text = format!(
            "no disk {id} on this host: there is no file {}, nor {}",
            formatted.display(),
            empty.display()
        );
        let found = paths.into_iter().find(|path| path.is_file());
        found.ok_or_else(|| Error::new(ErrorKind::DiskNotFound, text))
    }

    /// Makes a disk's file so long; the file system in it stays as it is. Durable when it returns.
    ///
    /// # Errors
    /// `DiskNotFound`; `InvalidArgument` when it is longer; `ResourceExhausted` when the host takes no file of this length.
    pub fn grow(&self, id: &DiskId, gib: u32) -> Result<()> {
        let path = self.find(id)?;
        let action = format!("grow {} to {gib} GiB", path.display());
        let file: File = OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(failed(action.clone()))?;
        let (now, wanted) = (
            file.metadata().map_err(failed(action.clone()))?.len(),
            u64::from(gib) * GIB,
        );
        if wanted < now {
            let text = format!(
                "disk {id} has {} GiB, {gib} are wanted; valid: as much or more, a disk can only grow",
                now / GIB
            );
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        file.set_len(wanted)
            .and_then(|()| file.sync_all())
            .map_err(failed(action))
    }

    /// All disks that have a file.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn list(&self) -> Result<Vec<DiskFile>> {
        let action = || format!("list the disks in {}", self.dir.display());
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(failed(action()))? {
            let path = entry.map_err(failed(action()))?.path();
            let name = path.file_stem().and_then(|name| name.to_str());
            let is_disk = path
                .extension()
                .is_some_and(|extension| extension == FORMATTED || extension == EMPTY);
            let Some(id) = name.filter(|_| is_disk).and_then(DiskId::parse) else {
                continue;
            };
            // It may go while this looks.
            if let Ok(metadata) = std::fs::metadata(&path) {
                found.push(DiskFile {
                    id,
                    size_bytes: metadata.len(),
                    used_bytes: metadata.blocks() * 512,
                });
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    /// Removes a disk; it may be gone already.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, id: &DiskId) -> Result<()> {
        for path in self.paths(id) {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(format!("remove {}", path.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_for_a_device_is_empty_and_one_like_others() {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::open(dir.path().join("disks")).unwrap();
        let id = DiskId::parse("d-0").unwrap();
        let path = disks.create_empty(&id, 20).unwrap();
        let file = &disks.list().unwrap()[0];
        assert_eq!((&file.id, file.size_bytes, file.used_bytes), (&id, 20 * GIB, 0));
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|file| std::os::unix::fs::FileExt::write_all_at(&file, b"x", 4096))
            .unwrap();
        assert_eq!(disks.create_empty(&id, 20).unwrap(), path);
        assert!(disks.list().unwrap()[0].used_bytes > 0, "it was made anew");
        disks.grow(&id, 21).unwrap();
        assert_eq!(disks.find(&id).unwrap(), path);
        disks.remove(&id).unwrap();
        assert!(!disks.exists(&id) && !path.exists());
    }

    #[test]
    fn a_disk_is_made_once_grows_and_is_never_half_there() {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::open(dir.path().join("disks")).unwrap();
        let id = DiskId::parse("d-0").unwrap();
        assert_eq!(disks.find(&id).unwrap_err().kind, ErrorKind::DiskNotFound);
        let path = disks.create(&id, 20).unwrap();
        let length = || std::fs::metadata(&path).unwrap().len();
        assert_eq!(length(), 20 * GIB);
        disks.grow(&id, 21).unwrap();
        assert_eq!(disks.grow(&id, 20).unwrap_err().kind, ErrorKind::InvalidArgument);
        // It is there, whatever was asked for first.
        disks.create(&id, 20).unwrap();
        assert_eq!(length(), 21 * GIB);
        let listed = disks.list().unwrap();
        assert_eq!(
            (listed.len(), &listed[0].id, listed[0].size_bytes),
            (1, &id, 21 * GIB)
        );
        assert!(listed[0].used_bytes < GIB, "it is sparse: {listed:?}");
        let draft = path.with_extension("abc.draft");
        std::fs::write(&draft, "half").unwrap();
        let disks = Disks::open(dir.path().join("disks")).unwrap();
        assert!(!draft.exists() && disks.exists(&id));
        std::fs::write(dir.path().join("disks/README"), "").unwrap();
        assert_eq!(disks.list().unwrap().len(), 1);
        disks.remove(&id).unwrap();
        disks.remove(&id).unwrap();
        assert!(!disks.exists(&id));
    }
}
