//! Programs that are run to their end, and programs that go on beside a test. Every wait has a limit, and is for an
//! event: a line of output, or the end of a process.

use std::{
    fmt,
    io::{BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// The longest anything may take. An emulated host is 10 to 20 times slower than others, and shares its processor.
pub const LIMIT: Duration = Duration::from_secs(180);

/// A program that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// All it printed.
    pub stdout: String,
    /// All it complained.
    pub stderr: String,
}

impl Finished {
    /// What it printed, if it ended well.
    ///
    /// # Errors
    /// It did not; the message has all of its output.
    pub fn success(self) -> Result<String> {
        ensure!(self.code == 0, "{self}");
        Ok(self.stdout)
    }

    /// That it ended with this code and complained with all of these words.
    ///
    /// # Errors
    /// It did not; the message has all of its output.
    pub fn refused(&self, code: i32, words: &[&str]) -> Result<()> {
        ensure!(self.code == code, "expected exit code {code}: {self}");
        for word in words {
            ensure!(self.stderr.contains(word), "expected {word:?}: {self}");
        }
        Ok(())
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, stdout, stderr } = self;
        let (stdout, stderr) = (stdout.trim_end(), stderr.trim_end());
        write!(formatter, "exit code {code}\nstdout: {stdout}\nstderr: {stderr}")
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn pidfd(child: &Child) -> Result<OwnedFd> {
    pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("open a process descriptor")
}

/// Waits for the end of a process.
///
/// # Errors
/// It did not end within the limit.
pub(crate) fn wait_gone(process: &OwnedFd, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).context("express a time limit")?;
        let mut events = [PollFd::new(process, PollFlags::IN)];
        match poll(&mut events, Some(&timeout)) {
            Ok(0) => bail!("it still runs after {} s", limit.as_secs()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for the end of a process"),
        }
    }
}

fn read_all(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What was read before a failure is what there is to show.
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Runs a program to its end with this standard input.
///
/// # Errors
/// It can't be started, or had to be killed after [`LIMIT`].
pub fn run(command: &mut Command, input: &[u8]) -> Result<Finished> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let process = pidfd(&child)?;
    let (stdout, stderr) = (read_all(child.stdout.take()), read_all(child.stderr.take()));
    let writer = child.stdin.take().map(|mut stdin| {
        let input = input.to_vec();
        // A program need not read what it gets.
        thread::spawn(move || drop(stdin.write_all(&input)))
    });
    let in_time = wait_gone(&process, LIMIT);
    if in_time.is_err() {
        child.kill().with_context(|| format!("kill {name}"))?;
    }
    let status = child.wait().with_context(|| format!("wait for {name}"))?;
    let text = |reader: thread::JoinHandle<Vec<u8>>| {
        let bytes = reader.join().unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    if let Some(writer) = writer {
        // It has nothing to tell: the pipe is closed now.
        let _ = writer.join();
    }
    let finished = Finished {
        code: exit_code(status),
        stdout: text(stdout),
        stderr: text(stderr),
    };
    match in_time {
        Ok(()) => Ok(finished),
        Err(error) => Err(error.context(format!("{name}: {finished}"))),
    }
}

/// The lines a program has written so far.
#[derive(Debug, Default)]
struct Written {
    lines: Vec<String>,
    ended: bool,
}

/// A program that goes on beside the test; it is killed when this is dropped.
#[derive(Debug)]
pub struct Background {
    name: String,
    child: Child,
    process: OwnedFd,
    written: Arc<(Mutex<Written>, Condvar)>,
    /// Lines that waits have passed.
    n_passed: usize,
}

impl Background {
    /// Starts a program whose standard output is read, line by line.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        Self::spawn(command.stdout(Stdio::piped()))
    }

    /// Starts a program whose standard error is read, line by line: a daemon that logs there.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start_daemon(command: &mut Command) -> Result<Self> {
        Self::spawn(command.stderr(Stdio::piped()))
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let process = pidfd(&child)?;
        let written = Arc::<(Mutex<Written>, Condvar)>::default();
        let stream: Option<Box<dyn Read + Send>> = match (child.stdout.take(), child.stderr.take()) {
            (Some(stdout), _) => Some(Box::new(stdout)),
            (None, Some(stderr)) => Some(Box::new(stderr)),
            (None, None) => None,
        };
        let shared = Arc::clone(&written);
        thread::spawn(move || {
            let lines = stream
                .into_iter()
                .flat_map(|stream| BufReader::new(stream).lines());
            for line in lines.map_while(Result::ok) {
                lock(&shared.0).lines.push(line);
                shared.1.notify_all();
            }
            lock(&shared.0).ended = true;
            shared.1.notify_all();
        });
        Ok(Self {
            name,
            child,
            process,
            written,
            n_passed: 0,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that fits, among those no earlier wait has passed.
    ///
    /// # Errors
    /// The output ended, or [`LIMIT`] passed, without such a line; the message has the last lines.
    pub fn wait_line(&mut self, what: &str, mut fits: impl FnMut(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + LIMIT;
        let (written, changed) = &*self.written;
        let mut state = lock(written);
        loop {
            while let Some(line) = state.lines.get(self.n_passed) {
                self.n_passed += 1;
                if fits(line) {
                    return Ok(line.clone());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let why = if state.ended { "it ended" } else { "time is up" };
                let last = last_lines(&state.lines, 20);
                bail!(
                    "{}: waiting for {what}: {why}; its last lines:\n{last}",
                    self.name
                );
            }
            (state, _) = changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for its own end: the exit code, and all lines it wrote.
    ///
    /// # Errors
    /// It did not end within [`LIMIT`].
    pub fn wait_end(&mut self) -> Result<(i32, Vec<String>)> {
        wait_gone(&self.process, LIMIT).with_context(|| self.name.clone())?;
        let status = self
            .child
            .wait()
            .with_context(|| format!("wait for {}", self.name))?;
        let (written, changed) = &*self.written;
        let (state, timeout) = changed
            .wait_timeout_while(lock(written), LIMIT, |state| !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(
            !timeout.timed_out(),
            "{}: its output goes on after its end",
            self.name
        );
        Ok((exit_code(status), state.lines.clone()))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        pidfd_send_signal(&self.process, signal).with_context(|| format!("send {signal:?} to {}", self.name))
    }

    /// All lines it has written so far.
    pub fn lines(&self) -> Vec<String> {
        lock(&self.written.0).lines.clone()
    }

    /// Its last lines, for showing after a failure.
    pub fn last_lines(&self, n: usize) -> String {
        last_lines(&lock(&self.written.0).lines, n)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lock(written: &Mutex<Written>) -> MutexGuard<'_, Written> {
    written.lock().unwrap_or_else(PoisonError::into_inner)
}

fn last_lines(lines: &[String], n: usize) -> String {
    lines[lines.len().saturating_sub(n)..].join("\n")
}
