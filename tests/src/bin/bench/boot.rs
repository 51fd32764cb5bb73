//! Start times: clock (a), monitor process to ready; clock (b), start call to the guest's first output.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::ground::{Ground, Guest};
use crate::monitor::Monitor;
use crate::stats::Samples;
use crate::summary::{Figure, Summary};

/// What the guest init prints first, with `eci.mode=bench`.
const INIT_OUTPUT: &str = "eci: init ready";
const RIVAL: &str = "QEMU microvm";

/// A real kernel and init.
pub(crate) fn measure_boot(ground: &Ground, summary: &mut Summary) -> Result<()> {
    compare(
        ground,
        summary,
        "boot_b",
        &ground.guest("eci.mode=bench"),
        INIT_OUTPUT,
        0.6,
    )
}

/// A kernel of three instructions.
pub(crate) fn measure_floor(ground: &Ground, summary: &mut Summary) -> Result<()> {
    compare(ground, summary, "vmm_floor", &ground.stub(), "!", 0.15)
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
    let ours = series(ground, Monitor::Ours, guest, marker)?;
    summary.add(
        &format!("{name}_ours"),
        Figure::of(&ours.output, "counted ms").clock("b"),
    );
    summary.add(
        &format!("{name}_ready"),
        Figure::of(&ours.ready, "counted ms").clock("a"),
    );
    if ground.rival {
        let theirs = series(ground, Monitor::Qemu, guest, marker)?;
        summary.add(
            &format!("{name}_qemu"),
            Figure::of(&theirs.output, "counted ms").clock("b"),
        );
        let ratio = ours.output.divided_by(theirs.output.percentile(50));
        summary.add(
            &format!("{name}_vs_qemu"),
            Figure::of(&ratio, "ratio").clock("b").rival(RIVAL).at_most(goal),
        );
    }
    Ok(())
}

struct Series {
    output: Samples,
    ready: Samples,
}

/// Starts the guest in every phase of the tick. The first start is not counted: it fills caches.
fn series(ground: &Ground, monitor: Monitor, guest: &Guest, marker: &str) -> Result<Series> {
    let once = |phase| -> Result<(Duration, Option<Duration>, String)> {
        ground.wait_for_phase(phase);
        let mut running = monitor.start(guest)?;
        let output = running.wait_for(marker)?;
        Ok((output, running.ready(), running.console()))
    };
    let (_, _, console) = once(0)?;
    if ground.show_console {
        eprintln!("{monitor:?}: {console}");
    }
    let (mut output, mut ready) = (Samples::default(), Samples::default());
    for phase in ground.phases() {
        match once(phase) {
            Ok((to_output, to_ready, _)) => {
                output.add(milliseconds(to_output));
                if let Some(to_ready) = to_ready {
                    ready.add(milliseconds(to_ready));
                }
            }
            Err(error) => {
                eprintln!("bench: a start with {monitor:?} failed: {error:#}");
                output.add_failure();
            }
        }
    }
    if output.is_empty() {
        bail!("no start with {monitor:?} succeeded");
    }
    Ok(Series { output, ready })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
