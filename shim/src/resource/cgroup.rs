//! Places the VMM: its cgroup, and its rank for the host's OOM killer.

use std::{fs, io, path::Path};

use crate::error::{Error, Result};

/// The shim's own rank: killed last, since what it knows is lost with it.
const SHIM_OOM_SCORE_ADJ: &str = "-999";
/// The VMM's rank: an ordinary process, whose memory is the tenant's.
const VMM_OOM_SCORE_ADJ: &str = "0";

/// Moves a process into a cgroup v2 directory.
///
/// # Errors
/// The directory is no cgroup, or may not be written.
pub fn enter(cgroup: &Path, pid: u32) -> Result<()> {
    let path = cgroup.join("cgroup.procs");
    // Opened without O_CREAT: a wrong path must fail, not become a plain file.
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| io::Write::write_all(&mut file, pid.to_string().as_bytes()))
        .map_err(|error| {
            Error::io(
                format!("move process {pid} into cgroup {}", cgroup.display()),
                error,
            )
        })
}

/// Protects this process from the OOM killer as far as it is permitted.
pub fn protect_self() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", SHIM_OOM_SCORE_ADJ) {
        tracing::debug!(%error, "oom_score_adj stays as it is");
    }
}

/// Takes that protection, which children inherit, from the VMM.
pub fn expose(pid: u32) {
    let path = format!("/proc/{pid}/oom_score_adj");
    if let Err(error) = fs::write(&path, VMM_OOM_SCORE_ADJ) {
        tracing::warn!(path, %error, "the VMM keeps the shim's OOM protection");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = enter(dir.path(), 1).unwrap_err();
        assert!(error.chain().contains("into cgroup"), "{}", error.chain());
        assert!(!dir.path().join("cgroup.procs").exists());
    }
}
