//! Start times: clock (a), monitor process to ready; clock (b), start call to the guest's first output; clock (e), start
//! call to the guest init's first answer.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use shim::resource::written;
use vmm::config::Origin;

use crate::answer;
use crate::ground::{Ground, Guest, SNAPSHOT_WRITTEN};
use crate::monitor::Monitor;
use crate::summary::{Figure, Summary};
use crate::trace;

/// What the guest init prints first, with `eci.mode=bench`.
const INIT_OUTPUT: &str = "eci: init ready";
pub(crate) const RIVAL: &str = "QEMU microvm";

/// A real kernel and init.
pub(crate) fn measure_boot(ground: &Ground, summary: &mut Summary) -> Result<()> {
    let guest = ground.guest("eci.mode=bench");
    compare(ground, summary, "boot_b", &guest, INIT_OUTPUT, 0.45)
}

/// A kernel of three instructions.
pub(crate) fn measure_floor(ground: &Ground, summary: &mut Summary) -> Result<()> {
    compare(ground, summary, "vmm_floor", &ground.stub(), "!", 0.15)
}

/// Until the guest init answers: booted, and restored from a template. The rival here is our own boot, as an init is reached
/// through our VMM only.
pub(crate) fn measure_answer(ground: &Ground, summary: &mut Summary) -> Result<()> {
    let caller = answer::Caller::new()?;
    let series = |guest: &Guest| {
        let starts = ground.tick.series("a start", || {
            let mut running = Monitor::Ours.start(guest)?;
            caller.first_answer(&mut running).map(|answer| answer.after)
        })?;
        anyhow::Ok(starts.times(|time| Some(*time)))
    };
    let cold = series(&ground.guest(""))?;
    summary.add("cold_e_ms", Figure::of(&cold, "counted ms").clock("e"));
    let mut template = ground.template().context("make a template")?;
    // As the shim does it with the first group that is made from a template.
    let mut first = Monitor::Ours.start(&template)?;
    caller.first_answer(&mut first)?;
    let [_, memory] = template.files;
    written::record(first.process.id(), Path::new(memory), Path::new(SNAPSHOT_WRITTEN))
        .context("list the pages that a guest of the template writes to")?;
    drop(first);
    template.origin = Origin::Snapshot { with_written: true };
    let restored = series(&template)?;
    summary.add(
        "restore_e_ms",
        Figure::of(&restored, "counted ms").clock("e").at_most(8.0),
    );
    if ground.trace.is_some() {
        trace::record(ground, || {
            let mut running = Monitor::Ours.start(&template)?;
            caller.first_answer(&mut running)
        })?;
    }
    let ratio = restored.divided_by(cold.percentile(50));
    summary.add(
        "restore_e_vs_cold",
        Figure::of(&ratio, "ratio")
            .clock("e")
            .rival("our own boot")
            .at_most(0.1),
    );
    Ok(())
}

/// Not a measurement: shows what the kernel does and how long each step takes.
pub(crate) fn profile(ground: &Ground, _: &mut Summary) -> Result<()> {
    let mut running = Monitor::Ours.start(&ground.guest("eci.mode=bench initcall_debug ignore_loglevel"))?;
    running.wait_for(INIT_OUTPUT)?;
    println!("{}", running.console());
    Ok(())
}

fn compare(
    ground: &Ground,
    summary: &mut Summary,
    name: &str,
    guest: &Guest,
    marker: &str,
    goal: f64,
) -> Result<()> {
    let series = |monitor: Monitor| {
        ground.tick.series("a start", || {
            let mut running = monitor.start(guest)?;
            let output = running.wait_for(marker)?;
            if ground.show_console {
                eprintln!("{monitor:?}: {}", running.console());
            }
            Ok((output, running.ready()))
        })
    };
    let output = |times: &(Duration, Option<Duration>)| Some(times.0);
    let starts = series(Monitor::Ours)?;
    let ours = starts.times(output);
    summary.add(
        &format!("{name}_ours"),
        Figure::of(&ours, "counted ms").clock("b"),
    );
    summary.add(
        &format!("{name}_ready"),
        Figure::of(&starts.times(|times| times.1), "counted ms").clock("a"),
    );
    if ground.rival {
        let theirs = series(Monitor::Qemu).context("measure the rival")?.times(output);
        summary.add(
            &format!("{name}_qemu"),
            Figure::of(&theirs, "counted ms").clock("b"),
        );
        let ratio = ours.divided_by(theirs.percentile(50));
        summary.add(
            &format!("{name}_vs_qemu"),
            Figure::of(&ratio, "ratio").clock("b").rival(RIVAL).at_most(goal),
        );
    }
    Ok(())
}
