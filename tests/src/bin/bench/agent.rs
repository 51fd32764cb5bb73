//! The whole product at work: a registry on loopback, the agent, and `ecictl`.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::ground;
use crate::memory::Memory;

const REGISTRY: &str = "127.0.0.1:5056";
/// For a template to be made.
const LOG_DEADLINE: Duration = Duration::from_secs(60);
/// What groups are made of.
pub(crate) const IMAGE: &str = "127.0.0.1:5056/bench/image:latest";

/// A running agent. It is killed when dropped, with its groups and its registry.
#[derive(Debug)]
pub(crate) struct Agent {
    dir: TempDir,
    agent: Child,
    registry: Child,
}

/// The processes of one group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Processes {
    pub(crate) shim: Memory,
    pub(crate) vmm: Memory,
}

/// How an agent's groups begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Starts {
    /// All boot.
    Boot,
    /// They go on from templates, where there are some.
    Template,
    /// They take over sandboxes that stand by, where there are some; so many are kept.
    Standby(usize),
}

impl Agent {
    /// Starts both, and pulls the image: it is local from then on. To be called on equal ground: all paths are its.
    pub(crate) fn start(starts: Starts) -> Result<Self> {
        let dir = TempDir::with_prefix("eci-bench.").context("make a directory")?;
        fs::write(dir.path().join("agent.toml"), configuration(dir.path(), starts))
            .context("write the agent's configuration")?;
        fs::write(
            dir.path().join("registry.yml"),
            registry_configuration(dir.path()),
        )
        .context("write the registry's configuration")?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(dir.path().join("registry.yml"));
        let registry = spawn(command, &dir.path().join("registry.log"))?;
        let mut command = Command::new("/eci-agent");
        command
            .args(["serve", "--config"])
            .arg(dir.path().join("agent.toml"));
        let agent = spawn_until(command, &dir.path().join("agent.log"), "serving");
        let agent = match agent {
            Ok(agent) => agent,
            Err(error) => {
                end(registry);
                return Err(error);
            }
        };
        let this = Self { dir, agent, registry };
        this.fill_registry()?;
        this.ecictl(["image", "pull", IMAGE])?;
        Ok(this)
    }

    /// Runs `ecictl` to its end and gives back what it printed.
    pub(crate) fn ecictl(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String> {
        let mut command = Command::new("/ecictl");
        command
            .args(arguments)
            .env("ECICTL_SOCKET", self.dir.path().join("run/agent.sock"));
        output(&mut command).with_context(|| format!("{command:?}; {}", self.last_words()))
    }

    /// Waits until the agent has logged this.
    pub(crate) fn wait_log(&self, words: &str) -> Result<()> {
        let deadline = Instant::now() + LOG_DEADLINE;
        let path = self.dir.path().join("agent.log");
        while !fs::read_to_string(&path).is_ok_and(|log| log.contains(words)) {
            ensure!(
                Instant::now() < deadline,
                "no {words:?} in the log; {}",
                self.last_words()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until so many sandboxes stand by.
    pub(crate) fn wait_standbys(&self, n: usize) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        let deadline = Instant::now() + LOG_DEADLINE;
        let line = format!("eci_standbys {n}");
        while !self.metrics()?.lines().any(|found| found == line) {
            ensure!(
                Instant::now() < deadline,
                "no {n} sandboxes stand by; {}",
                self.last_words()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// The mean time of each phase of the starts so far, milliseconds, by its name.
    pub(crate) fn start_phases(&self) -> Result<Vec<(String, f64)>> {
        Ok(means(&self.metrics()?))
    }

    fn metrics(&self) -> Result<String> {
        let mut get = Command::new("curl");
        get.args(["-sS", "--unix-socket"])
            .arg(self.dir.path().join("run/agent.sock"))
            .arg("http://agent/v1/metrics");
        output(&mut get)
    }

    /// A file that is gone with this.
    pub(crate) fn write(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// The memory of a group's processes.
    pub(crate) fn processes(&self, group_id: &str) -> Result<Processes> {
        let bundle = self.dir.path().join("run/sandboxes").join(group_id);
        let memory = |file: &str| {
            let path = bundle.join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            // The process id, then when it was started.
            let pid = text.split_whitespace().next().context("no process id")?;
            Memory::of(pid.parse().with_context(|| format!("process id {pid:?}"))?)
        };
        Ok(Processes {
            shim: memory("shim.pid")?,
            vmm: memory("vmm.pid")?,
        })
    }

    /// `skopeo` waits for no registry that is not up yet, so `curl` does.
    fn fill_registry(&self) -> Result<()> {
        let mut wait = Command::new("curl");
        wait.args([
            "-sS",
            "--retry",
            "60",
            "--retry-connrefused",
            "--retry-delay",
            "1",
            "-o",
            "/dev/null",
        ]);
        output(wait.arg(format!("http://{REGISTRY}/v2/"))).context("wait for the registry")?;
        let mut copy = Command::new("skopeo");
        copy.args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:latest", ground::IMAGE))
            .arg(format!("docker://{IMAGE}"));
        output(&mut copy).context("fill the registry").map(drop)
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(10)..].join("\n");
        format!("the agent's last words:\n{tail}")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Groups outlive an agent: they are removed by name.
        if let Ok(list) = self.ecictl(["ps", "-a", "-o", "json"]) {
            for id in ids(&list) {
                let _ = self.ecictl(["rm", "--grace", "0", &id]);
            }
        }
        for process in [&mut self.agent, &mut self.registry] {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Means of the histogram of phases, out of its sums and counts.
fn means(metrics: &str) -> Vec<(String, f64)> {
    let value = |kind: &str, phase: &str| -> Option<f64> {
        let line = format!("eci_start_phase_seconds_{kind}{{phase=\"{phase}\"}} ");
        metrics
            .lines()
            .find_map(|text| text.strip_prefix(&line)?.trim().parse().ok())
    };
    let phases = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix("eci_start_phase_seconds_count{phase=\"")?;
        rest.split_once('"').map(|(phase, _)| phase)
    });
    phases
        .filter_map(|phase| {
            let mean = value("sum", phase)? / value("count", phase)?;
            Some((phase.to_owned(), mean * 1e3))
        })
        .collect()
}

/// The ids in what `ecictl ps -o json` prints.
fn ids(list: &str) -> Vec<String> {
    let groups: Vec<serde_json::Value> = serde_json::from_str(list).unwrap_or_default();
    let id = |group: &serde_json::Value| group["id"].as_str().map(str::to_owned);
    groups.iter().filter_map(id).collect()
}

fn configuration(dir: &Path, starts: Starts) -> String {
    let mut text = String::new();
    let table = toml_table(&[("state_dir", dir.join("state")), ("run_dir", dir.join("run"))]);
    let _ = writeln!(text, "{table}node_name = \"bench\"\n[files]");
    text += &toml_table(&[
        ("shim", "/containerd-shim-eci-v2".into()),
        ("vmm", ground::VMM.into()),
        ("kernel", ground::KERNEL.into()),
        ("initrd", ground::INITRD.into()),
    ]);
    let _ = writeln!(text, "[image]\ninsecure_registries = [\"{REGISTRY}\"]");
    let _ = writeln!(text, "[template]\nenabled = {}", starts != Starts::Boot);
    let n_standbys = match starts {
        Starts::Standby(n) => n,
        Starts::Boot | Starts::Template => 0,
    };
    let _ = writeln!(text, "[standby]\nper_shape = {n_standbys}\nmax = {n_standbys}");
    // Groups that use nearly nothing of what they are promised.
    text += "[capacity]\ncpu_overcommit = 100.0\nmemory_overcommit = 100.0\n";
    // Ports of other doors may be in use; the one that is measured is the socket.
    for door in ["eci", "kubelet", "readonly"] {
        let _ = writeln!(text, "[{door}]\nenabled = false");
    }
    text + "[admin]\n" + &toml_table(&[("socket", dir.join("run/agent.sock"))])
}

fn toml_table(paths: &[(&str, PathBuf)]) -> String {
    paths
        .iter()
        .map(|(name, path)| format!("{name} = \"{}\"\n", path.display()))
        .collect()
}

fn registry_configuration(dir: &Path) -> String {
    let root = dir.join("registry");
    format!(
        "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\n\
         storage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp: {{ addr: {REGISTRY} }}\n",
        root.display()
    )
}

fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("share the log")?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("start {command:?}"))
}

/// Starts a process and waits until it logs `marker`; its log goes on to a file.
fn spawn_until(mut command: Command, log: &Path, marker: &str) -> Result<Child> {
    let mut process = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let errors = process
        .stderr
        .take()
        .context("the process has no standard error")?;
    let mut lines = BufReader::new(errors);
    let mut seen = String::new();
    loop {
        let from = seen.len();
        if lines.read_line(&mut seen)? == 0 {
            end(process);
            bail!("{command:?} ended: {seen}");
        }
        if seen[from..].contains(marker) {
            break;
        }
    }
    let mut file = File::create(log).with_context(|| format!("create {}", log.display()))?;
    // Ends with the process.
    std::thread::spawn(move || std::io::copy(&mut lines, &mut file));
    Ok(process)
}

fn end(mut process: Child) {
    let _ = process.kill();
    let _ = process.wait();
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context("start it")?;
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8(output.stdout).context("read its output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_of_phases_are_sums_by_counts() {
        let metrics = "eci_start_phase_seconds_sum{phase=\"shim\"} 0.04\n\
                       eci_start_phase_seconds_count{phase=\"shim\"} 4\n\
                       eci_start_phase_seconds_count{phase=\"none\"} 1\n";
        assert_eq!(means(metrics), [("shim".to_owned(), 10.0)]);
    }

    #[test]
    fn ids_of_groups_are_found() {
        let list = r#"[{"id": "eci-a", "status": {}}, {"id": "eci-b"}]"#;
        assert_eq!(ids(list), ["eci-a", "eci-b"]);
        assert!(ids("[]").is_empty());
    }
}
