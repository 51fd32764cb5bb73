//! RestartContainerGroup

use super::{ActionResult, Call, Fields};

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    call.client_token()?;
    let group = call.group().await?;
    call.door.engine.restart(&group.id).await?;
    Ok(Fields::new())
}
