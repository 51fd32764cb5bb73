//! CreateContainerGroup

use serde_json::json;

use super::{ActionResult, ApiError, Call, fields};
use crate::group::eci;

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let token = call.client_token()?;
    let spec = eci::to_group(&call.params, call.door.engine.rules())?;
    if call.flag("DryRun")? == Some(true) {
        call.door.engine.check(&spec).await?;
        return Err(ApiError::new(
            400,
            "DryRunOperation",
            "Request validation has been passed with DryRun flag set",
        ));
    }
    let engine = &call.door.engine;
    let id = engine.create(spec.clone(), token.clone()).await?;
    // The engine answers a known token with the group of that time, whatever is asked now.
    if token.is_some()
        && let Ok(group) = engine.get(&id).await
        && group.spec.request != spec.request
    {
        return Err(ApiError::new(
            400,
            "IdempotentParameterMismatch",
            format!("ClientToken was used with other parameters, for {id}"),
        ));
    }
    Ok(fields(json!({"ContainerGroupId": id})))
}
