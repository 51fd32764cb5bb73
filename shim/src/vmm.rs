//! The sandbox's VMM: starts eci-vmm, speaks control messages with it, knows why it ended. The only user of crate `vmm`
//! besides the slice layout.
//!
//! One task supervises the process: it receives events, kills when asked or when the handle is dropped, and reaps. The
//! VMM counts as already broken into: its messages are bounded by crate `vmm`, and it cannot make the shim wait longer
//! than a deadline.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    fs::OpenOptions,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    process::Child,
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use vmm::{
    config::{Extent, SliceDisk, VmConfig},
    control::{self, Command, ControlError, Event, ExitReason, OwnerSocket},
};

use crate::{
    error::{Error, ErrorKind, Result},
    sys::{self, ChildKind},
};

/// For one control command, the VMM's answer included.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// For a snapshot to be written to its files.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);
/// From the kill command, or the end of the control socket, to the end of the process; then SIGKILL.
const EXIT_TIMEOUT: Duration = Duration::from_secs(3);
/// Connections of the guest that wait to be looked at; more are closed.
const MAX_WAITING_CONNECTIONS: usize = 4;
/// Longest text kept of what the VMM says about its end.
const MAX_MESSAGE_CHARS: usize = 2000;

/// How a VMM process is made.
#[derive(Debug, Clone)]
pub struct VmmSpec {
    /// The eci-vmm binary.
    pub vmm_path: PathBuf,
    /// Its standard output and error, appended to.
    pub log_path: PathBuf,
}

/// A VMM that was made.
#[derive(Debug)]
pub struct Launched {
    /// The owner's end of the control socket.
    pub control: OwnerSocket,
    /// The process; none when the other end is not a child of ours.
    pub child: Option<Child>,
}

/// Makes VMMs. [`launch_process`] in the product.
pub type Launcher = Arc<dyn Fn(&VmmSpec) -> Result<Launched> + Send + Sync>;

/// Starts the VMM process with its end of a new control socket as descriptor 3 and nothing else.
///
/// # Errors
/// The binary or the log cannot be opened.
pub fn launch_process(spec: &VmmSpec) -> Result<Launched> {
    let (control, theirs) = control::pair()
        .map_err(|error| Error::with_source(ErrorKind::Internal, "create control socket", error))?;
    let open_log = || {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&spec.log_path)
            .map_err(|error| Error::io(format!("open log {}", spec.log_path.display()), error))
    };
    let mut command = std::process::Command::new(&spec.vmm_path);
    command
        .env_clear()
        .stdin(Stdio::null())
        .stdout(open_log()?)
        .stderr(open_log()?);
    sys::pass_descriptor(&mut command, &theirs, ChildKind::Dependent);
    let mut command = tokio::process::Command::from(command);
    let child = command
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Error::io(format!("start VMM {}", spec.vmm_path.display()), error))?;
    Ok(Launched {
        control,
        child: Some(child),
    })
}

/// Why a VMM ended, as far as it could be learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// The VMM said so.
    Reported(ExitReason),
    /// It ended without a word.
    Crashed {
        /// Exit status or signal of the process, or what was wrong on the control socket.
        message: String,
    },
}

impl VmExit {
    /// A stable name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Reported(ExitReason::Shutdown) => "shutdown",
            Self::Reported(ExitReason::Reset) => "reset",
            Self::Reported(ExitReason::GuestPanic) => "guest_panic",
            Self::Reported(ExitReason::Killed) => "killed",
            Self::Reported(ExitReason::KvmError { .. }) => "kvm_error",
            Self::Reported(ExitReason::StartFailed { .. }) => "start_failed",
            Self::Reported(ExitReason::SnapshotRefused { .. }) => "snapshot_refused",
            Self::Crashed { .. } => "vmm_crash",
        }
    }

    /// What is known beyond the name; bounded and printable.
    pub fn message(&self) -> String {
        let text = match self {
            Self::Reported(ExitReason::KvmError { vcpu, message }) => format!("vCPU {vcpu}: {message}"),
            Self::Reported(ExitReason::StartFailed { message } | ExitReason::SnapshotRefused { message })
            | Self::Crashed { message } => message.clone(),
            Self::Reported(_) => String::new(),
        };
        text.chars()
            .filter(|c| !c.is_control())
            .take(MAX_MESSAGE_CHARS)
            .collect()
    }
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.message();
        if message.is_empty() {
            f.write_str(self.name())
        } else {
            write!(f, "{}: {message}", self.name())
        }
    }
}

/// Counters of a VMM, by name.
pub type VmmCounters = BTreeMap<String, u64>;

/// Counters where they were asked for.
type Answer = std::result::Result<VmmCounters, String>;

#[derive(Debug)]
struct Shared {
    control: AsyncFd<OwnerSocket>,
    next_id: AtomicU64,
    /// Commands without an answer yet.
    pending: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    exit: watch::Receiver<Option<VmExit>>,
}

/// Sends commands; cheap to clone.
#[derive(Debug, Clone)]
pub struct VmmClient {
    shared: Arc<Shared>,
}

/// A running VMM. Dropping it kills the VM.
#[derive(Debug)]
pub struct Vmm {
    client: VmmClient,
    pid: Option<u32>,
    kill: Option<oneshot::Sender<()>>,
    connections: mpsc::Receiver<(u32, OwnedFd)>,
    started: Option<oneshot::Receiver<()>>,
}

impl Vmm {
    /// Takes a launched VMM over and begins to supervise it.
    ///
    /// # Errors
    /// The control socket cannot be polled.
    pub fn supervise(launched: Launched) -> Result<Self> {
        let (exit_sender, exit) = watch::channel(None);
        let (kill, kill_asked) = oneshot::channel();
        let (started_sender, started) = oneshot::channel();
        let (connection_sender, connections) = mpsc::channel(MAX_WAITING_CONNECTIONS);
        let pid = launched.child.as_ref().and_then(Child::id);
        let control = sys::poll_control(launched.control)
            .map_err(|error| Error::io("poll the control socket", error))?;
        let shared = Arc::new(Shared {
            control,
            next_id: AtomicU64::new(1),
            pending: Mutex::default(),
            exit,
        });
        let supervisor = Supervisor {
            shared: Arc::clone(&shared),
            started: Some(started_sender),
            connections: connection_sender,
            reported: None,
        };
        tokio::spawn(supervisor.run(launched.child, kill_asked, exit_sender));
        Ok(Self {
            client: VmmClient { shared },
            pid,
            kill: Some(kill),
            connections,
            started: Some(started),
        })
    }

    /// For commands.
    pub fn client(&self) -> VmmClient {
        self.client.clone()
    }

    /// The VMM's process id, if it is a child process.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Builds and starts the virtual machine. `fds` as in `vmm::config::FdRole`.
    ///
    /// # Errors
    /// `Unavailable` with the VMM's own reason when it ended instead.
    pub async fn start(&mut self, config: VmConfig, fds: &[OwnedFd]) -> Result<()> {
        self.client.send(&Command::Start(Box::new(config)), fds).await?;
        let started = self
            .started
            .take()
            .ok_or_else(|| Error::new(ErrorKind::FailedPrecondition, "the VM was started before"))?;
        match started.await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.client.ended().await),
        }
    }

    /// Waits until the guest connects to host port `port`.
    ///
    /// # Errors
    /// `Unavailable` when the VM ended instead.
    pub async fn guest_connection(&mut self, port: u32) -> Result<OwnedFd> {
        while let Some((connected, socket)) = self.connections.recv().await {
            if connected == port {
                return Ok(socket);
            }
        }
        Err(self.client.ended().await)
    }

    /// Ends the VM now; returns at once.
    pub fn kill(&mut self) {
        if let Some(kill) = self.kill.take() {
            // Fails only when the VM has ended already.
            let _ = kill.send(());
        }
    }
}

impl VmmClient {
    /// Waits for the end of the VM, its process reaped.
    pub async fn exited(&self) -> VmExit {
        let mut exit = self.shared.exit.clone();
        let ended = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| exit.clone());
        ended.unwrap_or_else(|| VmExit::Crashed {
            message: "its supervision ended".into(),
        })
    }

    async fn ended(&self) -> Error {
        Error::new(
            ErrorKind::Unavailable,
            format!("the VM has ended: {}", self.exited().await),
        )
    }

    /// Opens a connection to a port of the guest.
    ///
    /// # Errors
    /// The guest refuses, or does not answer in time.
    pub async fn connect(&self, port: u32) -> Result<UnixStream> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()
            .map_err(|error| Error::io("create a socket pair for a guest connection", error))?;
        let ours = ours
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(ours))
            .map_err(|error| Error::io("poll a guest connection", error))?;
        self.request(|id| Command::Connect { id, port }, &[theirs.into()])
            .await
            .map_err(|error| error.context(format!("connect to guest port {port}")))?;
        Ok(ours)
    }

    /// Maps files, one descriptor per extent.
    ///
    /// # Errors
    /// The VMM refuses, or does not answer in time.
    pub async fn add_extents(&self, disk: SliceDisk, extents: Vec<Extent>, fds: &[OwnedFd]) -> Result<()> {
        self.request(|id| Command::AddExtents { id, disk, extents }, fds)
            .await
    }

    /// Unmaps a range.
    ///
    /// # Errors
    /// The VMM refuses, or does not answer in time.
    pub async fn remove_extents(
        &self,
        disk: SliceDisk,
        disk_offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<()> {
        self.request(
            |id| Command::RemoveExtents {
                id,
                disk,
                disk_offset_bytes,
                length_bytes,
            },
            &[],
        )
        .await
    }

    /// Stops the guest.
    ///
    /// # Errors
    /// The VMM refuses, or does not answer in time.
    pub async fn pause(&self) -> Result<()> {
        self.request(|id| Command::Pause { id }, &[]).await
    }

    /// Lets it run again.
    ///
    /// # Errors
    /// The VMM refuses, or does not answer in time.
    pub async fn resume(&self) -> Result<()> {
        self.request(|id| Command::Resume { id }, &[]).await
    }

    /// Takes a snapshot of the paused guest. It may be resumed then, but the files are complete only after
    /// [`VmmClient::finish_snapshot`].
    ///
    /// # Errors
    /// The VMM refuses, or does not answer in time.
    pub async fn begin_snapshot(&self, state: OwnedFd, memory: OwnedFd) -> Result<()> {
        self.request(|id| Command::Snapshot { id }, &[state, memory])
            .await
    }

    /// Waits until the files of the last snapshot are complete.
    ///
    /// # Errors
    /// They are not and will not be.
    pub async fn finish_snapshot(&self) -> Result<()> {
        self.request_within(SNAPSHOT_TIMEOUT, |id| Command::FinishSnapshot { id }, &[])
            .await
    }

    /// Makes vCPUs until there are so many; the guest has to start them.
    ///
    /// # Errors
    /// The VMM refuses, or does not answer in time.
    pub async fn add_vcpus(&self, n_vcpus: u32) -> Result<()> {
        self.request(|id| Command::AddVcpus { id, n_vcpus }, &[]).await
    }

    /// Asks the guest to have so much memory plugged; [`VmmClient::counters`] tell how far it is.
    ///
    /// # Errors
    /// The VMM refuses, or does not answer in time.
    pub async fn resize_memory(&self, plugged_mib: u64) -> Result<()> {
        self.request(|id| Command::ResizeMemory { id, plugged_mib }, &[])
            .await
    }

    /// What the VMM counts.
    ///
    /// # Errors
    /// The VMM does not answer in time.
    pub async fn counters(&self) -> Result<VmmCounters> {
        self.ask_within(COMMAND_TIMEOUT, |id| Command::Stats { id }, &[])
            .await
    }

    async fn request(&self, command: impl FnOnce(u64) -> Command, fds: &[OwnedFd]) -> Result<()> {
        self.request_within(COMMAND_TIMEOUT, command, fds).await
    }

    async fn request_within(
        &self,
        time: Duration,
        command: impl FnOnce(u64) -> Command,
        fds: &[OwnedFd],
    ) -> Result<()> {
        self.ask_within(time, command, fds).await.map(drop)
    }

    async fn ask_within(
        &self,
        time: Duration,
        command: impl FnOnce(u64) -> Command,
        fds: &[OwnedFd],
    ) -> Result<VmmCounters> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer_sender, answer) = oneshot::channel();
        self.shared.pending().insert(id, answer_sender);
        let exchange = async {
            self.send(&command(id), fds).await?;
            match answer.await {
                Ok(Ok(counters)) => Ok(counters),
                Ok(Err(message)) => Err(Error::new(
                    ErrorKind::Internal,
                    format!("the VMM refused: {message}"),
                )),
                Err(_) => Err(self.ended().await),
            }
        };
        let result = timeout(time, exchange).await;
        self.shared.pending().remove(&id);
        result.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::DeadlineExceeded,
                format!("no answer from the VMM within {} s", time.as_secs()),
            ))
        })
    }

    async fn send(&self, command: &Command, fds: &[OwnedFd]) -> Result<()> {
        match self.shared.send(command, fds).await {
            Ok(()) => Ok(()),
            Err(ControlError::Closed) => Err(self.ended().await),
            Err(error) => Err(Error::with_source(
                ErrorKind::Internal,
                "send a control message to the VMM",
                error,
            )),
        }
    }
}

impl Shared {
    fn pending(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, command: &Command, fds: &[OwnedFd]) -> std::result::Result<(), ControlError> {
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        loop {
            let mut ready = self
                .control
                .writable()
                .await
                .map_err(|source| ControlError::Socket {
                    operation: "poll",
                    source,
                })?;
            match self.control.get_ref().try_send(command, &borrowed) {
                Err(ControlError::WouldBlock) => ready.clear_ready(),
                sent => return sent,
            }
        }
    }

    async fn receive(&self) -> std::result::Result<(Event, Vec<OwnedFd>), ControlError> {
        loop {
            let mut ready = self
                .control
                .readable()
                .await
                .map_err(|source| ControlError::Socket {
                    operation: "poll",
                    source,
                })?;
            match self.control.get_ref().try_recv() {
                Err(ControlError::WouldBlock) => ready.clear_ready(),
                received => return received,
            }
        }
    }
}

struct Supervisor {
    shared: Arc<Shared>,
    started: Option<oneshot::Sender<()>>,
    connections: mpsc::Sender<(u32, OwnedFd)>,
    reported: Option<ExitReason>,
}

impl Supervisor {
    async fn run(
        mut self,
        child: Option<Child>,
        mut kill_asked: oneshot::Receiver<()>,
        exit: watch::Sender<Option<VmExit>>,
    ) {
        let ended = tokio::select! {
            // Asked to, or the handle was dropped.
            _ = &mut kill_asked => None,
            ended = self.receive_to_the_end() => Some(ended),
        };
        let was_asked = ended.is_none();
        let ended = match ended {
            Some(ended) => ended,
            None => {
                let shared = Arc::clone(&self.shared);
                let orderly = async {
                    match shared.send(&Command::Kill, &[]).await {
                        Ok(()) => self.receive_to_the_end().await,
                        Err(error) => error,
                    }
                };
                // Not answered in time: the signal below follows.
                timeout(EXIT_TIMEOUT, orderly)
                    .await
                    .unwrap_or(ControlError::Closed)
            }
        };
        let status = match child {
            Some(mut child) => reap(&mut child).await,
            None => String::from("it closed its control socket"),
        };
        let reason = match self.reported.take() {
            Some(reason) => VmExit::Reported(reason),
            None if was_asked => VmExit::Reported(ExitReason::Killed),
            None if matches!(ended, ControlError::Closed) => VmExit::Crashed { message: status },
            None => VmExit::Crashed {
                message: format!("{ended}; {status}"),
            },
        };
        exit.send_replace(Some(reason));
        // Those who wait for an answer learn of the end when their sender goes; `exit` is set by then.
        self.shared.pending().clear();
    }

    /// Handles events until there are no more. A message that cannot be understood ends the VM.
    async fn receive_to_the_end(&mut self) -> ControlError {
        loop {
            match self.shared.receive().await {
                Ok((event, fds)) => self.on_event(event, fds),
                Err(error) => return error,
            }
        }
    }

    fn on_event(&mut self, event: Event, fds: Vec<OwnedFd>) {
        match event {
            Event::Started => {
                if let Some(started) = self.started.take() {
                    let _ = started.send(());
                }
            }
            Event::GuestConnected { port } => {
                if let Some(socket) = fds.into_iter().next()
                    && self.connections.try_send((port, socket)).is_err()
                {
                    tracing::debug!(port, "a connection of the guest was closed: nobody waits for it");
                }
            }
            Event::Done { id } => self.answer(id, Ok(VmmCounters::new())),
            Event::Failed { id, message } => {
                let bounded = message
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(MAX_MESSAGE_CHARS)
                    .collect();
                self.answer(id, Err(bounded));
            }
            Event::Stats { id, counters } => self.answer(id, Ok(counters)),
            Event::Exited(reason) => {
                self.reported.get_or_insert(reason);
                close_elsewhere(fds);
            }
        }
    }

    fn answer(&self, id: u64, answer: Answer) {
        let waiting = self.shared.pending().remove(&id);
        match waiting {
            // The asker may have given up.
            Some(sender) => drop(sender.send(answer)),
            None => tracing::debug!(id, "the VMM answered a command that nobody waits for"),
        }
    }
}

/// Closes what is left of a VM on a thread of its own: the kernel takes its time (`Event::Exited`), and the end of the
/// sandbox need not wait for it. The thread ends with this process at the latest.
fn close_elsewhere(remains: Vec<OwnedFd>) {
    if remains.is_empty() {
        return;
    }
    let thread = std::thread::Builder::new().name("vm-remains".into());
    if let Err(error) = thread.spawn(move || drop(remains)) {
        // They were closed here and now, with the closure.
        tracing::debug!(%error, "no thread to close what is left of the VM");
    }
}

/// Waits for the end of the process, kills it when that takes too long, and tells how it ended.
async fn reap(child: &mut Child) -> String {
    let status = match timeout(EXIT_TIMEOUT, child.wait()).await {
        Ok(status) => status,
        Err(_) => match child.start_kill() {
            Ok(()) => child.wait().await,
            Err(error) => Err(error),
        },
    };
    match status {
        Ok(status) => format!("its process ended: {status}"),
        Err(error) => format!("its process could not be reaped: {error}"),
    }
}

/// Checks that the VMM binary can be there; the kernel decides the rest when it is started.
///
/// # Errors
/// `InvalidArgument` for a path that is not absolute.
pub fn check_absolute(field: &str, path: &str) -> Result<PathBuf> {
    let path = Path::new(path);
    if path.is_absolute() {
        Ok(path.to_owned())
    } else {
        Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("options.{field} is {:?}: give an absolute path", path.display()),
        ))
    }
}
