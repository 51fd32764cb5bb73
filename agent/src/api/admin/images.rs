//! Requests about images.

use axum::extract::{RawQuery, State};
use bytes::Bytes;
use futures_util::StreamExt;

use super::{
    Answer, Shared, json, json_lines,
    wire::{Failure, Pull, PullLine},
};
use crate::{
    api::query::Query,
    error::{Error, ErrorKind},
    group::spec::RegistryCredential,
};

pub(super) async fn list(State(engine): Shared) -> Answer {
    json(engine.list_images().await)
}

pub(super) async fn remove(State(engine): Shared, RawQuery(raw): RawQuery) -> Answer {
    let query = Query::parse(raw.as_deref());
    let reference = query.get("reference").unwrap_or_default();
    if reference.is_empty() {
        return Err(Error::new(ErrorKind::InvalidArgument, "There is no reference parameter").into());
    }
    json(engine.remove_image(reference).await)
}

pub(super) async fn pull(State(engine): Shared, body: Bytes) -> Answer {
    let pull: Pull = serde_json::from_slice(&body).map_err(|error| {
        Error::with_source(
            ErrorKind::InvalidArgument,
            "The pull request is not valid JSON",
            error,
        )
    })?;
    let credentials = pull.login.map(|login| RegistryCredential {
        server: registry_of(&pull.reference).to_owned(),
        username: login.username,
        password: login.password,
    });
    let progress = engine.pull_image(pull.reference, pull.policy, credentials).await;
    Ok(json_lines(progress.map(|status| match status {
        Ok(status) => PullLine::Status(status),
        Err(error) => PullLine::Failure(Failure::of(&error)),
    })))
}

/// The registry a reference names: its first part if that looks like a host.
fn registry_of(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => first,
        _ => "docker.io",
    }
}

#[cfg(test)]
mod tests {
    use super::registry_of;

    #[test]
    fn registries() {
        for (reference, registry) in [
            ("busybox", "docker.io"),
            ("library/busybox:1", "docker.io"),
            ("localhost/x", "localhost"),
            ("reg.local:5000/a/b", "reg.local:5000"),
        ] {
            assert_eq!(registry_of(reference), registry);
        }
    }
}
