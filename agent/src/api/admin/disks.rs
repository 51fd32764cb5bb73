//! Requests about disks.

use axum::extract::{Path, State};

use super::{Answer, Shared, json};
use crate::{
    error::{Error, ErrorKind},
    group::disk::DiskId,
};

pub(super) async fn list(State(engine): Shared) -> Answer {
    json(engine.disks().await)
}

pub(super) async fn remove(State(engine): Shared, Path(disk): Path<String>) -> Answer {
    let id = DiskId::parse(&disk).ok_or_else(|| {
        let text = format!("the disk is {disk:?}; valid: d- and 1 to 40 lower-case letters or digits");
        Error::new(ErrorKind::InvalidArgument, text)
    })?;
    json(engine.remove_disk(&id).await)
}
