//! Snapshots of running groups, and groups that go on from one.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::Host;
use crate::{
    engine::{CloneRequest, Forked, SnapshotInfo},
    error::{Error, ErrorKind, Result},
    group::{
        driver::GroupHandle,
        spec::{GroupSpec, VolumeSource, VolumeSpec},
        status::{ContainerState, GroupId, Phase},
        validate::validate,
    },
    parts::now_ms,
    profile,
    sandbox::{client::SandboxConnection, volumes::has_file},
    snapshots::{Snapshot, SnapshotId, Snapshots, Taken},
    store::ContainerRecord,
};

/// Most groups made by one request.
const MAX_CLONES: u32 = 1000;
/// For writing a group's memory.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(660);

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::with_source(
            ErrorKind::Internal,
            "a blocking task ended",
            error,
        ))
    })
}

impl Host {
    pub(super) async fn take_snapshot(&self, id: &GroupId, is_ephemeral: bool) -> Result<Snapshot> {
        let published = self.published(id)?;
        let group = &published.group;
        let refuse = |why: String| {
            Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!("no snapshot of {id} can be taken: {why}"),
            ))
        };
        let (Some(connection), Phase::Running) = (&published.connection, group.status.phase) else {
            return refuse(format!("it is {:?}, not Running", group.status.phase));
        };
        if let Some(volume) = group.spec.volumes.iter().find(|volume| has_file(volume)) {
            return refuse(format!(
                "volume {} is a file of its own, which is not captured: valid are emptyDir without sizeLimit or in memory, \
                 and volumes of files",
                volume.name
            ));
        }
        let is_nfs = |volume: &&VolumeSpec| matches!(volume.source, VolumeSource::Nfs(_));
        if let Some(volume) = group.spec.volumes.iter().find(is_nfs) {
            return refuse(format!(
                "volume {} is on a server, which would take a copy of the group for the group itself; valid: a group without \
                 volumes on servers",
                volume.name
            ));
        }
        let mut running = BTreeSet::new();
        for container in &group.status.containers {
            match (&container.state, &container.container_id) {
                (ContainerState::Running { .. }, Some(id)) => {
                    running.insert(id.clone());
                }
                (ContainerState::Terminated { .. }, _) => {}
                _ => return refuse(format!("container {} waits for its start", container.name)),
            }
        }
        let snapshots = self.parts.snapshots.clone();
        let draft = {
            let snapshots = snapshots.clone();
            blocking(move || snapshots.draft()).await?
        };
        let pause_us = self.capture(id, connection, draft.directory()).await?;
        let captured: BTreeSet<String> = Snapshots::captured_containers(&draft)?.into_iter().collect();
        if captured != running {
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("a container of {id} ended or started while its snapshot was taken: try again"),
            ));
        }
        let taken = Taken {
            group_id: id.clone(),
            spec: group.spec.clone(),
            containers: group.status.containers.clone(),
            pause_us,
            created_at_ms: now_ms(),
            is_ephemeral,
        };
        let snapshot = blocking(move || snapshots.keep(draft, taken)).await?;
        tracing::info!(group_id = %id, snapshot_id = %snapshot.id, pause_us, "snapshot taken");
        Ok(snapshot)
    }

    /// While a copy of the VMM writes the group's memory, each page the group changes exists twice.
    async fn capture(
        &self,
        id: &GroupId,
        connection: &SandboxConnection,
        directory: &std::path::Path,
    ) -> Result<u64> {
        let limit = |factor: u64| {
            let (parts, id) = (Arc::clone(&self.parts), id.clone());
            let size = self.published(&id).map(|published| published.group.spec.size);
            blocking(move || {
                let bytes = crate::capacity::footprint(size?, &parts.config.sandbox).memory_bytes;
                parts.cgroups.limit_memory(&id, bytes * factor)
            })
        };
        limit(2).await?;
        let captured = connection.checkpoint(directory, SNAPSHOT_DEADLINE).await;
        let limited = limit(1).await;
        captured?;
        limited?;
        let (_, info) = connection.sandbox_status().await?;
        let pause_us = info
            .get("pause_us")
            .and_then(|text| text.parse().ok())
            .unwrap_or_default();
        profile::snapshot_pause(Duration::from_micros(pause_us));
        Ok(pause_us)
    }

    pub(super) async fn list_snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        let snapshots = self.parts.snapshots.clone();
        let found = blocking(move || snapshots.list()).await?;
        Ok(found.iter().map(Snapshot::info).collect())
    }

    pub(super) async fn restore_snapshot(
        &self,
        id: &SnapshotId,
        request: &CloneRequest,
    ) -> Result<Vec<GroupId>> {
        if !(1..=MAX_CLONES).contains(&request.count) {
            return Err(invalid(format!(
                "count is {}; valid: 1 to {MAX_CLONES}",
                request.count
            )));
        }
        let (snapshots, id) = (self.parts.snapshots.clone(), id.clone());
        let snapshot = blocking(move || {
            let snapshot = snapshots.read(&id)?;
            snapshots.verify(&snapshot)?;
            Ok(snapshot)
        })
        .await?;
        let owner = &snapshot.spec.namespace;
        if let Some(namespace) = request.namespace.as_ref().filter(|namespace| *namespace != owner) {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "snapshot {} belongs to namespace {owner}, not {namespace}: its memory is not for others",
                    snapshot.id
                ),
            ));
        }
        let specs: Vec<GroupSpec> = (1..=request.count)
            .map(|number| clone_spec(&snapshot, request, number))
            .collect();
        if let Some(longest) = specs.last() {
            let violations = validate(longest);
            if !violations.0.is_empty() {
                return Err(invalid(violations.to_string()));
            }
        }
        let mut made: Vec<GroupId> = Vec::new();
        for spec in specs {
            match self.accept(spec, None, Some(&snapshot)).await {
                Ok(id) => made.push(id),
                Err(error) => {
                    // All or none.
                    for id in &made {
                        if let Ok(handle) = self.handle(id) {
                            handle.delete(Some(0)).await;
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    pub(super) async fn fork_group(&self, id: &GroupId, request: &CloneRequest) -> Result<Forked> {
        let snapshot = self.take_snapshot(id, true).await?;
        let groups = self.restore_snapshot(&snapshot.id, request).await;
        let clones: Vec<GroupHandle> = groups
            .iter()
            .flatten()
            .filter_map(|id| self.handle(id).ok())
            .collect();
        let (snapshots, snapshot_id) = (self.parts.snapshots.clone(), snapshot.id);
        tokio::spawn(async move {
            for clone in clones {
                // An error is the group's end.
                let _ = clone
                    .follow()
                    .wait_for(|published| published.restores.is_none())
                    .await;
            }
            if let Err(error) = blocking(move || snapshots.remove(&snapshot_id)).await {
                tracing::warn!(error = %error.chain(), "the snapshot of a fork stays until the next start");
            }
        });
        Ok(Forked {
            groups: groups?,
            pause_us: snapshot.pause_us,
        })
    }

    pub(super) async fn remove_snapshot_files(&self, id: &SnapshotId) -> Result<()> {
        // Not between a group's acceptance and the begin of its start.
        let _one = self.accepting.lock().await;
        let user = self
            .all()
            .into_iter()
            .find(|published| published.restores.as_ref() == Some(id));
        if let Some(user) = user {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "{} is being restored from snapshot {id}: try again",
                    user.group.id
                ),
            ));
        }
        let (snapshots, id) = (self.parts.snapshots.clone(), id.clone());
        blocking(move || snapshots.remove(&id)).await
    }
}

/// The group that a clone is: its parent with a name of its own.
fn clone_spec(snapshot: &Snapshot, request: &CloneRequest, number: u32) -> GroupSpec {
    let parent = &snapshot.spec;
    let base = request
        .name
        .clone()
        .unwrap_or_else(|| format!("{}-clone", parent.name));
    let name = if request.count == 1 && request.name.is_some() {
        base
    } else {
        format!("{base}-{number}")
    };
    let hostname = if parent.hostname == parent.name {
        name.clone()
    } else {
        parent.hostname.clone()
    };
    GroupSpec {
        hostname,
        // The parent's, where a cluster gave it one.
        uid: None,
        name,
        ..parent.clone()
    }
}

/// What is kept of the containers of a group that goes on from a snapshot.
pub(super) fn records(snapshot: &Snapshot) -> Vec<ContainerRecord> {
    let record = |status: &crate::group::status::ContainerStatus| match status.state {
        ContainerState::Running { .. } => ContainerRecord {
            // The run goes on, so it is begun with its own number.
            runs: status.restart_count,
            is_captured: true,
            ..ContainerRecord::default()
        },
        _ => ContainerRecord {
            runs: status.restart_count + 1,
            done: true,
            ..ContainerRecord::default()
        },
    };
    snapshot.containers.iter().map(record).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_clone_has_the_name_it_was_given_and_several_are_numbered() {
        let request = |name: Option<&str>, count| CloneRequest {
            name: name.map(str::to_owned),
            namespace: None,
            count,
        };
        let snapshot = crate::snapshots::testing::snapshot("web");
        let names = |request: &CloneRequest| -> Vec<(String, String)> {
            (1..=request.count)
                .map(|number| clone_spec(&snapshot, request, number))
                .map(|spec| (spec.name, spec.hostname))
                .collect()
        };
        let same = |name: &str| (name.to_owned(), name.to_owned());
        assert_eq!(names(&request(Some("a"), 1)), [same("a")]);
        assert_eq!(names(&request(Some("a"), 2)), [same("a-1"), same("a-2")]);
        assert_eq!(names(&request(None, 1)), [same("web-clone-1")]);
    }
}
