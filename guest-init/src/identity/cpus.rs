//! CPUs the machine has but was not booted with (`maxcpus=1`): a template of a class holds them all.

use std::{fs, path::Path};

use crate::error::{Context, Error, Result};

/// Where the kernel has a directory for every CPU of the machine.
const DIRECTORY: &str = "/sys/devices/system/cpu";

/// Brings CPUs 1 to `n_vcpus` - 1 online; 0 leaves them. CPUs that are online stay so.
///
/// # Errors
/// `InvalidArgument` when the machine has fewer, `Internal` when one does not start.
pub(super) fn bring_online(n_vcpus: u32) -> Result<()> {
    bring_online_in(Path::new(DIRECTORY), n_vcpus)
}

fn bring_online_in(directory: &Path, n_vcpus: u32) -> Result<()> {
    if n_vcpus > 1 && !directory.join(format!("cpu{}", n_vcpus - 1)).exists() {
        return Err(Error::invalid(format!(
            "n_vcpus is {n_vcpus}: the machine has no CPU {}",
            n_vcpus - 1
        )));
    }
    for number in 1..n_vcpus {
        let file = directory.join(format!("cpu{number}/online"));
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
    }
}
