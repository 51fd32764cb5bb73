//! How long a group stands still for a snapshot, by how much memory it has written to.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::agent::{Agent, IMAGE, Starts};
use crate::ground::Ground;
use crate::stats::Samples;
use crate::summary::{Figure, Summary};

const NAME: &str = "forked";
/// Snapshots of each size.
const N: usize = 4;
/// What one of the containers writes, MiB: little, and much.
const SIZES_MIB: [u32; 2] = [128, 2048];

pub(crate) fn measure(_: &Ground, summary: &mut Summary) -> Result<()> {
    let agent = Agent::start(Starts::Boot)?;
    let manifest = agent.write("forked.yaml", &manifest())?;
    agent.ecictl([
        "create".as_ref(),
        "--quiet".as_ref(),
        "-f".as_ref(),
        manifest.as_os_str(),
    ])?;
    let [little, much] = SIZES_MIB.map(|mib| pauses(&agent, mib));
    let (little, much) = (little?, much?);
    summary.add("fork5_pause_little_ms", Figure::of(&little, "counted ms"));
    summary.add("fork5_pause_ms", Figure::of(&much, "counted ms"));
    summary.add(
        "fork5_pause_growth",
        Figure::of(&much.divided_by(little.percentile(50)), "ratio")
            .rival("128 MiB")
            .at_most(1.5),
    );
    agent.ecictl(["rm", "--grace", "0", NAME]).map(drop)
}

/// Pauses with so much memory written, milliseconds. One that is not counted comes first.
fn pauses(agent: &Agent, mib: u32) -> Result<Samples> {
    let fill = format!("rm -f /mem/blob; dd if=/dev/zero of=/mem/blob bs=1M count={mib} 2>/dev/null");
    agent.ecictl(["exec", "-c", "c1", NAME, "--", "/bin/sh", "-c", &fill])?;
    let mut samples = Samples::default();
    for number in 0..=N {
        let id = agent.ecictl(["snapshot", "create", NAME])?;
        let list = agent.ecictl(["snapshot", "ls", "-o", "json"])?;
        let pause_us = pause_of(&list, id.trim())?;
        agent.ecictl(["snapshot", "rm", id.trim()])?;
        if number > 0 {
            samples.add(pause_us / 1e3);
        }
    }
    Ok(samples)
}

fn pause_of(list: &str, id: &str) -> Result<f64> {
    let snapshots: Vec<Value> = serde_json::from_str(list).context("parse the snapshots")?;
    let found = snapshots.iter().find(|snapshot| snapshot["id"] == id);
    found
        .and_then(|snapshot| snapshot["pause_us"].as_f64())
        .with_context(|| format!("no snapshot {id} in {list}"))
}

/// Five containers; the first has memory to fill.
fn manifest() -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {NAME} }}\nspec:\n  terminationGracePeriodSeconds: 0\n  volumes:\n  \
         - name: mem\n    emptyDir: {{ medium: Memory, sizeLimit: 2200Mi }}\n  containers:\n"
    );
    for number in 1..=5 {
        let memory = if number == 1 { 2500 } else { 64 };
        text += &format!(
            "  - name: c{number}\n    image: {IMAGE}\n    imagePullPolicy: IfNotPresent\n    \
             command: [\"/bin/sleep\", \"1000000\"]\n    \
             volumeMounts: [{{ name: mem, mountPath: /mem }}]\n    \
             resources: {{ limits: {{ cpu: 200m, memory: {memory}Mi }} }}\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_found() {
        let list = r#"[{"id": "snap-a", "pause_us": 1}, {"id": "snap-b", "pause_us": 2500}]"#;
        assert_eq!(pause_of(list, "snap-b").unwrap(), 2500.0);
        assert!(pause_of(list, "snap-c").is_err());
    }
}
