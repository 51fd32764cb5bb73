//! `ecictl create`

use std::{io::Read, path::Path, time::Duration};

use anyhow::{Context, bail};
use http::Method;

use super::{args::CreateArgs, client::Client, client::group_path, table};
use crate::{
    api::admin::{ECI_JSON, wire::Created},
    group::status::{ContainerState, EventKind, Group, Phase},
};

const POD: &str = "application/yaml";

pub(super) async fn run(client: &Client, args: CreateArgs) -> anyhow::Result<u8> {
    let (kind, manifest) = read(&args.file)?;
    let created: Created = client
        .call(Method::POST, "/v1/groups", kind, manifest)
        .await
        .with_context(|| format!("Failed to create a group from {}", args.file.display()))?;
    if args.no_wait {
        table::print(format!("{}\n", created.id).as_bytes())?;
        return Ok(0);
    }
    let limit = Duration::from_secs(args.timeout);
    match tokio::time::timeout(limit, wait_until_running(client, &created, args.quiet)).await {
        Ok(result) => result?,
        Err(_) => bail!(
            "Group {} does not run after {} s; it goes on starting (see ecictl describe {})",
            created.id,
            args.timeout,
            created.id
        ),
    }
    table::print(format!("{}\n", created.id).as_bytes())?;
    Ok(0)
}

/// A manifest and its content type.
pub(super) fn read(file: &Path) -> anyhow::Result<(&'static str, Vec<u8>)> {
    let manifest = if file == Path::new("-") {
        let mut text = Vec::new();
        std::io::stdin()
            .lock()
            .read_to_end(&mut text)
            .context("Failed to read the manifest from standard input")?;
        text
    } else {
        std::fs::read(file).with_context(|| format!("Failed to read the manifest {}", file.display()))?
    };
    let kind = if is_eci(&manifest) { ECI_JSON } else { POD };
    Ok((kind, manifest))
}

/// The events of a group that were shown already.
#[derive(Debug, Default)]
pub(super) struct Shown {
    n_shown: usize,
    /// Nothing is shown before the last one for this reason.
    from: Option<&'static str>,
}

impl Shown {
    /// Only what happens from the last event for this reason on is shown.
    pub(super) fn from_the_last(reason: &'static str) -> Self {
        Self {
            n_shown: 0,
            from: Some(reason),
        }
    }

    /// Shows those that are new.
    pub(super) fn show(&mut self, group: &Group) {
        let events = &group.status.events;
        if let Some(reason) = self.from.take() {
            let last = events.iter().rposition(|event| event.reason == reason);
            self.n_shown = last.unwrap_or(0);
        }
        // Events are appended; the oldest fall off only beyond what a start makes.
        for event in events.iter().skip(self.n_shown) {
            let about = event.container.as_deref().map(|name| format!(" {name}:"));
            let mark = if event.kind == EventKind::Warning {
                "!"
            } else {
                "·"
            };
            eprintln!(
                "{mark} {}{} {}",
                event.reason,
                about.unwrap_or_default(),
                table::clean(&event.message)
            );
        }
        self.n_shown = events.len();
    }
}

/// An ECI request is a JSON object that names a ContainerGroupName; a Pod never does.
fn is_eci(manifest: &[u8]) -> bool {
    manifest.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{')
        && serde_json::from_slice::<serde_json::Value>(manifest)
            .is_ok_and(|value| value.get("ContainerGroupName").is_some())
}

/// Shows what happens until all containers run, or the group ended.
pub(super) async fn wait_until_running(
    client: &Client,
    created: &Created,
    quiet: bool,
) -> anyhow::Result<()> {
    let path = group_path(created.id.as_str(), "/watch");
    let mut changes = client.lines(Method::GET, &path, Vec::new()).await?;
    let mut shown = Shown::default();
    while let Some(group) = changes.next::<Group>().await? {
        if !quiet {
            shown.show(&group);
        }
        match group.status.phase {
            // A name that is spelt wrong should not take as long to be told as a slow registry: the first setback ends
            // the wait, though not the group's attempts.
            Phase::Scheduling | Phase::Pending if !group.status.reason.is_empty() => {
                bail!("{}", setback(&group))
            }
            Phase::Scheduling | Phase::Pending | Phase::Restarting | Phase::Updating => {}
            Phase::Running if has_waiting(&group) => {}
            Phase::Running | Phase::Succeeded => return Ok(()),
            Phase::Failed | Phase::Terminating => bail!("{}", failure(&group)),
        }
    }
    bail!("Group {} was deleted while it started", created.id)
}

/// Whether a container has not started yet. One that restarts has.
fn has_waiting(group: &Group) -> bool {
    group.status.containers.iter().any(|container| {
        matches!(container.state, ContainerState::Waiting { .. })
            && container.restart_count == 0
            && container.previous.is_none()
    })
}

/// Why a group does not run yet, and what can be done.
fn setback(group: &Group) -> String {
    let (id, status) = (&group.id, &group.status);
    format!(
        "Group {id} ({}) does not run: {}: {}\nIt goes on trying: ecictl describe {id} shows how it fares, ecictl rm {id} \
         ends it",
        group.spec.name,
        status.reason,
        table::clean(&status.message)
    )
}

/// Why a group does not run, with all the agent knows.
pub(super) fn failure(group: &Group) -> String {
    let status = &group.status;
    let mut text = format!("Group {} ({}) failed", group.id, group.spec.name);
    for part in [&status.reason, &status.message] {
        if !part.is_empty() {
            text.push_str(": ");
            text.push_str(&table::clean(part));
        }
    }
    for container in &status.containers {
        match &container.state {
            ContainerState::Terminated {
                exit_code,
                reason,
                message,
                ..
            } if *exit_code != 0 => {
                text.push_str(&format!(
                    "\n  container {}: {reason}, exit code {exit_code} {}",
                    container.name,
                    table::clean(message)
                ));
            }
            ContainerState::Waiting { reason, message } if !reason.is_empty() => {
                text.push_str(&format!(
                    "\n  container {}: {reason} {}",
                    container.name,
                    table::clean(message)
                ));
            }
            _ => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::is_eci;

    #[test]
    fn requests_are_told_from_pods() {
        assert!(is_eci(b" {\"ContainerGroupName\": \"x\"}"));
        assert!(!is_eci(b"{\"kind\": \"Pod\"}"));
        assert!(!is_eci(b"kind: Pod"));
    }
}
