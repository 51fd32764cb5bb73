//! The end of a VM: from the guest's power-off to the monitor's process being reaped.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::boot::RIVAL;
use crate::ground::Ground;
use crate::monitor::Monitor;
use crate::summary::{Figure, Summary};

/// What Linux prints last, whatever its log level (kernel/reboot.c, `kernel_power_off`).
const LAST_WORDS: &str = "reboot: Power down";

/// How long an end took.
#[derive(Debug)]
struct End {
    /// From the guest's last words to the process being reaped.
    process: Duration,
    /// How long the owner then took to close what was left of the VM; ours only.
    remains: Option<Duration>,
}

pub(crate) fn measure(ground: &Ground, summary: &mut Summary) -> Result<()> {
    let guest = ground.guest("eci.mode=bench");
    let series = |monitor: Monitor| {
        ground.tick.series("an end", || {
            let mut running = monitor.start(&guest)?;
            let said = running.wait_for(LAST_WORDS)?;
            let ended = running.wait_for_end()?;
            let remains = running.close_remains()?;
            Ok(End {
                process: ended.saturating_sub(said),
                remains,
            })
        })
    };
    let process = |end: &End| Some(end.process);
    let ends = series(Monitor::Ours)?;
    let ours = ends.times(process);
    summary.add(
        "vmm_exit_ms",
        Figure::of(&ours, "counted ms").rival(RIVAL).at_most(10.0),
    );
    summary.add(
        "vmm_remains_ms",
        Figure::of(&ends.times(|end| end.remains), "counted ms"),
    );
    if ground.rival {
        let theirs = series(Monitor::Qemu).context("measure the rival")?.times(process);
        summary.add("vmm_exit_qemu", Figure::of(&theirs, "counted ms"));
    }
    Ok(())
}
