//! Durable writes: a file appears whole or not at all, also after a power cut.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use tempfile::NamedTempFile;

/// Creates `target` with what `write` puts out. `tmp` is a folder of the same file system.
pub(super) fn write_file(
    tmp: &Path,
    target: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(tmp)?;
    write(file.as_file_mut())?;
    publish(file, target)
}

/// As [`write_file`], from memory.
pub(super) fn write_bytes(tmp: &Path, target: &Path, bytes: &[u8]) -> io::Result<()> {
    write_file(tmp, target, |file| file.write_all(bytes))
}

/// Gives a temporary file its name.
pub(super) fn publish(file: NamedTempFile, target: &Path) -> io::Result<()> {
    file.as_file().sync_all()?;
    file.persist(target).map_err(|error| error.error)?;
    sync_folder_of(target)
}

/// Removes a file; one that is gone already is no error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Makes a created, renamed or removed name durable.
pub(super) fn sync_folder_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}
