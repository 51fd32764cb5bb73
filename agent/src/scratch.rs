//! Scratch disks: sparse files with an ext4 file system, one per group. A template is made once; a group's disk is a
//! copy of it that shares or skips what is empty.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    error::{Error, ErrorKind, Result},
    group::status::GroupId,
};

const GIB: u64 = 1 << 30;

/// The folder of scratch disks. Calls block.
#[derive(Debug, Clone)]
pub struct ScratchDisks {
    dir: PathBuf,
    template: PathBuf,
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |error| {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
            _ => ErrorKind::Internal,
        };
        Error::with_source(kind, what, error)
    }
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
        if !disks.template.exists() {
            disks.make_template(size_gib)?;
        }
        Ok(disks)
    }

    fn make_template(&self, size_gib: u64) -> Result<()> {
        let draft = self.template.with_extension("draft");
        let file = File::create(&draft).map_err(failed(format!("make {}", draft.display())))?;
        file.set_len(size_gib * GIB)
            .map_err(failed(format!("make {} {size_gib} GiB long", draft.display())))?;
        // No journal: a scratch disk does not outlive its sandbox. Lazy tables: only what is used is ever written.
        let output = Command::new("mkfs.ext4")
            .args([
                "-q",
                "-F",
                "-m",
                "0",
                "-O",
                "^has_journal,^resize_inode,uninit_bg",
            ])
            .args(["-E", "lazy_itable_init=1,nodiscard", "-L", "scratch"])
            .arg(&draft)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| {
                Error::with_source(
                    ErrorKind::FailedPrecondition,
                    "run mkfs.ext4: install e2fsprogs",
                    error,
                )
            })?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(Error::new(
                ErrorKind::Internal,
                format!(
                    "mkfs.ext4 for {}: {}: {}",
                    draft.display(),
                    output.status,
                    text.trim()
                ),
            ));
        }
        file.sync_all()
            .and_then(|()| std::fs::rename(&draft, &self.template))
            .map_err(failed(format!("keep {}", self.template.display())))
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

    /// Removes a group's disk; it may be gone already.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, id: &GroupId) -> Result<()> {
        let path = self.path(id);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(format!("remove {}", path.display()))(error))
            }
            _ => Ok(()),
        }
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
                .and_then(|name| name.strip_suffix(".ext4"))
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
}
