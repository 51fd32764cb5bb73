//! Requests about snapshots.

use axum::{
    Json,
    extract::{Path, State},
};

use super::{
    Answer, Shared, json,
    wire::{Clones, Created},
};
use crate::{
    api::lookup,
    engine::{CloneRequest, Engine},
    error::{Error, ErrorKind, Result},
    group::status::GroupId,
    snapshots::SnapshotId,
};

fn id_of(text: &str) -> Result<SnapshotId> {
    SnapshotId::parse(text).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidArgument,
            format!("the snapshot is {text:?}; valid: snap- and 20 lower-case letters or digits"),
        )
    })
}

pub(super) async fn take(State(engine): Shared, Path(group): Path<String>) -> Answer {
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    json(engine.snapshot(&group.id).await)
}

pub(super) async fn list(State(engine): Shared) -> Answer {
    json(engine.snapshots().await)
}

pub(super) async fn remove(State(engine): Shared, Path(snapshot): Path<String>) -> Answer {
    json(engine.remove_snapshot(&id_of(&snapshot)?).await)
}

pub(super) async fn restore(
    State(engine): Shared,
    Path(snapshot): Path<String>,
    Json(request): Json<CloneRequest>,
) -> Answer {
    let ids = engine.restore(&id_of(&snapshot)?, request).await?;
    let groups = created(engine.as_ref(), ids).await;
    json(Ok(Clones {
        groups,
        pause_us: None,
    }))
}

pub(super) async fn fork(
    State(engine): Shared,
    Path(group): Path<String>,
    Json(request): Json<CloneRequest>,
) -> Answer {
    let group = lookup::by_text(engine.as_ref(), &group).await?;
    let forked = engine.fork(&group.id, request).await?;
    let groups = created(engine.as_ref(), forked.groups).await;
    json(Ok(Clones {
        groups,
        pause_us: Some(forked.pause_us),
    }))
}

/// With their names. One that is gone already has none to tell.
async fn created(engine: &dyn Engine, ids: Vec<GroupId>) -> Vec<Created> {
    let mut groups = Vec::new();
    for id in ids {
        if let Ok(group) = engine.get(&id).await {
            groups.push(Created {
                id,
                name: group.spec.name,
                namespace: group.spec.namespace,
            });
        }
    }
    groups
}
