//! Where the time of one start goes: the processor time of each program on the host while a group is created and answers a
//! first exec, by the kernel's scheduler events (Documentation/trace/events.rst).

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::agent::{Agent, Starts};
use crate::ground::Ground;
use crate::group::{NAME, manifest, start_group, warm_up};
use crate::summary::Summary;

const TRACEFS: &str = "/sys/kernel/tracing";
/// Per CPU; a start takes about a tenth.
const BUFFER_KIB: &str = "65536";

/// Shows it; with a file, all events go there too.
pub(crate) fn measure(ground: &Ground, _: &mut Summary) -> Result<()> {
    let agent = Agent::start(Starts::Standby(1))?;
    let manifest = agent.write("group.yaml", &manifest(NAME))?;
    warm_up(&agent, &manifest)?;
    // The first of a template, and of this agent, fills caches.
    for _ in 0..2 {
        agent.wait_standbys(1)?;
        start_group(&agent, &manifest)?;
        agent.ecictl(["rm", "--grace", "0", NAME])?;
    }
    agent.wait_standbys(1)?;
    ground.tick.settle();
    let ((start, _), events) = record(ground, || start_group(&agent, &manifest))?;
    agent.ecictl(["rm", "--grace", "0", NAME])?;
    println!(
        "running after {:.3} counted ms, exec's result after {:.3}; processor time of each program:",
        start.running.as_secs_f64() * 1e3,
        start.exec_result.as_secs_f64() * 1e3
    );
    print_programs(&events);
    Ok(())
}

/// The processor time of each program, counted ms.
pub(crate) fn print_programs(events: &str) {
    for (name, ms) in by_program(events) {
        println!("{ms:9.3} {name}");
    }
}

/// Does `what` and returns the events meanwhile, too; with a file, they go there.
pub(crate) fn record<T>(ground: &Ground, what: impl FnOnce() -> Result<T>) -> Result<(T, String)> {
    begin(ground.trace_events.as_deref())?;
    let done = what();
    control("tracing_on", "0")?;
    let done = done?;
    let events = fs::read_to_string(Path::new(TRACEFS).join("trace")).context("read the trace")?;
    if let Some(mut file) = ground.trace.as_ref() {
        file.write_all(events.as_bytes()).context("write the trace")?;
    }
    Ok((done, events))
}

fn begin(more: Option<&str>) -> Result<()> {
    if !Path::new(TRACEFS).join("trace").exists() {
        rustix::mount::mount(
            "tracefs",
            TRACEFS,
            "tracefs",
            rustix::mount::MountFlags::empty(),
            c"",
        )
        .context("mount tracefs")?;
    }
    control("buffer_size_kb", BUFFER_KIB)?;
    control("trace_clock", "mono")?;
    control("trace", "")?;
    for event in ["sched/sched_switch", "sched/sched_process_exec"]
        .into_iter()
        .chain(more.into_iter().flat_map(|more| more.split(',')))
    {
        control(&format!("events/{event}/enable"), "1")?;
    }
    control("tracing_on", "1")
}

fn control(file: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACEFS).join(file);
    fs::write(&path, value).with_context(|| format!("write {value:?} to {}", path.display()))
}

/// Milliseconds of each command name, most first. One CPU.
fn by_program(events: &str) -> Vec<(String, f64)> {
    let mut sums = BTreeMap::<&str, f64>::new();
    let mut since = None;
    for line in events.lines().filter(|line| !line.starts_with('#')) {
        let Some((head, fields)) = line.split_once(": sched_switch: ") else {
            continue;
        };
        let at: Option<f64> = head
            .rsplit(' ')
            .next()
            .and_then(|time| time.trim_end_matches(':').parse().ok());
        let name = |key: &str, end: &str| {
            let (_, rest) = fields.split_once(key)?;
            rest.split_once(end).map(|(name, _)| name)
        };
        let (Some(at), Some(name)) = (at, name("prev_comm=", " prev_pid=")) else {
            continue;
        };
        if let Some(since) = since.replace(at) {
            *sums.entry(name).or_default() += (at - since) * 1e3;
        }
    }
    let mut sums: Vec<_> = sums.into_iter().map(|(name, ms)| (name.to_owned(), ms)).collect();
    sums.sort_by(|a, b| b.1.total_cmp(&a.1));
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_belongs_to_who_is_switched_away_from() {
        let events = "# tracer: nop\n\
            <idle>-0 [000] d..2. 10.000000: sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=a next_pid=7\n\
            a-7 [000] d..2. 10.002000: sched_switch: prev_comm=a b prev_pid=7 prev_prio=120 prev_state=S ==> next_comm=c next_pid=8\n\
            c-8 [000] d..2. 10.002500: sched_switch: prev_comm=c prev_pid=8 prev_prio=120 prev_state=S ==> next_comm=a next_pid=7\n";
        let sums = by_program(events);
        assert_eq!(sums.len(), 2);
        assert_eq!(sums[0].0, "a b");
        assert!((sums[0].1 - 2.0).abs() < 1e-6 && (sums[1].1 - 0.5).abs() < 1e-6);
    }
}
