//! A guest in a virtual machine, its vsock ports as Unix sockets.

use std::{
    env,
    fs::{self, File},
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use protocol::{GUEST_API_PORT, READY_PORT, STDIO_PORT};
use vmm::{
    config::{Extent, Origin, VmConfig},
    control::{self, Command as Order, Event, OwnerSocket},
};

use crate::framework::{Guest, image};

/// CPUs of the machine.
pub(crate) const N_VCPUS: u32 = 2;
/// An emulated machine boots slowly.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);

/// How much memory a machine has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) memory_mib: u64,
    pub(crate) hotplug_mib: u64,
}

/// Runs `test` with a guest; says so when this machine cannot have one.
#[allow(dead_code, reason = "each test program uses its part")]
pub(crate) fn run(test: impl AsyncFnOnce(&Guest)) {
    let size = Size {
        memory_mib: 256,
        hotplug_mib: 0,
    };
    run_sized(size, async |_machine, guest| test(guest).await);
}

/// Runs `test` with a machine of that size and its guest; says so when this machine cannot have one.
pub(crate) fn run_sized(size: Size, test: impl AsyncFnOnce(&Machine, &Guest)) {
    let files = match Files::find() {
        Ok(files) => files,
        Err(missing) => {
            eprintln!("NOT RUN: this needs {missing}");
            return;
        }
    };
    let machine = Machine::boot(files, size);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let guest = Guest::connect(machine.directory.path(), N_VCPUS).await;
        test(&machine, &guest).await;
    });
}

/// What a machine is made of.
struct Files {
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Files {
    fn find() -> Result<Self, String> {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has_flag = cpu.split_whitespace().any(|word| word == "vmx" || word == "svm");
        if !has_flag || File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Err("KVM".into());
        }
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let file = |variable: &str, path: &str| {
            let path = env::var_os(variable).map_or_else(|| target.join(path), PathBuf::from);
            if path.exists() {
                Ok(path)
            } else {
                Err(format!("{} (make build)", path.display()))
            }
        };
        Ok(Self {
            vmm: file("ECI_VMM", "release/eci-vmm")?,
            kernel: file("ECI_KERNEL", "guest/vmlinux")?,
            initramfs: file("ECI_INITRAMFS", "guest/initramfs.cpio")?,
        })
    }
}

/// Ids of orders from here on are answered to who gave them.
const FIRST_ID: u64 = 1 << 32;

pub(crate) struct Machine {
    files: Arc<Files>,
    size: Size,
    child: Child,
    directory: tempfile::TempDir,
    owner: Arc<OwnerSocket>,
    answers: Mutex<mpsc::Receiver<Event>>,
}

/// A machine as it was at one moment: its state, its memory and its disks.
pub(crate) struct Snapshot {
    directory: tempfile::TempDir,
}

fn open(path: &Path, write: bool) -> File {
    File::options().read(true).write(write).open(path).unwrap()
}

impl Machine {
    fn boot(files: Files, size: Size) -> Self {
        let directory = tempfile::tempdir().unwrap();
        image::make(directory.path());
        Self::start(Arc::new(files), size, directory, None)
    }

    /// Starts a machine with the disks in `directory`, and waits until its guest can be connected to.
    fn start(
        files: Arc<Files>,
        size: Size,
        directory: tempfile::TempDir,
        snapshot: Option<&Snapshot>,
    ) -> Self {
        let (console_read, console_write) = std::io::pipe().unwrap();
        let disks = ["vda", "vdb"].map(|name| open(&directory.path().join(name), name == "vdb"));
        let [read_only_extents, read_write_extents] = [0, 1].map(|index: usize| {
            let length_bytes = disks[index].metadata().unwrap().len();
            vec![Extent {
                disk_offset_bytes: 0,
                file_offset_bytes: 0,
                length_bytes,
            }]
        });
        let config = VmConfig {
            origin: snapshot.map_or(Origin::Boot, |_| Origin::Snapshot { with_written: false }),
            n_vcpus: N_VCPUS,
            n_possible_vcpus: N_VCPUS,
            memory_mib: size.memory_mib,
            hotplug_mib: size.hotplug_mib,
            // As a template is booted: the init brings the other CPUs online.
            kernel_args: env::var("ECI_KERNEL_ARGS").unwrap_or_else(|_| "quiet maxcpus=1".into()),
            cid: 3,
            net: None,
            read_only_extents,
            read_write_extents,
            io_uring: true,
        };
        let (owner, socket) = control::pair().unwrap();
        let mut command = Command::new(&files.vmm);
        vmm::sys::inherited::pass_control_fd(&mut command, socket);
        let child = command.spawn().unwrap();
        drop(command);
        let [vda, vdb] = disks;
        let console: OwnedFd = console_write.into();
        let [first, second] = match snapshot {
            None => [open(&files.kernel, false), open(&files.initramfs, false)],
            Some(snapshot) => {
                ["state", "memory"].map(|name| open(&snapshot.directory.path().join(name), false))
            }
        };
        let descriptors = [
            open("/dev/kvm".as_ref(), true).into(),
            first.into(),
            second.into(),
            console,
            vda.into(),
            vdb.into(),
        ];
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        owner.send(&Order::Start(Box::new(config)), &borrowed).unwrap();
        drop(descriptors);
        show_console(console_read);
        let owner = Arc::new(owner);
        for (name, port) in [("api", GUEST_API_PORT), ("stdio", STDIO_PORT)] {
            let listener = UnixListener::bind(directory.path().join(name)).unwrap();
            forward(listener, port, Arc::clone(&owner));
        }
        let (ready, is_ready) = mpsc::channel();
        let (answer, answers) = mpsc::channel();
        let events = Arc::clone(&owner);
        let is_restored = snapshot.is_some();
        thread::spawn(move || {
            while let Ok((event, _descriptors)) = events.recv() {
                match event {
                    Event::GuestConnected { port: READY_PORT } => ready.send(()).unwrap_or(()),
                    // A restored guest has said that it is ready before.
                    Event::Started if is_restored => ready.send(()).unwrap_or(()),
                    Event::Done { id: FIRST_ID.. }
                    | Event::Failed { id: FIRST_ID.., .. }
                    | Event::Stats { id: FIRST_ID.., .. } => answer.send(event).unwrap_or(()),
                    Event::Started | Event::Done { .. } => {}
                    other => eprintln!("machine: {other:?}"),
                }
            }
        });
        is_ready
            .recv_timeout(BOOT_DEADLINE)
            .expect("the guest init says that it is ready");
        Self {
            files,
            size,
            child,
            directory,
            owner,
            answers: Mutex::new(answers),
        }
    }

    /// Gives the VMM an order, made with the id to use, and returns its answer.
    #[allow(dead_code, reason = "each test program uses its part")]
    pub(crate) fn order(&self, order: impl FnOnce(u64) -> Order) -> Event {
        self.order_with(order, &[])
    }

    fn order_with(&self, order: impl FnOnce(u64) -> Order, files: &[File]) -> Event {
        let answers = self.answers.lock().unwrap();
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.owner.send(&order(FIRST_ID), &descriptors).unwrap();
        answers.recv_timeout(BOOT_DEADLINE).expect("an order is answered")
    }

    /// Captures the machine, which goes on then.
    #[allow(dead_code, reason = "each test program uses its part")]
    pub(crate) fn capture(&self) -> Snapshot {
        let snapshot = Snapshot {
            directory: tempfile::tempdir().unwrap(),
        };
        let path = |name: &str| snapshot.directory.path().join(name);
        let files = ["state", "memory"].map(|name| File::create_new(path(name)).unwrap());
        let done = Event::Done { id: FIRST_ID };
        assert_eq!(self.order(|id| Order::Pause { id }), done);
        assert_eq!(self.order_with(|id| Order::Snapshot { id }, &files), done);
        for name in ["vda", "vdb"] {
            fs::copy(self.directory.path().join(name), path(name)).unwrap();
        }
        assert_eq!(self.order(|id| Order::Resume { id }), done);
        snapshot
    }

    /// Another machine that goes on where `snapshot` of this one was taken, and its guest.
    #[allow(dead_code, reason = "each test program uses its part")]
    pub(crate) async fn restore(&self, snapshot: &Snapshot) -> (Self, Guest) {
        let directory = tempfile::tempdir().unwrap();
        for name in ["vda", "vdb"] {
            fs::copy(snapshot.directory.path().join(name), directory.path().join(name)).unwrap();
        }
        let machine = Self::start(Arc::clone(&self.files), self.size, directory, Some(snapshot));
        let guest = Guest::attach(machine.directory.path()).await;
        (machine, guest)
    }

    /// A counter of the VMM.
    #[allow(dead_code, reason = "each test program uses its part")]
    pub(crate) fn counter(&self, name: &str) -> u64 {
        match self.order(|id| Order::Stats { id }) {
            Event::Stats { counters, .. } => counters[name],
            other => panic!("{other:?} instead of counters"),
        }
    }

    /// What the VMM process takes of the host's memory, bytes: pages shared with others in proportion (PSS).
    #[allow(dead_code, reason = "each test program uses its part")]
    pub(crate) fn host_memory_bytes(&self) -> u64 {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib << 10
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The guest's console, on standard error.
fn show_console(mut console: std::io::PipeReader) {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = console.read(&mut buffer) {
            eprint!("{}", String::from_utf8_lossy(&buffer[..length]));
        }
    });
}

/// Hands each connection on `listener` to the guest's `port`.
fn forward(listener: UnixListener, port: u32, owner: Arc<OwnerSocket>) {
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let _ = owner.send(
                &Order::Connect {
                    id: port.into(),
                    port,
                },
                &[connection.as_fd()],
            );
        }
    });
}
