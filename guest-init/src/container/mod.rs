//! Containers: from a specification to running processes.
//!
//! `spec` is what is asked; `plan` turns it into a `program` of steps (pure); `Container` makes what the steps need and
//! runs them in a new process. `sys` has the system calls.

pub mod capabilities;
pub mod cgroup;
pub mod command;
pub mod devices;
pub mod freezer;
pub mod mounts;
pub mod pause;
pub mod plan;
pub mod process;
pub mod program;
pub mod seccomp;
pub mod spec;
pub mod stdio;
pub mod user;

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex},
};

use protocol::TERMINATION_MESSAGE_MAX_BYTES;
use rustix::fs::{FileType, Gid, Mode, OFlags, ResolveFlags, Uid, makedev};

use self::{
    cgroup::Cgroup,
    pause::Pause,
    plan::{Places, Processes, Stdio},
    process::{Ended, Process, State},
    program::Program,
    stdio::Hold,
    user::Identity,
};
use crate::{
    care::{Care, Lifecycle},
    error::{Context, Error, ErrorKind, Result},
    reaper::Reaper,
    storage::Rootfs,
    sys,
};

/// Most processes of a container the host may have open at once.
const MAX_PROCESSES: usize = 256;

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its name.
    pub id: String,
    /// Its limits and counters.
    pub cgroup: Cgroup,
    /// Its root file system.
    pub rootfs: Rootfs,
    /// How it is looked after.
    pub care: Care,
    spec: spec::Spec,
    /// The host name instead of the specification's.
    renamed: Mutex<Option<String>>,
    places: Places,
    /// By exec id; the init's is empty.
    processes: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    /// A container of `spec`, whose root file system is mounted and whose cgroup is made. Checks all of the
    /// specification that can be checked without running it.
    ///
    /// # Errors
    /// `InvalidArgument` names the field; root file system and cgroup are given back.
    pub fn new(
        id: &str,
        spec: spec::Spec,
        rootfs: Rootfs,
        cgroup: Cgroup,
        lifecycle: Lifecycle,
        identity_files: &Path,
    ) -> std::result::Result<Self, Box<(Error, Rootfs, Cgroup)>> {
        let places = Places {
            rootfs: rootfs.path.clone(),
            identity_files: identity_files.to_owned(),
            devices: rootfs.path.with_file_name("devices"),
            termination_message: (!lifecycle.termination_message_path.is_empty()).then(|| {
                // On the writable layer's disk: a container may write as much as it likes.
                let file = rootfs.upper.with_file_name("termination-message");
                (file, lifecycle.termination_message_path.clone())
            }),
        };
        let prepared = (|| {
            make_devices(&spec, &places.devices)?;
            if let Some((file, _)) = &places.termination_message {
                make_open_file(file)?;
            }
            let process = spec
                .process
                .clone()
                .ok_or_else(|| Error::invalid("process is missing from the specification"))?;
            let identity = identity(&places.rootfs, &process.user)?;
            plan::init(&spec, &identity, &places, Stdio::Terminal)?;
            Ok(Process::new(process, identity))
        })();
        match prepared {
            Ok(init) => Ok(Self {
                id: id.to_owned(),
                cgroup,
                rootfs,
                care: Care::new(lifecycle),
                spec,
                renamed: Mutex::default(),
                places,
                processes: Mutex::new(HashMap::from([(String::new(), Arc::new(init))])),
            }),
            Err(error) => Err(Box::new((error, rootfs, cgroup))),
        }
    }

    /// Adds a process; it does not run yet.
    ///
    /// # Errors
    /// `InvalidArgument` names the field, `AlreadyExists`, `FailedPrecondition` when the container does not run.
    pub fn create_process(&self, exec_id: &str, process: spec::Process) -> Result<()> {
        let (_, init) = self.init()?.running()?;
        let identity = identity(&self.places.rootfs, &process.user)?;
        plan::exec(&self.spec, &process, &identity, init, Stdio::Terminal)?;
        let mut processes = self.processes.lock().expect("no panic while held");
        if processes.contains_key(exec_id) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("process {exec_id:?} of container {:?} exists", self.id),
            ));
        }
        if processes.len() >= MAX_PROCESSES {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                format!(
                    "container {:?} has {MAX_PROCESSES} processes: delete ended ones",
                    self.id
                ),
            ));
        }
        processes.insert(exec_id.to_owned(), Arc::new(Process::new(process, identity)));
        Ok(())
    }

    /// Finds a process.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        let processes = self.processes.lock().expect("no panic while held");
        processes
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("container {:?} has no process {exec_id:?}", self.id)))
    }

    /// What the container left in its file for it, at most [`TERMINATION_MESSAGE_MAX_BYTES`].
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn termination_message(&self) -> Result<Vec<u8>> {
        let mut message = Vec::new();
        if let Some((path, _)) = &self.places.termination_message {
            let action = || format!("read {}", path.display());
            let file = File::open(path).context(action)?;
            file.take(TERMINATION_MESSAGE_MAX_BYTES as u64)
                .read_to_end(&mut message)
                .context(action)?;
        }
        Ok(message)
    }

    fn init(&self) -> Result<Arc<Process>> {
        self.process("")
    }

    /// Starts a process; returns its id once its program runs.
    ///
    /// # Errors
    /// As [`Process::finish_start`]; `FailedPrecondition` when it was started before or the container does not run.
    pub async fn start(
        self: &Arc<Self>,
        exec_id: &str,
        reaper: &Reaper,
        hold: &Hold,
        pause: &Pause,
    ) -> Result<u32> {
        let process = self.process(exec_id)?;
        let is_init = exec_id.is_empty();
        // Looked up first: without a running init an exec stays as it is.
        let init = if is_init {
            None
        } else {
            Some(self.init()?.running()?)
        };
        let shared = if is_init && plan::processes(&self.spec) == Processes::Shared {
            Some(pause.process(reaper, &self.places.rootfs).await?)
        } else {
            None
        };
        let (stdio, ends) = process.begin_start(hold)?;
        let oom_kills_before = self.cgroup.oom_kills();
        let begun = (|| {
            let (ours, theirs) = process::report_channel()?;
            let (program, child) = match &init {
                None => {
                    let program = self.plan_init(&process.identity, stdio)?;
                    let namespaces = plan::namespaces(&self.spec)?;
                    let child = match &shared {
                        None => self.spawn(namespaces, &program, &theirs)?,
                        Some(pause) => self.spawn_beside(pause, namespaces, &program, &theirs)?,
                    };
                    (program, child)
                }
                Some((_, pidfd)) => {
                    let init = Arc::clone(pidfd);
                    let program = plan::exec(&self.spec, &process.spec, &process.identity, init, stdio)?;
                    let child = self.spawn_beside(pidfd, 0, &program, &theirs)?;
                    (program, child)
                }
            };
            Ok((program, ours, child))
        })();
        let (program, report, child) = begun.inspect_err(|_| process.fail())?;
        let mut exit = reaper.watch(child.pid);
        let running = process
            .finish_start(program, report, child, &mut exit, ends)
            .await?;
        let pid = running.pid;
        let container = Arc::clone(self);
        tokio::spawn(async move {
            // The reaper lives as long as the program.
            let Ok(exit) = exit.await else { return };
            if is_init {
                // With a PID namespace of its own the kernel has done it; without, the others would live on.
                if let Err(error) = container.cgroup.kill() {
                    crate::log::error(&format!(
                        "end the processes of container {:?}: {error}",
                        container.id
                    ));
                }
            }
            running.drain().await;
            let oom_killed = container.cgroup.oom_kills() > oom_kills_before;
            process.set_ended(Ended { exit, oom_killed });
        });
        Ok(pid)
    }

    fn plan_init(&self, identity: &Identity, stdio: Stdio) -> Result<Program> {
        let renamed = self.renamed.lock().expect("no panic while held");
        match &*renamed {
            None => plan::init(&self.spec, identity, &self.places, stdio),
            Some(hostname) => {
                let spec = spec::Spec {
                    hostname: Some(hostname.clone()),
                    ..self.spec.clone()
                };
                plan::init(&spec, identity, &self.places, stdio)
            }
        }
    }

    /// The sandbox, which was called `old`, is called `new`: so is the container, if it has a host name of its own that
    /// was the sandbox's.
    ///
    /// # Errors
    /// When the name cannot be set.
    pub fn rename(&self, old: &str, new: &str) -> Result<()> {
        if plan::namespaces(&self.spec)? & libc::CLONE_NEWUTS == 0 {
            return Ok(());
        }
        let mut renamed = self.renamed.lock().expect("no panic while held");
        if renamed.as_deref().or(self.spec.hostname.as_deref()) != Some(old) {
            return Ok(());
        }
        if let Ok((_, init)) = self.init()?.running() {
            let own = File::open("/proc/self/ns/uts").context(|| "open /proc/self/ns/uts")?;
            sys::namespace::join(init.as_fd(), libc::CLONE_NEWUTS)
                .context(|| format!("join the UTS namespace of container {:?}", self.id))?;
            let named = rustix::system::sethostname(new.as_bytes());
            sys::namespace::join(own.as_fd(), libc::CLONE_NEWUTS)
                .context(|| "return to the guest's UTS namespace")?;
            named.context(|| format!("set the host name {new:?} of container {:?}", self.id))?;
        }
        *renamed = Some(new.to_owned());
        Ok(())
    }

    /// See [`Process::lose_streams`].
    pub fn lose_streams(&self) {
        for process in self.processes.lock().expect("no panic while held").values() {
            process.lose_streams();
        }
    }

    /// See [`Process::give_up_streams`].
    pub fn give_up_streams(&self) {
        for process in self.processes.lock().expect("no panic while held").values() {
            process.give_up_streams();
        }
    }

    fn spawn(&self, namespaces: i32, program: &Program, report: &OwnedFd) -> Result<sys::clone::Child> {
        let cgroup = self.cgroup.open()?;
        sys::clone::spawn(namespaces, Some(cgroup.as_fd()), || program.run(report.as_fd()))
            .context(|| format!("make a process of container {:?}", self.id))
    }

    /// Makes the child in the PID namespace of the process `beside`.
    fn spawn_beside(
        &self,
        beside: &OwnedFd,
        namespaces: i32,
        program: &Program,
        report: &OwnedFd,
    ) -> Result<sys::clone::Child> {
        let own = File::open("/proc/self/ns/pid").context(|| "open /proc/self/ns/pid")?;
        sys::namespace::join(beside.as_fd(), libc::CLONE_NEWPID)
            .context(|| "join the container's PID namespace")?;
        let child = self.spawn(namespaces, program, report);
        sys::namespace::join(own.as_fd(), libc::CLONE_NEWPID)
            .context(|| "return to the guest's PID namespace")?;
        child
    }

    /// Sends `signal` to one process.
    ///
    /// # Errors
    /// `FailedPrecondition` when it does not run, `InvalidArgument` for a number that is no signal.
    pub fn signal(&self, exec_id: &str, signal: i32) -> Result<()> {
        let (_, pidfd) = self.process(exec_id)?.running()?;
        sys::signal::send(pidfd.as_fd(), signal).map_err(|error| signal_error(signal, error))
    }

    /// Sends `signal` to every process of the container.
    ///
    /// # Errors
    /// As [`Container::signal`].
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        if matches!(self.init()?.state(), State::Created) {
            return Err(Error::precondition("the container is not started"));
        }
        if signal == libc::SIGKILL {
            return self.cgroup.kill();
        }
        for pid in self.cgroup.processes()? {
            match sys::signal::send_to_pid(pid, signal) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(signal_error(signal, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Forgets an exec.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition` while it runs.
    pub fn delete_exec(&self, exec_id: &str) -> Result<()> {
        self.process(exec_id)?.delete()?;
        self.processes
            .lock()
            .expect("no panic while held")
            .remove(exec_id);
        Ok(())
    }

    /// Forgets all processes, so that no request finds one to wait for.
    ///
    /// # Errors
    /// `FailedPrecondition` while the init runs.
    pub fn delete_processes(&self) -> Result<()> {
        self.init()?.delete()?;
        for (_, process) in self.processes.lock().expect("no panic while held").drain() {
            // An exec whose end is just being reported: it is marked when the report is done.
            let _ = process.delete();
        }
        Ok(())
    }
}

fn signal_error(signal: i32, error: std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ESRCH) => Error::precondition("the process has ended"),
        Some(libc::EINVAL) => Error::invalid(format!("signal is {signal}: give 1 to 64")),
        _ => Error::system(format!("send signal {signal}"), error),
    }
}

/// Looks up whom a process runs as in the files of the container's image.
fn identity(rootfs: &Path, user: &spec::User) -> Result<Identity> {
    let root = rustix::fs::open(
        rootfs,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| format!("open {}", rootfs.display()))?;
    let read = |path: &str| {
        // The image may have anything there: a missing or unreadable file has no entries.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mut text = Vec::new();
        if let Ok(file) = rustix::fs::openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            let _ = File::from(file).take(user::MAX_FILE_BYTES).read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    };
    let passwd = read("etc/passwd");
    if user.username.is_empty() {
        return Ok(user::by_ids(&passwd, user.uid, user.gid, &user.additional_gids));
    }
    user::by_name(&passwd, &read("etc/group"), &user.username, &user.additional_gids)
}

/// Makes an empty file that everybody may write to.
fn make_open_file(path: &Path) -> Result<()> {
    let action = || format!("make {}", path.display());
    File::create(path).context(action)?;
    rustix::fs::chmod(path, Mode::from_raw_mode(0o666)).context(action)
}

/// Makes the nodes of the specification's devices where only the guest init reaches them.
fn make_devices(spec: &spec::Spec, directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).context(|| format!("make {}", directory.display()))?;
    for (index, device) in spec.linux.devices.iter().enumerate() {
        let kind = match device.kind.as_str() {
            "c" | "u" => FileType::CharacterDevice,
            "b" => FileType::BlockDevice,
            other => {
                return Err(Error::invalid(format!(
                    "linux.devices[{index}].type is {other:?}: give c, u or b"
                )));
            }
        };
        let path = directory.join(index.to_string());
        let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666) & 0o777);
        let action = || format!("make the node of {}", device.path);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            kind,
            mode,
            makedev(device.major, device.minor),
        )
        .context(action)?;
        rustix::fs::chmod(&path, mode).context(action)?;
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        rustix::fs::chown(&path, Some(uid), Some(gid)).context(action)?;
    }
    Ok(())
}
