//! An L1 host that stays up: a supervisor process owns it and lets any number of runners in.
//!
//! The supervisor listens on `target/nested/control.sock`, gives each runner a session number of its own, and passes
//! frames on. It ends with its L1 host, on `down`, when its socket is removed (as by `cargo clean`), or when nobody
//! has used it for a long time. QEMU dies with it, however it dies.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

use crate::machine::{Machine, Shape};
use crate::place::Place;
use crate::sys;
use crate::wire::{Frame, Message};

/// A host nobody has used for so long is forgotten.
const IDLE_LIMIT: Duration = Duration::from_secs(2 * 60 * 60);
/// How often the supervisor looks whether it is still wanted.
const LOOK_INTERVAL_MS: u16 = 2000;
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(20);

/// Connects to this checkout's L1 host, if one is up.
pub(crate) fn connect(place: &Place) -> Result<Option<UnixStream>> {
    let socket = place.socket();
    match UnixStream::connect(reachable_path(place)?.1) {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // Its supervisor was killed.
            let _ = fs::remove_file(&socket);
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("connect to {}", socket.display())),
    }
}

/// The socket's path through its open directory: a socket address has room for 107 bytes only.
fn reachable_path(place: &Place) -> Result<(File, PathBuf)> {
    let dir = File::open(&place.run_dir).with_context(|| format!("open {}", place.run_dir.display()))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/control.sock", dir.as_raw_fd()));
    Ok((dir, path))
}

/// Boots an L1 host that stays up; returns when it takes commands. `false` if there was one already.
pub(crate) fn up(place: &Place, arguments: &[String]) -> Result<bool> {
    let _lock = lock(place)?;
    if connect(place)?.is_some() {
        return Ok(false);
    }
    let log_path = place.run_dir.join("supervisor.log");
    let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("supervise")
        .args(arguments)
        .current_dir(&place.checkout);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    sys::lead_session(&mut command);
    let mut supervisor = command.spawn().context("start the supervisor")?;
    let mut said = String::new();
    if let Some(mut stdout) = supervisor.stdout.take() {
        stdout
            .read_to_string(&mut said)
            .context("wait for the supervisor")?;
    }
    if said != READY {
        let _ = supervisor.wait();
        bail!("{}", fs::read_to_string(&log_path).unwrap_or_default().trim_end());
    }
    Ok(true)
}

const READY: &str = "ready\n";

fn lock(place: &Place) -> Result<Flock<File>> {
    let path = place.run_dir.join("lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("lock {}", path.display()))
}

/// Takes this checkout's L1 host down; `false` if none was up.
pub(crate) fn down(place: &Place) -> Result<bool> {
    let _lock = lock(place)?;
    let Some(mut link) = connect(place)? else {
        return Ok(false);
    };
    let supervisor = getsockopt(&link, PeerCredentials)
        .context("find the supervisor's pid")?
        .pid();
    link.set_read_timeout(Some(SHUTDOWN_LIMIT))
        .context("set a time limit")?;
    // The supervisor's end closes the link.
    let asked = Frame::new(0, Message::Shutdown).write(&mut link);
    if asked.is_err() || io::copy(&mut link, &mut io::sink()).is_err() {
        kill(Pid::from_raw(supervisor), Signal::SIGKILL)
            .context("kill the supervisor, which does not answer")?;
        let _ = fs::remove_file(place.socket());
    }
    Ok(true)
}

type Clients = Arc<Mutex<HashMap<u32, Sender<Frame>>>>;

/// The life of the supervisor. Says "ready" on standard output, which it then closes.
pub(crate) fn supervise(place: &Place, shape: &Shape) -> Result<()> {
    let machine = Machine::boot(place, shape)?;
    let socket = place.socket();
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(reachable_path(place)?.1)
        .with_context(|| format!("listen on {}", socket.display()))?;
    let socket_inode = fs::metadata(&socket)
        .with_context(|| format!("look at {}", socket.display()))?
        .ino();
    say_ready()?;
    let result = route(&machine, &listener, || {
        fs::metadata(&socket).is_ok_and(|metadata| metadata.ino() == socket_inode)
    });
    if fs::metadata(&socket).is_ok_and(|metadata| metadata.ino() == socket_inode) {
        let _ = fs::remove_file(&socket);
    }
    machine.shut_down();
    result
}

/// The starter reads until nobody holds the pipe any more.
fn say_ready() -> Result<()> {
    io::stdout()
        .write_all(READY.as_bytes())
        .context("say that the host is ready")?;
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context("open /dev/null")?;
    nix::unistd::dup2_stdout(null).context("close standard output")
}

fn route(machine: &Machine, listener: &UnixListener, is_wanted: impl Fn() -> bool) -> Result<()> {
    let clients: Clients = Arc::default();
    let to_machine = Arc::new(Mutex::new(machine.link.try_clone().context("share the link")?));
    // Closed by the thread that holds the other end: the L1 host is gone, or somebody wants it to be.
    let (end, end_seen) = UnixStream::pair().context("create a pipe")?;
    let end = Arc::new(end);
    {
        let (mut from_machine, clients, end) =
            (machine.link.try_clone()?, Arc::clone(&clients), Arc::clone(&end));
        thread::spawn(move || {
            while let Ok(Some(frame)) = Frame::read(&mut from_machine) {
                deliver(&clients, frame);
            }
            let _ = end.shutdown(std::net::Shutdown::Both);
        });
    }
    let mut last_used = Instant::now();
    let mut session = 0;
    loop {
        let mut waiting = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(end_seen.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut waiting, PollTimeout::from(LOOK_INTERVAL_MS)).context("wait for runners")?;
        if waiting[1].any().unwrap_or(false) {
            return Ok(());
        }
        if waiting[0].any().unwrap_or(false) {
            let (link, _) = listener.accept().context("accept a runner")?;
            session += 1;
            serve_client(link, session, &clients, &to_machine, &end)?;
        }
        if !lock_clients(&clients).is_empty() {
            last_used = Instant::now();
        }
        ensure!(
            last_used.elapsed() < IDLE_LIMIT,
            "nobody has used this L1 host for a long time: it goes down"
        );
        ensure!(is_wanted(), "the control socket is gone: the L1 host goes down");
    }
}

fn deliver(clients: &Clients, frame: Frame) {
    let mut clients = lock_clients(clients);
    let (id, ends) = (frame.session, frame.ends_session());
    // A runner that is gone has had its session killed already.
    if let Some(client) = clients.get(&id) {
        let _ = client.send(frame);
    }
    if ends {
        clients.remove(&id);
    }
}

/// Two threads for each runner, one for each direction. What waits for a slow runner is bounded by its windows.
fn serve_client(
    link: UnixStream,
    session: u32,
    clients: &Clients,
    to_machine: &Arc<Mutex<UnixStream>>,
    end: &Arc<UnixStream>,
) -> Result<()> {
    let (sender, frames) = mpsc::channel::<Frame>();
    lock_clients(clients).insert(session, sender);
    let mut to_client = link.try_clone().context("share a runner's link")?;
    thread::spawn(move || {
        for frame in frames {
            if frame.write(&mut to_client).is_err() {
                break;
            }
        }
        let _ = to_client.shutdown(std::net::Shutdown::Both);
    });
    let (clients, to_machine, end) = (Arc::clone(clients), Arc::clone(to_machine), Arc::clone(end));
    thread::spawn(move || {
        let mut from_client = link;
        while let Ok(Some(mut frame)) = Frame::read(&mut from_client) {
            if frame.is_shutdown() {
                let _ = end.shutdown(std::net::Shutdown::Both);
                // The asker waits for our end.
                thread::park();
            }
            frame.session = session;
            send(&to_machine, &frame);
        }
        if lock_clients(&clients).remove(&session).is_some() {
            send(&to_machine, &Frame::new(session, Message::Kill));
        }
    });
    Ok(())
}

/// A broken link to the L1 host shows at its reading end.
fn send(link: &Mutex<UnixStream>, frame: &Frame) {
    let mut link = link.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = frame.write(&mut *link);
}

fn lock_clients(clients: &Clients) -> MutexGuard<'_, HashMap<u32, Sender<Frame>>> {
    clients.lock().unwrap_or_else(PoisonError::into_inner)
}
