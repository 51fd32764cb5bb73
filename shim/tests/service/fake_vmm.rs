//! The VMM's end of the control socket, in this process.

use std::{
    io::Write,
    os::fd::{AsFd, OwnedFd},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::stream;
use protocol::guest_ttrpc;
use rustix::net::Shutdown;
use shim::vmm::{Launched, Launcher};
use tokio::runtime::Handle;
use ttrpc::r#async::{Server, transport::Listener};
use vmm::{
    config::{Extent, Origin, SliceDisk, VmConfig},
    control::{self, Command, Event, ExitReason, VmmSocket},
};

use crate::fake_guest::FakeGuest;

/// How a VM behaves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// Boots.
    Boots,
    /// Starts, and its guest never becomes ready.
    NeverReady,
    /// Starts, and its guest panics.
    Panics,
    /// Refuses its configuration.
    RefusesStart,
    /// Refuses a snapshot, and boots.
    RefusesSnapshot,
    /// Dies of a snapshot, and boots.
    DiesOfSnapshot,
    /// Connects to the guest, where nobody answers.
    DeafGuest,
    /// Answers no command but Start.
    Hangs,
}

/// A VM's vCPUs and plugged memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) n_vcpus: u32,
    pub(crate) plugged_mib: u64,
}

/// What the test sees of the VM.
pub(crate) struct FakeVm {
    pub(crate) guest: Arc<FakeGuest>,
    /// The configuration of Start, and how many descriptors came with it.
    pub(crate) started: Mutex<Option<(VmConfig, usize)>>,
    pub(crate) extents: Mutex<Vec<(SliceDisk, Extent)>>,
    pub(crate) n_add_commands: Mutex<usize>,
    /// What it was made to have while it ran.
    pub(crate) size: Arc<Mutex<Size>>,
    /// Plugged memory that its guest does not give back.
    pub(crate) stuck_mib: AtomicU64,
    socket: VmmSocket,
    /// Connections to the guest API.
    api: Mutex<Vec<UnixStream>>,
}

impl FakeVm {
    /// The VMM process dies without a word.
    pub(crate) fn crash(&self) {
        rustix::net::shutdown(self.socket.as_fd(), Shutdown::Both).unwrap();
        self.cut_guest();
    }

    /// The guest API ends, the VM goes on.
    pub(crate) fn cut_guest(&self) {
        for connection in self.api.lock().unwrap().drain(..) {
            // The other end may be closed.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }

    fn end(&self, reason: ExitReason) {
        // The other end may be closed.
        let _ = self.socket.send(&Event::Exited(reason), &[]);
        let _ = rustix::net::shutdown(self.socket.as_fd(), Shutdown::Both);
        self.cut_guest();
        self.guest.kill_all();
    }

    fn say(&self, event: &Event) {
        let _ = self.socket.send(event, &[]);
    }

    fn run(self: &Arc<Self>, behaviour: Behaviour, handle: &Handle) {
        let _context = handle.enter();
        while let Ok((command, fds)) = self.socket.recv() {
            match command {
                Command::Start(config) => {
                    self.size.lock().unwrap().n_vcpus = config.n_vcpus;
                    let is_snapshot = matches!(config.origin, Origin::Snapshot { .. });
                    *self.started.lock().unwrap() = Some((*config, fds.len()));
                    if behaviour == Behaviour::RefusesStart {
                        return self.end(ExitReason::StartFailed {
                            message: "open /dev/kvm: no such thing".into(),
                        });
                    }
                    if is_snapshot && behaviour == Behaviour::RefusesSnapshot {
                        return self.end(ExitReason::SnapshotRefused {
                            message: "another processor".into(),
                        });
                    }
                    self.say(&Event::Started);
                    match behaviour {
                        Behaviour::DiesOfSnapshot if is_snapshot => return self.end(ExitReason::GuestPanic),
                        // Its guest was ready before.
                        _ if is_snapshot => {}
                        Behaviour::NeverReady => {}
                        Behaviour::Panics => return self.end(ExitReason::GuestPanic),
                        _ => {
                            let (ours, theirs) = UnixStream::pair().unwrap();
                            drop(ours);
                            let event = Event::GuestConnected {
                                port: protocol::READY_PORT,
                            };
                            self.socket.send(&event, &[theirs.as_fd()]).unwrap();
                        }
                    }
                }
                Command::Kill => return self.end(ExitReason::Killed),
                _ if behaviour == Behaviour::Hangs => {}
                Command::Connect { id, port } => {
                    let socket = fds.into_iter().next().unwrap();
                    match port {
                        protocol::GUEST_API_PORT if behaviour == Behaviour::DeafGuest => {
                            self.api.lock().unwrap().push(socket.into());
                        }
                        protocol::GUEST_API_PORT => self.serve(socket),
                        protocol::STDIO_PORT => self.guest.stream(socket),
                        port => {
                            let message = format!("connection refused by guest port {port}");
                            self.say(&Event::Failed { id, message });
                            continue;
                        }
                    }
                    self.say(&Event::Done { id });
                }
                Command::Snapshot { id } => {
                    for (file, text) in fds.into_iter().zip(["state", "memory"]) {
                        std::fs::File::from(file).write_all(text.as_bytes()).unwrap();
                    }
                    self.say(&Event::Done { id });
                }
                Command::AddExtents { id, disk, extents } => {
                    assert_eq!(extents.len(), fds.len());
                    *self.n_add_commands.lock().unwrap() += 1;
                    let mut mapped = self.extents.lock().unwrap();
                    for extent in extents {
                        extent.validate().unwrap();
                        mapped.push((disk, extent));
                    }
                    self.say(&Event::Done { id });
                }
                Command::RemoveExtents { id, .. }
                | Command::Pause { id }
                | Command::FinishSnapshot { id }
                | Command::Resume { id }
                | Command::SetBalloon { id, .. } => self.say(&Event::Done { id }),
                Command::ResizeMemory { id, plugged_mib } => {
                    self.size.lock().unwrap().plugged_mib =
                        plugged_mib.max(self.stuck_mib.load(Ordering::Relaxed));
                    self.say(&Event::Done { id });
                }
                Command::AddVcpus { id, n_vcpus } => {
                    let mut size = self.size.lock().unwrap();
                    size.n_vcpus = size.n_vcpus.max(n_vcpus);
                    self.say(&Event::Done { id });
                }
                Command::Stats { id } => {
                    let size = *self.size.lock().unwrap();
                    let counters = [
                        ("vcpus", u64::from(size.n_vcpus)),
                        ("mem_plugged_bytes", size.plugged_mib << 20),
                    ];
                    self.say(&Event::Stats {
                        id,
                        counters: counters.map(|(name, value)| (name.to_owned(), value)).into(),
                    });
                }
            }
        }
        self.guest.kill_all();
    }

    fn serve(self: &Arc<Self>, socket: OwnedFd) {
        let socket = UnixStream::from(socket);
        self.api.lock().unwrap().push(socket.try_clone().unwrap());
        socket.set_nonblocking(true).unwrap();
        let socket = tokio::net::UnixStream::from_std(socket).unwrap();
        let guest = Arc::clone(&self.guest);
        let vm = Arc::clone(self);
        tokio::spawn(async move {
            let mut power_off = guest.power_off.subscribe();
            // A listener of one connection.
            let once = Listener::new(stream::iter([Ok(socket)]));
            let mut server = Server::new()
                .add_listener(once)
                .register_service(guest_ttrpc::create_guest(guest));
            server.start().await.unwrap();
            if power_off.wait_for(|off| *off).await.is_ok() {
                vm.end(ExitReason::Shutdown);
            }
        });
    }
}

/// Makes fake VMs; the last one is in the returned slot.
pub(crate) fn launcher(
    behaviour: Behaviour,
    hang_signals: bool,
) -> (Launcher, Arc<Mutex<Option<Arc<FakeVm>>>>) {
    let slot = Arc::new(Mutex::new(None));
    let last = Arc::clone(&slot);
    let launcher = Arc::new(move |_: &_| {
        let (control, socket) = control::pair().unwrap();
        let size = Arc::<Mutex<Size>>::default();
        let vm = Arc::new(FakeVm {
            guest: Arc::new(FakeGuest::new(hang_signals, Arc::clone(&size))),
            size,
            stuck_mib: AtomicU64::new(0),
            started: Mutex::default(),
            extents: Mutex::default(),
            n_add_commands: Mutex::default(),
            socket,
            api: Mutex::default(),
        });
        *slot.lock().unwrap() = Some(Arc::clone(&vm));
        let handle = Handle::current();
        std::thread::spawn(move || vm.run(behaviour, &handle));
        Ok(Launched { control, child: None })
    });
    (launcher, last)
}
