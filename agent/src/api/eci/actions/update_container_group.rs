//! UpdateContainerGroup

use super::{ActionResult, ApiError, Call, Fields};
use crate::group::eci::update::{self, UpdateType};

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let token = call.client_token()?;
    let group = call.group().await?;
    let kind = match call.text("UpdateType") {
        None | Some("None" | "RenewUpdate") => UpdateType::Renew,
        Some("IncrementalUpdate") => UpdateType::Incremental,
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "UpdateType is {other:?}; valid: RenewUpdate, IncrementalUpdate"
            )));
        }
    };
    let Some(spec) = update::updated(&group.spec, &call.params, kind, call.door.engine.rules()) else {
        return Err(ApiError::new(
            403,
            "InvalidAction",
            format!(
                "{} was not made by CreateContainerGroup; valid: ecictl update with its manifest",
                group.id
            ),
        ));
    };
    let changed = call.door.engine.update(&group.id, &group.spec, spec?).await?;
    // Asked for again with its token, an update that was carried out has succeeded.
    if changed || token.is_some() {
        Ok(Fields::new())
    } else {
        Err(ApiError::new(
            400,
            "NoNeedUpdate",
            format!("{} is what the request says already", group.id),
        ))
    }
}
