//! DescribeContainerGroupSnapshots: an extension

use serde_json::{Value, json};

use super::{ActionResult, Call, fields};
use crate::api::eci::view;

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let group = call.text("ContainerGroupId");
    let snapshots = call.door.engine.snapshots().await?;
    let found: Vec<Value> = snapshots
        .iter()
        .filter(|snapshot| group.is_none_or(|group| snapshot.group_id.as_str() == group))
        .map(|snapshot| {
            json!({
                "SnapshotId": snapshot.id,
                "ContainerGroupId": snapshot.group_id,
                "ContainerGroupName": snapshot.name,
                "CreationTime": view::time(snapshot.created_at_ms),
                "PauseMicroseconds": snapshot.pause_us,
                "SizeBytes": snapshot.size_bytes,
            })
        })
        .collect();
    Ok(fields(json!({ "TotalCount": found.len(), "Snapshots": found })))
}
