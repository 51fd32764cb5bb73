//! Boots the L1 host: one QEMU process with software emulation, tied to the life of the thread that boots it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::initramfs::{self, path_text};
use crate::place::Place;
use crate::sys;
use crate::wire::{Frame, Message};

/// A boot takes 5 s on an idle machine; these are for very busy ones.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const BOOT_LIMIT_COUNTED_TIME: Duration = Duration::from_secs(600);
const CONSOLE_TAIL_LINES: usize = 25;

/// What may differ from one L1 host to the next.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) memory_mib: u32,
    /// Size of the sparse disk at `/var/lib/eci-agent`.
    pub(crate) scratch_gib: u32,
    /// Time is the number of instructions executed, so that timings repeat.
    pub(crate) counted_time: bool,
    /// Further directories to share read-write.
    pub(crate) shares: Vec<PathBuf>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            memory_mib: 4096,
            scratch_gib: 64,
            counted_time: false,
            shares: Vec::new(),
        }
    }
}

/// A running L1 host. Dropping it kills QEMU; so does the end of the booting thread.
#[derive(Debug)]
pub(crate) struct Machine {
    qemu: Child,
    console: PathBuf,
    /// The command server's byte stream.
    pub(crate) link: UnixStream,
}

impl Machine {
    /// Boots and waits until the command server answers.
    pub(crate) fn boot(place: &Place, shape: &Shape) -> Result<Self> {
        let console = place.console_log();
        // A new file, not a truncated one: an older L1 host may still write to it.
        let _ = fs::remove_file(&console);
        let log = File::create_new(&console).with_context(|| format!("create {}", console.display()))?;
        let (link, far_end) = UnixStream::pair().context("create the command channel")?;
        // QEMU opens these by their number in this process: they have no name that could be left over.
        let initramfs = write_initramfs(place, shape)?;
        let scratch = make_scratch_disk(place, shape)?;

        let mut command = qemu_command(place, shape, &initramfs, &scratch)?;
        command
            .stdin(OwnedFd::from(far_end))
            .stdout(log.try_clone().context("share the console log")?)
            .stderr(log);
        sys::die_with_this_thread(&mut command);
        let qemu = command
            .spawn()
            .context("start qemu-system-x86_64: run `make setup`, which installs it")?;
        // The command holds our copy of the channel's far end; without it gone, QEMU's death would not show.
        drop(command);
        let mut machine = Self { qemu, console, link };
        let limit = if shape.counted_time {
            BOOT_LIMIT_COUNTED_TIME
        } else {
            BOOT_LIMIT
        };
        machine.wait_ready(limit)?;
        Ok(machine)
    }

    fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.link
            .set_read_timeout(Some(limit))
            .context("set the boot's time limit")?;
        let first = Frame::read(&mut self.link);
        let reason = match first {
            Ok(Some(frame)) => match frame.into_message()? {
                Message::Ready => {
                    return self
                        .link
                        .set_read_timeout(None)
                        .context("lift the boot's time limit");
                }
                other => format!("it said {other:?} instead of being ready"),
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                format!("it was not ready after {} s", limit.as_secs())
            }
            Ok(None) | Err(_) => "QEMU or the kernel in it stopped".to_owned(),
        };
        bail!("the L1 host did not boot: {reason}.\n{}", self.console_tail());
    }

    /// The end of the console log with a headline, for a message to the user.
    pub(crate) fn console_tail(&self) -> String {
        console_tail(&self.console)
    }

    /// Asks the L1 host to write out its files and turn itself off, and waits for it.
    pub(crate) fn shut_down(self) {
        let asked = Frame::new(0, Message::Shutdown).write(&mut &self.link);
        if asked.is_ok() && self.link.set_read_timeout(Some(Duration::from_secs(10))).is_ok() {
            // The end of QEMU closes the channel; whatever is still in it is of no interest.
            let _ = io::copy(&mut &self.link, &mut io::sink());
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The end of a console log, for a message to the user.
pub(crate) fn console_tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail = &lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..];
    format!(
        "The end of its console ({}):\n  {}",
        path.display(),
        tail.join("\n  ")
    )
}

fn write_initramfs(place: &Place, shape: &Shape) -> Result<File> {
    let kernel = place.kernel()?;
    let mut file = tempfile::tempfile_in(&place.run_dir).context("create the initramfs")?;
    let shares = shares(place, shape)?
        .into_iter()
        .map(|share| (share.tag, share.path))
        .collect();
    let mut buffered = io::BufWriter::new(&mut file);
    initramfs::write(&mut buffered, &kernel, shares)?;
    buffered.flush().context("write the initramfs")?;
    drop(buffered);
    Ok(file)
}

struct Share {
    tag: String,
    path: String,
}

fn shares(place: &Place, shape: &Shape) -> Result<Vec<Share>> {
    let dirs = place.shared_dirs(&shape.shares);
    dirs.iter()
        .enumerate()
        .map(|(index, dir)| {
            Ok(Share {
                tag: format!("share{index}"),
                path: path_text(dir)?,
            })
        })
        .collect()
}

fn make_scratch_disk(place: &Place, shape: &Shape) -> Result<File> {
    let disk = tempfile::tempfile_in(&place.run_dir).context("create the scratch disk")?;
    disk.set_len(u64::from(shape.scratch_gib) << 30)
        .context("size the scratch disk")?;
    // No journal: the disk does not outlive its host, and every write is emulated.
    let made = Command::new("mkfs.ext4")
        .args([
            "-q",
            "-F",
            "-m",
            "0",
            "-L",
            "scratch",
            "-O",
            "^has_journal",
            "-E",
            "lazy_itable_init=1,nodiscard",
        ])
        .arg(reopen_path(&disk))
        .env("PATH", with_sbin())
        .stdin(Stdio::null())
        .output()
        .context("run mkfs.ext4: run `make setup`, which installs it")?;
    ensure!(
        made.status.success(),
        "mkfs.ext4 failed: {}",
        String::from_utf8_lossy(&made.stderr)
    );
    Ok(disk)
}

fn with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// A path by which our children can open a file that has no name.
fn reopen_path(file: &File) -> String {
    format!("/proc/{}/fd/{}", process::id(), file.as_raw_fd())
}

fn qemu_command(place: &Place, shape: &Shape, initramfs: &File, scratch: &File) -> Result<Command> {
    let kernel = place.kernel()?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-M",
        "q35",
        "-smp",
        "1",
    ]);
    command.args(["-m", &shape.memory_mib.to_string()]);
    if shape.counted_time {
        command.args([
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=0,sleep=off",
            "-seed",
            "1",
        ]);
        command.args([
            "-rtc",
            "base=2026-01-01T00:00:00,clock=vm",
            "-cpu",
            "max,erms=off,fsrm=off",
        ]);
    } else {
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
    }
    command.arg("-kernel").arg(kernel.image());
    command.args([
        "-initrd",
        &reopen_path(initramfs),
        "-append",
        &kernel_arguments(shape),
    ]);
    // The console log is QEMU's own standard output.
    command.args([
        "-chardev",
        "file,id=console,path=/dev/stdout",
        "-serial",
        "chardev:console",
    ]);
    command.args([
        "-chardev",
        "socket,id=commands,fd=0",
        "-device",
        "virtio-serial-pci",
    ]);
    command.args(["-device", "virtserialport,chardev=commands,name=commands"]);
    command.args([
        "-blockdev",
        &format!(
            "driver=file,node-name=scratch,filename={},locking=off,cache.no-flush=on,discard=unmap",
            reopen_path(scratch)
        ),
    ]);
    command.args(["-device", "virtio-blk-pci,drive=scratch"]);
    share_by_9p(&mut command, "root", "/", true);
    for share in shares(place, shape)? {
        share_by_9p(&mut command, &share.tag, &share.path, false);
    }
    Ok(command)
}

fn share_by_9p(command: &mut Command, tag: &str, path: &str, read_only: bool) {
    // In QEMU's option lists a comma is written twice.
    let path = path.replace(',', ",,");
    let read_only = if read_only { ",readonly=on" } else { "" };
    command.arg("-fsdev").arg(format!(
        "local,id={tag},path={path},security_model=none,multidevs=remap{read_only}"
    ));
    command
        .arg("-device")
        .arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
}

fn kernel_arguments(shape: &Shape) -> String {
    // A panic ends QEMU (-no-reboot). The emulated CPU has none of the flaws that mitigations are for.
    let common = "console=ttyS0 loglevel=4 panic=-1 cgroup_no_v1=all audit=0 apparmor=0 mitigations=off \
                  random.trust_cpu=on nowatchdog nokaslr tsc=reliable";
    if shape.counted_time {
        format!("{common} norandmaps clocksource=tsc")
    } else {
        // On a busy machine the kernel measures its CPU's counter wrongly, and its clock then runs at twice the
        // speed or half of it.
        format!("{common} tsc_early_khz={}", sys::tsc_khz())
    }
}
