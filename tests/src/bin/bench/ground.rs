//! Equal ground for all that is measured: the same files, in memory; starts spread over the phases of the host's tick.

use std::io::{self, Seek};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::time::{ClockId, clock_getres, clock_gettime};

use crate::Options;
use crate::root::Root;
use crate::stub_guest::Code;

/// Guest memory in all measurements, MiB.
pub(crate) const MEMORY_MIB: u64 = 256;
/// Results lock to the host's timer tick: starts are delayed over so many phases of it.
pub(crate) const N_PHASES: u32 = 8;
/// What the VMM tells every guest kernel by itself, and the rival is told too.
pub(crate) const KERNEL_ARGS: &str =
    "console=ttyS0 8250.nr_uarts=1 quiet pci=off tsc=reliable panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd";

/// Where things are in the root of the measurements.
pub(crate) const VMM: &str = "/eci-vmm";
pub(crate) const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const KERNEL: &str = "/vmlinux";
const INITRD: &str = "/initramfs.cpio";
const STUB: &str = "/stub";
const EMPTY: &str = "/empty";
/// What QEMU may read when it starts a microvm machine.
const QEMU_DATA: [&str; 5] = [
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
    "qboot.rom",
];

/// A kernel, and what is given to it.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) kernel: &'static str,
    pub(crate) initrd: &'static str,
    /// Beyond [`KERNEL_ARGS`].
    pub(crate) args: String,
}

/// The files of all measurements, and how often to measure.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) rounds: usize,
    pub(crate) rival: bool,
    pub(crate) show_console: bool,
    kernel_args: String,
    tick: Duration,
}

impl Ground {
    /// Makes a root of files in memory and moves into it: nothing is read from a disk, or from outside of an emulated
    /// host, while a clock runs.
    pub(crate) fn prepare(options: &Options) -> Result<Self> {
        let root = Root::new()?;
        root.add_program(&options.programs.join("eci-vmm"), VMM)?;
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

        let resolution = clock_getres(ClockId::MonotonicCoarse);
        let tick = Duration::new(
            u64::try_from(resolution.tv_sec)?,
            u32::try_from(resolution.tv_nsec)?,
        );
        ensure!(!tick.is_zero(), "the host's tick is not known");
        Ok(Self {
            rounds: options.rounds,
            rival: options.rival,
            show_console: options.console,
            kernel_args: options.kernel_args.clone(),
            tick,
        })
    }

    /// The real kernel and initramfs.
    pub(crate) fn guest(&self, args: &str) -> Guest {
        Guest {
            kernel: KERNEL,
            initrd: INITRD,
            args: format!("{args} {}", self.kernel_args).trim_end().to_owned(),
        }
    }

    /// A kernel that prints one byte and halts: what is left is the monitor.
    pub(crate) fn stub(&self) -> Guest {
        Guest {
            kernel: STUB,
            initrd: EMPTY,
            args: String::new(),
        }
    }

    /// All starts of one series: each phase of the tick, as often as there are rounds.
    pub(crate) fn phases(&self) -> impl Iterator<Item = u32> + use<> {
        (0..self.rounds).flat_map(|_| 0..N_PHASES)
    }

    /// Returns at a phase of the tick. Spins: a timer would end at a tick.
    pub(crate) fn wait_for_phase(&self, phase: u32) {
        let coarse = || clock_gettime(ClockId::MonotonicCoarse);
        let before = coarse();
        while coarse() == before {
            std::hint::spin_loop();
        }
        let due = Instant::now() + self.tick * phase / N_PHASES;
        while Instant::now() < due {
            std::hint::spin_loop();
        }
    }
}

/// Stops the vCPU for good.
const CLI_HLT: [u8; 2] = [0xfa, 0xf4];
