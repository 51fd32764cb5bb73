//! cgroup v2: one group for the guest init, one per container.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

use crate::{
    container::{
        freezer::Freezer,
        spec::{Resources, Throttle},
    },
    error::{Context, Error, Result},
    sys,
};

/// Controllers handed down to containers, where the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// The part of the hierarchy the guest init uses.
#[derive(Debug, Clone)]
pub struct Hierarchy {
    containers: PathBuf,
}

impl Hierarchy {
    /// Moves this process into a group of its own below `root`, a mounted cgroup v2 hierarchy, and makes the group of
    /// all containers.
    ///
    /// # Errors
    /// When a group cannot be made or joined.
    pub fn prepare(root: &Path) -> Result<Self> {
        let own = root.join("init");
        let containers = root.join("containers");
        for group in [&own, &containers] {
            make_directory(group)?;
        }
        fs::write(own.join("cgroup.procs"), "0").context(|| format!("join cgroup {}", own.display()))?;
        for group in [root, &containers] {
            for controller in CONTROLLERS {
                // One at a time: the kernel refuses all when it lacks one.
                let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
        Ok(Self { containers })
    }

    /// The freezer of all containers.
    #[must_use]
    pub fn freezer(&self) -> Freezer {
        Freezer::new(self.containers.clone())
    }

    /// The group of all containers.
    #[must_use]
    pub fn all(&self) -> Cgroup {
        Cgroup {
            path: self.containers.clone(),
        }
    }

    /// Makes the group of container `id` with its limits. On error nothing of it is left.
    ///
    /// # Errors
    /// When the group cannot be made or a limit is not accepted.
    pub fn create(&self, id: &str, resources: &Resources) -> Result<Cgroup> {
        let path = self.containers.join(id);
        make_directory(&path)?;
        let cgroup = Cgroup { path };
        for (file, value) in files(resources)? {
            let written = fs::write(cgroup.path.join(&file), &value);
            if let Err(error) = written {
                let _ = cgroup.remove();
                return Err(Error::system(
                    format!("write {value:?} to the cgroup's {file}"),
                    error,
                ));
            }
        }
        Ok(cgroup)
    }
}

fn make_directory(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::system(format!("make cgroup {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// A container's group.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Opens the group, for making processes in it.
    ///
    /// # Errors
    /// When it has gone.
    pub fn open(&self) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty())
            .context(|| format!("open cgroup {}", self.path.display()))
    }

    /// Kills every process in the group.
    ///
    /// # Errors
    /// When the group has gone.
    pub fn kill(&self) -> Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
            .context(|| format!("kill all in cgroup {}", self.path.display()))
    }

    /// Kills every process in the group and waits until all have gone.
    ///
    /// # Errors
    /// When the group has gone.
    pub async fn clear(&self) -> Result<()> {
        order(&self.path, "cgroup.kill", ("populated", 0)).await
    }

    /// The processes in the group.
    ///
    /// # Errors
    /// When the group has gone.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let text = self.read("cgroup.procs")?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// The text of one of the group's files.
    ///
    /// # Errors
    /// When the kernel does not have the file.
    pub fn read(&self, file: &str) -> Result<String> {
        let path = self.path.join(file);
        fs::read_to_string(&path).context(|| format!("read {}", path.display()))
    }

    /// Path of one of the group's files.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// How often the kernel killed a process of the group for memory; 0 without the memory controller.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        self.read("memory.events")
            .map_or(0, |text| value_of(&text, "oom_kill"))
    }

    /// Gives the group other limits: those that are given, all others stay. Blocks while the kernel reclaims.
    ///
    /// # Errors
    /// `FailedPrecondition` as [`Cgroup::limit_memory`], before any limit has changed; else what the kernel does not take.
    pub fn update(&self, resources: &Resources) -> Result<()> {
        let files = files(resources)?;
        let (memory, others): (Vec<_>, Vec<_>) =
            files.into_iter().partition(|(file, _)| file == "memory.max");
        // First what may be refused.
        for (_, limit) in memory {
            self.limit_memory(&limit)?;
        }
        for (file, value) in others {
            self.write(&file, &value)?;
        }
        Ok(())
    }

    /// Sets the memory limit, in bytes or `max`. Below what the group uses the kernel first reclaims what it can; nothing is
    /// killed.
    ///
    /// # Errors
    /// `FailedPrecondition` when it uses more than that all the same; the limit is as it was.
    pub fn limit_memory(&self, limit: &str) -> Result<()> {
        let Ok(bytes) = limit.parse::<u64>() else {
            return self.write("memory.max", limit);
        };
        // Reclaims, and from now on whoever needs more waits instead of being killed.
        self.write("memory.high", limit)?;
        let used: u64 = self.read("memory.current")?.trim().parse().unwrap_or(u64::MAX);
        let limited = if used > bytes {
            let name = self.path.file_name().unwrap_or_default().to_string_lossy();
            Err(Error::precondition(format!(
                "{name} uses {used} bytes of memory, which can't be limited to {bytes}"
            )))
        } else {
            self.write("memory.max", limit)
        };
        self.write("memory.high", "max")?;
        limited
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.path.join(file), value).context(|| format!("write {value:?} to the cgroup's {file}"))
    }

    /// Removes the group, with groups its processes made below it.
    ///
    /// # Errors
    /// When processes are in it.
    pub fn remove(&self) -> Result<()> {
        remove_tree(&self.path).context(|| format!("remove cgroup {}", self.path.display()))
    }
}

/// Writes `1` to the file `order` of the group at `directory`, and waits until its `cgroup.events` has this key and value.
///
/// # Errors
/// When the group has gone.
pub async fn order(directory: &Path, order: &str, (key, value): (&str, u64)) -> Result<()> {
    let action = || format!("write to {order} of cgroup {}", directory.display());
    // Opened before the order: each change after this is told.
    let mut events = File::open(directory.join("cgroup.events")).context(action)?;
    let changes = sys::poll::watch_priority(events.try_clone().context(action)?.into()).context(action)?;
    fs::write(directory.join(order), "1").context(action)?;
    loop {
        let mut text = String::new();
        events.seek(SeekFrom::Start(0)).context(action)?;
        events.read_to_string(&mut text).context(action)?;
        if value_of(&text, key) == value {
            return Ok(());
        }
        let changed = changes.ready(tokio::io::Interest::PRIORITY).await;
        changed.context(action)?.clear_ready();
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// The value of `key` in a file of lines `key value`; 0 when missing.
#[must_use]
pub fn value_of(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
        .unwrap_or(0)
}

/// What to write into which file, in order. Pure.
fn files(resources: &Resources) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    let mut add = |file: &str, value: String| files.push((file.to_owned(), value));
    let limit = |bytes: i64| {
        if bytes < 0 {
            "max".to_owned()
        } else {
            bytes.to_string()
        }
    };
    if let Some(memory) = &resources.memory {
        if let Some(bytes) = memory.limit.filter(|bytes| *bytes != 0) {
            add("memory.max", limit(bytes));
        }
        if let Some(bytes) = memory.reservation.filter(|bytes| *bytes != 0) {
            add("memory.low", limit(bytes));
        }
        match (memory.swap, memory.limit) {
            (None | Some(0), _) => {}
            (Some(-1), _) => add("memory.swap.max", "max".into()),
            (Some(both), Some(memory)) if both >= memory && memory >= 0 => {
                add("memory.swap.max", (both - memory).to_string());
            }
            (Some(both), limit) => {
                return Err(Error::invalid(format!(
                    "linux.resources.memory.swap is {both} with a limit of {limit:?}: it is memory plus swap, so give at least the limit"
                )));
            }
        }
    }
    if let Some(cpu) = &resources.cpu {
        if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
            add("cpu.weight", weight(shares).to_string());
        }
        if cpu.quota.is_some() || cpu.period.is_some() {
            let period = cpu.period.filter(|period| *period != 0).unwrap_or(100_000);
            let quota = cpu
                .quota
                .filter(|quota| *quota > 0)
                .map_or("max".to_owned(), |quota| quota.to_string());
            add("cpu.max", format!("{quota} {period}"));
        }
        for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
            if !list.is_empty() {
                add(file, list.clone());
            }
        }
    }
    if let Some(pids) = &resources.pids {
        add(
            "pids.max",
            if pids.limit > 0 {
                pids.limit.to_string()
            } else {
                "max".into()
            },
        );
    }
    if let Some(io) = &resources.block_io {
        for (key, throttles) in [
            ("rbps", &io.throttle_read_bps_device),
            ("wbps", &io.throttle_write_bps_device),
            ("riops", &io.throttle_read_iops_device),
            ("wiops", &io.throttle_write_iops_device),
        ] {
            for Throttle { major, minor, rate } in throttles {
                add("io.max", format!("{major}:{minor} {key}={rate}"));
            }
        }
    }
    for (file, value) in &resources.unified {
        if file.contains('/') || file.starts_with("cgroup.") || !file.contains('.') {
            return Err(Error::invalid(format!(
                "linux.resources.unified: {file:?} is not the file of a controller, such as memory.high"
            )));
        }
        add(file, value.clone());
    }
    Ok(files)
}

/// cgroup v1 CPU shares (2 to 262144) as a v2 weight (1 to 10000), by the formula OCI runtimes share.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, expected: &[(&str, &str)]) {
        let resources = serde_json::from_str(json).unwrap();
        let files = files(&resources).unwrap();
        let files: Vec<_> = files
            .iter()
            .map(|(file, value)| (file.as_str(), value.as_str()))
            .collect();
        assert_eq!(files, expected);
    }

    #[test]
    fn limits_become_files() {
        check(
            r#"{"memory":{"limit":1000,"swap":1500,"reservation":10},"pids":{"limit":7}}"#,
            &[
                ("memory.max", "1000"),
                ("memory.low", "10"),
                ("memory.swap.max", "500"),
                ("pids.max", "7"),
            ],
        );
        check(
            r#"{"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1"}}"#,
            &[
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
            ],
        );
        check(
            r#"{"cpu":{"quota":-1},"memory":{"limit":-1}}"#,
            &[("memory.max", "max"), ("cpu.max", "max 100000")],
        );
        check(
            r#"{"unified":{"memory.oom.group":"1"}}"#,
            &[("memory.oom.group", "1")],
        );
        check(
            r#"{"blockIO":{"throttleReadBpsDevice":[{"major":254,"minor":16,"rate":5}]}}"#,
            &[("io.max", "254:16 rbps=5")],
        );
    }

    #[test]
    fn a_limit_below_what_is_used_is_refused_and_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            path: directory.path().to_owned(),
        };
        for (file, value) in [
            ("memory.current", "5000\n"),
            ("memory.max", "9000"),
            ("cpu.max", "max 100000"),
        ] {
            fs::write(cgroup.path.join(file), value).unwrap();
        }
        let update = |json: &str| cgroup.update(&serde_json::from_str(json).unwrap());
        let seen = || ["memory.max", "memory.high", "cpu.max"].map(|file| cgroup.read(file).unwrap());
        let error = update(r#"{"memory":{"limit":4999},"cpu":{"quota":50000}}"#).unwrap_err();
        assert_eq!(error.kind, crate::error::ErrorKind::FailedPrecondition);
        assert!(error.to_string().contains("5000 bytes"), "{error}");
        assert_eq!(seen(), ["9000", "max", "max 100000"]);
        update(r#"{"memory":{"limit":5000},"cpu":{"quota":50000}}"#).unwrap();
        assert_eq!(seen(), ["5000", "max", "50000 100000"]);
        update(r#"{"memory":{"limit":-1}}"#).unwrap();
        assert_eq!(seen(), ["max", "max", "50000 100000"]);
    }

    #[test]
    fn shares_cover_the_range_of_weights() {
        assert_eq!(
            (weight(0), weight(2), weight(262_144), weight(u64::MAX)),
            (1, 1, 10_000, 10_000)
        );
    }

    #[test]
    fn files_outside_the_controllers_are_refused() {
        for file in ["../x.y", "cgroup.procs", "nonsense"] {
            let resources = Resources {
                unified: [(file.into(), "1".into())].into(),
                ..Default::default()
            };
            assert!(files(&resources).unwrap_err().to_string().contains(file));
        }
    }

    #[test]
    fn values_are_found_by_whole_key() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(
            (
                value_of(text, "oom_kill"),
                value_of(text, "oom"),
                value_of(text, "none")
            ),
            (2, 3, 0)
        );
    }
}
