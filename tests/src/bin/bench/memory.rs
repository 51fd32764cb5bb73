//! Memory of an idle microVM.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::ground::{Ground, MEMORY_MIB};
use crate::monitor::Monitor;
use crate::stats::Samples;
use crate::summary::{Figure, Summary};

/// The port that the guest init connects to when it is ready (`protocol::READY_PORT`).
const READY_PORT: u32 = 1024;

/// The monitor's own memory while its guest's init waits for orders.
pub(crate) fn measure(ground: &Ground, summary: &mut Summary) -> Result<()> {
    let mut running = Monitor::Ours.start(&ground.guest(""))?;
    running.wait_for_connection(READY_PORT)?;
    let memory = Memory::of(running.process.id(), MEMORY_MIB * 1024)?;
    let figure = |kib: u64| {
        let mut samples = Samples::default();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        samples.add(kib as f64);
        Figure::of(&samples, "KiB")
    };
    summary.add("vmm_private_kib", figure(memory.private_kib).at_most(4096.0));
    summary.add("vmm_guest_ram_kib", figure(memory.guest_ram_kib));
    summary.add("vmm_page_tables_kib", figure(memory.page_tables_kib));
    Ok(())
}

/// A monitor's memory by use.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Private and resident, without guest RAM.
    pub(crate) private_kib: u64,
    /// Resident guest RAM.
    pub(crate) guest_ram_kib: u64,
    /// Page tables of the process.
    pub(crate) page_tables_kib: u64,
}

impl Memory {
    pub(crate) fn of(pid: u32, guest_kib: u64) -> Result<Self> {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read the VMM's mappings")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read the VMM's status")?;
        let page_tables_kib = status
            .lines()
            .find_map(|line| field(line, "VmPTE"))
            .context("no VmPTE")?;
        split(&smaps, guest_kib).map(|(private_kib, guest_ram_kib)| Self {
            private_kib,
            guest_ram_kib,
            page_tables_kib,
        })
    }
}

/// Private memory outside and resident memory inside of the mapping that is guest RAM: the one of just its size.
fn split(smaps: &str, guest_kib: u64) -> Result<(u64, u64)> {
    let (mut private, mut guest_ram, mut n_found) = (0, 0, 0);
    let mut is_guest_ram = false;
    for line in smaps.lines() {
        if let Some(size) = field(line, "Size") {
            is_guest_ram = size == guest_kib;
            n_found += u32::from(is_guest_ram);
        } else if is_guest_ram {
            guest_ram += field(line, "Rss").unwrap_or(0);
        } else {
            private += field(line, "Private_Clean").unwrap_or(0) + field(line, "Private_Dirty").unwrap_or(0);
        }
    }
    ensure!(
        n_found == 1,
        "{n_found} mappings of {guest_kib} KiB instead of one, guest RAM"
    );
    Ok((private, guest_ram))
}

/// The value of a line like `Rss:   12 kB`.
fn field(line: &str, name: &str) -> Option<u64> {
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
Rss:               30000 kB
Private_Clean:         0 kB
Private_Dirty:     30000 kB
7f0020000000-7f0020010000 r-xp 00000000 00:01 5  /usr/bin/eci-vmm
Size:                 64 kB
Rss:                  60 kB
Private_Clean:        40 kB
Private_Dirty:         8 kB
";

    #[test]
    fn guest_ram_is_told_apart() {
        assert_eq!(split(SMAPS, 262_144).unwrap(), (48, 30_000));
        assert!(split(SMAPS, 1).is_err());
    }
}
