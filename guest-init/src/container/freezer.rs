//! Stops all containers at once (cgroup v2, "cgroup.freeze").

use std::{fs, path::PathBuf, time::Duration};

use tokio::time::timeout;

use crate::{
    container::cgroup::order,
    error::{Context, Error, ErrorKind, Result},
};

/// How long processes may take to stand still: one in the middle of disk input stops only after it.
const DEADLINE: Duration = Duration::from_secs(5);

/// The freezer of a cgroup and all below it.
#[derive(Debug)]
pub struct Freezer {
    directory: PathBuf,
}

impl Freezer {
    /// The freezer of the cgroup at `directory`.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Stops every process and returns when all stand still.
    ///
    /// # Errors
    /// `DeadlineExceeded` when some do not; all run again then.
    pub async fn freeze(&self) -> Result<()> {
        let result = match timeout(DEADLINE, order(&self.directory, "cgroup.freeze", ("frozen", 1))).await {
            Ok(result) => result,
            Err(_) => Err(Error::new(
                ErrorKind::DeadlineExceeded,
                format!("some processes do not stand still within {DEADLINE:?}"),
            )),
        };
        if result.is_err()
            && let Err(error) = self.thaw()
        {
            crate::log::failure("undo a freeze", &error);
        }
        result
    }

    /// Lets all processes run.
    ///
    /// # Errors
    /// When the group has gone.
    pub fn thaw(&self) -> Result<()> {
        fs::write(self.directory.join("cgroup.freeze"), "0")
            .context(|| format!("thaw cgroup {}", self.directory.display()))
    }
}
