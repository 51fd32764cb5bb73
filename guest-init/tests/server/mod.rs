//! The guest init's service as process 1 of namespaces of its own.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
};

use guest_init::{
    identity::GenerationWatch,
    sandbox::{Config, Sandbox},
    service,
    storage::Disks,
};

use rustix::fs::{FileType, Mode, OFlags};

use crate::framework::{
    Guest, KERNEL_LOG,
    image::{self, command},
    run_case,
};

/// Tells the test binary to be the server, and where.
const SERVE: &str = "GUEST_INIT_TEST_SERVE";
const READY: &str = "the guest init serves";

/// One guest at a time: loop devices are few.
static TURN: Mutex<()> = Mutex::new(());

/// Runs `case` with a guest of its own; says so when this machine cannot have one.
pub(crate) fn run(case: impl AsyncFnOnce(&Guest)) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(missing) = missing() {
        eprintln!("NOT RUN: this needs {missing}");
        return;
    }
    let server = Server::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let guest = Guest::connect(server.directory(), 0).await;
        run_case(&guest, case).await;
    });
}

/// What this machine lacks, if anything.
fn missing() -> Option<&'static str> {
    let has_file_system = |name: &str| {
        fs::read_to_string("/proc/filesystems")
            .is_ok_and(|text| text.split_whitespace().any(|word| word == name))
    };
    let has_program = |name: &str| Command::new(name).arg("--help").output().is_ok();
    [
        (rustix::process::geteuid().is_root(), "root"),
        (Path::new("/dev/loop-control").exists(), "loop devices"),
        (
            has_file_system("erofs") && has_file_system("overlay"),
            "EROFS and overlay",
        ),
        (has_program("mkfs.erofs"), "mkfs.erofs"),
        (Path::new("/usr/bin/busybox").exists(), "busybox"),
        (cgroup_root().is_some(), "a cgroup v2 hierarchy"),
    ]
    .into_iter()
    .find_map(|(is_there, name)| (!is_there).then_some(name))
}

/// Where cgroup v2 is mounted.
fn cgroup_root() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.join("cgroup.controllers").exists())
}

/// The cgroup of this test process's guests.
fn test_cgroup() -> PathBuf {
    let pid = env::var("GUEST_INIT_TEST_PID").unwrap_or_else(|_| std::process::id().to_string());
    cgroup_root()
        .expect("looked for before")
        .join(format!("guest-init-test-{pid}"))
}

/// A running server.
struct Server {
    child: Child,
    disks: [String; 2],
    directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        image::make(directory.path());
        let disks = ["vda", "vdb"].map(|name| {
            command(
                "losetup",
                &[
                    "--find",
                    "--show",
                    "--partscan",
                    &directory.path().join(name).to_string_lossy(),
                ],
            )
        });
        let cgroup = test_cgroup();
        fs::create_dir_all(&cgroup).unwrap();
        for controller in ["cpu", "cpuset", "io", "memory", "pids"] {
            let _ = fs::write(
                cgroup.with_file_name("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
        // SIGCHLD is blocked before the test harness has threads: it must reach the signal descriptor only.
        let mut child = Command::new("unshare")
            .args([
                "--pid",
                "--mount",
                "--uts",
                "--net",
                "--ipc",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args(["--propagation", "private", "env", "--block-signal=CHLD"])
            .arg(env::current_exe().unwrap())
            .args(["--exact", "serve", "--nocapture", "--test-threads=1"])
            .env(SERVE, directory.path())
            .env("GUEST_INIT_TEST_PID", std::process::id().to_string())
            .env("GUEST_INIT_TEST_DISKS", disks.join(","))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains(READY) {
            line.clear();
            assert!(
                output.read_line(&mut line).unwrap() > 0,
                "the server does not start"
            );
        }
        Self {
            child,
            disks,
            directory,
        }
    }

    fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for disk in &self.disks {
            // Partitions a test left behind would keep the device.
            let _ = Command::new("losetup").args(["--detach", disk]).output();
        }
        let _ = fs::write(test_cgroup().join("cgroup.kill"), "1");
        remove_cgroup(&test_cgroup());
    }
}

/// Removes a cgroup whose processes are going.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

/// A pipe with a name, in place of the kernel's log.
fn kernel_log(path: &Path) -> OwnedFd {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, mode, 0).unwrap();
    rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap()
}

/// The server's part, when asked for by the environment.
pub(crate) fn serve() {
    let Some(directory) = env::var_os(SERVE).map(PathBuf::from) else {
        return;
    };
    let disks = env::var("GUEST_INIT_TEST_DISKS").unwrap();
    let (read_only, read_write) = disks.split_once(',').unwrap();
    // Mounts of the guest init's own go away with the namespace.
    fs::create_dir(directory.join("run")).unwrap();
    command(
        "mount",
        &["-t", "tmpfs", "run", &directory.join("run").to_string_lossy()],
    );
    let config = Config {
        directory: directory.join("run"),
        cgroup_root: test_cgroup(),
        disks: Disks {
            read_only: read_only.into(),
            read_write: read_write.into(),
        },
        generation: GenerationWatch::of_records(kernel_log(&directory.join(KERNEL_LOG))),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let sandbox = Sandbox::start(config).unwrap();
        let stdio = UnixListener::bind(directory.join("stdio")).unwrap();
        let api = format!("unix://{}", directory.join("api").display());
        let _server = service::serve(sandbox, &api, stdio.into()).await.unwrap();
        println!("{READY}");
        std::future::pending::<()>().await;
    });
}
