//! The figures: a table for people, and JSON.

use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::stats::Samples;

/// One figure; `value` is the median, where nothing else is said.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    value: f64,
    unit: &'static str,
    /// Which of the start times (a) to (g) it is.
    clock: Option<&'static str>,
    rival: Option<&'static str>,
    n: usize,
    n_failures: usize,
    p50: f64,
    p95: f64,
    p99: f64,
    max: f64,
    /// The value should not exceed this.
    goal: Option<f64>,
}

impl Figure {
    pub(crate) fn of(samples: &Samples, unit: &'static str) -> Self {
        let value = |percent| (samples.percentile(percent) * 1e4).round() / 1e4;
        Self {
            value: value(50),
            unit,
            clock: None,
            rival: None,
            n: samples.n(),
            n_failures: samples.n_failures(),
            p50: value(50),
            p95: value(95),
            p99: value(99),
            max: value(100),
            goal: None,
        }
    }

    /// The value is another percentile than the median.
    pub(crate) fn of_percentile(samples: &Samples, percent: usize, unit: &'static str) -> Self {
        let mut figure = Self::of(samples, unit);
        figure.value = (samples.percentile(percent) * 1e4).round() / 1e4;
        figure
    }

    pub(crate) fn clock(mut self, clock: &'static str) -> Self {
        self.clock = Some(clock);
        self
    }

    pub(crate) fn rival(mut self, rival: &'static str) -> Self {
        self.rival = Some(rival);
        self
    }

    pub(crate) fn at_most(mut self, goal: f64) -> Self {
        self.goal = Some(goal);
        self
    }

    fn is_good(&self) -> bool {
        self.n_failures == 0 && self.goal.is_none_or(|goal| self.value <= goal)
    }
}

/// Makes the file for a summary, and its directory.
pub(crate) fn create(path: &Path) -> Result<File> {
    let create = || {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        File::create(path)
    };
    create().with_context(|| format!("create {}", path.display()))
}

/// All figures, in the order they were measured.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    figures: Vec<(String, Figure)>,
    failures: Vec<(String, String)>,
}

impl Summary {
    pub(crate) fn add(&mut self, name: &str, figure: Figure) {
        // At once too: a run takes minutes.
        eprintln!("bench: {name} {} {}", figure.value, figure.unit);
        self.figures.push((name.to_owned(), figure));
    }

    /// A measurement gave no figure.
    pub(crate) fn failed(&mut self, name: &str, reason: &str) {
        self.failures.push((name.to_owned(), reason.to_owned()));
    }

    /// Everything was measured and meets its goal.
    pub(crate) fn is_good(&self) -> bool {
        self.failures.is_empty() && self.figures.iter().all(|(_, figure)| figure.is_good())
    }

    /// Writes all figures as one JSON object.
    pub(crate) fn write(&self, mut file: File) -> Result<()> {
        let mut object = serde_json::Map::new();
        for (name, figure) in &self.figures {
            object.insert(name.clone(), serde_json::to_value(figure)?);
        }
        let text = serde_json::to_string_pretty(&object)? + "\n";
        file.write_all(text.as_bytes()).context("write the summary")
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<24} {:>10} {:<10} {:>5} {:>4} {:>9} {:>9} {:>9} {:>9} {:>7}",
            "figure", "value", "unit", "clock", "n", "p95", "p99", "max", "goal", ""
        )?;
        for (name, figure) in &self.figures {
            let Figure {
                value,
                unit,
                p95,
                p99,
                max,
                n,
                ..
            } = figure;
            let clock = figure.clock.unwrap_or("");
            let goal = figure.goal.map_or_else(String::new, |goal| format!("{goal}"));
            let verdict = match (figure.is_good(), figure.goal) {
                (false, _) => "MISSED",
                (true, Some(_)) => "met",
                (true, None) => "",
            };
            writeln!(
                f,
                "{name:<24} {value:>10.3} {unit:<10} {clock:>5} {n:>4} {p95:>9.3} {p99:>9.3} {max:>9.3} {goal:>9} {verdict:>7}"
            )?;
        }
        for (name, reason) in &self.failures {
            writeln!(f, "{name}: FAILED: {reason}")?;
        }
        Ok(())
    }
}
