//! The life of groups.

use anyhow::{Context, Result, ensure};
use tests::{leftovers::Snapshot, pod::Pod, stage::Stage};

use super::SAY_HELLO;

const RUNS: usize = 20;
/// Descriptors the agent may have more of after many runs: connections to it that are being closed, files of its store.
const SPARE_DESCRIPTORS: usize = 4;

pub(crate) fn twenty_runs_leave_nothing_behind(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let before = Snapshot::take(host)?;
    let mut descriptors = None;
    for run in 1..=RUNS {
        let name = format!("run-{run}");
        let pod = Pod::new(&name).container("main", &stage.tools(), SAY_HELLO);
        let once = || -> Result<()> {
            host.create(&pod)?;
            let said = host
                .exec(&name, "main", &["/bin/echo", "run", &run.to_string()])?
                .success()?;
            ensure!(said == format!("run {run}\n"), "exec printed {said:?}");
            let log = host.ecictl(&["logs", &name])?.success()?;
            ensure!(log == "hello\n", "the log is {log:?}");
            // Both ways to end one: at once, and with the time it gives itself.
            if run % 2 == 0 {
                host.remove(&name)
            } else {
                host.ecictl(&["rm", &name])?.success().map(|_| ())
            }
        };
        once()
            .and_then(|()| before.ensure_same(host))
            .with_context(|| format!("run {run}"))?;
        let now = host.agent_descriptors()?;
        let first = *descriptors.get_or_insert(now);
        ensure!(
            now <= first + SPARE_DESCRIPTORS,
            "the agent had {first} descriptors after the first run and has {now} after run {run}"
        );
    }
    Ok(())
}
