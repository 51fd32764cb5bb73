//! `ecictl top`

use std::time::Duration;

use super::{
    args::TopArgs,
    client::{Client, group_path},
    table,
};
use crate::{
    engine::GroupStats,
    group::status::{Group, Phase},
};

/// CPU use is what was used between two looks so far apart.
const WINDOW: Duration = Duration::from_millis(1000);

pub(super) async fn run(client: &Client, args: &TopArgs) -> anyhow::Result<u8> {
    let groups = if args.groups.is_empty() {
        let mut groups: Vec<Group> = client.get("/v1/groups").await?;
        groups.retain(|group| group.status.phase == Phase::Running);
        groups
    } else {
        let mut groups = Vec::new();
        for group in &args.groups {
            groups.push(client.group(group).await?);
        }
        groups
    };
    let mut first = Vec::new();
    for group in &groups {
        // A group that ended meanwhile has no statistics any more.
        first.push(stats(client, group).await.ok());
    }
    tokio::time::sleep(WINDOW).await;
    let mut rows = Vec::new();
    for (group, before) in groups.iter().zip(&first) {
        let Ok(after) = stats(client, group).await else {
            continue;
        };
        rows.extend(render(group, before.as_ref(), &after));
    }
    let header = [
        "GROUP",
        "CONTAINER",
        "CPU",
        "MEMORY",
        "LIMIT",
        "PIDS",
        "DISK",
        "NET RX/TX",
    ];
    table::print(table::columns(&header, &rows).as_bytes())?;
    Ok(0)
}

async fn stats(client: &Client, group: &Group) -> anyhow::Result<GroupStats> {
    client.get(&group_path(group.id.as_str(), "/stats")).await
}

fn render(group: &Group, before: Option<&GroupStats>, after: &GroupStats) -> Vec<Vec<String>> {
    let elapsed_us = before.map_or(0, |before| after.at_ms.saturating_sub(before.at_ms) * 1000);
    let network = &after.network;
    let mut rows = vec![vec![
        group.spec.name.clone(),
        "-".into(),
        cpu(
            before.map(|before| before.guest_cpu_usage_us),
            after.guest_cpu_usage_us,
            elapsed_us,
        ),
        table::bytes(after.guest_memory_used_bytes),
        table::bytes(group.spec.size.memory_bytes),
        "-".into(),
        table::bytes(after.scratch_used_bytes),
        format!(
            "{}/{}",
            table::bytes(network.rx_bytes),
            table::bytes(network.tx_bytes)
        ),
    ]];
    for container in &after.containers {
        let earlier = before.and_then(|before| before.containers.iter().find(|c| c.name == container.name));
        rows.push(vec![
            group.spec.name.clone(),
            container.name.clone(),
            cpu(
                earlier.map(|c| c.cpu_usage_us),
                container.cpu_usage_us,
                elapsed_us,
            ),
            table::bytes(container.memory_working_set_bytes),
            match container.memory_limit_bytes {
                0 => "-".into(),
                limit => table::bytes(limit),
            },
            container.pids.to_string(),
            table::bytes(container.rootfs_used_bytes),
            "-".into(),
        ]);
    }
    rows
}

/// Per cent of one CPU.
fn cpu(before_us: Option<u64>, after_us: u64, elapsed_us: u64) -> String {
    match before_us {
        Some(before_us) if elapsed_us > 0 => {
            let permille = u128::from(after_us.saturating_sub(before_us)) * 1000 / u128::from(elapsed_us);
            format!("{}.{}%", permille / 10, permille % 10)
        }
        _ => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::cpu;

    #[test]
    fn cpu_is_a_rate() {
        assert_eq!(cpu(Some(1_000_000), 1_500_000, 1_000_000), "50.0%");
        assert_eq!(cpu(None, 1, 1), "-");
        assert_eq!(cpu(Some(5), 1, 0), "-");
    }
}
