//! Stops all containers at once (cgroup v2, "cgroup.freeze").

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    path::PathBuf,
    time::Duration,
};

use tokio::time::timeout;

use crate::{
    container::cgroup::value_of,
    error::{Context, Error, ErrorKind, Result},
    sys,
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
        let result = match timeout(DEADLINE, self.freeze_and_wait()).await {
            Ok(result) => result.context(|| format!("freeze cgroup {}", self.directory.display())),
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

    async fn freeze_and_wait(&self) -> io::Result<()> {
        // Opened before the order: each change after this is told.
        let mut events = File::open(self.directory.join("cgroup.events"))?;
        let changes = sys::poll::watch_priority(events.try_clone()?.into())?;
        fs::write(self.directory.join("cgroup.freeze"), "1")?;
        loop {
            let mut text = String::new();
            events.seek(SeekFrom::Start(0))?;
            events.read_to_string(&mut text)?;
            if value_of(&text, "frozen") == 1 {
                return Ok(());
            }
            changes.ready(tokio::io::Interest::PRIORITY).await?.clear_ready();
        }
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
