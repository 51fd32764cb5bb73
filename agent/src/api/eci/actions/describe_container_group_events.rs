//! DescribeContainerGroupEvents

use serde_json::{Value, json};

use super::{ActionResult, Call, fields, selection};
use crate::{
    api::eci::view,
    group::status::{EventKind, Group},
};

const LIMIT: u64 = 200;

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let since_ms = match call.number("SinceSecond", 60..=3600)? {
        Some(seconds) => now_ms().saturating_sub(seconds * 1000),
        None => 0,
    };
    let page = selection::select(call, LIMIT).await?;
    let data: Vec<Value> = page.groups.iter().map(|group| events(group, since_ms)).collect();
    Ok(fields(json!({
        "TotalCount": page.total,
        "NextToken": page.next_token,
        "Data": data,
    })))
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn events(group: &Group, since_ms: u64) -> Value {
    let spec = &group.spec;
    let events: Vec<_> = group
        .status
        .events
        .iter()
        .filter(|event| event.last_ms >= since_ms)
        .map(|event| {
            json!({
                "Type": match event.kind {
                    EventKind::Normal => "Normal",
                    EventKind::Warning => "Warning",
                },
                "Reason": event.reason,
                "Message": event.message,
                "Count": event.count,
                "FirstTimestamp": view::time(event.first_ms),
                "LastTimestamp": view::time(event.last_ms),
                "ReportingComponent": "kubelet",
                "ReportingInstance": "eci",
                "Source": {"Component": "kubelet", "Host": "eci"},
                "Metadata": {
                    "Name": view::event_name(group, event.first_ms),
                    "Namespace": spec.namespace,
                },
                "involvedObject": {
                    "ApiVersion": "v1",
                    "Kind": "Pod",
                    "Name": spec.name,
                    "Namespace": spec.namespace,
                    "Uid": group.id,
                },
            })
        })
        .collect();
    json!({
        "ContainerGroupId": group.id,
        "Name": spec.name,
        "Namespace": spec.namespace,
        "uuid": spec.uid.clone().unwrap_or_else(|| group.id.to_string()),
        "Annotations": view::annotations(group),
        "Events": events,
    })
}
