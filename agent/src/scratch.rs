//! Scratch disks: sparse files with an ext4 file system, one per group. A template is made once; a group's disk is a
//! copy of it that shares or skips what is empty. An empty directory with a limit is a file system of its own beside it.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    error::Result,
    ext4::{self, failed},
    group::status::GroupId,
};

const GIB: u64 = 1 << 30;
/// Smallest file system of an empty directory: with less, there is hardly room for anything but its own tables.
const MIN_LIMITED_BYTES: u64 = 1 << 20;
/// What a file system of an empty directory is made like. Fewer inodes than usual: they count for the limit.
const LIMITED: &[&str] = &[
    "-O",
    "^has_journal,^resize_inode,uninit_bg",
    "-b",
    "4096",
    "-i",
    "16384",
];

/// The folder of scratch disks. Calls block.
#[derive(Debug, Clone)]
pub struct ScratchDisks {
    dir: PathBuf,
    template: PathBuf,
}

impl ScratchDisks {
    /// Makes the folder and the template when they are not there.
    ///
    /// # Errors
    /// `FailedPrecondition` without `mkfs.ext4`; `Internal` with what it printed.
    pub fn open(dir: PathBuf, size_gib: u64) -> Result<Self> {
        std::fs::create_dir_all(&dir).map_err(failed(format!("make {}", dir.display())))?;
        let template = dir.join(format!("template-{size_gib}g.ext4"));
        let disks = Self { dir, template };
        ext4::make(&disks.template, size_gib * GIB, "scratch", ext4::SHORT_LIVED)?;
        Ok(disks)
    }

    /// Where a group's disk is.
    pub fn path(&self, id: &GroupId) -> PathBuf {
        self.dir.join(format!("{id}.ext4"))
    }

    /// Makes a group's disk, empty; one that was there is replaced.
    ///
    /// # Errors
    /// `ResourceExhausted` when the disk is full.
    pub fn create(&self, id: &GroupId) -> Result<PathBuf> {
        self.create_from(id, &self.template)
    }

    /// Makes a group's disk as a copy of another one; one that was there is replaced.
    ///
    /// # Errors
    /// `ResourceExhausted` when the disk is full.
    pub fn create_from(&self, id: &GroupId, other: &Path) -> Result<PathBuf> {
        let path = self.path(id);
        self.remove(id)?;
        sparse_file::copy(other, &path).map_err(failed(format!(
            "copy {} to {}",
            other.display(),
            path.display()
        )))?;
        Ok(path)
    }

    /// Where a group's limited empty directories are.
    fn limited_dir(&self, id: &GroupId) -> PathBuf {
        self.dir.join(format!("{id}.volumes"))
    }

    /// Makes the file system of a limited empty directory, unless it is there.
    ///
    /// # Errors
    /// As [`ext4::make`].
    pub fn limited(&self, id: &GroupId, volume: &str, bytes: u64) -> Result<PathBuf> {
        let dir = self.limited_dir(id);
        std::fs::create_dir_all(&dir).map_err(failed(format!("make {}", dir.display())))?;
        let path = dir.join(format!("{volume}.ext4"));
        let bytes = bytes.max(MIN_LIMITED_BYTES).next_multiple_of(4096);
        ext4::make(&path, bytes, "emptydir", LIMITED)?;
        Ok(path)
    }

    /// Removes a group's disk and limited empty directories; they may be gone already.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, id: &GroupId) -> Result<()> {
        let (path, limited) = (self.path(id), self.limited_dir(id));
        let removed = std::fs::remove_file(&path);
        for (path, removed) in [
            (path, removed),
            (limited.clone(), std::fs::remove_dir_all(&limited)),
        ] {
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(format!("remove {}", path.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes disks of groups that are not known. Returns how many.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_orphans(&self, known: &[GroupId]) -> Result<usize> {
        let mut removed = 0;
        let listing = std::fs::read_dir(&self.dir).map_err(failed(format!("list {}", self.dir.display())))?;
        for entry in listing.flatten() {
            let name = entry.file_name();
            let id = name
                .to_str()
                .and_then(|name| {
                    name.strip_suffix(".ext4")
                        .or_else(|| name.strip_suffix(".volumes"))
                })
                .and_then(GroupId::parse);
            if let Some(id) = id.filter(|id| !known.contains(id)) {
                self.remove(&id)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_made_replaced_and_cleaned_up() {
        let dir = tempfile::tempdir().unwrap();
        let disks = ScratchDisks::open(dir.path().join("scratch"), 1).unwrap();
        let id = GroupId::parse("eci-0000000000000000000a").unwrap();
        let path = disks.create(&id).unwrap();
        std::fs::write(&path, "x").unwrap();
        assert_eq!(
            std::fs::metadata(disks.create(&id).unwrap()).unwrap().len(),
            1 << 30
        );
        assert_eq!(disks.remove_orphans(std::slice::from_ref(&id)).unwrap(), 0);
        assert_eq!(disks.remove_orphans(&[]).unwrap(), 1);
        assert!(!path.exists());
        disks.remove(&id).unwrap();
    }

    #[test]
    fn a_limited_directory_is_made_once_and_goes_with_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let disks = ScratchDisks::open(dir.path().join("scratch"), 1).unwrap();
        let id = GroupId::parse("eci-0000000000000000000a").unwrap();
        let path = disks.limited(&id, "v", 5_000_000).unwrap();
        let inode = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap());
        let first = inode();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 5_001_216);
        disks.limited(&id, "v", 5_000_000).unwrap();
        assert_eq!(inode(), first);
        assert_eq!(
            std::fs::metadata(disks.limited(&id, "w", 1).unwrap())
                .unwrap()
                .len(),
            1 << 20
        );
        assert_eq!(disks.remove_orphans(&[]).unwrap(), 1);
        assert!(!path.parent().unwrap().exists());
    }
}
