//! Many groups: all created at the same moment, and what they cost while they do nothing.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::agent::{Agent, Processes};
use crate::ground::Ground;
use crate::group::{kvm_tables_kib, manifest};
use crate::memory::kib;
use crate::stats::Samples;
use crate::summary::{Figure, Summary};
use crate::trace;

/// Groups of the crowd.
const N: usize = 50;

/// With the median of a single group's start (create to running), milliseconds.
pub(crate) fn measure(ground: &Ground, agent: &Agent, single_ms: f64, summary: &mut Summary) -> Result<()> {
    let names: Vec<String> = (1..=N).map(|number| format!("crowd-{number}")).collect();
    let manifests = names
        .iter()
        .map(|name| agent.write(&format!("{name}.yaml"), &manifest(name)))
        .collect::<Result<Vec<_>>>()?;
    let tables_before = kvm_tables_kib()?;
    let mut times = Samples::default();
    let mut ids = Vec::new();
    let starts = if ground.trace.is_some() {
        let (starts, events) = trace::record(ground, || Ok(start_all(agent, &manifests)))?;
        trace::print_programs(&events);
        starts
    } else {
        start_all(agent, &manifests)
    };
    for started in starts {
        match started {
            Ok((id, took)) => {
                times.add(took.as_secs_f64() * 1e3);
                ids.push(id);
            }
            Err(error) => {
                eprintln!("bench: a group of the crowd: {error:#}");
                times.add_failure();
            }
        }
    }
    let ratios = times.divided_by(single_ms);
    summary.add("burst50_ms", Figure::of(&times, "counted ms").clock("g"));
    summary.add(
        "burst50_p99_vs_single",
        Figure::of_percentile(&ratios, 99, "ratio")
            .clock("g")
            .rival("a single start")
            .at_most(60.0),
    );
    ensure!(!ids.is_empty(), "no group of the crowd runs");
    measure_idle(agent, &ids, tables_before, summary)?;
    for name in &names {
        agent.ecictl(["rm", "--grace", "0", name])?;
    }
    Ok(())
}

/// Creates all groups at the same moment: id and time until it runs, of each.
fn start_all(agent: &Agent, manifests: &[PathBuf]) -> Vec<Result<(String, Duration)>> {
    std::thread::scope(|scope| {
        let begun = Instant::now();
        let starts: Vec<_> = manifests
            .iter()
            .map(|manifest| {
                scope.spawn(move || {
                    let id = agent.ecictl([
                        "create".as_ref(),
                        "--quiet".as_ref(),
                        "-f".as_ref(),
                        manifest.as_os_str(),
                    ])?;
                    Ok((id.trim().to_owned(), begun.elapsed()))
                })
            })
            .collect();
        starts
            .into_iter()
            .map(|start| {
                start
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("the thread panicked")))
            })
            .collect()
    })
}

/// What each costs beyond what all share: pages of programs, and of the template.
fn measure_idle(agent: &Agent, ids: &[String], tables_before: u64, summary: &mut Summary) -> Result<()> {
    let n = u64::try_from(ids.len()).context("count the groups")?;
    let kvm_tables = kvm_tables_kib()?.saturating_sub(tables_before);
    let (mut shims, mut vmms, mut guests, mut tables) = (0, 0, 0, kvm_tables);
    for id in ids {
        let Processes { shim, vmm } = agent.processes(id)?;
        shims += shim.private_kib;
        vmms += vmm.private_kib;
        guests += vmm.guest_ram_kib;
        tables += shim.page_tables_kib + vmm.page_tables_kib;
    }
    let each = (shims + vmms + guests + tables) / n;
    summary.add("group_idle_marginal_kib", kib(each).at_most(12.0 * 1024.0));
    for (name, all) in [
        ("marginal_shim_kib", shims),
        ("marginal_vmm_kib", vmms),
        ("marginal_guest_ram_kib", guests),
        ("marginal_page_tables_kib", tables),
    ] {
        summary.add(name, kib(all / n));
    }
    Ok(())
}
