//! CreateContainerGroupSnapshot: an extension

use serde_json::json;

use super::{ActionResult, Call, fields};

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let group = call.group().await?;
    let snapshot = call.door.engine.snapshot(&group.id).await?;
    Ok(fields(json!({
        "SnapshotId": snapshot.id,
        "PauseMicroseconds": snapshot.pause_us,
        "SizeBytes": snapshot.size_bytes,
    })))
}
