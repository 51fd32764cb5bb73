//! DeleteContainerGroupSnapshot: an extension

use super::{ActionResult, Call, Fields, clones};

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let id = clones::snapshot_id(call)?;
    call.door.engine.remove_snapshot(&id).await?;
    Ok(Fields::new())
}
