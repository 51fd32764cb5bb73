//! The benchmarks, run by `make bench` in an L1 host whose time is the number of instructions executed: every figure
//! repeats. What is measured and how to read it: `docs/benchmarks.md`.

mod agent;
mod answer;
mod boot;
mod crowd;
mod exit;
mod fork;
mod ground;
mod group;
mod memory;
mod monitor;
mod root;
mod stats;
#[path = "../../../../vmm/tests/stub_guest/mod.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used)]
mod stub_guest;
mod summary;
mod tick;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lexopt::{Arg, Parser, ValueExt};

use crate::ground::Ground;
use crate::summary::Summary;

const USAGE: &str = "\
Measures the start time and memory of microVMs against QEMU's microvm machine, both in this host.

usage: bench [OPTION...]

  --programs DIR    where our programs are (target/release)
  --guest DIR       where vmlinux and initramfs.cpio are (target/guest)
  --image DIR       the OCI layout of the groups' image (target/bench/image)
  --summary FILE    also write the figures there, as JSON
  --only GROUP,...  measure only these: group, fork, boot, floor, answer, exit,
                    memory (all); profile shows the kernel's own account of one boot,
                    trace who used the processor while one group started,
                    crowd only the part of group with many at once
  --trace FILE      what trace saw, event by event; with --only answer: one restore,
                    with --only crowd: all starts of the crowd
  --trace-events E  more events for it, as kvm/kvm_exit,raw_syscalls
  --rounds N        starts per phase of the host's tick, of which there are 8 (3)
  --rival no        leave the rival out: for comparing two builds of ours
  --kernel-args X   more kernel arguments, for both monitors
  --console         show what the guests write to their console

Exit code 1: a figure misses its goal or could not be measured.";

/// What to measure, and with what.
#[derive(Debug)]
struct Options {
    programs: PathBuf,
    guest: PathBuf,
    image: PathBuf,
    summary: Option<PathBuf>,
    only: Vec<String>,
    rounds: usize,
    rival: bool,
    kernel_args: String,
    console: bool,
    trace: Option<PathBuf>,
    trace_events: Option<String>,
}

fn main() -> ExitCode {
    match parse().and_then(|options| options.map_or(Ok(true), |options| run(&options))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn parse() -> Result<Option<Options>> {
    let mut options = Options {
        programs: "target/release".into(),
        guest: "target/guest".into(),
        image: "target/bench/image".into(),
        summary: None,
        only: Vec::new(),
        rounds: 3,
        rival: true,
        kernel_args: String::new(),
        console: false,
        trace: None,
        trace_events: None,
    };
    let mut parser = Parser::from_env();
    while let Some(argument) = parser.next().context("read the options")? {
        match argument {
            Arg::Long("programs") => options.programs = parser.value()?.into(),
            Arg::Long("guest") => options.guest = parser.value()?.into(),
            Arg::Long("image") => options.image = parser.value()?.into(),
            Arg::Long("summary") => options.summary = Some(parser.value()?.into()),
            Arg::Long("only") => {
                for group in parser.value()?.string()?.split(',') {
                    if !GROUPS.iter().any(|(name, _)| *name == group) {
                        let names: Vec<_> = GROUPS.iter().map(|(name, _)| *name).collect();
                        bail!("--only {group}: valid are {}", names.join(", "));
                    }
                    options.only.push(group.to_owned());
                }
            }
            Arg::Long("rounds") => options.rounds = parser.value()?.parse()?,
            Arg::Long("rival") => options.rival = parser.value()?.string()? != "no",
            Arg::Long("kernel-args") => options.kernel_args = parser.value()?.string()?,
            Arg::Long("trace") => options.trace = Some(parser.value()?.into()),
            Arg::Long("trace-events") => options.trace_events = Some(parser.value()?.string()?),
            Arg::Long("console") => options.console = true,
            Arg::Long("help") | Arg::Short('h') => {
                println!("{USAGE}");
                return Ok(None);
            }
            other => return Err(other.unexpected()).context("see `bench --help`"),
        }
    }
    if options.rounds == 0 {
        bail!("--rounds 0: give at least 1");
    }
    Ok(Some(options))
}

type Measurement = fn(&Ground, &mut Summary) -> Result<()>;

/// In the order of the table.
const GROUPS: [(&str, Measurement); 10] = [
    ("group", group::measure),
    ("fork", fork::measure),
    ("boot", boot::measure_boot),
    ("floor", boot::measure_floor),
    ("answer", boot::measure_answer),
    ("exit", exit::measure),
    ("memory", memory::measure),
    ("profile", boot::profile),
    ("trace", trace::measure),
    ("crowd", group::measure_crowd),
];

/// Measured only when asked for.
const EXTRAS: [&str; 3] = ["profile", "trace", "crowd"];

/// Runs the measurements; one that fails does not keep the others from running. Whether all goals are met.
fn run(options: &Options) -> Result<bool> {
    // Opened first: paths are others afterwards.
    let file = options.summary.as_deref().map(summary::create).transpose()?;
    let is_wanted = |name: &str| {
        if options.only.is_empty() {
            !EXTRAS.contains(&name)
        } else {
            options.only.iter().any(|only| only == name)
        }
    };
    let ground = Ground::prepare(options)?;
    let mut summary = Summary::default();
    for (name, measure) in GROUPS.iter().filter(|(name, _)| is_wanted(name)) {
        eprintln!("bench: measuring {name} ...");
        if let Err(error) = measure(&ground, &mut summary) {
            eprintln!("bench: {name}: {error:#}");
            summary.failed(name, &format!("{error:#}"));
        }
    }
    print!("{summary}");
    if let Some(file) = file {
        summary.write(file)?;
    }
    Ok(summary.is_good())
}
