//! DescribeContainerGroups

use serde_json::{Value, json};

use super::{ActionResult, Call, fields, selection};
use crate::api::eci::view;

const LIMIT: u64 = 20;

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    // Older clients read events without asking for them.
    let with_events = call.flag("WithEvent")?.unwrap_or(true);
    let page = selection::select(call, LIMIT).await?;
    let config = &call.door.config;
    let groups: Vec<Value> = page
        .groups
        .iter()
        .map(|group| view::group(group, config, with_events))
        .collect();
    Ok(fields(json!({
        "TotalCount": page.total,
        "NextToken": page.next_token,
        "ContainerGroups": groups,
    })))
}
