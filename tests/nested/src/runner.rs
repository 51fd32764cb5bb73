//! Runs one command in an L1 host: standard streams, signals, time limit, exit code.

use std::env;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

use crate::window::Window;
use crate::wire::{CHUNK_BYTES, Frame, Message, Request, Stream, WINDOW_BYTES};

/// Exit code when the time limit ended the command, as `timeout(1)` has it.
pub(crate) const TIME_LIMIT_CODE: i32 = 124;
/// How long a command may take to end after a signal, and the L1 host to answer after a kill.
const GRACE: Duration = Duration::from_secs(3);
const ANSWER_LIMIT: Duration = Duration::from_secs(15);

/// Variables that commands in the L1 host see as they are outside.
const CARRIED: [&str; 13] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "TERM",
    "COLORTERM",
    "NO_COLOR",
    "LANG",
    "TZ",
    "MAKEFLAGS",
    "MAKELEVEL",
    "PWD",
];
const CARRIED_PREFIXES: [&str; 7] = ["CARGO", "ECI_", "LC_", "NEXTEST", "PROPTEST", "RUST", "BENCH_"];

/// What to run and under which conditions.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) argv: Vec<String>,
    pub(crate) time_limit: Option<Duration>,
    /// Further variables, given by the user.
    pub(crate) env: Vec<(String, String)>,
}

/// The part of the environment that goes along.
pub(crate) fn carried_environment(order: &Order) -> Vec<(String, String)> {
    let mut carried: Vec<_> = env::vars()
        .filter(|(name, _)| {
            CARRIED.contains(&name.as_str()) || CARRIED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        })
        .collect();
    carried.push(("ECI_L1".into(), "1".into()));
    carried.extend(order.env.iter().cloned());
    carried
}

/// The signals that mean "stop". Blocked in every thread from now on, to be read from the descriptor.
pub(crate) fn take_stop_signals() -> Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        signals.add(signal);
    }
    signals.thread_block().context("block signals")?;
    SignalFd::new(&signals).context("create a signal descriptor")
}

enum Event {
    Frame(Frame),
    LinkEnded,
    Signal(i32),
}

/// The sending half of the link, shared by the threads that have something to say.
#[derive(Clone)]
struct Outlet(Arc<Mutex<UnixStream>>);

impl Outlet {
    /// A broken link shows at its reading end.
    fn send(&self, message: Message) {
        let mut link = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = Frame::new(1, message).write(&mut *link);
    }
}

/// Runs the command over the link and returns its exit code.
///
/// # Errors
/// When the link breaks, which means that the L1 host is gone.
pub(crate) fn run(link: &UnixStream, order: &Order) -> Result<i32> {
    let signals = take_stop_signals()?;
    let request = Request {
        argv: order.argv.clone(),
        env: carried_environment(order),
        cwd: env::current_dir().context("find the working directory")?,
    };
    let outlet = Outlet(Arc::new(Mutex::new(link.try_clone().context("share the link")?)));
    let (sender, events) = mpsc::channel();
    read_link(link.try_clone().context("share the link")?, sender.clone());
    read_signals(signals, sender);
    outlet.send(Message::Start(request));

    let room = Arc::new(Window::new(WINDOW_BYTES));
    read_stdin(Arc::clone(&room), outlet.clone());
    let mut sinks = Sinks::new(&outlet);
    let mut ending = Ending::new(order.time_limit);
    loop {
        match next(&events, ending.deadline) {
            Some(Event::Frame(frame)) => match frame.into_message()? {
                Message::Output(stream, bytes) => sinks.write(stream, bytes),
                Message::Credit(Stream::Stdin, n_bytes) => room.give(n_bytes),
                Message::Exit(code) => {
                    sinks.finish();
                    return Ok(ending.exit_code(code));
                }
                Message::Failed(code, text) => {
                    sinks.finish();
                    eprintln!("nested: {text}");
                    return Ok(ending.exit_code(code));
                }
                _ => {}
            },
            Some(Event::LinkEnded) => bail!("the L1 host stopped while the command ran"),
            Some(Event::Signal(number)) => ending.signalled(number, &outlet),
            None => ending.overdue(&outlet)?,
        }
    }
}

fn next(events: &Receiver<Event>, deadline: Option<Instant>) -> Option<Event> {
    let Some(deadline) = deadline else {
        return Some(events.recv().unwrap_or(Event::LinkEnded));
    };
    match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(event) => Some(event),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => Some(Event::LinkEnded),
    }
}

/// How far the command is from a forced end.
struct Ending {
    stage: Stage,
    /// When the next stage begins.
    deadline: Option<Instant>,
}

enum Stage {
    Running(Option<Duration>),
    /// A signal was passed on; the command may clean up. Holds the exit code to give when it does not.
    Signalled(i32),
    /// All its processes are being killed. Holds the exit code to give.
    Killed(i32),
}

impl Ending {
    fn new(limit: Option<Duration>) -> Self {
        Self {
            stage: Stage::Running(limit),
            deadline: limit.map(|limit| Instant::now() + limit),
        }
    }

    fn exit_code(&self, of_command: i32) -> i32 {
        match self.stage {
            Stage::Running(_) | Stage::Signalled(_) => of_command,
            Stage::Killed(code) => code,
        }
    }

    /// The first signal is for the command, the second one kills it.
    fn signalled(&mut self, number: i32, outlet: &Outlet) {
        match self.stage {
            Stage::Running(_) => {
                outlet.send(Message::Signal(number));
                self.stage = Stage::Signalled(128 + number);
                self.deadline = Some(Instant::now() + GRACE);
            }
            Stage::Signalled(code) => self.kill(code, outlet),
            Stage::Killed(_) => {}
        }
    }

    fn overdue(&mut self, outlet: &Outlet) -> Result<()> {
        match self.stage {
            Stage::Running(limit) => {
                let limit = limit.unwrap_or_default().as_secs();
                eprintln!("nested: the command exceeded its time limit of {limit} s and is killed");
                self.kill(TIME_LIMIT_CODE, outlet);
            }
            Stage::Signalled(code) => self.kill(code, outlet),
            Stage::Killed(_) => bail!(
                "the L1 host did not answer within {} s after the command was killed",
                ANSWER_LIMIT.as_secs()
            ),
        }
        Ok(())
    }

    fn kill(&mut self, code: i32, outlet: &Outlet) {
        outlet.send(Message::Kill);
        self.stage = Stage::Killed(code);
        self.deadline = Some(Instant::now() + ANSWER_LIMIT);
    }
}

fn read_link(mut link: UnixStream, events: Sender<Event>) {
    thread::spawn(move || {
        while let Ok(Some(frame)) = Frame::read(&mut link) {
            if events.send(Event::Frame(frame)).is_err() {
                return;
            }
        }
        let _ = events.send(Event::LinkEnded);
    });
}

fn read_signals(signals: SignalFd, events: Sender<Event>) {
    thread::spawn(move || {
        while let Ok(Some(signal)) = signals.read_signal() {
            let number = i32::try_from(signal.ssi_signo).unwrap_or(libc_sigterm());
            if events.send(Event::Signal(number)).is_err() {
                return;
            }
        }
    });
}

fn libc_sigterm() -> i32 {
    Signal::SIGTERM as i32
}

/// A terminal is not read: the command has none, and reading would stop a runner in the background.
fn read_stdin(room: Arc<Window>, outlet: Outlet) {
    if io::stdin().is_terminal() {
        outlet.send(Message::Stdin(Vec::new()));
        return;
    }
    thread::spawn(move || {
        let mut buffer = [0; CHUNK_BYTES];
        // Room is taken before reading, so that nothing is read that cannot be sent.
        while let Some(taken) = room.take(buffer.len()) {
            let length = io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .map(std::fs::File::from)
                .and_then(|mut stdin| stdin.read(&mut buffer[..taken]));
            match length {
                Ok(length) if length > 0 => {
                    outlet.send(Message::Stdin(buffer[..length].to_vec()));
                    room.give(u32::try_from(taken - length).unwrap_or(0));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    room.give(u32::try_from(taken).unwrap_or(0));
                }
                _ => break,
            }
        }
        outlet.send(Message::Stdin(Vec::new()));
    });
}

/// Standard output and error, each written by a thread of its own, so that a reader who stops reading does not keep
/// signals and the time limit from working. What waits here is bounded by the windows.
struct Sinks {
    stdout: (Sender<Vec<u8>>, JoinHandle<()>),
    stderr: (Sender<Vec<u8>>, JoinHandle<()>),
}

impl Sinks {
    fn new(outlet: &Outlet) -> Self {
        Self {
            stdout: sink(Stream::Stdout, io::stdout(), outlet.clone()),
            stderr: sink(Stream::Stderr, io::stderr(), outlet.clone()),
        }
    }

    fn write(&mut self, stream: Stream, bytes: Vec<u8>) {
        let (sender, _) = if stream == Stream::Stderr {
            &self.stderr
        } else {
            &self.stdout
        };
        // The thread is gone when nobody reads this stream any more.
        let _ = sender.send(bytes);
    }

    /// Waits until everything is written. From here on a signal ends this program at once.
    fn finish(self) {
        let _ = SigSet::all().thread_unblock();
        for (sender, thread) in [self.stdout, self.stderr] {
            drop(sender);
            let _ = thread.join();
        }
    }
}

fn sink(
    stream: Stream,
    mut to: impl Write + Send + 'static,
    outlet: Outlet,
) -> (Sender<Vec<u8>>, JoinHandle<()>) {
    let (sender, chunks) = mpsc::channel::<Vec<u8>>();
    let thread = thread::spawn(move || {
        for bytes in chunks {
            if to.write_all(&bytes).and_then(|()| to.flush()).is_err() {
                outlet.send(Message::Close(stream));
                return;
            }
            outlet.send(Message::Credit(
                stream,
                u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            ));
        }
    });
    (sender, thread)
}
