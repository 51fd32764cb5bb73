//! Scratch disks: sparse files with an ext4 file system, one per group. A template is made once; a group's disk is a
//! copy of it that shares or skips what is empty.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::fs::{SeekFrom, copy_file_range, fstat, ioctl_ficlone, seek};

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
        let path = self.path(id);
        self.remove(id)?;
        copy_sparse(&self.template, &path).map_err(failed(format!(
            "copy {} to {}",
            self.template.display(),
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

/// Copies a file by reference where the file system can, else only the parts that have data.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(to)?;
    if ioctl_ficlone(target.as_fd(), source.as_fd()).is_ok() {
        return Ok(());
    }
    let length = u64::try_from(fstat(&source)?.st_size).unwrap_or(0);
    target.set_len(length)?;
    let mut at = 0;
    // ENXIO: no data after this offset (lseek(2)).
    while let Ok(start) = seek(&source, SeekFrom::Data(at)) {
        let end = seek(&source, SeekFrom::Hole(start))?;
        let (mut read_at, mut write_at) = (start, start);
        while read_at < end {
            let chunk = usize::try_from(end - read_at).unwrap_or(usize::MAX);
            if copy_file_range(&source, Some(&mut read_at), &target, Some(&mut write_at), chunk)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn copies_keep_content_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"middle", 500 << 20).unwrap();
        copy_sparse(&from, &to).unwrap();
        let copy = File::open(&to).unwrap();
        let mut bytes = [0; 6];
        copy.read_exact_at(&mut bytes, 500 << 20).unwrap();
        assert_eq!(&bytes, b"middle");
        let metadata = copy.metadata().unwrap();
        assert_eq!(metadata.len(), 1 << 30);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    }

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
