//! Equal ground for all that is measured: the same files, in memory, on a host set up as the agent does it.

use std::fs::File;
use std::io::{self, Seek};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use vmm::config::Origin;

use crate::Options;
use crate::monitor::Monitor;
use crate::root::Root;
use crate::stub_guest::Code;
use crate::tick::Tick;

/// Guest memory in all measurements, MiB.
pub(crate) const MEMORY_MIB: u64 = 256;
/// What the VMM tells every guest kernel by itself, and the rival is told too.
pub(crate) const KERNEL_ARGS: &str =
    "console=ttyS0 8250.nr_uarts=1 quiet pci=off tsc=reliable panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd";

/// Where things are in the root of the measurements.
pub(crate) const VMM: &str = "/eci-vmm";
/// Ours.
const PROGRAMS: [&str; 4] = ["eci-agent", "ecictl", "containerd-shim-eci-v2", "eci-vmm"];
/// What the agent runs, and what its images come from.
const TOOLS: [&str; 5] = [
    "/usr/sbin/nft",
    "/usr/sbin/mkfs.ext4",
    "/usr/bin/docker-registry",
    "/usr/bin/skopeo",
    "/usr/bin/curl",
];
/// The OCI layout of the groups' image.
pub(crate) const IMAGE: &str = "/image";
pub(crate) const QEMU: &str = "/usr/bin/qemu-system-x86_64";
pub(crate) const KERNEL: &str = "/vmlinux";
pub(crate) const INITRD: &str = "/initramfs.cpio";
const STUB: &str = "/stub";
const EMPTY: &str = "/empty";
const SNAPSHOT_STATE: &str = "/snapshot.state";
const SNAPSHOT_MEMORY: &str = "/snapshot.memory";
pub(crate) const SNAPSHOT_WRITTEN: &str = "/snapshot.written";
/// What QEMU may read when it starts a microvm machine.
const QEMU_DATA: [&str; 5] = [
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
    "qboot.rom",
];

/// What a start begins with.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) origin: Origin,
    /// Kernel and initramfs; or the state and the memory of a snapshot.
    pub(crate) files: [&'static str; 2],
    /// For the kernel, beyond [`KERNEL_ARGS`].
    pub(crate) args: String,
}

/// The files of all measurements, and how often to measure.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) tick: Tick,
    pub(crate) rival: bool,
    pub(crate) show_console: bool,
    kernel_args: String,
    /// Where the events of a trace go, and which there are to be beyond the scheduler's.
    pub(crate) trace: Option<File>,
    pub(crate) trace_events: Option<String>,
}

impl Ground {
    /// Makes a root of files in memory and moves into it: nothing is read from a disk, or from outside of an emulated
    /// host, while a clock runs.
    pub(crate) fn prepare(options: &Options) -> Result<Self> {
        // Opened first: paths are others afterwards.
        let trace = options.trace.as_deref().map(crate::summary::create).transpose()?;
        set_up_host(&options.programs)?;
        // Before the move: the new root has no modules, and the agent checks that there is a bridge to be had.
        let loaded = Command::new("modprobe")
            .arg("bridge")
            .status()
            .context("run modprobe")?;
        ensure!(loaded.success(), "modprobe bridge: {loaded}");
        let root = Root::new()?;
        for name in PROGRAMS {
            root.add_program(&options.programs.join(name), &format!("/{name}"))?;
        }
        for program in TOOLS {
            root.add_program(Path::new(program), program)?;
        }
        root.add_dir(&options.image, IMAGE)?;
        root.add(&options.guest.join("vmlinux"), KERNEL)?;
        root.add(&options.guest.join("initramfs.cpio"), INITRD)?;
        if options.rival {
            root.add_program(Path::new(QEMU), QEMU)?;
            for file in QEMU_DATA {
                let path = format!("/usr/share/qemu/{file}");
                root.add(Path::new(&path), &path)?;
            }
        }
        let mut stub = Code::default().print("!").raw(&CLI_HLT).spin().into_kernel();
        stub.rewind()?;
        io::copy(&mut stub, &mut root.create(STUB)?)?;
        root.create(EMPTY)?;
        root.enter()?;

        Ok(Self {
            tick: Tick::new(options.rounds)?,
            rival: options.rival,
            show_console: options.console,
            kernel_args: options.kernel_args.clone(),
            trace,
            trace_events: options.trace_events.clone(),
        })
    }

    /// The real kernel and initramfs.
    pub(crate) fn guest(&self, args: &str) -> Guest {
        Guest {
            origin: Origin::Boot,
            files: [KERNEL, INITRD],
            args: format!("{args} {}", self.kernel_args).trim_end().to_owned(),
        }
    }

    /// A kernel that prints one byte and halts: what is left is the monitor.
    pub(crate) fn stub(&self) -> Guest {
        Guest {
            origin: Origin::Boot,
            files: [STUB, EMPTY],
            args: String::new(),
        }
    }

    /// A guest whose init waits for orders, as a template has it: booted once, and written to files in memory.
    pub(crate) fn template(&self) -> Result<Guest> {
        let guest = self.guest("");
        let mut running = Monitor::Ours.start(&guest)?;
        running.wait_until_init_is_ready()?;
        let files = [SNAPSHOT_STATE, SNAPSHOT_MEMORY];
        running.take_snapshot(files.map(Path::new))?;
        Ok(Guest {
            origin: Origin::Snapshot { with_written: false },
            files,
            ..guest
        })
    }
}

/// What the agent does before it serves, for the rival's benefit too.
pub(crate) fn set_up_host(programs: &Path) -> Result<()> {
    let status = Command::new(programs.join("eci-agent")).arg("tune").status();
    let status = status.context("run eci-agent tune")?;
    ensure!(status.success(), "eci-agent tune: {status}");
    Ok(())
}

/// Stops the vCPU for good.
const CLI_HLT: [u8; 2] = [0xfa, 0xf4];
