//! `ecictl update`

use std::time::Duration;

use anyhow::{Context, bail};
use http::Method;

use super::{
    args::UpdateArgs,
    client::{Client, group_path},
    create, table,
};
use crate::{
    api::admin::wire::Updated,
    group::{
        resize::RESIZE_FAILED,
        status::{ContainerState, Group, Phase},
    },
};

pub(super) async fn run(client: &Client, args: UpdateArgs) -> anyhow::Result<u8> {
    let (group, args) = (args.group, args.create);
    let (kind, manifest) = create::read(&args.file)?;
    let updated: Updated = client
        .call(Method::POST, &group_path(&group, "/update"), kind, manifest)
        .await
        .with_context(|| format!("Failed to update {group} from {}", args.file.display()))?;
    if !updated.changed {
        eprintln!("{group} is what {} says already", args.file.display());
    } else if !args.no_wait {
        let limit = Duration::from_secs(args.timeout);
        let wait = wait_until_updated(client, updated.id.as_str(), args.quiet);
        match tokio::time::timeout(limit, wait).await {
            Ok(result) => result?,
            Err(_) => bail!(
                "Group {} does not run after {} s; its update goes on (see ecictl describe {})",
                updated.id,
                args.timeout,
                updated.id
            ),
        }
    }
    table::print(format!("{}\n", updated.id).as_bytes())?;
    Ok(0)
}

/// Shows what happens until all that is to run runs, or the group ended.
async fn wait_until_updated(client: &Client, id: &str, quiet: bool) -> anyhow::Result<()> {
    let path = group_path(id, "/watch");
    let mut changes = client.lines(Method::GET, &path, Vec::new()).await?;
    let mut shown = create::Shown::from_the_last("Updating");
    while let Some(group) = changes.next::<Group>().await? {
        if !quiet {
            shown.show(&group);
        }
        match group.status.phase {
            Phase::Updating | Phase::Scheduling => {}
            Phase::Pending | Phase::Running => {
                if let Some(why) = setback(&group) {
                    bail!("{why}\nIt goes on trying: ecictl describe {id} shows how it fares");
                }
                if let Some(why) = not_resized(&group) {
                    bail!("{why}");
                }
                if group.status.phase == Phase::Running && !waits(&group) {
                    return Ok(());
                }
            }
            Phase::Succeeded => return Ok(()),
            Phase::Restarting => bail!("Group {id} is restarted before its update was seen to its end"),
            Phase::Failed | Phase::Terminating => bail!("{}", create::failure(&group)),
        }
    }
    bail!("Group {id} was deleted while it was updated")
}

/// Why the group keeps its size, when that is what its last update came to.
fn not_resized(group: &Group) -> Option<&str> {
    let last = |reason: &str| {
        let mut events = group.status.events.iter().rev();
        events.find(|event| event.reason == reason)
    };
    let (failed, begun) = (last(RESIZE_FAILED)?, last("Updating")?);
    (failed.last_ms >= begun.last_ms).then_some(failed.message.as_str())
}

fn waits(group: &Group) -> bool {
    let mut containers = group.status.containers.iter();
    containers.any(|container| matches!(container.state, ContainerState::Waiting { .. }))
}

/// What keeps a container from running that will not pass at once.
fn setback(group: &Group) -> Option<String> {
    let mut containers = group.status.containers.iter();
    containers.find_map(|container| match &container.state {
        ContainerState::Waiting { reason, message } if reason.ends_with("BackOff") => Some(format!(
            "Container {} of {} does not run: {reason}: {}",
            container.name,
            group.id,
            table::clean(message)
        )),
        _ => None,
    })
}
