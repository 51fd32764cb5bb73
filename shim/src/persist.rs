//! What outlives the shim process, in the bundle: whom to kill and which socket to remove. Written at start, read by
//! `delete`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::error::{Error, ErrorKind, Result};

/// The shim's address.
pub const ADDRESS_FILE: &str = "address";
/// The shim's process.
pub const SHIM_PID_FILE: &str = "shim.pid";
/// The VMM's process.
pub const VMM_PID_FILE: &str = "vmm.pid";
/// What the shim and the VMM log.
pub const LOG_FILE: &str = "shim.log";
/// What the guest kernel prints.
pub const CONSOLE_FILE: &str = "console.log";

/// A process that can be told from a later one with the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/<pid>/stat` (proc(5)).
    pub start_ticks: u64,
}

impl ProcessId {
    /// Looks a running process up.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).map_err(|error| Error::io(format!("read {path}"), error))?;
        let (state, start_ticks) = parse_stat(&stat)
            .ok_or_else(|| Error::io(format!("parse {path}"), io::ErrorKind::InvalidData.into()))?;
        // Dead, and only not reaped yet.
        if matches!(state, "Z" | "X") {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("process {pid} has ended"),
            ));
        }
        Ok(Self { pid, start_ticks })
    }

    /// Whether exactly this process still exists.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid).is_ok_and(|found| found == self)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        Some(Self {
            pid: lines.next()?.trim().parse().ok()?,
            start_ticks: lines.next()?.trim().parse().ok()?,
        })
    }
}

/// State and start time. The name in parentheses may hold anything, so fields count from its end.
fn parse_stat(stat: &str) -> Option<(&str, u64)> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The files of one bundle.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
}

impl Bundle {
    /// Names a bundle; touches nothing.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Path of one of this module's files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until no other start or delete is at work on this bundle, and keeps others waiting until the lock is dropped or this
    /// process ends.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn lock(&self) -> io::Result<fs::File> {
        let directory = fs::File::open(&self.dir)?;
        rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockExclusive)?;
        Ok(directory)
    }

    /// Writes a process file, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_process(&self, name: &str, process: ProcessId) -> Result<()> {
        self.write(name, &format!("{}\n{}\n", process.pid, process.start_ticks))
    }

    /// Writes a small file, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, name: &str, content: &str) -> Result<()> {
        let (path, draft) = (self.path(name), self.path(&format!(".{name}.draft")));
        fs::write(&draft, content)
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(|error| Error::io(format!("write {}", path.display()), error))
    }

    /// The process a file names, if there is such a file and it can be read.
    pub fn read_process(&self, name: &str) -> Option<ProcessId> {
        ProcessId::parse(&fs::read_to_string(self.path(name)).ok()?)
    }

    /// The shim's address, if there is one.
    pub fn read_address(&self) -> Option<String> {
        fs::read_to_string(self.path(ADDRESS_FILE))
            .ok()
            .map(|text| text.trim().to_owned())
    }

    /// Removes a file; it may be gone already.
    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_fields() {
        let rest = (3..=30)
            .map(|field| field.to_string())
            .collect::<Vec<_>>()
            .join(" ");
        assert_eq!(parse_stat(&format!("1 (a) b) {rest}")), Some(("3", 22)));
        assert_eq!(parse_stat("1 (a) S 1"), None);
    }

    #[test]
    fn round_trip_and_reuse() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(dir.path());
        let me = ProcessId::of(std::process::id()).unwrap();
        bundle.write_process(SHIM_PID_FILE, me).unwrap();
        assert_eq!(bundle.read_process(SHIM_PID_FILE), Some(me));
        assert!(me.is_alive());
        assert!(
            !ProcessId {
                start_ticks: me.start_ticks + 1,
                ..me
            }
            .is_alive()
        );
        bundle.remove(SHIM_PID_FILE);
        bundle.remove(SHIM_PID_FILE);
        assert_eq!(bundle.read_process(SHIM_PID_FILE), None);
    }
}
