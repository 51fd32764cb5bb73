//! `ecictl disk`

use http::Method;

use super::{
    args::{DiskCommand, Output},
    client::{Client, disk_path},
    table,
};
use crate::engine::DiskInfo;

pub(super) async fn run(client: &Client, command: DiskCommand) -> anyhow::Result<u8> {
    match command {
        DiskCommand::Ls { output } => {
            let disks: Vec<DiskInfo> = client.get("/v1/disks").await?;
            let text = match output {
                Output::Json => format!("{}\n", serde_json::to_string_pretty(&disks)?),
                Output::Table => render(&disks, table::now_ms()),
            };
            table::print(text.as_bytes())?;
            Ok(0)
        }
        DiskCommand::Rm { disks } => {
            let mut code = 0;
            for id in disks {
                match client
                    .call::<()>(Method::DELETE, &disk_path(&id), "", Vec::new())
                    .await
                {
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

fn render(disks: &[DiskInfo], now_ms: u64) -> String {
    let rows: Vec<_> = disks
        .iter()
        .map(|disk| {
            vec![
                disk.id.to_string(),
                table::bytes(disk.size_bytes),
                table::bytes(disk.used_bytes),
                disk.group
                    .as_ref()
                    .map_or_else(|| "-".into(), ToString::to_string),
                disk.made_at_ms
                    .map_or_else(|| "-".into(), |made| table::age(made, now_ms)),
            ]
        })
        .collect();
    table::columns(&["ID", "SIZE", "USED", "GROUP", "AGE"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{disk::DiskId, status::GroupId};

    #[test]
    fn a_disk_that_was_kept_has_no_group() {
        let disk = |id: &str, group: Option<&str>| DiskInfo {
            id: DiskId::parse(id).unwrap(),
            size_bytes: 20 << 30,
            used_bytes: 3 << 20,
            made_at_ms: group.map(|_| 0),
            group: group.map(|id| GroupId::parse(id).unwrap()),
        };
        let text = render(
            &[disk("d-a", Some("eci-0000000000000000000a")), disk("d-b", None)],
            60_000,
        );
        let rows: Vec<Vec<_>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows[0], ["ID", "SIZE", "USED", "GROUP", "AGE"]);
        assert_eq!(
            rows[1],
            ["d-a", "20.0GiB", "3.0MiB", "eci-0000000000000000000a", "60s"]
        );
        assert_eq!(rows[2], ["d-b", "20.0GiB", "3.0MiB", "-", "-"]);
    }
}
