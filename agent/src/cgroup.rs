//! cgroups of the groups' VMMs, v2 only: the host's own limit around each microVM. Calls block.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, ErrorKind, Result},
    group::status::GroupId,
};

/// CPU bandwidth period, microseconds.
const PERIOD_US: u64 = 100_000;

/// The parent cgroup of all groups; `None` when limits are switched off.
#[derive(Debug)]
pub struct Cgroups {
    root: Option<PathBuf>,
}

fn failed(what: String) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::with_source(ErrorKind::Internal, what, error)
}

impl Cgroups {
    /// Makes the parent cgroup with its controllers. An empty path switches limits off.
    ///
    /// # Errors
    /// `FailedPrecondition` without cgroup v2.
    pub fn open(root: &Path) -> Result<Self> {
        if root.as_os_str().is_empty() {
            return Ok(Self { root: None });
        }
        let parent = root.parent().unwrap_or(Path::new("/sys/fs/cgroup"));
        if !parent.join("cgroup.controllers").exists() {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "{} is no cgroup v2 directory: boot with systemd.unified_cgroup_hierarchy=1, or set \
                     sandbox.cgroup_root to an empty text to run without limits",
                    parent.display()
                ),
            ));
        }
        std::fs::create_dir_all(root).map_err(failed(format!("make cgroup {}", root.display())))?;
        for dir in [parent, root] {
            let path = dir.join("cgroup.subtree_control");
            std::fs::write(&path, "+cpu +memory")
                .map_err(failed(format!("write \"+cpu +memory\" to {}", path.display())))?;
        }
        Ok(Self {
            root: Some(root.to_owned()),
        })
    }

    /// Makes a group's cgroup with its memory limit. CPU is limited only once the guest has booted
    /// ([`Self::limit_cpu`]), so that a small group starts as fast as a large one.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn create(&self, id: &GroupId, memory_bytes: u64) -> Result<Option<PathBuf>> {
        let Some(dir) = self.dir(id) else {
            return Ok(None);
        };
        std::fs::create_dir_all(&dir).map_err(failed(format!("make cgroup {}", dir.display())))?;
        write(&dir, "memory.max", &memory_bytes.to_string())?;
        write(&dir, "memory.oom.group", "1")?;
        Ok(Some(dir))
    }

    /// Changes a group's memory limit.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn limit_memory(&self, id: &GroupId, memory_bytes: u64) -> Result<()> {
        self.dir(id)
            .map_or(Ok(()), |dir| write(&dir, "memory.max", &memory_bytes.to_string()))
    }

    /// Memory that a group's VMM and its guest use on the host and that the kernel can't take from them, bytes; 0 without limits.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn memory_used(&self, id: &GroupId) -> Result<u64> {
        let Some(dir) = self.dir(id) else {
            return Ok(0);
        };
        let read = |file: &str| {
            let path = dir.join(file);
            std::fs::read_to_string(&path).map_err(failed(format!("read {}", path.display())))
        };
        let all: u64 = read("memory.current")?.trim().parse().unwrap_or(u64::MAX);
        Ok(all.saturating_sub(page_cache(&read("memory.stat")?)))
    }

    /// Limits a group's CPU time.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn limit_cpu(&self, id: &GroupId, cpu_milli: u32) -> Result<()> {
        self.dir(id).map_or(Ok(()), |dir| {
            let quota = u64::from(cpu_milli) * PERIOD_US / 1000;
            write(&dir, "cpu.max", &format!("{quota} {PERIOD_US}"))
        })
    }

    /// Kills what is left in a group's cgroup and removes it; it may be gone already.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn remove(&self, id: &GroupId) -> Result<()> {
        let Some(dir) = self.dir(id) else {
            return Ok(());
        };
        if !dir.exists() {
            return Ok(());
        }
        write(&dir, "cgroup.kill", "1")?;
        wait_empty(&dir)?;
        match std::fs::remove_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(format!("remove cgroup {}", dir.display()))(error))
            }
            _ => Ok(()),
        }
    }

    /// Removes cgroups of groups that are not known, with their processes. Returns how many.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn remove_orphans(&self, known: &[GroupId]) -> Result<usize> {
        let Some(root) = &self.root else {
            return Ok(0);
        };
        let mut removed = 0;
        let listing = std::fs::read_dir(root).map_err(failed(format!("list {}", root.display())))?;
        for entry in listing.flatten() {
            let id = entry.file_name().to_str().and_then(GroupId::parse);
            if let Some(id) = id.filter(|id| !known.contains(id)) {
                self.remove(&id)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// OOM kills the host's kernel did in a group's cgroup: the group outgrew its memory on the host's side.
    pub fn oom_kills(&self, id: &GroupId) -> u64 {
        let text = self
            .dir(id)
            .and_then(|dir| std::fs::read_to_string(dir.join("memory.events")).ok())
            .unwrap_or_default();
        counter(&text, "oom_kill")
    }

    fn dir(&self, id: &GroupId) -> Option<PathBuf> {
        self.root.as_ref().map(|root| root.join(id.as_str()))
    }
}

/// Pages of files on disks: they count as the group's, and make room when they have to.
fn page_cache(memory_stat: &str) -> u64 {
    // Files in memory are among them, and stay.
    counter(memory_stat, "file").saturating_sub(counter(memory_stat, "shmem"))
}

fn counter(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

fn write(dir: &Path, file: &str, value: &str) -> Result<()> {
    let path = dir.join(file);
    std::fs::write(&path, value).map_err(failed(format!("write {value:?} to {}", path.display())))
}

/// Waits for the kernel to say that the cgroup has no processes, by an inotify event of `cgroup.events`.
fn wait_empty(dir: &Path) -> Result<()> {
    use rustix::{
        event::{PollFd, PollFlags, Timespec, poll},
        fs::inotify,
    };
    let path = dir.join("cgroup.events");
    let what = || format!("wait for cgroup {} to empty", dir.display());
    let errno = |error: rustix::io::Errno| failed(what())(error.into());
    let watch =
        inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).map_err(errno)?;
    inotify::add_watch(&watch, &path, inotify::WatchFlags::MODIFY).map_err(errno)?;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let text = std::fs::read_to_string(&path).map_err(failed(what()))?;
        if counter(&text, "populated") == 0 {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Err(Error::new(ErrorKind::DeadlineExceeded, what()));
        }
        let timeout = Timespec::try_from(left)
            .map_err(|error| Error::with_source(ErrorKind::Internal, what(), error))?;
        let mut fds = [PollFd::new(&watch, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).map_err(errno)?;
        let mut buffer = [0_u8; 1024];
        // Only drained: what has changed is read from the file.
        let _ = rustix::io::read(&watch, &mut buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_whole_name() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!((counter(text, "oom_kill"), counter(text, "nope")), (2, 0));
        assert_eq!(page_cache("anon 5\nfile 1000\nfile_mapped 7\nshmem 300\n"), 700);
    }

    #[test]
    fn without_cgroup_v2_the_message_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = Cgroups::open(&dir.path().join("eci")).unwrap_err();
        assert!(error.message.contains("sandbox.cgroup_root"), "{error}");
        let off = Cgroups::open(Path::new("")).unwrap();
        let id = GroupId::parse("eci-0000000000000000000a").unwrap();
        assert_eq!(off.create(&id, 1).unwrap(), None);
        off.remove(&id).unwrap();
    }
}
