//! Requests about groups.

use std::{sync::Arc, time::SystemTime};

use axum::{
    Json,
    body::Body,
    extract::{Path, RawQuery, Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, StatusCode, header};

use super::{
    Answer, Refusal, Shared, json, json_lines,
    wire::{Created, Updated},
};
use crate::{
    api::{
        exec::{self, Framing},
        listener::ConnectionSlot,
        lookup,
        query::{self, Query},
        websocket::Handshake,
    },
    engine::Engine,
    error::{Error, ErrorKind, Result},
    group::{
        eci::{self, params::Params},
        pod,
        rules::Rules,
        spec::GroupSpec,
        status::Group,
    },
};

/// Content type of a CreateContainerGroup request as a JSON object; anything else is a Pod.
pub(crate) const ECI_JSON: &str = "application/vnd.eci.create-container-group+json";

pub(super) async fn list(State(engine): Shared) -> Json<Vec<Group>> {
    Json(engine.list().await.into_iter().map(without_secrets).collect())
}

pub(super) async fn get(State(engine): Shared, Path(group): Path<String>) -> Answer {
    json(
        lookup::by_text(engine.as_ref(), &group)
            .await
            .map(without_secrets),
    )
}

/// Passwords and secrets are for the group, not for reading.
fn without_secrets(mut group: Group) -> Group {
    group.spec.hide_secrets();
    group
}

pub(super) async fn create(
    State(engine): Shared,
    headers: HeaderMap,
    RawQuery(raw): RawQuery,
    body: Bytes,
) -> std::result::Result<Response, Refusal> {
    let spec = parse(&headers, &body, engine.rules())?;
    let token = Query::parse(raw.as_deref()).get("token").map(str::to_owned);
    let (name, namespace) = (spec.name.clone(), spec.namespace.clone());
    // Names are how people speak of groups here, so they are unique; the ECI door goes by id alone.
    if token.is_none() && engine.list().await.iter().any(|group| same_name(group, &spec)) {
        let message =
            format!("A group called {namespace}/{name} exists; delete it first, or choose another name");
        return Err(Error::new(ErrorKind::AlreadyExists, message).into());
    }
    let id = engine.create(spec, token).await?;
    Ok((StatusCode::CREATED, Json(Created { id, name, namespace })).into_response())
}

fn parse(headers: &HeaderMap, body: &[u8], rules: &Rules) -> Result<GroupSpec> {
    let eci = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(ECI_JSON.as_bytes()));
    if eci {
        parse_eci(body, rules)
    } else {
        parse_pod(body, rules)
    }
}

fn same_name(group: &Group, spec: &GroupSpec) -> bool {
    group.spec.name == spec.name && group.spec.namespace == spec.namespace
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

fn parse_pod(body: &[u8], rules: &Rules) -> Result<GroupSpec> {
    let text =
        std::str::from_utf8(body).map_err(|error| invalid(format!("The manifest is not UTF-8: {error}")))?;
    let pod = pod::parse_manifest(text).map_err(|error| invalid(error.to_string()))?;
    pod::to_group(pod, rules).map_err(|violations| invalid(violations.to_string()))
}

fn parse_eci(body: &[u8], rules: &Rules) -> Result<GroupSpec> {
    let value = serde_json::from_slice(body).map_err(|error| invalid(format!("not valid JSON: {error}")))?;
    let params = Params::from_json(&value).map_err(|error| invalid(error.to_string()))?;
    eci::to_group(&params, rules).map_err(|violations| invalid(violations.to_string()))
}

pub(super) async fn delete(
    State(engine): Shared,
    Path(group): Path<String>,
    RawQuery(raw): RawQuery,
) -> Answer {
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    let query = Query::parse(raw.as_deref());
    let (grace, wait) = (query.number("grace")?, query.flag("wait")?);
    engine.delete(&group.id, grace, wait).await?;
    let (name, namespace) = (group.spec.name, group.spec.namespace);
    let id = group.id;
    json(Ok(Created { id, name, namespace }))
}

pub(super) async fn resize(
    State(engine): Shared,
    Path(group): Path<String>,
    RawQuery(raw): RawQuery,
) -> Answer {
    let query = Query::parse(raw.as_deref());
    let required = |name: &str| {
        let missing = || {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("{name} is missing from the query"),
            )
        };
        query.get(name).ok_or_else(missing)
    };
    let (volume, gib) = (required("volume")?, required("gib")?);
    let gib = gib.parse().map_err(|_| {
        let text = format!("gib is {gib:?}; valid: a number of GiB");
        Error::new(ErrorKind::InvalidArgument, text)
    })?;
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    engine.resize_volume(&group.id, volume, gib).await?;
    json(Ok(Created {
        id: group.id,
        name: group.spec.name,
        namespace: group.spec.namespace,
    }))
}

pub(super) async fn restart(State(engine): Shared, Path(group): Path<String>) -> Answer {
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    engine.restart(&group.id).await?;
    let (name, namespace) = (group.spec.name, group.spec.namespace);
    let id = group.id;
    json(Ok(Created { id, name, namespace }))
}

pub(super) async fn update(
    State(engine): Shared,
    Path(group): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let spec = parse(&headers, &body, engine.rules())?;
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    let changed = engine.update(&group.id, &group.spec, spec).await?;
    json(Ok(Updated {
        id: group.id,
        changed,
    }))
}

pub(super) async fn watch(State(engine): Shared, Path(group): Path<String>) -> Answer {
    let first = lookup::by_text(engine.as_ref(), &group).await?;
    Ok(json_lines(stream::unfold(
        Watch::First(engine, Box::new(first)),
        Watch::next,
    )))
}

/// A watch between two lines.
enum Watch {
    First(Arc<dyn Engine>, Box<Group>),
    After(Arc<dyn Engine>, Box<Group>),
}

impl Watch {
    async fn next(self) -> Option<(Group, Self)> {
        let (engine, group) = match self {
            Self::First(engine, group) => (engine, group),
            // Gone is the end of the stream.
            Self::After(engine, seen) => {
                let group = engine.wait_change(&seen.id, &seen).await.ok()?;
                (engine, Box::new(group))
            }
        };
        Some((without_secrets((*group).clone()), Self::After(engine, group)))
    }
}

pub(super) async fn exec(
    State(engine): Shared,
    Path(group): Path<String>,
    RawQuery(raw): RawQuery,
    mut request: Request,
) -> Answer {
    let handshake = Handshake::from_request(&mut request).map_err(|error| invalid(error.to_string()))?;
    let slot = request.extensions().get::<ConnectionSlot>().cloned();
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    let query = Query::parse(raw.as_deref());
    let container = lookup::container(&group, query.get("container"))?;
    let request = query::exec_request(&query, container, &query::ADMIN_STREAMS)?;
    let protocol = handshake.choose(&[exec::V5, exec::V4]);
    let session = engine.exec(&group.id, request).await?;
    let response = handshake.response::<Body>(protocol);
    let framing = Framing::of(protocol);
    tokio::spawn(async move {
        let _slot = slot;
        if let Some(socket) = handshake.socket().await {
            exec::carry(socket, session, framing).await;
        }
    });
    Ok(response)
}

pub(super) async fn logs(
    State(engine): Shared,
    Path(group): Path<String>,
    RawQuery(raw): RawQuery,
) -> Answer {
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    let query = Query::parse(raw.as_deref());
    let container = lookup::container(&group, query.get("container"))?;
    let options = query::log_options(&query, container, SystemTime::now())?;
    let lines = engine.logs(&group.id, options).await?;
    Ok((
        [(header::CONTENT_TYPE, "text/plain; charset=utf-8")],
        Body::from_stream(lines),
    )
        .into_response())
}

pub(super) async fn stats(State(engine): Shared, Path(group): Path<String>) -> Answer {
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    json(engine.stats(&group.id).await)
}
