//! Files with an ext4 file system, or room for one. Sparse: only what is used takes room. Calls block.

use std::{
    fs::File,
    io,
    path::Path,
    process::{Command, Stdio},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::{
    error::{Error, ErrorKind, Result},
    random,
};

/// What ends the name of a file that is being made.
pub const DRAFT: &str = "draft";
/// No journal, for a disk that does not outlive its sandbox.
pub const SHORT_LIVED: &[&str] = &["-O", "^has_journal,^resize_inode,uninit_bg"];
/// As `mkfs.ext4` makes them, to last and to grow.
pub const LASTING: &[&str] = &[];

/// Turns an error of the host's file system into one that tells of a full disk.
pub fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |error| {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ErrorKind::ResourceExhausted
            }
            _ => ErrorKind::Internal,
        };
        Error::with_source(kind, what, error)
    }
}

/// Makes the file at `path` unless it is there. It is there as a whole or not at all, whenever this ends.
///
/// # Errors
/// `FailedPrecondition` without `mkfs.ext4`, `ResourceExhausted` when the host's disk is full or its file system takes no file
/// of this length, `Internal` with what `mkfs.ext4` printed.
pub fn make(path: &Path, bytes: u64, label: &str, options: &[&str]) -> Result<()> {
    make_by(path, |draft| format(draft, bytes, label, options))
}

/// As [`make`], without a file system.
///
/// # Errors
/// As [`make`].
pub fn make_empty(path: &Path, bytes: u64) -> Result<()> {
    make_by(path, |draft| {
        let action = format!("make {} {bytes} bytes long", draft.display());
        let file = File::create_new(draft).map_err(failed(action.clone()))?;
        file.set_len(bytes)
            .and_then(|()| file.sync_all())
            .map_err(failed(action))
    })
}

fn make_by(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let draft = path.with_extension(format!("{}.{DRAFT}", random::text(8)?));
    let made = write(&draft).and_then(|()| {
        match renameat_with(CWD, &draft, CWD, path, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            // Somebody was faster.
            Err(rustix::io::Errno::EXIST) => std::fs::remove_file(&draft),
            Err(error) => Err(error.into()),
        }
        .map_err(failed(format!("keep {}", path.display())))
    });
    if made.is_err() {
        // It may not be there.
        let _ = std::fs::remove_file(&draft);
    }
    made
}

fn format(path: &Path, bytes: u64, label: &str, options: &[&str]) -> Result<()> {
    let file = File::create_new(path).map_err(failed(format!("make {}", path.display())))?;
    file.set_len(bytes)
        .map_err(failed(format!("make {} {bytes} bytes long", path.display())))?;
    // Lazy tables: only what is used is ever written. All of it is for who uses it, so nothing is kept for root.
    let output = Command::new("mkfs.ext4")
        .args([
            "-q",
            "-F",
            "-m",
            "0",
            "-E",
            "lazy_itable_init=1,nodiscard",
            "-L",
            label,
        ])
        .args(options)
        .arg(path)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            let text = "run mkfs.ext4: install e2fsprogs";
            Error::with_source(ErrorKind::FailedPrecondition, text, error)
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(
            ErrorKind::Internal,
            format!(
                "mkfs.ext4 for {}: {}: {}",
                path.display(),
                output.status,
                text.trim()
            ),
        ));
    }
    file.sync_all()
        .map_err(failed(format!("write {}", path.display())))
}
