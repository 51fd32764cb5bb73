//! ForkContainerGroup: an extension

use serde_json::json;

use super::{ActionResult, Call, clones, fields};

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let group = call.group().await?;
    let request = clones::clone_request(call)?;
    let forked = call.door.engine.fork(&group.id, request).await?;
    Ok(fields(json!({
        "ContainerGroupIds": forked.groups,
        "PauseMicroseconds": forked.pause_us,
    })))
}
