//! CPUs the machine has but was not booted with (`maxcpus=1`): a template of a class holds them all, and a sandbox may come to have
//! more than it began with.

use std::{fs, path::Path};

use crate::error::{Context, Error, Result};

/// Where the kernel has a directory for every CPU of the machine.
const DIRECTORY: &str = "/sys/devices/system/cpu";

/// Brings CPUs 1 to `n_vcpus` - 1 online; 0 leaves them. CPUs that are online stay so.
///
/// # Errors
/// `InvalidArgument` when the machine has fewer, `Internal` when one does not start.
pub(crate) fn bring_online(n_vcpus: u32) -> Result<()> {
    bring_online_in(Path::new(DIRECTORY), n_vcpus)
}

/// Brings CPUs 1 to `n_vcpus` - 1 online and takes all others offline. Returns how many are online.
///
/// # Errors
/// As [`bring_online`]; `Internal` too when one does not go offline.
pub(crate) fn set_online(n_vcpus: u32) -> Result<u32> {
    set_online_in(Path::new(DIRECTORY), n_vcpus)
}

fn set_online_in(directory: &Path, n_vcpus: u32) -> Result<u32> {
    if n_vcpus == 0 {
        return Err(Error::invalid("n_vcpus is 0: give at least 1"));
    }
    bring_online_in(directory, n_vcpus)?;
    // The last first: those that are left have no gap between them, whatever happens.
    let mut others = Vec::new();
    while let file = online_file(
        directory,
        n_vcpus + u32::try_from(others.len()).unwrap_or(u32::MAX),
    ) && file.exists()
    {
        others.push(file);
    }
    for file in others.into_iter().rev() {
        let online = fs::read_to_string(&file).context(|| format!("read {}", file.display()))?;
        if online.trim() != "0" {
            fs::write(&file, "0").context(|| format!("take a CPU offline by {}", file.display()))?;
        }
    }
    Ok(n_vcpus)
}

fn online_file(directory: &Path, number: u32) -> std::path::PathBuf {
    directory.join(format!("cpu{number}/online"))
}

fn bring_online_in(directory: &Path, n_vcpus: u32) -> Result<()> {
    if n_vcpus > 1 && !directory.join(format!("cpu{}", n_vcpus - 1)).exists() {
        return Err(Error::invalid(format!(
            "n_vcpus is {n_vcpus}: the machine has no CPU {}",
            n_vcpus - 1
        )));
    }
    for number in 1..n_vcpus {
        let file = online_file(directory, number);
        fs::write(&file, "1").context(|| format!("bring CPU {number} online"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpus_asked_for_come_online_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..4 {
            let cpu = directory.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).unwrap();
            fs::write(cpu.join("online"), "0").unwrap();
        }
        let online = || {
            [0, 1, 2, 3].map(|number| {
                fs::read_to_string(directory.path().join(format!("cpu{number}/online"))).unwrap()
            })
        };
        bring_online_in(directory.path(), 0).unwrap();
        bring_online_in(directory.path(), 1).unwrap();
        assert_eq!(online(), ["0", "0", "0", "0"]);
        bring_online_in(directory.path(), 3).unwrap();
        assert_eq!(online(), ["0", "1", "1", "0"]);
        let error = bring_online_in(directory.path(), 5).unwrap_err();
        assert_eq!(error.to_string(), "n_vcpus is 5: the machine has no CPU 4");
        assert_eq!(online(), ["0", "1", "1", "0"], "all or none");
        assert_eq!(set_online_in(directory.path(), 4).unwrap(), 4);
        assert_eq!(online(), ["0", "1", "1", "1"]);
        assert_eq!(set_online_in(directory.path(), 2).unwrap(), 2);
        assert_eq!(online(), ["0", "1", "0", "0"]);
        set_online_in(directory.path(), 5).unwrap_err();
        set_online_in(directory.path(), 0).unwrap_err();
        assert_eq!(online(), ["0", "1", "0", "0"]);
    }
}
