//! DeleteContainerGroup

use super::{ActionResult, ApiError, Call, Fields};
use crate::{
    error::ErrorKind,
    group::status::{GroupId, Phase},
};

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    call.client_token()?;
    let text = call.required("ContainerGroupId")?;
    let grace = call.flag("Force")?.unwrap_or(false).then_some(0);
    let engine = &call.door.engine;
    // Deleting what is not there is done already; clients repeat deletions.
    let Some(id) = GroupId::parse(text) else {
        return Ok(Fields::new());
    };
    let group = match engine.get(&id).await {
        Ok(group) => group,
        Err(error) if error.kind == ErrorKind::NotFound => return Ok(Fields::new()),
        Err(error) => return Err(error.into()),
    };
    if group.status.phase == Phase::Terminating && grace.is_none() {
        return Err(ApiError::new(
            400,
            "OperationConflict",
            format!("Container group {id} is being deleted already"),
        ));
    }
    match engine.delete(&id, grace, false).await {
        Err(error) if error.kind != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(Fields::new()),
    }
}
