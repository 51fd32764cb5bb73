//! What the actions about snapshots have in common. They are this host's extension of the API.

use super::{ApiError, Call};
use crate::{engine::CloneRequest, snapshots::SnapshotId};

/// The snapshot named by `SnapshotId`.
pub(super) fn snapshot_id(call: &Call<'_>) -> Result<SnapshotId, ApiError> {
    let text = call.required("SnapshotId")?;
    SnapshotId::parse(text).ok_or_else(|| {
        ApiError::new(
            404,
            "InvalidParameter.NotFound",
            format!("SnapshotId is {text:?}; there is no such snapshot"),
        )
    })
}

/// The clones wanted by `ContainerGroupName` and `Count`.
pub(super) fn clone_request(call: &Call<'_>) -> Result<CloneRequest, ApiError> {
    let count = call.number("Count", 1..=1000)?.unwrap_or(1);
    Ok(CloneRequest {
        name: call.text("ContainerGroupName").map(str::to_owned),
        namespace: None,
        count: u32::try_from(count).unwrap_or(u32::MAX),
    })
}
