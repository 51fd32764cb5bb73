//! RestoreContainerGroup: an extension

use serde_json::json;

use super::{ActionResult, Call, clones, fields};

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let id = clones::snapshot_id(call)?;
    let request = clones::clone_request(call)?;
    let groups = call.door.engine.restore(&id, request).await?;
    Ok(fields(json!({ "ContainerGroupIds": groups })))
}
