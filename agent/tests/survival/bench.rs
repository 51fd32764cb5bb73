//! A directory with an agent that is watched: where it halts, somebody is killed.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::symlink, net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

use agent::store::HALT_VARIABLE;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid},
};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const VMM: &str = "eci-vmm";
pub(crate) const SHIM: &str = "containerd-shim-eci-v2";
pub(crate) const AGENT_VARIABLE: &str = "SURVIVAL_AGENT_DIR";
pub(crate) const SERVING: &str = "serving";
/// Nothing here takes long; what hangs fails.
const LIMIT: Duration = Duration::from_secs(60);

/// Whom to kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Agent,
    Shim,
    Vmm,
}

/// What became of the agent so far.
#[derive(Debug, Default)]
struct Watched {
    /// The agent halted, and there was somebody to kill.
    killed: bool,
    halted: bool,
    serves: bool,
    /// Agents started so far.
    generation: u32,
    agent: Option<Pid>,
    /// Nobody restarts the agent any more.
    over: bool,
}

type Shared = Arc<(Mutex<Watched>, Condvar)>;

/// Agents on one directory, one after the other.
pub(crate) struct Bench {
    dir: Arc<TempDir>,
    shared: Shared,
    watcher: Option<thread::JoinHandle<()>>,
}

/// What the agent answered.
pub(crate) type Answer = Result<(u16, String), std::io::Error>;

impl Bench {
    /// Prepares a directory; no agent runs.
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("eci-").tempdir().unwrap();
        let program = std::env::current_exe().unwrap();
        for name in [VMM, SHIM] {
            symlink(&program, dir.path().join(name)).unwrap();
        }
        for name in ["kernel", "image"] {
            fs::write(dir.path().join(name), vec![1; 4096]).unwrap();
        }
        Self {
            dir: Arc::new(dir),
            shared: Shared::default(),
            watcher: None,
        }
    }

    /// Starts an agent that halts at this moment; there the victim is killed, and an agent that was is started again.
    pub(crate) fn start(&mut self, moment: u64, victim: Victim) {
        let (dir, shared) = (Arc::clone(&self.dir), Arc::clone(&self.shared));
        *lock(&shared) = Watched::default();
        self.watcher = Some(thread::spawn(move || watch(dir.path(), &shared, moment, victim)));
        self.wait_serving(0);
    }

    /// Ends the agent, as a crash would. Whether it had come to its moment, and somebody was killed there.
    pub(crate) fn stop(&mut self) -> (bool, bool) {
        {
            let mut watched = lock(&self.shared);
            watched.over = true;
            if let Some(agent) = watched.agent {
                // It may have ended by itself.
                let _ = kill_process(agent, Signal::KILL);
            }
        }
        self.watcher.take().unwrap().join().unwrap();
        let watched = lock(&self.shared);
        (watched.halted, watched.killed)
    }

    /// The agent's generation, once one serves that is later than this.
    pub(crate) fn wait_serving(&self, after: u32) -> u32 {
        let (_, changed) = &*self.shared;
        let (watched, timeout) = changed
            .wait_timeout_while(lock(&self.shared), LIMIT, |watched| {
                !(watched.serves && watched.generation > after)
            })
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "no agent serves: {watched:?}\n{}",
            self.log()
        );
        watched.generation
    }

    /// Somebody was killed.
    pub(crate) fn has_killed(&self) -> bool {
        lock(&self.shared).killed
    }

    /// One request, to the agent that serves now.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let mut stream = self.connect(method, path, body)?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text
            .split_once("\r\n\r\n")
            .ok_or_else(|| std::io::Error::other(format!("half an answer: {text:?}")))?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| std::io::Error::other(format!("no status: {head:?}")))?;
        Ok((status, body.to_owned()))
    }

    fn connect(&self, method: &str, path: &str, body: &str) -> std::io::Result<UnixStream> {
        let mut stream = UnixStream::connect(self.dir.path().join("run/agent.sock"))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.0\r\nHost: agent\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        Ok(stream)
    }

    /// Follows a group until it fits. `None` when the agent went away, or the group has gone.
    pub(crate) fn follow(&self, group: &str, fits: impl Fn(&Value) -> bool) -> Option<Value> {
        let stream = self
            .connect("GET", &format!("/v1/groups/{group}/watch"), "")
            .ok()?;
        for line in BufReader::new(stream).lines() {
            let line = match line {
                Ok(line) => line,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let (_, now) = self.ask("GET", &format!("/v1/groups/{group}"), "").ok()?;
                    panic!(
                        "the group does not come to the state that is waited for: {now}\n{}",
                        self.log()
                    );
                }
                Err(_) => return None,
            };
            let Ok(value) = serde_json::from_str::<Value>(&line) else {
                continue;
            };
            // Without a status it says that there is no such group.
            if value["status"].is_object() && fits(&value) {
                return Some(value);
            }
        }
        None
    }

    /// Runs a program in a container; its exit code, 125 when it was not run.
    pub(crate) fn exec(&self, group: &str, container: &str, command: &[&str]) -> i32 {
        let output = Command::new(env!("CARGO_BIN_EXE_ecictl"))
            .arg("--socket")
            .arg(self.dir.path().join("run/agent.sock"))
            .args(["exec", group, "-c", container, "--"])
            .args(command)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        output.status.code().unwrap_or(-1)
    }

    /// Everything of groups that is still there, once nothing of it ends any more: files, processes of shims and VMMs.
    pub(crate) fn leftovers(&self) -> BTreeSet<String> {
        let limit = Timespec::try_from(LIMIT).unwrap();
        for (_, pid) in self.processes() {
            // What has been told to end may take a moment; it may be gone already.
            if let Ok(process) = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()) {
                poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap();
            }
        }
        let mut found = BTreeSet::new();
        for part in ["run/sandboxes", "state/scratch", "state/logs", "sockets"] {
            let entries = fs::read_dir(self.dir.path().join(part))
                .into_iter()
                .flatten()
                .flatten();
            let names = entries.map(|entry| format!("{part}/{}", entry.file_name().to_string_lossy()));
            found.extend(names.filter(|name| !name.starts_with("state/scratch/template-")));
        }
        found.extend(
            self.processes()
                .into_iter()
                .map(|(name, pid)| format!("{name} {pid}")),
        );
        found
    }

    fn processes(&self) -> Vec<(&'static str, i32)> {
        processes(self.dir.path())
    }

    /// What the last agents logged.
    pub(crate) fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(80)..].join("\n")
    }

    /// Forgets what was logged.
    pub(crate) fn clear_log(&self) {
        fs::write(self.dir.path().join("agent.log"), "").unwrap();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if self.watcher.is_some() && !thread::panicking() {
            self.stop();
        }
        for (_, pid) in self.processes() {
            // It may end by itself.
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

fn lock(shared: &Shared) -> std::sync::MutexGuard<'_, Watched> {
    shared.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Shims and VMMs of a directory, by what their command lines name.
fn processes(dir: &Path) -> Vec<(&'static str, i32)> {
    let dir = dir.to_str().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        // Any may end while this looks; one that waits to be reaped has no command line.
        let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        if line.starts_with(&format!("{dir}/{VMM}")) {
            found.push((VMM, pid));
        } else if line.contains(&format!("-bundle\0{dir}")) && line.contains("\0run\0") {
            found.push((SHIM, pid));
        }
    }
    found
}

fn spawn(dir: &Path, shared: &Shared, moment: Option<u64>) -> Child {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("agent.log"))
        .unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .env(AGENT_VARIABLE, dir)
        .env(shim::args::SOCKET_DIR_ENV, dir.join("sockets"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    if let Some(moment) = moment {
        command.env(HALT_VARIABLE, moment.to_string());
    }
    let mut agent = command.spawn().unwrap();
    let stdout = agent.stdout.take().unwrap();
    let mut watched = lock(shared);
    watched.generation += 1;
    watched.agent = Some(Pid::from_child(&agent));
    let generation = watched.generation;
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let mut watched = lock(&shared);
            watched.serves |= line == SERVING && watched.generation == generation;
            shared.1.notify_all();
        }
    });
    agent
}

#[expect(clippy::zombie_processes, reason = "`waitpid` reaps it")]
fn watch(dir: &Path, shared: &Shared, moment: u64, victim: Victim) {
    let mut agent = spawn(dir, shared, Some(moment));
    loop {
        let pid = Pid::from_child(&agent);
        let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
        if status.stopped() {
            let victims: Vec<i32> = match victim {
                Victim::Agent => vec![pid.as_raw_nonzero().get()],
                Victim::Shim => of(dir, SHIM),
                Victim::Vmm => of(dir, VMM),
            };
            {
                let mut watched = lock(shared);
                watched.halted = true;
                watched.killed = !victims.is_empty();
                watched.serves &= victim != Victim::Agent;
            }
            for victim in victims {
                // It may end by itself.
                let _ = kill_process(Pid::from_raw(victim).unwrap(), Signal::KILL);
            }
            if victim != Victim::Agent {
                kill_process(pid, Signal::CONT).unwrap();
            }
            continue;
        }
        assert!(status.signaled(), "an agent ended by itself: {status:?}");
        let over = {
            let mut watched = lock(shared);
            watched.agent = None;
            watched.serves = false;
            watched.over
        };
        // Reaped above.
        drop(agent.stdin.take());
        if over {
            return;
        }
        agent = spawn(dir, shared, None);
    }
}

fn of(dir: &Path, program: &str) -> Vec<i32> {
    let found = processes(dir).into_iter();
    found
        .filter(|(name, _)| *name == program)
        .map(|(_, pid)| pid)
        .collect()
}
