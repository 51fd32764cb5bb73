//! Starting a guest under either monitor, in the same way, and seeing when things happen.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use protocol::READY_PORT;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vmm::config::{Origin, VmConfig};
use vmm::control::{self, Command, Event, ExitReason, OwnerSocket};

use crate::ground::{Guest, KERNEL_ARGS, MEMORY_MIB, QEMU, SNAPSHOT_WRITTEN, VMM};

/// No start takes so long, however slow the host.
const DEADLINE: Duration = Duration::from_secs(60);
/// Memory that can be plugged, as the agent gives it to its smallest groups.
const HOTPLUG_MIB: u64 = 2048;

/// The two that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Monitor {
    Ours,
    Qemu,
}

/// A started monitor. It is killed when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) process: Child,
    origin: Origin,
    started: Instant,
    console: File,
    text: Vec<u8>,
    /// Ours only.
    owner: Option<OwnerSocket>,
    ready: Option<Duration>,
}

impl Monitor {
    /// Starts a guest. The clock runs from just before the spawn of the process.
    ///
    /// Both are spawned with a control socket, though QEMU has no use for it: so both are spawned in the same way.
    pub(crate) fn start(self, guest: &Guest) -> Result<Running> {
        let (output, console) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("make a pipe")?;
        let started = Instant::now();
        let (owner, socket) = control::pair()?;
        let mut command = match self {
            Self::Ours => Process::new(VMM),
            Self::Qemu => qemu(guest, &console)?,
        };
        vmm::sys::inherited::pass_control_fd(&mut command, socket);
        let process = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        drop(command);
        let mut running = Running {
            process,
            origin: guest.origin,
            started,
            console: File::from(output),
            text: Vec::new(),
            owner: None,
            ready: None,
        };
        if self == Self::Ours {
            order_start(&owner, guest, &console)?;
            running.owner = Some(owner);
        }
        Ok(running)
    }
}

/// What the shim does.
fn order_start(owner: &OwnerSocket, guest: &Guest, console: &OwnedFd) -> Result<()> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("open /dev/kvm: run this where KVM works, with `make bench`")?;
    let first = File::open(guest.files[0])?;
    let second = File::open(guest.files[1])?;
    let config = VmConfig {
        origin: guest.origin,
        n_vcpus: 1,
        n_possible_vcpus: 2,
        memory_mib: MEMORY_MIB,
        hotplug_mib: HOTPLUG_MIB,
        kernel_args: guest.args.clone(),
        cid: 3,
        net: None,
        read_only_extents: Vec::new(),
        read_write_extents: Vec::new(),
        io_uring: true,
    };
    let written = match guest.origin {
        Origin::Snapshot { with_written: true } => Some(File::open(SNAPSHOT_WRITTEN)?),
        _ => None,
    };
    let mut fds = vec![kvm.as_fd(), first.as_fd(), second.as_fd()];
    fds.extend(written.as_ref().map(AsFd::as_fd));
    fds.push(console.as_fd());
    owner.send(&Command::Start(Box::new(config)), &fds)?;
    Ok(())
}

/// QEMU as those who care for start time use it: the microvm machine without legacy devices and option ROMs, and the
/// small firmware (qboot).
fn qemu(guest: &Guest, console: &OwnedFd) -> Result<Process> {
    let mut command = Process::new(QEMU);
    command.args([
        "-M",
        "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off",
        "-bios",
        "qboot.rom",
        "-cpu",
        "host",
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command.args(["-m", &MEMORY_MIB.to_string()]);
    command.arg("-kernel").arg(guest.files[0]);
    if std::fs::metadata(guest.files[1])?.len() > 0 {
        command.arg("-initrd").arg(guest.files[1]);
    }
    command.args(["-append", &format!("{KERNEL_ARGS} {}", guest.args)]);
    command.stdout(console.try_clone()?);
    Ok(command)
}

impl Running {
    /// From the spawn until the console shows `marker`; the time is that of its first byte. With ours, the time until
    /// the monitor said that the vCPUs run is kept.
    pub(crate) fn wait_for(&mut self, marker: &str) -> Result<Duration> {
        let mut reads = Vec::new();
        loop {
            let before = self.text.len();
            if !self.next()? {
                continue;
            }
            reads.push((self.text.len(), self.started.elapsed()));
            let from = before.saturating_sub(marker.len() - 1);
            if let Some(at) = find(&self.text[from..], marker.as_bytes()) {
                let begin = from + at;
                let seen = reads.iter().find(|(length, _)| *length > begin);
                return seen
                    .map(|(_, time)| *time)
                    .context("the console showed this before");
            }
        }
    }

    /// Waits until the guest connects to a host port.
    pub(crate) fn wait_for_connection(&mut self, port: u32) -> Result<Duration> {
        loop {
            let time = self.started.elapsed();
            match self.next_event()? {
                Some(Event::GuestConnected { port: to }) if to == port => return Ok(time),
                _ => {}
            }
        }
    }

    /// Waits until the guest init serves its API: a booted one says so, a restored one said so before.
    pub(crate) fn wait_until_init_is_ready(&mut self) -> Result<()> {
        match self.origin {
            Origin::Boot => self.wait_for_connection(READY_PORT).map(drop),
            Origin::Snapshot { .. } => Ok(()),
        }
    }

    /// Connects `stream` to a port of the guest; ours only.
    pub(crate) fn connect(&mut self, port: u32, stream: &OwnedFd) -> Result<()> {
        self.request(|id| Command::Connect { id, port }, &[stream.as_fd()])
    }

    /// Stops the guest for good and writes it to new files; ours only.
    pub(crate) fn take_snapshot(&mut self, files: [&Path; 2]) -> Result<()> {
        let create = |path: &Path| {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path);
            file.with_context(|| format!("create {}", path.display()))
        };
        let (state, memory) = (create(files[0])?, create(files[1])?);
        self.request(|id| Command::Pause { id }, &[])?;
        self.request(|id| Command::Snapshot { id }, &[state.as_fd(), memory.as_fd()])?;
        self.request(|id| Command::FinishSnapshot { id }, &[])
    }

    /// Gives a command and waits until it was carried out.
    fn request(&mut self, command: impl FnOnce(u64) -> Command, fds: &[BorrowedFd<'_>]) -> Result<()> {
        // One at a time: the number only has to be the same in the answer.
        const ID: u64 = 1;
        let command = command(ID);
        let owner = self.owner.as_ref().context("this monitor takes no commands")?;
        owner.send(&command, fds)?;
        loop {
            match self.next_event()? {
                Some(Event::Done { id: ID }) => return Ok(()),
                Some(Event::Failed { id: ID, message }) => bail!("{command:?}: {message}"),
                _ => {}
            }
        }
    }

    /// From the spawn until now.
    pub(crate) fn since_spawn(&self) -> Duration {
        self.started.elapsed()
    }

    /// From the spawn until the process had ended and was reaped.
    pub(crate) fn wait_for_end(&mut self) -> Result<Duration> {
        let process = pidfd_open(Pid::from_child(&self.process), PidfdFlags::empty())
            .context("watch the monitor's process")?;
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        let ended = poll(&mut fds, Some(&self.time_left()?)).context("wait for the monitor's end")?;
        ensure!(
            ended == 1,
            "the monitor did not end; the console showed: {:?}",
            self.console()
        );
        let status = self.process.wait().context("reap the monitor")?;
        let time = self.started.elapsed();
        ensure!(status.success(), "the monitor failed: {status}");
        Ok(time)
    }

    /// After the end: closes what the monitor left of the VM, and tells how long that took; ours only.
    pub(crate) fn close_remains(&mut self) -> Result<Option<Duration>> {
        let Some(owner) = &self.owner else { return Ok(None) };
        loop {
            match owner.try_recv().context("read the VMM's last message")? {
                (Event::Exited(ExitReason::Shutdown), remains) => {
                    let closing = Instant::now();
                    drop(remains);
                    return Ok(Some(closing.elapsed()));
                }
                (Event::Exited(reason), _) => bail!("the VM ended: {reason:?}"),
                _ => {}
            }
        }
    }

    /// From the spawn until the vCPUs ran.
    pub(crate) fn ready(&self) -> Option<Duration> {
        self.ready
    }

    /// The console so far.
    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&self.text).into_owned()
    }

    /// Waits for console output, which is taken (`true`), or an event.
    fn next(&mut self) -> Result<bool> {
        let is_output = self.wait()?;
        if is_output {
            self.read_console()?;
        } else {
            self.take_event()?;
        }
        Ok(is_output)
    }

    fn next_event(&mut self) -> Result<Option<Event>> {
        if self.wait()? {
            self.read_console()?;
            return Ok(None);
        }
        self.take_event()
    }

    fn read_console(&mut self) -> Result<()> {
        let mut bytes = [0; 4096];
        match self.console.read(&mut bytes) {
            Ok(0) => bail!("the console was closed; it showed: {:?}", self.console()),
            Ok(length) => self.text.extend(&bytes[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read the console"),
        }
        Ok(())
    }

    /// Whether the console can be read; else there is an event.
    fn wait(&self) -> Result<bool> {
        let mut fds = vec![PollFd::new(&self.console, PollFlags::IN)];
        if let Some(owner) = &self.owner {
            fds.push(PollFd::new(owner, PollFlags::IN));
        }
        match poll(&mut fds, Some(&self.time_left()?)) {
            Ok(0) => bail!(
                "nothing after {} s; the console showed: {:?}",
                DEADLINE.as_secs(),
                self.console()
            ),
            Ok(_) => Ok(!fds[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => self.wait(),
            Err(error) => Err(error).context("wait for the guest"),
        }
    }

    fn time_left(&self) -> Result<Timespec> {
        let left = DEADLINE.saturating_sub(self.started.elapsed());
        Timespec::try_from(left).map_err(|_| anyhow!("the time limit is too long"))
    }

    fn take_event(&mut self) -> Result<Option<Event>> {
        let Some(owner) = &self.owner else { return Ok(None) };
        match owner.try_recv() {
            Ok((Event::Started, _)) => {
                self.ready = Some(self.started.elapsed());
                Ok(Some(Event::Started))
            }
            Ok((Event::Exited(reason), _)) => {
                bail!(
                    "the VM ended: {reason:?}; the console showed: {:?}",
                    self.console()
                )
            }
            Ok((event, _)) => Ok(Some(event)),
            Err(control::ControlError::WouldBlock) => Ok(None),
            Err(error) => Err(error).context("read from the VMM"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn find(text: &[u8], marker: &[u8]) -> Option<usize> {
    text.windows(marker.len()).position(|window| window == marker)
}
