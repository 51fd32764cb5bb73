//! One process the host asked for: a container's init or an exec.
//!
//! ```text
//! Created ──start──▶ Starting ──▶ Running ──▶ Ended ──delete──▶ Deleted
//!    │                  └──▶ Failed ──────────────────delete──────▲
//!    └──────────────────────────────────────────────delete────────┘
//! ```

use std::{
    collections::HashMap,
    io::IoSliceMut,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex},
};

use rustix::{
    fs::{Mode, OFlags},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
        recvmsg, socketpair,
    },
    pipe::{PipeFlags, pipe_with},
    termios,
};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

use crate::{
    container::{
        plan::Stdio,
        program::{Program, REPORT_BYTES, Step, parse_report},
        spec,
        stdio::{self, Connected, Forsaken, Hold, Line},
        user::Identity,
    },
    error::{Context, Error, ErrorKind, Result},
    reaper::Exit,
    stream::Stream,
    sys::{self, clone::Child},
};

/// A standard stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamName {
    /// Standard input.
    Stdin,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a process ended, as the host is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Exit code and time.
    pub exit: Exit,
    /// The container's cgroup saw an OOM kill during its life.
    pub oom_killed: bool,
}

/// Where a process is in its life.
#[derive(Debug, Clone)]
pub enum State {
    /// Not started.
    Created,
    /// Between `clone` and `execve`.
    Starting,
    /// The program runs.
    Running {
        /// In the guest's PID namespace.
        pid: u32,
        /// The process.
        pidfd: Arc<OwnedFd>,
    },
    /// It has ended and its output is drained.
    Ended(Ended),
    /// It could not be started.
    Failed,
    /// It is forgotten.
    Deleted,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// What to run.
    pub spec: spec::Process,
    /// Whom it runs as.
    pub identity: Identity,
    state: watch::Sender<State>,
    /// Until it is started.
    connected: Mutex<HashMap<StreamName, Connected>>,
    /// Since then.
    lines: Mutex<HashMap<StreamName, Arc<Line>>>,
    terminal: Mutex<Option<Arc<Stream>>>,
}

/// Our ends of what a new process reads and writes.
#[derive(Debug)]
pub struct Ends {
    hold: Hold,
    input: Option<(Arc<Stream>, Arc<Line>)>,
    outputs: Vec<(Arc<Stream>, Arc<Line>)>,
}

impl Process {
    /// A process that is not started yet.
    #[must_use]
    pub fn new(spec: spec::Process, identity: Identity) -> Self {
        Self {
            spec,
            identity,
            state: watch::Sender::new(State::Created),
            connected: Mutex::default(),
            lines: Mutex::default(),
            terminal: Mutex::default(),
        }
    }

    /// Where it is now.
    #[must_use]
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Gives it a stream of the host's, and tells the host so: one it will be started with, or one that was lost.
    ///
    /// # Errors
    /// `FailedPrecondition` when it was started without the stream, or has ended; `AlreadyExists` for a second stream of
    /// the same name, `Internal` when the host has gone.
    pub fn connect(&self, name: StreamName, connected: Connected) -> Result<()> {
        match *self.state.borrow() {
            State::Created => {}
            State::Starting | State::Running { .. } => {
                let line = self
                    .lines
                    .lock()
                    .expect("no panic while held")
                    .get(&name)
                    .cloned();
                return line
                    .ok_or_else(|| Error::precondition(format!("the process was started without {name:?}")))?
                    .connect(connected);
            }
            State::Ended(_) | State::Failed | State::Deleted => {
                return Err(Error::precondition("the process has ended"));
            }
        }
        let mut streams = self.connected.lock().expect("no panic while held");
        if streams.contains_key(&name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("{name:?} is connected already"),
            ));
        }
        connected.acknowledge()?;
        streams.insert(name, connected);
        Ok(())
    }

    /// This is a clone: the host has none of the streams any more.
    pub fn lose_streams(&self) {
        self.connected.lock().expect("no panic while held").clear();
        for line in self.lines.lock().expect("no panic while held").values() {
            line.lose();
        }
    }

    /// Streams that are still lost are not waited for any longer.
    pub fn give_up_streams(&self) {
        for line in self.lines.lock().expect("no panic while held").values() {
            line.give_up();
        }
    }

    /// Takes the step from `Created` to `Starting` and makes what the process reads and writes.
    ///
    /// # Errors
    /// `FailedPrecondition` when it was started before.
    pub fn begin_start(&self, hold: &Hold) -> Result<(Stdio, Ends)> {
        let mut is_created = false;
        self.state.send_if_modified(|state| {
            is_created = matches!(state, State::Created);
            if is_created {
                *state = State::Starting;
            }
            is_created
        });
        if !is_created {
            return Err(Error::precondition("the process was started before"));
        }
        let result = self.make_stdio(hold);
        if result.is_err() {
            self.fail();
        }
        result
    }

    fn make_stdio(&self, hold: &Hold) -> Result<(Stdio, Ends)> {
        let mut ends = Ends {
            hold: hold.clone(),
            input: None,
            outputs: Vec::new(),
        };
        if self.spec.terminal {
            return Ok((Stdio::Terminal, ends));
        }
        let mut connected = self.connected.lock().expect("no panic while held");
        let mut side = |name: StreamName| -> Result<OwnedFd> {
            let Some(stream) = connected.remove(&name) else {
                let flags = if name == StreamName::Stdin {
                    OFlags::RDONLY
                } else {
                    OFlags::WRONLY
                };
                return rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty())
                    .context(|| "open /dev/null");
            };
            let (read, write) = pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe")?;
            let (ours, theirs) = if name == StreamName::Stdin {
                (write, read)
            } else {
                (read, write)
            };
            let ours = Arc::new(Stream::new(ours).context(|| "watch a pipe")?);
            let line = self.line(name, Some(stream), Forsaken::Closed, hold);
            if name == StreamName::Stdin {
                ends.input = Some((ours, line));
            } else {
                ends.outputs.push((ours, line));
            }
            Ok(theirs)
        };
        let streams = [
            side(StreamName::Stdin)?,
            side(StreamName::Stdout)?,
            side(StreamName::Stderr)?,
        ];
        Ok((Stdio::Streams(streams), ends))
    }

    fn line(
        &self,
        name: StreamName,
        stream: Option<Connected>,
        forsaken: Forsaken,
        hold: &Hold,
    ) -> Arc<Line> {
        let line = Arc::new(Line::new(stream, forsaken, hold.clone()));
        let mut lines = self.lines.lock().expect("no panic while held");
        lines.insert(name, Arc::clone(&line));
        line
    }

    /// It could not be started: its streams end.
    pub fn fail(&self) {
        self.connected.lock().expect("no panic while held").clear();
        self.lines.lock().expect("no panic while held").clear();
        self.state.send_replace(State::Failed);
    }

    /// Follows the child until its program runs. `exit` is its end, should it come first.
    ///
    /// # Errors
    /// `NotFound`, `PermissionDenied` or `InvalidArgument` when the program cannot be run, `Internal` when a step before
    /// that failed.
    pub async fn finish_start(
        &self,
        program: Program,
        report: OwnedFd,
        child: Child,
        exit: &mut oneshot::Receiver<Exit>,
        mut ends: Ends,
    ) -> Result<Running> {
        let followed = follow(report).await.and_then(|outcome| match outcome {
            Outcome::Runs(terminal) => terminal
                .map(Stream::new)
                .transpose()
                .context(|| "watch the terminal"),
            Outcome::Failed(report) => Err(step_error(&program, report)),
        });
        let terminal = match followed {
            Ok(terminal) => terminal,
            Err(error) => {
                // Mostly it ends by itself. Until it has, its namespaces hold on to mounts.
                let _ = sys::signal::send(child.pidfd.as_fd(), libc::SIGKILL);
                let _ = exit.await;
                self.fail();
                return Err(error);
            }
        };
        // Our copies of the child's ends must go, or its output would never end.
        drop(program);
        if let Some(terminal) = terminal {
            let terminal = Arc::new(terminal);
            let mut connected = self.connected.lock().expect("no panic while held");
            ends.input = connected.remove(&StreamName::Stdin).map(|stream| {
                let line = self.line(StreamName::Stdin, Some(stream), Forsaken::Closed, &ends.hold);
                (Arc::clone(&terminal), line)
            });
            // Without a reader it is read all the same: a full terminal would stop the program.
            let output = connected.remove(&StreamName::Stdout);
            let line = self.line(StreamName::Stdout, output, Forsaken::Dropped, &ends.hold);
            ends.outputs.push((Arc::clone(&terminal), line));
            *self.terminal.lock().expect("no panic while held") = Some(terminal);
        }
        let pid = child.pid.unsigned_abs();
        self.state.send_replace(State::Running {
            pid,
            pidfd: Arc::new(child.pidfd),
        });
        let ended = watch::Sender::new(false);
        if let Some((pipe, line)) = ends.input {
            tokio::spawn(stdio::pump_input(line, pipe, ended.subscribe()));
        }
        let outputs = ends
            .outputs
            .into_iter()
            .map(|(pipe, line)| tokio::spawn(stdio::pump_output(pipe, line, ended.subscribe())))
            .collect();
        Ok(Running { pid, ended, outputs })
    }

    /// It has ended, all told.
    pub fn set_ended(&self, ended: Ended) {
        self.terminal.lock().expect("no panic while held").take();
        self.lines.lock().expect("no panic while held").clear();
        self.state.send_replace(State::Ended(ended));
    }

    /// Waits until it has ended and its output was handed over. Cancelling is fine.
    ///
    /// # Errors
    /// `FailedPrecondition` when it could not be started, `NotFound` when it is deleted meanwhile.
    pub async fn wait(&self) -> Result<Ended> {
        let mut states = self.state.subscribe();
        let state = states
            .wait_for(|state| matches!(state, State::Ended(_) | State::Failed | State::Deleted))
            .await
            .map_err(|_| Error::not_found("the process was deleted"))?
            .clone();
        match state {
            State::Ended(ended) => Ok(ended),
            State::Failed => Err(Error::precondition("the process could not be started")),
            _ => Err(Error::not_found("the process was deleted")),
        }
    }

    /// The running process.
    ///
    /// # Errors
    /// `FailedPrecondition` when it does not run.
    pub fn running(&self) -> Result<(u32, Arc<OwnedFd>)> {
        match &*self.state.borrow() {
            State::Running { pid, pidfd } => Ok((*pid, Arc::clone(pidfd))),
            State::Created | State::Starting => Err(Error::precondition("the process is not started")),
            State::Ended(_) | State::Failed | State::Deleted => {
                Err(Error::precondition("the process has ended"))
            }
        }
    }

    /// Marks it as forgotten.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs.
    pub fn delete(&self) -> Result<()> {
        let mut may = false;
        self.state.send_if_modified(|state| {
            may = !matches!(state, State::Starting | State::Running { .. });
            if may {
                *state = State::Deleted;
            }
            may
        });
        if !may {
            return Err(Error::precondition("the process is running"));
        }
        self.connected.lock().expect("no panic while held").clear();
        Ok(())
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// `FailedPrecondition` without a terminal.
    pub fn resize(&self, ws_row: u16, ws_col: u16) -> Result<()> {
        let terminal = self.terminal.lock().expect("no panic while held");
        let terminal = terminal
            .as_ref()
            .ok_or_else(|| Error::precondition("the process has no terminal"))?;
        let size = termios::Winsize {
            ws_row,
            ws_col,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        termios::tcsetwinsize(terminal.as_fd(), size).context(|| format!("set the size {ws_row}x{ws_col}"))
    }
}

/// A process whose program runs, and the tasks that copy its output.
#[derive(Debug)]
pub struct Running {
    /// In the guest's PID namespace.
    pub pid: u32,
    ended: watch::Sender<bool>,
    outputs: Vec<JoinHandle<()>>,
}

impl Running {
    /// The process was reaped: copies what is left of its output.
    pub async fn drain(self) {
        self.ended.send_replace(true);
        for output in self.outputs {
            let _ = output.await;
        }
    }
}

/// A channel for the report of a child: ours and the child's end.
///
/// # Errors
/// When there are no descriptors.
pub fn report_channel() -> Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).context(|| "make a socket pair")
}

/// Follows a command of our own until its program runs, and lets go of our copies of the child's ends.
///
/// # Errors
/// As [`Process::finish_start`].
pub async fn follow_command(program: Program, report: OwnedFd) -> Result<()> {
    match follow(report).await? {
        Outcome::Runs(_) => Ok(()),
        Outcome::Failed(report) => Err(step_error(&program, report)),
    }
}

/// What a child reports.
enum Outcome {
    /// `execve` has succeeded; with the terminal, if the program has opened one.
    Runs(Option<OwnedFd>),
    /// A step has failed.
    Failed([u8; REPORT_BYTES]),
}

/// Reads the report: the terminal, if the program opens one; an error; the end, once `execve` has closed it.
async fn follow(report: OwnedFd) -> Result<Outcome> {
    let report = sys::poll::watch(report).context(|| "watch the new process")?;
    let mut terminal = None;
    loop {
        let mut message = [0; REPORT_BYTES];
        let received = {
            let mut ready = report.readable().await.context(|| "watch the new process")?;
            let result = ready.try_io(|report| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let flags = RecvFlags::CMSG_CLOEXEC;
                let received = recvmsg(
                    report,
                    &mut [IoSliceMut::new(&mut message)],
                    &mut ancillary,
                    flags,
                )?;
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                        terminal = descriptors.last();
                    }
                }
                Ok(received.bytes)
            });
            match result {
                Ok(received) => received.context(|| "read the new process's report")?,
                Err(_would_block) => continue,
            }
        };
        match received {
            0 => return Ok(Outcome::Runs(terminal)),
            REPORT_BYTES => return Ok(Outcome::Failed(message)),
            _ => {}
        }
    }
}

/// The error of the step a report names.
fn step_error(program: &Program, report: [u8; REPORT_BYTES]) -> Error {
    let (index, error) = parse_report(report);
    let Some(step) = program.steps.get(index) else {
        return Error::system("follow the new process", error);
    };
    let kind = match (step, error.raw_os_error()) {
        (Step::Execute { .. }, Some(libc::ENOENT | libc::ENOTDIR)) => ErrorKind::NotFound,
        (Step::Execute { .. }, Some(libc::EACCES | libc::EPERM)) => ErrorKind::PermissionDenied,
        (Step::Execute { .. }, _) => ErrorKind::InvalidArgument,
        (Step::ChangeDirectory { .. }, Some(libc::EACCES)) => ErrorKind::PermissionDenied,
        (Step::ChangeDirectory { .. } | Step::MakeDirectory { .. }, _) => ErrorKind::InvalidArgument,
        _ => ErrorKind::Internal,
    };
    Error::system(step.to_string(), error).with_kind(kind)
}
