//! `ecictl snapshot`, `ecictl restore`, `ecictl fork`

use std::time::Duration;

use anyhow::{Context, bail};
use http::Method;

use super::{
    args::{ForkArgs, NewGroups, Output, RestoreArgs, SnapshotCommand},
    client::{Client, group_path, snapshot_path},
    create, table,
};
use crate::{
    api::admin::wire::Clones,
    engine::{CloneRequest, SnapshotInfo},
};

const JSON: &str = "application/json";

pub(super) async fn run(client: &Client, command: SnapshotCommand) -> anyhow::Result<u8> {
    match command {
        SnapshotCommand::Create { group } => {
            let path = group_path(&group, "/snapshot");
            let taken: SnapshotInfo = client
                .call(Method::POST, &path, "", Vec::new())
                .await
                .with_context(|| format!("Failed to take a snapshot of {group}"))?;
            eprintln!(
                "{}: {}, its containers stood still for {}",
                taken.name,
                table::bytes(taken.size_bytes),
                milliseconds(taken.pause_us)
            );
            table::print(format!("{}\n", taken.id).as_bytes())?;
            Ok(0)
        }
        SnapshotCommand::Ls { output } => {
            let snapshots: Vec<SnapshotInfo> = client.get("/v1/snapshots").await?;
            let text = match output {
                Output::Json => format!("{}\n", serde_json::to_string_pretty(&snapshots)?),
                Output::Table => render(&snapshots, table::now_ms()),
            };
            table::print(text.as_bytes())?;
            Ok(0)
        }
        SnapshotCommand::Rm { snapshots } => {
            let mut code = 0;
            for id in snapshots {
                let path = snapshot_path(&id, "");
                match client.call::<()>(Method::DELETE, &path, "", Vec::new()).await {
                    Ok(()) => table::print(format!("{id}\n").as_bytes())?,
                    // The others are still removed.
                    Err(error) => {
                        eprintln!("ecictl: {id}: {error:#}");
                        code = 1;
                    }
                }
            }
            Ok(code)
        }
    }
}

pub(super) async fn restore(client: &Client, args: RestoreArgs) -> anyhow::Result<u8> {
    let path = snapshot_path(&args.snapshot, "/restore");
    let clones = order(client, &path, &args.groups)
        .await
        .with_context(|| format!("Failed to restore {}", args.snapshot))?;
    wait(client, clones, &args.groups).await
}

pub(super) async fn fork(client: &Client, args: ForkArgs) -> anyhow::Result<u8> {
    let path = group_path(&args.group, "/fork");
    let clones = order(client, &path, &args.groups)
        .await
        .with_context(|| format!("Failed to fork {}", args.group))?;
    if let Some(pause_us) = clones.pause_us {
        eprintln!(
            "{}: its containers stood still for {}",
            args.group,
            milliseconds(pause_us)
        );
    }
    wait(client, clones, &args.groups).await
}

async fn order(client: &Client, path: &str, groups: &NewGroups) -> anyhow::Result<Clones> {
    let request = CloneRequest {
        name: groups.name.clone(),
        namespace: groups.namespace.clone(),
        count: groups.count,
    };
    client
        .call(Method::POST, path, JSON, serde_json::to_vec(&request)?)
        .await
}

/// Waits until all run; their ids go to standard output as they do.
async fn wait(client: &Client, clones: Clones, groups: &NewGroups) -> anyhow::Result<u8> {
    let limit = Duration::from_secs(groups.timeout);
    let all = async {
        for created in &clones.groups {
            if !groups.no_wait {
                create::wait_until_running(client, created, true).await?;
            }
            table::print(format!("{}\n", created.id).as_bytes())?;
        }
        Ok::<_, anyhow::Error>(())
    };
    match tokio::time::timeout(limit, all).await {
        Ok(done) => done?,
        Err(_) => bail!(
            "Not all groups run after {} s; they go on starting (see ecictl ps)",
            groups.timeout
        ),
    }
    Ok(0)
}

fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

fn render(snapshots: &[SnapshotInfo], now_ms: u64) -> String {
    let rows: Vec<_> = snapshots
        .iter()
        .map(|snapshot| {
            vec![
                snapshot.id.to_string(),
                format!("{}/{}", snapshot.namespace, snapshot.name),
                table::bytes(snapshot.size_bytes),
                milliseconds(snapshot.pause_us),
                table::age(snapshot.created_at_ms, now_ms),
            ]
        })
        .collect();
    table::columns(&["ID", "GROUP", "SIZE", "PAUSE", "AGE"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_told_in_milliseconds() {
        assert_eq!(milliseconds(12_345), "12.3 ms");
        assert_eq!(milliseconds(7), "0.0 ms");
    }
}
