//! ResizeContainerGroupVolume

use super::{ActionResult, ApiError, Call, Fields};
use crate::group::disk::SIZES_GIB;

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    call.client_token()?;
    let group = call.group().await?;
    let volume = call.required("VolumeName")?;
    let sizes = u64::from(*SIZES_GIB.start())..=u64::from(*SIZES_GIB.end());
    let gib = call
        .number("NewSize", sizes)?
        .and_then(|gib| u32::try_from(gib).ok())
        .ok_or_else(|| ApiError::missing("NewSize"))?;
    call.door.engine.resize_volume(&group.id, volume, gib).await?;
    Ok(Fields::new())
}
