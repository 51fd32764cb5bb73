//! Container groups through the agent: clock (f), create to the first exec's result, clock (g), create to running, and
//! what an idle group costs its host.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::agent::{Agent, IMAGE, Processes, Starts};
use crate::crowd;
use crate::ground::Ground;
use crate::memory::{field, kib};
use crate::stats::Samples;
use crate::summary::{Figure, Summary};
use crate::tick::Series;

/// Memory of the group, MiB.
const GROUP_MIB: u64 = 256;
pub(crate) const NAME: &str = "bench";

/// When things had happened, since just before the first call.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) running: Duration,
    pub(crate) exec_result: Duration,
}

pub(crate) fn measure(ground: &Ground, summary: &mut Summary) -> Result<()> {
    let cold_f = {
        let agent = Agent::start(Starts::Boot)?;
        let manifest = agent.write("group.yaml", &manifest(NAME))?;
        let starts = series(ground, &agent, &manifest, 0)?;
        let cold_f = starts.times(|start| Some(start.exec_result));
        let cold_g = starts.times(|start| Some(start.running));
        summary.add("cold_f_ms", Figure::of(&cold_f, "counted ms").clock("f"));
        summary.add("cold_g_ms", Figure::of(&cold_g, "counted ms").clock("g"));
        measure_idle(&agent, &manifest, summary)?;
        cold_f
    };
    {
        let agent = Agent::start(Starts::Standby(1))?;
        let manifest = agent.write("group.yaml", &manifest(NAME))?;
        warm_up(&agent, &manifest)?;
        let starts = series(ground, &agent, &manifest, 1)?;
        add_starts(summary, "create", &starts, &cold_f);
        print_phases(&agent, "standby")?;
    }
    measure_templates(ground, summary, Some(&cold_f))
}

/// Groups that go on from a template, one after the other and many at once, without those that boot to compare them with.
pub(crate) fn measure_crowd(ground: &Ground, summary: &mut Summary) -> Result<()> {
    measure_templates(ground, summary, None)
}

fn measure_templates(ground: &Ground, summary: &mut Summary, cold_f: Option<&Samples>) -> Result<()> {
    let agent = Agent::start(Starts::Template)?;
    let manifest = agent.write("group.yaml", &manifest(NAME))?;
    warm_up(&agent, &manifest)?;
    let starts = series(ground, &agent, &manifest, 0)?;
    if let Some(cold_f) = cold_f {
        add_starts(summary, "create_miss", &starts, cold_f);
    }
    print_phases(&agent, "template")?;
    let create_g = starts.times(|start| Some(start.running));
    crowd::measure(ground, &agent, create_g.percentile(50), summary)
}

/// The slow path has no goal.
fn add_starts(summary: &mut Summary, name: &str, starts: &Series<Start>, cold_f: &Samples) {
    let create_f = starts.times(|start| Some(start.exec_result));
    let create_g = starts.times(|start| Some(start.running));
    let (f_ms, g_ms) = (format!("{name}_f_ms"), format!("{name}_g_ms"));
    summary.add(&f_ms, Figure::of(&create_f, "counted ms").clock("f"));
    summary.add(&g_ms, Figure::of(&create_g, "counted ms").clock("g"));
    let ratio = Figure::of(&create_f.divided_by(cold_f.percentile(50)), "ratio")
        .clock("f")
        .rival("cold boot");
    let is_fast_path = name == "create";
    let ratio = if is_fast_path { ratio.at_most(0.25) } else { ratio };
    summary.add(&format!("{name}_f_vs_cold"), ratio);
}

/// Beside the figures: says where the time of a start goes.
fn print_phases(agent: &Agent, kind: &str) -> Result<()> {
    for (phase, mean_ms) in agent.start_phases()? {
        eprintln!("bench: {kind}: phase {phase:<20} {mean_ms:7.3} counted ms");
    }
    Ok(())
}

/// Starts one group after the other, each when so many sandboxes stand by.
fn series(ground: &Ground, agent: &Agent, manifest: &Path, n_standbys: usize) -> Result<Series<Start>> {
    ground.tick.series_after(
        "a group",
        || agent.wait_standbys(n_standbys),
        || {
            let (start, _) = start_group(agent, manifest)?;
            agent.ecictl(["rm", "--grace", "0", NAME])?;
            Ok(start)
        },
    )
}

/// Has the agent make the template that the groups go on from.
pub(crate) fn warm_up(agent: &Agent, manifest: &Path) -> Result<()> {
    start_group(agent, manifest)?;
    agent.wait_log("template is ready")?;
    agent.ecictl(["rm", "--grace", "0", NAME]).map(drop)
}

/// As a user does it: creates the group, waits until it runs, executes something.
pub(crate) fn start_group(agent: &Agent, manifest: &Path) -> Result<(Start, String)> {
    let begin = Instant::now();
    let id = agent.ecictl([
        "create".as_ref(),
        "--quiet".as_ref(),
        "-f".as_ref(),
        manifest.as_os_str(),
    ])?;
    let running = begin.elapsed();
    agent.ecictl(["exec", NAME, "--", "/bin/true"])?;
    let start = Start {
        running,
        exec_result: begin.elapsed(),
    };
    Ok((start, id.trim().to_owned()))
}

/// Memory of a group that does nothing, by who has it. The agent's share is not in it.
fn measure_idle(agent: &Agent, manifest: &Path, summary: &mut Summary) -> Result<()> {
    let before = kvm_tables_kib()?;
    let (_, id) = start_group(agent, manifest)?;
    let guest = agent.ecictl(["exec", NAME, "--", "/bin/cat", "/proc/meminfo"])?;
    let Processes { shim, vmm } = agent.processes(&id)?;
    let kvm_tables_kib = kvm_tables_kib()?.saturating_sub(before);
    ensure!(
        vmm.guest_ram_kib > 0,
        "no mapping of the VMM looks like guest RAM"
    );
    let tables_kib = shim.page_tables_kib + vmm.page_tables_kib + kvm_tables_kib;
    let parts = [
        ("group_shim_kib", shim.private_kib),
        ("group_vmm_kib", vmm.private_kib),
        ("group_guest_ram_kib", vmm.guest_ram_kib),
        ("group_page_tables_kib", tables_kib),
    ];
    summary.add("group_idle_kib", kib(parts.iter().map(|(_, part)| part).sum()));
    for (name, part) in parts {
        summary.add(name, kib(part));
    }
    for (name, part) in inside(&guest)? {
        summary.add(name, kib(part));
    }
    agent.ecictl(["rm", "--grace", "0", NAME]).map(drop)
}

/// What the guest says of its memory: parts of its RAM as the host sees it, but for what was used once and is free now.
fn inside(meminfo: &str) -> Result<[(&'static str, u64); 4]> {
    let value = |name: &str| {
        let found = meminfo.lines().find_map(|line| field(line, name));
        found.with_context(|| format!("the guest's /proc/meminfo has no {name}"))
    };
    let kernel = ["Slab", "KernelStack", "PageTables", "Percpu"]
        .iter()
        .map(|name| value(name))
        .sum::<Result<u64>>()?;
    Ok([
        ("guest_total_kib", value("MemTotal")?),
        ("guest_free_kib", value("MemFree")?),
        ("guest_kernel_kib", kernel),
        ("guest_processes_kib", value("AnonPages")? + value("Cached")?),
    ])
}

/// Page tables that KVM keeps for guests, of the whole host (Documentation/filesystems/proc.rst, `SecPageTables`).
pub(crate) fn kvm_tables_kib() -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let found = meminfo.lines().find_map(|line| field(line, "SecPageTables"));
    found.context("this kernel does not tell KVM's page tables (Linux 6.1)")
}

pub(crate) fn manifest(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nspec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  \
         - name: idle\n    image: {IMAGE}\n    imagePullPolicy: IfNotPresent\n    command: [\"/bin/sleep\", \"1000000\"]\n    \
         resources: {{ limits: {{ cpu: \"1\", memory: {GROUP_MIB}Mi }} }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_read() {
        let meminfo = "MemTotal: 100 kB\nMemFree: 60 kB\nCached: 5 kB\nSlab: 10 kB\nAnonPages: 7 kB\nKernelStack: 2 kB\n\
                       PageTables: 3 kB\nPercpu: 4 kB\n";
        let expected = [
            ("guest_total_kib", 100),
            ("guest_free_kib", 60),
            ("guest_kernel_kib", 19),
            ("guest_processes_kib", 12),
        ];
        assert_eq!(inside(meminfo).unwrap(), expected);
        assert!(inside("MemTotal: 1 kB\n").is_err());
    }
}
