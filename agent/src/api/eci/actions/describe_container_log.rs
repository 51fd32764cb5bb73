//! DescribeContainerLog

use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use serde_json::json;

use super::{ActionResult, ApiError, Call, fields};
use crate::{
    api::{lookup, query},
    engine::LogOptions,
};

const DEFAULT_LINES: u64 = 500;
const MOST_LINES: u64 = 2000;
const MOST_BYTES: u64 = 1 << 20;

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let container = call.required("ContainerName")?.to_owned();
    let group = call.group().await?;
    lookup::container(&group, Some(&container))?;
    let since = match (
        call.text("StartTime"),
        call.number("SinceSeconds", 1..=u64::from(u32::MAX))?,
    ) {
        (Some(text), _) => Some(query::parse_time(text).ok_or_else(|| {
            ApiError::invalid(format!("StartTime is {text:?}; valid: YYYY-MM-DDThh:mm:ssZ"))
        })?),
        (None, Some(seconds)) => SystemTime::now().checked_sub(Duration::from_secs(seconds)),
        (None, None) => None,
    };
    let limit_bytes = call.number("LimitBytes", 1..=MOST_BYTES)?.unwrap_or(MOST_BYTES);
    let options = LogOptions {
        container: Some(container.clone()),
        follow: false,
        previous: call.flag("LastTime")?.unwrap_or(false),
        tail_lines: Some(call.number("Tail", 1..=MOST_LINES)?.unwrap_or(DEFAULT_LINES)),
        limit_bytes: Some(limit_bytes),
        since,
        timestamps: call.flag("Timestamps")?.unwrap_or(false),
    };
    let mut lines = call.door.engine.logs(&group.id, options).await?;
    let most = usize::try_from(limit_bytes).unwrap_or(usize::MAX);
    let mut content = Vec::new();
    while let Some(bytes) = lines.next().await {
        let bytes = bytes.map_err(|error| {
            tracing::error!("The log of {} can't be read: {error}", group.id);
            ApiError::new(500, "InternalError", "The log can't be read")
        })?;
        let room = most - content.len();
        content.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if content.len() >= most {
            break;
        }
    }
    Ok(fields(json!({
        "ContainerName": container,
        "Content": String::from_utf8_lossy(&content),
    })))
}
