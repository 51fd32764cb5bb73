//! Text in the Prometheus exposition format, version 0.0.4.

use std::fmt::Write;

/// Kind of a metric.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Counter,
    Gauge,
}

/// Writes metric after metric.
#[derive(Debug, Default)]
pub(super) struct Exposition(String);

impl Exposition {
    /// Begins a metric; its samples follow.
    pub(super) fn metric(&mut self, name: &str, kind: Kind, help: &str) -> Samples<'_> {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Samples {
            text: &mut self.0,
            name: name.to_owned(),
        }
    }

    /// The whole text.
    pub(super) fn into_text(self) -> String {
        self.0
    }
}

/// Writes samples of one metric.
#[derive(Debug)]
pub(super) struct Samples<'a> {
    text: &'a mut String,
    name: String,
}

impl Samples<'_> {
    /// Writes one sample, with its time where there is one.
    pub(super) fn sample(&mut self, labels: &[(&str, &str)], value: f64, at_ms: Option<u64>) -> &mut Self {
        self.text.push_str(&self.name);
        if !labels.is_empty() {
            let labels: Vec<_> = labels
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
                .collect();
            let _ = write!(self.text, "{{{}}}", labels.join(","));
        }
        let _ = write!(self.text, " {value}");
        if let Some(at_ms) = at_ms {
            let _ = write!(self.text, " {at_ms}");
        }
        self.text.push('\n');
        self
    }
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// Microseconds as seconds.
#[allow(clippy::cast_precision_loss, reason = "exact for 285 years of CPU time")]
pub(super) fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

/// A count as a sample value.
#[allow(clippy::cast_precision_loss, reason = "exact up to 2^53")]
pub(super) fn count(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        let mut exposition = Exposition::default();
        exposition
            .metric("a_total", Kind::Counter, "What\nit \\ is")
            .sample(&[("x", "q\"\\\n")], 1.5, Some(7))
            .sample(&[], 2.0, None);
        assert_eq!(
            exposition.into_text(),
            "# HELP a_total What\\nit \\\\ is\n# TYPE a_total counter\na_total{x=\"q\\\"\\\\\\n\"} 1.5 7\na_total 2\n"
        );
    }
}
