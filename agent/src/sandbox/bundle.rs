//! The directory of one sandbox, and where its files are.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Where the shim writes its address.
const ADDRESS: &str = "address";

/// The directory of one sandbox. Owned by the agent; the shim writes its own few files into it.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
}

impl Bundle {
    /// The bundle at this place, which need not exist yet.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the directory, for root only.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.dir)?;
        builder.create(self.dir.join("fifo"))?;
        builder.create(self.dir.join("containers"))
    }

    /// Where a FIFO of this name belongs.
    pub fn fifo(&self, name: &str) -> PathBuf {
        self.dir.join("fifo").join(name)
    }

    /// The directory of a container, with its `config.json`.
    pub fn container(&self, container_id: &str) -> PathBuf {
        self.dir.join("containers").join(container_id)
    }

    /// The address a shim left in it.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn address(&self) -> io::Result<String> {
        Ok(std::fs::read_to_string(self.dir.join(ADDRESS))?.trim().to_owned())
    }

    /// The last lines of the guest's console and the shim's log, for explaining a failure. Bounded.
    pub fn last_words(&self) -> String {
        let tail = |name: &str| {
            let bytes = read_tail(&self.dir.join(name), 2048).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text
                .lines()
                .filter(|line| !line.trim().is_empty())
                .rev()
                .take(3)
                .collect();
            lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
        };
        let printable = |text: String| -> String {
            text.chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect()
        };
        ["shim.log", "console.log"]
            .iter()
            .map(|name| (name, printable(tail(name))))
            .filter(|(_, text)| !text.is_empty())
            .map(|(name, text)| format!("{name}: {text}"))
            .collect::<Vec<_>>()
            .join("; ")
    }
}

fn read_tail(path: &Path, limit_bytes: u64) -> io::Result<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit_bytes)))?;
    let mut bytes = Vec::new();
    file.take(limit_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}
