//! exec and logs of a Pod's containers.

use std::{sync::Arc, time::SystemTime};

use axum::{
    body::Body,
    extract::{Path, RawQuery, Request, State},
    response::IntoResponse,
};
use http::{StatusCode, header};

use super::{Answer, KubeletDoor, Shared};
use crate::{
    api::{
        exec::{self, Framing},
        listener::ConnectionSlot,
        lookup,
        query::{self, Query},
        websocket::Handshake,
    },
    error::{Error, ErrorKind},
};

pub(super) async fn exec(
    State(door): Shared,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Answer {
    run(
        &door,
        [&namespace, &pod],
        None,
        &container,
        raw.as_deref(),
        request,
    )
    .await
}

pub(super) async fn exec_with_uid(
    State(door): Shared,
    Path((namespace, pod, uid, container)): Path<(String, String, String, String)>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Answer {
    run(
        &door,
        [&namespace, &pod],
        Some(&uid),
        &container,
        raw.as_deref(),
        request,
    )
    .await
}

async fn run(
    door: &Arc<KubeletDoor>,
    [namespace, pod]: [&str; 2],
    uid: Option<&str>,
    container: &str,
    raw: Option<&str>,
    mut request: Request,
) -> Answer {
    let invalid = |message: String| Error::new(ErrorKind::InvalidArgument, message);
    let handshake = Handshake::from_request(&mut request).map_err(|error| invalid(error.to_string()))?;
    let slot = request.extensions().get::<ConnectionSlot>().cloned();
    let protocol = handshake.choose(&[exec::V5, exec::V4]).ok_or_else(|| {
        invalid(format!(
            "No WebSocket protocol in common; valid: {}, {}",
            exec::V5,
            exec::V4
        ))
    })?;
    let group = lookup::by_pod(door.engine.as_ref(), namespace, pod, uid).await?;
    let container = lookup::container(&group, Some(container))?;
    let request = query::exec_request(&Query::parse(raw), container, &query::KUBELET_STREAMS)?;
    let session = door.engine.exec(&group.id, request).await?;
    let response = handshake.response::<Body>(Some(protocol));
    tokio::spawn(async move {
        let _slot = slot;
        if let Some(socket) = handshake.socket().await {
            exec::carry(socket, session, Framing::of(Some(protocol))).await;
        }
    });
    Ok(response)
}

pub(super) async fn logs(
    State(door): Shared,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    RawQuery(raw): RawQuery,
) -> Answer {
    let group = lookup::by_pod(door.engine.as_ref(), &namespace, &pod, None).await?;
    let container = lookup::container(&group, Some(&container))?;
    let options = query::log_options(&Query::parse(raw.as_deref()), container, SystemTime::now())?;
    let lines = door.engine.logs(&group.id, options).await?;
    Ok((
        StatusCode::OK,
        [(header::CONTENT_TYPE, "text/plain")],
        Body::from_stream(lines),
    )
        .into_response())
}
