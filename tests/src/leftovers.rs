//! What groups may leave behind on a host, listed so that two moments can be compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{
    host::Host,
    process::{self, LIMIT, wait_gone},
};

/// Names of the product's programs as the kernel has them, which cuts them to 15 bytes.
const PROGRAMS: [&str; 2] = ["eci-vmm", "containerd-shim"];

/// Everything of a host that belongs to groups, at one moment: kinds of things, and their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    things: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Snapshot {
    /// Lists everything now.
    ///
    /// # Errors
    /// Something can't be listed.
    pub fn take(host: &Host) -> Result<Self> {
        let things = BTreeMap::from([
            ("process", processes(host)?.into_values().collect()),
            ("network interface", names_in(Path::new("/sys/class/net"))?),
            ("firewall line", firewall()?),
            ("mount of this namespace", lines_of("/proc/self/mountinfo")?),
            ("mount of the agent", {
                lines_of(&format!("/proc/{}/mountinfo", host.agent_id()))?
            }),
            ("cgroup", tree(&host.cgroup_root(), |kind| kind.is_dir())?),
            ("file", {
                let mut files = BTreeSet::new();
                for dir in host.dirs() {
                    files.extend(tree(&dir, |_| true)?);
                    // Folders for all groups are made with the first, and stay.
                    files.retain(|file| Path::new(file).parent() != Some(&*dir) || !Path::new(file).is_dir());
                }
                files
            }),
            ("group", host.group_names()?.into_iter().collect()),
        ]);
        Ok(Self { things })
    }

    /// That the host is now as it was then. Processes that are about to end may do so.
    ///
    /// # Errors
    /// What came and what went.
    pub fn ensure_same(&self, host: &Host) -> Result<()> {
        for (id, name) in processes(host)? {
            if !self.things["process"].contains(&name) {
                await_end(id).with_context(|| format!("{name} is left behind"))?;
            }
        }
        self.compare(&Self::take(host)?)
    }

    /// That a later moment is as this one.
    ///
    /// # Errors
    /// What came and what went.
    pub fn compare(&self, later: &Self) -> Result<()> {
        let mut differences = Vec::new();
        for (kind, before) in &self.things {
            let after = &later.things[kind];
            differences.extend(
                after
                    .difference(before)
                    .map(|name| format!("left behind: {kind} {name}")),
            );
            differences.extend(
                before
                    .difference(after)
                    .map(|name| format!("gone: {kind} {name}")),
            );
        }
        if differences.is_empty() {
            return Ok(());
        }
        bail!("the host is not as it was:\n{}", differences.join("\n"));
    }
}

fn await_end(id: i32) -> Result<()> {
    let pid = Pid::from_raw(id).context("read a process id")?;
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => wait_gone(&process, LIMIT),
        Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error).context("open a process descriptor"),
    }
}

/// Shims and VMMs, wherever they came from, and the agent's children, dead ones that nobody waited for included.
fn processes(host: &Host) -> Result<BTreeMap<i32, String>> {
    let agent = host.agent_id().to_string();
    let mut found = BTreeMap::new();
    for name in names_in(Path::new("/proc"))? {
        let Ok(id) = name.parse::<i32>() else {
            continue;
        };
        // Any may end while this looks.
        let Ok(stat) = fs::read_to_string(format!("/proc/{id}/stat")) else {
            continue;
        };
        // proc_pid_stat(5): the name is in parentheses, and may have some itself.
        let Some((begin, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        let program = begin.split_once('(').map_or("", |(_, program)| program);
        let parent = rest.split(' ').nth(1);
        if PROGRAMS.contains(&program) || parent == Some(agent.as_str()) {
            let dead = rest.starts_with('Z');
            let mark = if dead { ", which nobody waited for" } else { "" };
            found.insert(id, format!("{id} {program}{mark}"));
        }
    }
    Ok(found)
}

/// The rules without their counters.
fn firewall() -> Result<BTreeSet<String>> {
    let rules = process::run(Command::new("nft").args(["--stateless", "list", "ruleset"]), b"")?.success()?;
    Ok(rules.lines().map(|line| line.trim().to_owned()).collect())
}

fn lines_of(path: &str) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn names_in(dir: &Path) -> Result<BTreeSet<String>> {
    let what = || format!("list {}", dir.display());
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).with_context(what)? {
        let entry = entry.with_context(what)?;
        names.insert(entry.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Everything below a directory that is of some kind; nothing when there is no such directory.
fn tree(dir: &Path, wanted: impl Fn(fs::FileType) -> bool + Copy) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("list {}", dir.display())),
        };
        for entry in entries {
            let entry = entry.with_context(|| format!("list {}", dir.display()))?;
            let kind = entry
                .file_type()
                .with_context(|| format!("look at {}", entry.path().display()))?;
            if wanted(kind) {
                found.insert(entry.path().display().to_string());
            }
            if kind.is_dir() {
                open.push(entry.path());
            }
        }
    }
    Ok(found)
}
