//! DescribeContainerGroupStatus

use serde_json::{Value, json};

use super::{ActionResult, Call, fields, selection};
use crate::{
    api::{eci::view, pod_view},
    group::status::Group,
};

const LIMIT: u64 = 200;

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    call.number("SinceSecond", 0..=86_400)?;
    let page = selection::select(call, LIMIT).await?;
    let host_ip = call.door.config.listen.ip().to_string();
    let data: Vec<Value> = page.groups.iter().map(|group| status(group, &host_ip)).collect();
    Ok(fields(json!({
        "TotalCount": page.total,
        "NextToken": page.next_token,
        "Data": data,
    })))
}

fn status(group: &Group, host_ip: &str) -> Value {
    let (spec, status) = (&group.spec, &group.status);
    let conditions: Vec<_> = pod_view::conditions(group)
        .into_iter()
        .map(|condition| {
            json!({
                "type": condition.type_,
                "status": condition.status,
                "lastTransitionTime": condition
                    .last_transition_time
                    .map(|time| format!("{:.0}", time.0))
                    .unwrap_or_default(),
                "Reason": condition.reason.unwrap_or_default(),
                "Message": condition.message.unwrap_or_default(),
            })
        })
        .collect();
    let containers: Vec<_> = spec
        .containers
        .iter()
        .zip(&status.containers)
        .filter(|(spec, _)| !spec.lifecycle.role.takes_turns())
        .map(|(spec, status)| {
            json!({
                "Name": spec.name,
                "Image": spec.image,
                "ImageID": status.image_digest.clone().unwrap_or_default(),
                "Ready": status.ready,
                "Started": status.started,
                "RestartCount": status.restart_count,
                "State": view::pod_state(&status.state),
                "LastState": status.previous.as_ref().map_or_else(|| json!({}), view::pod_state),
            })
        })
        .collect();
    json!({
        "ContainerGroupId": group.id,
        "Name": spec.name,
        "Namespace": spec.namespace,
        "uuid": spec.uid.clone().unwrap_or_else(|| group.id.to_string()),
        "Annotations": view::annotations(group),
        "Status": view::status(group),
        "PodStatus": {
            "Phase": pod_view::phase(group),
            "HostIp": host_ip,
            "PodIp": status.ip.clone().unwrap_or_default(),
            "PodIps": status.ips().map(|ip| json!({"Ip": ip})).collect::<Vec<_>>(),
            "QosClass": pod_view::qos_class(spec),
            "StartTime": status.started_at_ms.map(view::time).unwrap_or_default(),
            "Conditions": conditions,
            "ContainerStatuses": containers,
        },
    })
}
