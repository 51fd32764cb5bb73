//! Memory of an idle microVM.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::answer::Caller;
use crate::ground::Ground;
use crate::monitor::Monitor;
use crate::stats::Samples;
use crate::summary::{Figure, Summary};

/// A mapping that is at least so long, and readable and writable, is guest RAM: a VMM has no other use for that much.
const MIN_GUEST_RAM_KIB: u64 = 32 << 10;

/// The monitor's own memory, and the init's in the guest, while the init waits for orders.
pub(crate) fn measure(ground: &Ground, summary: &mut Summary) -> Result<()> {
    let mut running = Monitor::Ours.start(&ground.guest(""))?;
    // Its answer tells the init's memory; asking is what an init that waits for orders is there for.
    let init = Caller::new()?.first_answer(&mut running)?.stats;
    let memory = Memory::of(running.process.id())?;
    ensure!(
        memory.guest_ram_kib > 0,
        "no mapping of the VMM looks like guest RAM"
    );
    summary.add("vmm_private_kib", kib(memory.private_kib).at_most(4096.0));
    summary.add("vmm_guest_ram_kib", kib(memory.guest_ram_kib));
    summary.add("vmm_page_tables_kib", kib(memory.page_tables_kib));
    summary.add(
        "init_rss_kib",
        kib(init.init_resident_bytes >> 10).at_most(4096.0),
    );
    Ok(())
}

/// A figure of one reading.
pub(crate) fn kib(kib: u64) -> Figure {
    let mut samples = Samples::default();
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    samples.add(kib as f64);
    Figure::of(&samples, "KiB")
}

/// A process's memory by use. What other processes share is not in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Private and resident, without guest RAM.
    pub(crate) private_kib: u64,
    /// Guest RAM that is in no file, or differs from it: of a VM that was restored, only what it wrote to.
    pub(crate) guest_ram_kib: u64,
    /// Page tables of the process.
    pub(crate) page_tables_kib: u64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let read = |file| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let page_tables_kib = read("status")?
            .lines()
            .find_map(|line| field(line, "VmPTE"))
            .context("no VmPTE")?;
        Ok(Self {
            page_tables_kib,
            ..split(&read("smaps")?)
        })
    }
}

/// Tells guest RAM from the rest.
fn split(smaps: &str) -> Memory {
    let mut memory = Memory::default();
    let (mut is_writable, mut is_guest_ram) = (false, false);
    for line in smaps.lines() {
        // The first line of a mapping: `7f0000000000-7f0010000000 rw-p 00000000 00:00 0`.
        if let Some((range, permissions)) = line.split_once(' ')
            && range.contains('-')
        {
            is_writable = permissions.starts_with("rw");
        } else if let Some(size) = field(line, "Size") {
            is_guest_ram = is_writable && size >= MIN_GUEST_RAM_KIB;
        } else if is_guest_ram {
            memory.guest_ram_kib += field(line, "Anonymous").unwrap_or(0);
        } else {
            memory.private_kib +=
                field(line, "Private_Clean").unwrap_or(0) + field(line, "Private_Dirty").unwrap_or(0);
        }
    }
    memory
}

/// The value of a line like `Rss:   12 kB`.
pub(crate) fn field(line: &str, name: &str) -> Option<u64> {
    let value = line.strip_prefix(name)?.strip_prefix(':')?;
    value.trim().strip_suffix(" kB")?.trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
KernelPageSize:        4 kB
Rss:               31000 kB
Private_Clean:      1000 kB
Private_Dirty:     30000 kB
Anonymous:         30000 kB
7f0010000000-7f0018000000 ---p 00000000 00:00 0
Size:             131072 kB
Rss:                   0 kB
Private_Clean:         0 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
7f0020000000-7f0020010000 r-xp 00000000 00:01 5  /usr/bin/eci-vmm
Size:                 64 kB
Rss:                  60 kB
Private_Clean:        40 kB
Private_Dirty:         8 kB
Anonymous:             8 kB
";

    #[test]
    fn guest_ram_is_told_apart() {
        let expected = Memory {
            private_kib: 48,
            guest_ram_kib: 30_000,
            page_tables_kib: 0,
        };
        assert_eq!(split(SMAPS), expected);
        // Without a mapping that may be guest RAM all is the VMM's own.
        let read_only = SMAPS.replace("rw-p", "r--p");
        assert_eq!(split(&read_only).guest_ram_kib, 0);
        assert_eq!(split(&read_only).private_kib, 31_048);
    }
}
