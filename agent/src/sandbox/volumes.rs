//! Volumes of a group that are files of their own on the host, which become slices of its sandbox's disk.

use std::sync::Arc;

use protocol::sandbox::AttachVolume;

use super::client::SandboxConnection;
use crate::{
    error::{Error, ErrorKind, Result},
    group::{
        disk::DiskVolume,
        spec::{ContainerSpec, GroupSpec, VolumeSource, VolumeSpec},
        status::GroupId,
    },
    parts::HostParts,
};

/// Whether a volume is a file of its own.
pub fn has_file(volume: &VolumeSpec) -> bool {
    matches!(
        volume.source,
        VolumeSource::EmptyDir {
            memory: false,
            size_limit_bytes: Some(_),
        } | VolumeSource::Disk(_)
    )
}

/// Makes what a container mounts, and gives it to the sandbox; what is there already stays as it is.
///
/// # Errors
/// Those of the host's file system, the shim and the guest.
pub async fn attach(
    parts: &Arc<HostParts>,
    id: &GroupId,
    group: &GroupSpec,
    container: &ContainerSpec,
    connection: &SandboxConnection,
) -> Result<()> {
    let is_mounted = |volume: &&VolumeSpec| {
        let mut mounts = container.volume_mounts.iter();
        mounts.any(|mount| mount.name == volume.name)
    };
    for volume in group
        .volumes
        .iter()
        .filter(is_mounted)
        .filter(|volume| has_file(volume))
    {
        attach_one(parts, id, group, volume, connection).await?;
    }
    Ok(())
}

/// Makes one such volume, and gives it to the sandbox, or lets it grow there.
///
/// # Errors
/// As [`attach`].
pub async fn attach_one(
    parts: &Arc<HostParts>,
    id: &GroupId,
    group: &GroupSpec,
    volume: &VolumeSpec,
    connection: &SandboxConnection,
) -> Result<()> {
    let made = {
        let (parts, id, volume) = (Arc::clone(parts), id.clone(), volume.clone());
        tokio::task::spawn_blocking(move || make(&parts, &id, &volume))
    };
    let path = made
        .await
        .unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "make a volume", error)))?;
    let attach = AttachVolume {
        volume: volume.name.clone(),
        path: path.to_string_lossy().into_owned(),
        is_empty_dir: matches!(volume.source, VolumeSource::EmptyDir { .. }),
        gid: group.fs_group,
        ..AttachVolume::default()
    };
    connection.attach_volume(&attach).await
}

/// Makes a volume's file. Blocks.
fn make(parts: &HostParts, id: &GroupId, volume: &VolumeSpec) -> Result<std::path::PathBuf> {
    match &volume.source {
        VolumeSource::EmptyDir {
            size_limit_bytes: Some(bytes),
            ..
        } => parts.scratch.limited(id, &volume.name, *bytes),
        VolumeSource::Disk(DiskVolume {
            id: Some(disk),
            new_gib,
            ..
        }) => match new_gib {
            Some(gib) => parts.disks.create(disk, *gib),
            None => parts.disks.find(disk),
        },
        VolumeSource::EmptyDir { .. } | VolumeSource::Files(_) | VolumeSource::Disk(_) => Err(Error::new(
            ErrorKind::Internal,
            format!("volume {} has no file of its own", volume.name),
        )),
    }
}
