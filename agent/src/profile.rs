//! Where the time of starts goes: each phase from a request to the first instruction of a container is a span in the log and a
//! sample of a histogram.
//!
//! | metric | labels | is |
//! |---|---|---|
//! | `eci_start_phase_seconds` | `phase` | one step; `sandbox_*` are steps of the shim inside of `sandbox` |
//! | `eci_sandbox_start_seconds` | `kind` | the shim's whole start, by what it began with: `boot`, `template`, `standby`, `snapshot` |
//! | `eci_template_total` | `result` | templates asked for: `hit`, `miss`, `refused` |
//! | `eci_standby_total` | `result` | sandboxes that stand by asked for: `hit`, `miss`, `failed` (the normal path was taken) |
//! | `eci_standbys` | | sandboxes that stand by |
//! | `eci_snapshot_pause_seconds` | | how long the containers of a group stood still for a snapshot |

use std::{
    collections::HashMap,
    sync::OnceLock,
    time::{Duration, Instant},
};

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};
use tracing::Instrument;

const PHASE: &str = "eci_start_phase_seconds";
const SANDBOX_START: &str = "eci_sandbox_start_seconds";
const TEMPLATES: &str = "eci_template_total";
const STANDBY_TOTAL: &str = "eci_standby_total";
const STANDBYS: &str = "eci_standbys";
const PAUSE: &str = "eci_snapshot_pause_seconds";

/// Upper bounds of the histograms' buckets, seconds: from a step of a template start to a boot under load.
const BUCKETS: [f64; 15] = [
    0.000_25, 0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 4.0, 16.0,
];

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// Begins to collect. Without it, samples go nowhere.
///
/// # Errors
/// Something in this process collects already.
pub fn install() -> Result<(), BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets(&BUCKETS)?
        .install_recorder()?;
    describe_histogram!(PHASE, "Time of one phase of a start");
    describe_histogram!(SANDBOX_START, "Time of a sandbox's start, by what it began with");
    describe_histogram!(PAUSE, "Time that containers stood still for a snapshot");
    describe_counter!(TEMPLATES, "Templates asked for, by what came of it");
    describe_counter!(
        STANDBY_TOTAL,
        "Sandboxes that stand by asked for, by what came of it"
    );
    describe_gauge!(STANDBYS, "Sandboxes that stand by");
    // Only one recorder can be installed, so this is the first.
    let _ = HANDLE.set(handle);
    Ok(())
}

/// Everything collected so far, in the Prometheus text format.
pub fn render() -> String {
    HANDLE.get().map_or_else(String::new, |handle| {
        handle.run_upkeep();
        handle.render()
    })
}

/// Does `work`, a phase of a start of this name.
pub async fn phase<T>(name: &'static str, work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let done = work.instrument(tracing::debug_span!("start", phase = name)).await;
    histogram!(PHASE, "phase" => name).record(begun.elapsed());
    done
}

/// A phase whose begin and end are in different places.
pub fn phase_took(name: &'static str, took: Duration) {
    histogram!(PHASE, "phase" => name).record(took);
}

/// What a shim tells of a start (`protos/sandbox.proto`, SandboxStatus).
pub fn sandbox_started(info: &HashMap<String, String>) {
    let us = |text: &str| text.parse().ok().map(Duration::from_micros);
    let kind = match info.get("start_kind").map(String::as_str) {
        Some("template") => "template",
        Some("snapshot") => "snapshot",
        Some("standby") => "standby",
        _ => "boot",
    };
    if let Some(took) = info.get("start_us").and_then(|text| us(text)) {
        histogram!(SANDBOX_START, "kind" => kind).record(took);
    }
    let phases = info.get("start_phases_us").map_or("", String::as_str);
    for (name, took) in phases.split(' ').filter_map(|phase| phase.split_once('=')) {
        // A shim of another version may tell of phases that this agent does not know.
        let name = match name {
            "open" => "sandbox_open",
            "spawn" => "sandbox_spawn",
            "vm" => "sandbox_vm",
            "boot" => "sandbox_boot",
            "connect" => "sandbox_connect",
            "identity" => "sandbox_identity",
            _ => continue,
        };
        if let Some(took) = us(took) {
            phase_took(name, took);
        }
    }
}

/// What came of asking for a template.
pub fn template(result: &'static str) {
    counter!(TEMPLATES, "result" => result).increment(1);
}

/// What came of asking for a sandbox that stands by.
pub fn standby(result: &'static str) {
    counter!(STANDBY_TOTAL, "result" => result).increment(1);
}

/// So many sandboxes stand by.
pub fn standbys(n: usize) {
    gauge!(STANDBYS).set(u32::try_from(n).map_or(f64::INFINITY, f64::from));
}

/// How long containers stood still for a snapshot.
pub fn snapshot_pause(took: Duration) {
    histogram!(PAUSE).record(took);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_phase_is_a_histogram() {
        install().unwrap();
        assert_eq!(phase("image", async { 7 }).await, 7);
        let info = [
            ("start_kind", "template"),
            ("start_us", "12000"),
            ("start_phases_us", "open=100 spawn=900 strange=1 vm=x"),
        ];
        sandbox_started(&info.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        template("hit");
        snapshot_pause(Duration::from_millis(3));
        let text = render();
        for line in [
            "eci_start_phase_seconds_count{phase=\"image\"} 1",
            "eci_start_phase_seconds_bucket{phase=\"sandbox_spawn\",le=\"0.001\"} 1",
            "eci_sandbox_start_seconds_sum{kind=\"template\"} 0.012",
            "eci_template_total{result=\"hit\"} 1",
            "eci_snapshot_pause_seconds_bucket{le=\"0.004\"} 1",
        ] {
            assert!(text.contains(line), "no {line} in\n{text}");
        }
        assert!(
            !text.contains("strange") && !text.contains("sandbox_vm"),
            "{text}"
        );
        assert!(install().is_err(), "collected twice");
    }
}
