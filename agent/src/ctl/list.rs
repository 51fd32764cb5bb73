//! `ecictl ps`

use super::{
    args::{Output, PsArgs},
    client::Client,
    table,
};
use crate::group::{
    lifecycle::Role,
    status::{Group, Phase},
};

pub(super) async fn run(client: &Client, args: &PsArgs) -> anyhow::Result<u8> {
    let mut groups: Vec<Group> = client.get("/v1/groups").await?;
    if !args.all {
        groups.retain(|group| !matches!(group.status.phase, Phase::Succeeded | Phase::Failed));
    }
    match args.output {
        Output::Json => {
            let mut text = serde_json::to_string_pretty(&groups)?;
            text.push('\n');
            table::print(text.as_bytes())?;
        }
        Output::Table => table::print(render(&groups, table::now_ms()).as_bytes())?,
    }
    Ok(0)
}

fn render(groups: &[Group], now_ms: u64) -> String {
    let rows: Vec<_> = groups
        .iter()
        .map(|group| {
            let status = &group.status;
            // Init containers come and go: they are not counted.
            let serving = group.spec.containers.iter().zip(&status.containers);
            let serving: Vec<_> = serving
                .filter(|(spec, _)| spec.lifecycle.role != Role::Init)
                .collect();
            let ready = serving.iter().filter(|(_, container)| container.ready).count();
            let n_serving = serving.len();
            let restarts: u32 = status
                .containers
                .iter()
                .map(|container| container.restart_count)
                .sum();
            vec![
                group.id.to_string(),
                format!("{}/{}", group.spec.namespace, group.spec.name),
                state(group),
                format!("{ready}/{n_serving}"),
                restarts.to_string(),
                crate::group::size::text(group.spec.size),
                status.ip.clone().unwrap_or_else(|| "-".into()),
                table::age(status.created_at_ms, now_ms),
            ]
        })
        .collect();
    table::columns(
        &["ID", "NAME", "STATUS", "READY", "RESTARTS", "SIZE", "IP", "AGE"],
        &rows,
    )
}

/// The phase, with its reason where there is one.
pub(super) fn state(group: &Group) -> String {
    let phase = format!("{:?}", group.status.phase);
    if group.status.reason.is_empty() {
        phase
    } else {
        format!("{phase} ({})", group.status.reason)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_group_is_a_line() {
        let group = crate::api::fake::group("eci-aaaaaaaaaaaaaaaaaaa1", "web", "default");
        let text = super::render(&[group], 1_767_225_660_000);
        let line = text.lines().nth(1).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(
            words,
            [
                "eci-aaaaaaaaaaaaaaaaaaa1",
                "default/web",
                "Running",
                "1/1",
                "0",
                "2",
                "vCPU",
                "/",
                "4",
                "GiB",
                "10.89.0.2",
                "60s"
            ]
        );
    }
}
