//! One command: its processes, its cgroup, its streams.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::server::Outlet;
use super::setup::SESSIONS_CGROUP;
use crate::sys;
use crate::window::Window;
use crate::wire::{CHUNK_BYTES, Message, Request, Stream, WINDOW_BYTES};

/// Marks every process of a session, so that those that left its cgroup are found as well.
const MARK: &str = "ECI_NESTED_SESSION";
/// How long output may keep coming after everybody who could write it is dead.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// A command that is about to run or runs.
#[derive(Debug)]
pub(super) struct Session {
    id: u32,
    /// The command's process and group; 0 before it has started.
    group: AtomicI32,
    killed: AtomicBool,
    stdin: Mutex<Option<Sender<Vec<u8>>>>,
    stdin_source: Mutex<Option<Receiver<Vec<u8>>>>,
    stdout: Arc<Window>,
    stderr: Arc<Window>,
}

impl Session {
    pub(super) fn new(id: u32) -> Self {
        let (sender, receiver) = mpsc::channel();
        Self {
            id,
            group: AtomicI32::new(0),
            killed: AtomicBool::new(false),
            stdin: Mutex::new(Some(sender)),
            stdin_source: Mutex::new(Some(receiver)),
            stdout: Arc::new(Window::new(WINDOW_BYTES)),
            stderr: Arc::new(Window::new(WINDOW_BYTES)),
        }
    }

    /// What the runner has to say while the command runs.
    pub(super) fn handle(&self, message: Message) {
        match message {
            Message::Stdin(bytes) => {
                let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
                if bytes.is_empty() {
                    *stdin = None;
                } else if let Some(sender) = &*stdin {
                    // The receiver is gone when the command has closed its input.
                    let _ = sender.send(bytes);
                }
            }
            Message::Credit(Stream::Stdout, n_bytes) => self.stdout.give(n_bytes),
            Message::Credit(Stream::Stderr, n_bytes) => self.stderr.give(n_bytes),
            Message::Close(Stream::Stdout) => self.stdout.close(),
            Message::Close(Stream::Stderr) => self.stderr.close(),
            Message::Signal(number) => self.signal(number),
            Message::Kill => {
                self.killed.store(true, Ordering::SeqCst);
                self.stdout.close();
                self.stderr.close();
                self.kill_all();
            }
            _ => {}
        }
    }

    fn signal(&self, number: i32) {
        let group = self.group.load(Ordering::Acquire);
        if let (Ok(signal), 1..) = (Signal::try_from(number), group) {
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }

    fn cgroup(&self) -> PathBuf {
        PathBuf::from(format!("{SESSIONS_CGROUP}/{}", self.id))
    }

    /// Kills the cgroup, then those of the session that moved themselves elsewhere.
    fn kill_all(&self) {
        let _ = fs::write(self.cgroup().join("cgroup.kill"), "1");
        for pid in marked_processes(self.id) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Runs the command to its end; the result is the session's last message.
pub(super) fn run(session: &Session, request: &Request, outlet: &Outlet) -> Message {
    let child = match start(session, request) {
        Ok(child) => child,
        Err(error) => return error,
    };
    let ended = pump_and_wait(session, child, outlet);
    session.kill_all();
    if let Err(error) = remove_cgroup(session) {
        eprintln!("nested: session {}: {error:#}", session.id);
    }
    match ended {
        Ok(status) => Message::Exit(exit_code(status)),
        Err(error) => Message::Failed(125, format!("{error:#}")),
    }
}

fn start(session: &Session, request: &Request) -> Result<Child, Message> {
    let internal = |error: anyhow::Error| Message::Failed(125, format!("{error:#}"));
    let cgroup = session.cgroup();
    fs::create_dir(&cgroup)
        .with_context(|| format!("create {}", cgroup.display()))
        .map_err(internal)?;
    let procs = cgroup.join("cgroup.procs");
    let procs = File::options()
        .write(true)
        .open(&procs)
        .with_context(|| format!("open {}", procs.display()))
        .map_err(internal)?;
    let failed = |code, text| {
        let _ = fs::remove_dir(&cgroup);
        Err(Message::Failed(code, text))
    };
    let Some((program, arguments)) = request.argv.split_first() else {
        return failed(125, "the command is empty".into());
    };
    if !request.cwd.is_dir() {
        return failed(
            125,
            format!(
                "the working directory {} is not visible in the L1 host",
                request.cwd.display()
            ),
        );
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(request.env.iter().map(|(name, value)| (name, value)))
        .env(MARK, session.id.to_string())
        .current_dir(&request.cwd)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    sys::lead_session_in_cgroup(&mut command, procs);
    match command.spawn() {
        Ok(child) => {
            session
                .group
                .store(i32::try_from(child.id()).unwrap_or(0), Ordering::Release);
            if session.killed.load(Ordering::SeqCst) {
                session.kill_all();
            }
            Ok(child)
        }
        // The codes a shell gives.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            failed(127, format!("{program}: command not found in the L1 host"))
        }
        Err(error) => failed(126, format!("{program}: {error}")),
    }
}

fn pump_and_wait(session: &Session, mut child: Child, outlet: &Outlet) -> Result<ExitStatus> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let input = session
        .stdin_source
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let (Some(stdin), Some(input)) = (stdin, input) {
        let outlet = outlet.clone();
        thread::spawn(move || feed(stdin, &input, &outlet));
    }
    let (progress, news) = mpsc::sync_channel::<()>(1);
    if let Some(stdout) = stdout {
        let (outlet, window, progress) = (outlet.clone(), Arc::clone(&session.stdout), progress.clone());
        thread::spawn(move || drain(stdout, Stream::Stdout, &window, &outlet, &progress));
    }
    if let Some(stderr) = stderr {
        let (outlet, window, progress) = (outlet.clone(), Arc::clone(&session.stderr), progress.clone());
        thread::spawn(move || drain(stderr, Stream::Stderr, &window, &outlet, &progress));
    }
    drop(progress);
    let status = child.wait().context("wait for the command")?;
    // The group's number may be taken again from here on.
    session.group.store(0, Ordering::Release);
    // Whoever is left may hold the output open.
    session.kill_all();
    // The news end when both pumps have. A runner that reads slowly is waited for; a process that escaped and
    // holds the output open is not.
    loop {
        match news.recv_timeout(DRAIN_LIMIT) {
            Err(RecvTimeoutError::Disconnected) => return Ok(status),
            Err(RecvTimeoutError::Timeout)
                if !session.stdout.is_used_up() && !session.stderr.is_used_up() =>
            {
                return Ok(status);
            }
            _ => {}
        }
    }
}

/// Moves input to the command; every chunk taken makes room for another.
fn feed(mut stdin: ChildStdin, input: &Receiver<Vec<u8>>, outlet: &Outlet) {
    for bytes in input {
        if stdin.write_all(&bytes).is_err() {
            // The command has closed its input. What follows is dropped, and no room is made for more.
            return;
        }
        outlet.send(Message::Credit(
            Stream::Stdin,
            u32::try_from(bytes.len()).unwrap_or(u32::MAX),
        ));
    }
}

/// Moves output of the command to the runner, telling `progress` of every chunk.
fn drain(mut pipe: impl Read, stream: Stream, window: &Window, outlet: &Outlet, progress: &SyncSender<()>) {
    let mut buffer = [0; CHUNK_BYTES];
    loop {
        let length = match pipe.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            // Once the runner has closed the stream, dropping the pipe tells the command with SIGPIPE.
            let Some(room) = window.take(rest.len()) else {
                return;
            };
            let (now, later) = rest.split_at(room);
            outlet.send(Message::Output(stream, now.to_vec()));
            rest = later;
        }
        let _ = progress.try_send(());
    }
}

/// Killed processes leave their cgroup when they are reaped, which is soon; until then it cannot be removed.
fn remove_cgroup(session: &Session) -> Result<()> {
    let cgroup = session.cgroup();
    let mut tries = 0;
    loop {
        match remove_tree(&cgroup) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries < 200 => {
                tries += 1;
                thread::sleep(Duration::from_millis(10));
            }
            other => return other.with_context(|| format!("remove {}", cgroup.display())),
        }
    }
}

/// Removes a cgroup and those below it; its files are not removed one by one.
fn remove_tree(cgroup: &std::path::Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

fn marked_processes(session: u32) -> Vec<Pid> {
    let mark = format!("{MARK}={session}");
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| {
                environment
                    .split(|byte| *byte == 0)
                    .any(|entry| entry == mark.as_bytes())
            })
        })
        .map(Pid::from_raw)
        .collect()
}

fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
