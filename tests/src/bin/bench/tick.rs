//! Measuring the same thing at every phase of the host's timer tick, which results lock to.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use rustix::time::{ClockId, clock_getres, clock_gettime};

use crate::stats::Samples;

/// Results lock to the host's timer tick: starts are delayed over so many phases of it.
const N_PHASES: u32 = 8;

/// The host's timer tick, and how often to go through its phases.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tick {
    length: Duration,
    rounds: usize,
}

/// What measuring in all phases gave.
#[derive(Debug)]
pub(crate) struct Series<T> {
    good: Vec<T>,
    n_failures: usize,
}

impl Tick {
    pub(crate) fn new(rounds: usize) -> Result<Self> {
        let resolution = clock_getres(ClockId::MonotonicCoarse);
        let length = Duration::new(
            u64::try_from(resolution.tv_sec)?,
            u32::try_from(resolution.tv_nsec)?,
        );
        ensure!(!length.is_zero(), "the host's tick is not known");
        Ok(Self { length, rounds })
    }

    /// Measures once in each phase and round. The first time is not counted: it fills caches.
    pub(crate) fn series<T>(&self, what: &str, once: impl FnMut() -> Result<T>) -> Result<Series<T>> {
        self.series_after(what, || Ok(()), once)
    }

    /// The same, with something to be done before each time.
    pub(crate) fn series_after<T>(
        &self,
        what: &str,
        mut before: impl FnMut() -> Result<()>,
        mut once: impl FnMut() -> Result<T>,
    ) -> Result<Series<T>> {
        before()?;
        self.wait_for_phase(0);
        once()?;
        let mut series = Series {
            good: Vec::new(),
            n_failures: 0,
        };
        for phase in (0..self.rounds).flat_map(|_| 0..N_PHASES) {
            before()?;
            self.wait_for_phase(phase);
            match once() {
                Ok(value) => series.good.push(value),
                Err(error) => {
                    eprintln!("bench: {what} failed: {error:#}");
                    series.n_failures += 1;
                }
            }
        }
        if series.good.is_empty() {
            bail!("{what} never succeeded");
        }
        Ok(series)
    }

    /// Waits for the beginning of a tick.
    pub(crate) fn settle(&self) {
        self.wait_for_phase(0);
    }

    /// Returns at a phase of the tick. Spins: a timer would end at a tick.
    fn wait_for_phase(&self, phase: u32) {
        let coarse = || clock_gettime(ClockId::MonotonicCoarse);
        let before = coarse();
        while coarse() == before {
            std::hint::spin_loop();
        }
        let due = Instant::now() + self.length * phase / N_PHASES;
        while Instant::now() < due {
            std::hint::spin_loop();
        }
    }
}

impl<T> Series<T> {
    /// One of the times that were taken each time.
    pub(crate) fn times(&self, time: impl Fn(&T) -> Option<Duration>) -> Samples {
        let mut samples = Samples::default();
        for time in self.good.iter().filter_map(time) {
            samples.add(time.as_secs_f64() * 1e3);
        }
        for _ in 0..self.n_failures {
            samples.add_failure();
        }
        samples
    }
}
