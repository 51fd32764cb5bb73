//! A log file of CRI entries, with rotation: `0.log` grows to a limit, then becomes `0.log.1`, replacing an older one.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// Longest a file gets.
pub const MAX_FILE_BYTES: u64 = 10 << 20;

/// One log file. Its methods block.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    max_bytes: u64,
}

impl LogFile {
    /// Opens a log file to append to.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with_limit(path, MAX_FILE_BYTES)
    }

    fn open_with_limit(path: &Path, max_bytes: u64) -> Result<Self> {
        let (file, size_bytes) =
            open_append(path).map_err(|error| Error::io(format!("open log {}", path.display()), error))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            size_bytes,
            max_bytes,
        })
    }

    /// Appends whole entries; starts a new file before them when they do not fit.
    ///
    /// # Errors
    /// The disk is full or broken; nothing of the entries is in the file then, as far as it can be helped.
    pub fn append(&mut self, entries: &[u8]) -> io::Result<()> {
        let length = entries.len() as u64;
        if self.size_bytes > 0 && self.size_bytes + length > self.max_bytes {
            self.rotate()?;
        }
        if let Err(error) = self.file.write_all(entries) {
            // A torn entry would be read as part of the next one.
            self.file.set_len(self.size_bytes)?;
            return Err(error);
        }
        self.size_bytes += length;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        fs::rename(&self.path, old)?;
        (self.file, self.size_bytes) = open_append(&self.path)?;
        Ok(())
    }
}

fn open_append(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let size_bytes = file.metadata()?.len();
    Ok((file, size_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_one_old_file_and_splits_no_entry() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("0.log"), dir.path().join("0.log.1"));
        fs::write(&path, "before\n").unwrap();
        let mut log = LogFile::open_with_limit(&path, 16).unwrap();
        log.append(b"12345678\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before\n12345678\n");
        log.append(b"next\n").unwrap();
        assert_eq!(fs::read_to_string(&old).unwrap(), "before\n12345678\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "next\n");
        // Longer than the limit: alone in its file, but whole.
        log.append(b"a very long entry, longer than a file\n").unwrap();
        log.append(b"x\n").unwrap();
        assert_eq!(
            fs::read_to_string(&old).unwrap(),
            "a very long entry, longer than a file\n"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "x\n");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
