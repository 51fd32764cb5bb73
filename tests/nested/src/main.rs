//! Runs commands where KVM works: in an emulated L1 host, or directly on a machine whose own KVM is usable.
//!
//! One program plays every part: the runner, the supervisor of an L1 host that stays up, PID 1 of the L1 host, and
//! its command server. It is therefore linked statically. See `docs/test-bed.md`.

mod direct;
mod initramfs;
mod l1;
mod machine;
mod persistent;
mod place;
mod runner;
mod sys;
mod window;
mod wire;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lexopt::{Arg, Parser, ValueExt};

use crate::machine::{Machine, Shape};
use crate::place::Place;
use crate::runner::Order;

const USAGE: &str = "\
Runs commands where KVM works: in an emulated L1 host, or directly where this machine's KVM is usable.

usage: nested run [OPTION...] -- COMMAND [ARGUMENT...]
       nested up [OPTION...]
       nested down
       nested status

run     uses the L1 host of this checkout that is up, or boots one for this command only
up      boots an L1 host that stays up, for this checkout
down    takes it down
status  tells whether one is up

options of run:
  --time-limit SECONDS  kill the command after so long; the exit code is then 124
  --fresh               boot an L1 host for this command even if one is up
  --counted-time        --fresh, with time counted in instructions executed: timings repeat exactly
  --env NAME=VALUE      set a variable for the command (PATH, HOME, TERM, CARGO*, RUST*, ECI_* go along anyway)

options of run and up, for an L1 host being booted:
  --memory MIB          its memory (4096)
  --scratch GIB         its sparse disk at /var/lib/eci-agent (64)
  --share DIR           also share this directory read-write, besides the checkout

The exit code is that of the command: 128 + N if signal N ended it, 127 if it was not found; 125 means that nested
itself failed. ECI_NESTED=direct or ECI_NESTED=emulated in the environment overrides the choice of where to run.";

/// Exit code for failures of our own.
const OWN_FAILURE: u8 = 125;

fn main() -> ExitCode {
    let name = env::args().next().unwrap_or_default();
    if name == l1::SERVER_NAME {
        return l1::serve();
    }
    if std::process::id() == 1 && name == "/init" && Path::new("/settings.json").exists() {
        return l1::init();
    }
    match act() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("nested: {error:#}");
            ExitCode::from(OWN_FAILURE)
        }
    }
}

#[derive(Debug, Default)]
struct Options {
    shape: Shape,
    time_limit: Option<Duration>,
    fresh: bool,
    env: Vec<(String, String)>,
    command: Vec<String>,
}

fn act() -> Result<u8> {
    let mut arguments = env::args().skip(1);
    let action = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    match action.as_str() {
        "run" => run(parse(&rest)?),
        "up" => up(&rest),
        "down" => {
            let was_up = persistent::down(&Place::find()?)?;
            eprintln!(
                "nested: {}",
                if was_up {
                    "the L1 host is down"
                } else {
                    "no L1 host was up"
                }
            );
            Ok(0)
        }
        "status" => status(),
        "supervise" => persistent::supervise(&Place::find()?, &parse(&rest)?.shape).map(|()| 0),
        "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(0)
        }
        other => bail!("'{other}' is none of run, up, down, status; see `nested --help`"),
    }
}

fn parse(arguments: &[String]) -> Result<Options> {
    let mut options = Options::default();
    let mut parser = Parser::from_args(arguments);
    while let Some(argument) = parser.next().context("read the options")? {
        match argument {
            Arg::Long("time-limit") => {
                options.time_limit = Some(Duration::from_secs(parser.value()?.parse()?));
            }
            Arg::Long("fresh") => options.fresh = true,
            Arg::Long("counted-time") => {
                options.fresh = true;
                options.shape.counted_time = true;
            }
            Arg::Long("env") => {
                let setting = parser.value()?.string()?;
                let (name, value) = setting
                    .split_once('=')
                    .with_context(|| format!("--env {setting}: expected NAME=VALUE"))?;
                options.env.push((name.to_owned(), value.to_owned()));
            }
            Arg::Long("memory") => options.shape.memory_mib = parser.value()?.parse()?,
            Arg::Long("scratch") => options.shape.scratch_gib = parser.value()?.parse()?,
            Arg::Long("share") => options.shape.shares.push(absolute(&parser.value()?.string()?)?),
            Arg::Value(program) => {
                options.command.push(program.string()?);
                for argument in parser.raw_args()? {
                    options.command.push(argument.string()?);
                }
            }
            other => return Err(other.unexpected()).context("see `nested --help`"),
        }
    }
    Ok(options)
}

fn absolute(dir: &str) -> Result<PathBuf> {
    let path = Path::new(dir)
        .canonicalize()
        .with_context(|| format!("--share {dir}"))?;
    ensure!(path.is_dir(), "--share {dir}: not a directory");
    Ok(path)
}

fn runs_directly() -> Result<bool> {
    match env::var("ECI_NESTED").as_deref() {
        Ok("direct") => Ok(true),
        Ok("emulated") => Ok(false),
        Ok("") | Err(_) => Ok(direct::kvm_is_usable()),
        Ok(other) => bail!("ECI_NESTED={other}: valid are direct and emulated"),
    }
}

fn run(options: Options) -> Result<u8> {
    ensure!(
        !options.command.is_empty(),
        "run needs a command: nested run -- COMMAND..."
    );
    let order = Order {
        argv: options.command,
        time_limit: options.time_limit,
        env: options.env,
    };
    let code = if !options.shape.counted_time && runs_directly()? {
        direct::run(&order)?
    } else {
        let place = Place::find()?;
        let up = if options.fresh {
            None
        } else {
            persistent::connect(&place)?
        };
        match up {
            Some(link) => {
                runner::run(&link, &order).with_context(|| machine::console_tail(&place.console_log()))?
            }
            None => run_alone(&place, &options.shape, &order)?,
        }
    };
    Ok(u8::try_from(code).unwrap_or(OWN_FAILURE))
}

fn run_alone(place: &Place, shape: &Shape, order: &Order) -> Result<i32> {
    let machine = boot(place, shape, |place| Machine::boot(place, shape))?;
    let code = runner::run(&machine.link, order).with_context(|| machine.console_tail())?;
    machine.shut_down();
    Ok(code)
}

fn up(arguments: &[String]) -> Result<u8> {
    let options = parse(arguments)?;
    ensure!(
        options.command.is_empty(),
        "up takes no command: use `nested run -- COMMAND...`"
    );
    if runs_directly()? {
        eprintln!("nested: this machine's own KVM is usable, commands run directly: no L1 host is needed");
        return Ok(0);
    }
    let place = Place::find()?;
    if persistent::connect(&place)?.is_some() {
        eprintln!("nested: the L1 host of this checkout is up already");
        return Ok(0);
    }
    boot(&place, &options.shape, |place| persistent::up(place, arguments))?;
    Ok(0)
}

/// Tells of a boot while it happens.
fn boot<T>(place: &Place, shape: &Shape, boot: impl FnOnce(&Place) -> Result<T>) -> Result<T> {
    let how = if shape.counted_time {
        "software emulation, counted time"
    } else {
        "software emulation"
    };
    eprintln!("nested: booting an L1 host ({how}, {} MiB) ...", shape.memory_mib);
    let started = Instant::now();
    let booted = boot(place)?;
    eprintln!(
        "nested: the L1 host is up after {:.1} s",
        started.elapsed().as_secs_f32()
    );
    Ok(booted)
}

fn status() -> Result<u8> {
    let place = Place::find()?;
    if runs_directly()? {
        println!("commands run directly: this machine's own KVM is usable");
    } else if persistent::connect(&place)?.is_some() {
        println!("an L1 host is up for {}", place.checkout.display());
    } else {
        println!("no L1 host is up for {}", place.checkout.display());
        return Ok(3);
    }
    Ok(0)
}
