//! Disks as volumes of groups: which group has which, and how they grow.

use std::sync::Arc;

use super::Host;
use crate::{
    disks::DiskFile,
    engine::DiskInfo,
    error::{Error, ErrorKind, Result},
    group::{
        disk::{DiskId, DiskVolume, SIZES_GIB},
        spec::{GroupSpec, VolumeSource},
        status::{GroupId, Phase},
    },
    random,
    sandbox::volumes,
};

/// The disks of a group.
fn disks_of(spec: &GroupSpec) -> impl Iterator<Item = (&str, &DiskVolume)> {
    spec.volumes.iter().filter_map(|volume| match &volume.source {
        VolumeSource::Disk(disk) => Some((volume.name.as_str(), disk)),
        VolumeSource::EmptyDir { .. }
        | VolumeSource::Files(_)
        | VolumeSource::Nfs(_)
        | VolumeSource::HostPath(_) => None,
    })
}

impl Host {
    /// Gives new disks their ids, and refuses disks that are not there or another group's. One group at a time is accepted,
    /// so what is free here stays so until the group's record says whose it is.
    pub(super) fn choose_disks(&self, spec: &mut GroupSpec) -> Result<()> {
        let mut problems = Vec::new();
        let mut kind = ErrorKind::DiskNotFound;
        for (volume, disk) in disks_of(spec) {
            let Some(id) = &disk.id else { continue };
            if !self.parts.disks.exists(id) {
                problems.push(format!(
                    "volume {volume}: no disk {id} on this host; valid: the id of one that was kept, or a size for a new one"
                ));
            } else if let Some(user) = self.user_of(id) {
                kind = ErrorKind::FailedPrecondition;
                problems.push(format!(
                    "volume {volume}: disk {id} is used by container group {user}; valid: a disk that no group has"
                ));
            }
        }
        if !problems.is_empty() {
            return Err(Error::new(kind, problems.join("; ")));
        }
        for volume in &mut spec.volumes {
            if let VolumeSource::Disk(disk @ DiskVolume { id: None, .. }) = &mut volume.source {
                disk.id = DiskId::parse(&format!("d-{}", random::text(20)?));
            }
        }
        Ok(())
    }

    fn user_of(&self, id: &DiskId) -> Option<GroupId> {
        let mut groups = self.all().into_iter();
        let user = groups.find(|published| {
            disks_of(&published.group.spec).any(|(_, disk)| disk.id.as_ref() == Some(id))
        })?;
        Some(user.group.id.clone())
    }

    /// See [`Engine::disks`](crate::engine::Engine::disks).
    pub(super) async fn list_disks(&self) -> Result<Vec<DiskInfo>> {
        let parts = Arc::clone(&self.parts);
        let files = tokio::task::spawn_blocking(move || {
            let disk = |file: DiskFile| Ok((parts.store.disk_made(&file.id)?, file));
            parts
                .disks
                .list()?
                .into_iter()
                .map(disk)
                .collect::<Result<Vec<_>>>()
        });
        let files = files
            .await
            .unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "list disks", error)))?;
        let info = |(made_at_ms, file): (Option<u64>, DiskFile)| DiskInfo {
            group: self.user_of(&file.id),
            id: file.id,
            size_bytes: file.size_bytes,
            used_bytes: file.used_bytes,
            made_at_ms,
        };
        Ok(files.into_iter().map(info).collect())
    }

    /// See [`Engine::remove_disk`](crate::engine::Engine::remove_disk).
    pub(super) async fn remove_kept_disk(&self, id: &DiskId) -> Result<()> {
        // Nobody takes it meanwhile.
        let _one = self.accepting.lock().await;
        if let Some(group) = self.user_of(id) {
            let text = format!(
                "disk {id} is used by container group {group}; valid: a disk that no group has, delete the group first"
            );
            return Err(Error::new(ErrorKind::FailedPrecondition, text));
        }
        let (parts, disk) = (Arc::clone(&self.parts), id.clone());
        let removed = tokio::task::spawn_blocking(move || {
            parts.disks.find(&disk)?;
            parts.disks.remove(&disk)?;
            parts.store.forget_disk(&disk)
        });
        let removed = removed.await;
        removed
            .unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "remove a disk", error)))?;
        tracing::info!(disk = %id, "disk removed");
        Ok(())
    }

    /// See [`Engine::resize_volume`](crate::engine::Engine::resize_volume).
    pub(super) async fn grow_disk(&self, id: &GroupId, name: &str, gib: u32) -> Result<()> {
        let published = self.published(id)?;
        let spec = &published.group.spec;
        let invalid = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
        let Some(volume) = spec.volumes.iter().find(|volume| volume.name == name) else {
            let known: Vec<_> = disks_of(spec).map(|(name, _)| name).collect();
            let text = format!(
                "container group {id} has no volume {name:?}; valid: {}",
                known.join(", ")
            );
            return Err(Error::new(ErrorKind::NotFound, text));
        };
        let VolumeSource::Disk(DiskVolume { id: Some(disk), .. }) = &volume.source else {
            return invalid(format!(
                "volume {name} of {id} is no disk; valid: a volume that is a disk"
            ));
        };
        if !SIZES_GIB.contains(&gib) {
            return invalid(format!(
                "{gib} GiB; valid: {} to {}",
                SIZES_GIB.start(),
                SIZES_GIB.end()
            ));
        }
        let (Some(connection), Phase::Running) = (&published.connection, published.group.status.phase) else {
            let text = format!(
                "container group {id} is {:?}; valid: Running",
                published.group.status.phase
            );
            return Err(Error::new(ErrorKind::FailedPrecondition, text));
        };
        let grown = {
            let (parts, disk) = (Arc::clone(&self.parts), disk.clone());
            tokio::task::spawn_blocking(move || parts.disks.grow(&disk, gib)).await
        };
        grown.unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "grow a disk", error)))?;
        volumes::attach_one(&self.parts, id, spec, volume, connection).await
    }
}
