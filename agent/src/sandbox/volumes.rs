//! Volumes of a group that its sandbox has to be given: files of their own on the host, which become slices of its disk, and
//! directories of NFS servers, which its guest mounts.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use protocol::sandbox::{AttachVolume, NfsDirectory};
use tokio::{net::lookup_host, time::timeout};

use super::client::SandboxConnection;
use crate::{
    disks::Disks,
    error::{Error, ErrorKind, Result},
    group::{
        disk::{DiskId, DiskVolume},
        nfs::NfsVolume,
        spec::{ContainerSpec, GroupSpec, VolumeSource, VolumeSpec},
        status::GroupId,
    },
    parts::{HostParts, now_ms},
    store::Store,
};

/// For the name of a server to be looked up.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(10);
/// RFC 7530, section 3.1.
const NFS_PORT: u16 = 2049;

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
/// Those of the host's file system, of the look-up of a server, of the shim and the guest; each names the volume.
pub async fn attach(
    parts: &Arc<HostParts>,
    id: &GroupId,
    group: &GroupSpec,
    container: &ContainerSpec,
    connection: &SandboxConnection,
) -> Result<()> {
    let is_mounted = |volume: &&VolumeSpec| {
        let mut mounts = container.volume_mounts.iter();
        let mut devices = container.volume_devices.iter();
        mounts.any(|mount| mount.name == volume.name) || devices.any(|device| device.name == volume.name)
    };
    for volume in group.volumes.iter().filter(is_mounted) {
        let (from, attached) = match &volume.source {
            VolumeSource::Nfs(nfs) => (
                format!(" from {nfs}"),
                attach_nfs(&volume.name, nfs, connection).await,
            ),
            _ if has_file(volume) => (
                String::new(),
                attach_one(parts, id, group, volume, connection).await,
            ),
            _ => continue,
        };
        attached.map_err(|error| {
            let text = format!("Mounting volume {}{from} failed", volume.name);
            Error::with_source(error.kind, text, error)
        })?;
    }
    Ok(())
}

async fn attach_nfs(name: &str, nfs: &NfsVolume, connection: &SandboxConnection) -> Result<()> {
    let directory = NfsDirectory {
        address: address_of(&nfs.server).await?.to_string(),
        server: nfs.server.clone(),
        path: nfs.path.clone(),
        read_only: nfs.read_only,
        ..NfsDirectory::default()
    };
    let attach = AttachVolume {
        volume: name.to_owned(),
        nfs: Some(directory).into(),
        ..AttachVolume::default()
    };
    connection.attach_volume(&attach).await
}

/// The address of a server that groups can reach, by the host's own resolver.
async fn address_of(server: &str) -> Result<Ipv4Addr> {
    if let Ok(address) = server.parse() {
        return Ok(address);
    }
    let action = || format!("look up server {server}");
    let found = timeout(LOOKUP_DEADLINE, lookup_host((server, NFS_PORT)))
        .await
        .map_err(|_| {
            let text = format!("{}: no answer within {} s", action(), LOOKUP_DEADLINE.as_secs());
            Error::new(ErrorKind::DeadlineExceeded, text)
        })?
        .map_err(|error| Error::with_source(ErrorKind::Unavailable, action(), error))?;
    let addresses: Vec<_> = found.map(|address| address.ip()).collect();
    let first = addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    first.ok_or_else(|| {
        let text = format!("{}: it has no IPv4 address, and groups have no others", action());
        Error::new(ErrorKind::Unavailable, text)
    })
}

/// Makes one volume that is a file, and gives it to the sandbox, or lets it grow there.
///
/// # Errors
/// Those of the host's file system, the shim and the guest.
pub async fn attach_one(
    parts: &Arc<HostParts>,
    id: &GroupId,
    group: &GroupSpec,
    volume: &VolumeSpec,
    connection: &SandboxConnection,
) -> Result<()> {
    let is_device = group.is_device(&volume.name);
    let made = {
        let (parts, id, volume) = (Arc::clone(parts), id.clone(), volume.clone());
        tokio::task::spawn_blocking(move || make(&parts, &id, &volume, is_device))
    };
    let path = made
        .await
        .unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "make a volume", error)))?;
    let attach = AttachVolume {
        volume: volume.name.clone(),
        path: path.to_string_lossy().into_owned(),
        is_empty_dir: matches!(volume.source, VolumeSource::EmptyDir { .. }),
        is_device,
        gid: group.fs_group.filter(|_| !is_device),
        ..AttachVolume::default()
    };
    connection.attach_volume(&attach).await
}

/// Makes a volume's file. Blocks.
fn make(parts: &HostParts, id: &GroupId, volume: &VolumeSpec, is_device: bool) -> Result<PathBuf> {
    match &volume.source {
        VolumeSource::EmptyDir {
            size_limit_bytes: Some(bytes),
            ..
        } => parts.scratch.limited(id, &volume.name, *bytes),
        VolumeSource::Disk(disk @ DiskVolume { id: Some(id), .. }) => {
            let new = disk.new_gib.map(|gib| (gib, is_device));
            disk_file(&parts.disks, &parts.store, id, new)
        }
        VolumeSource::EmptyDir { .. }
        | VolumeSource::Files(_)
        | VolumeSource::Disk(_)
        | VolumeSource::Nfs(_)
        | VolumeSource::HostPath(_) => Err(Error::new(
            ErrorKind::Internal,
            format!("volume {} has no file of its own", volume.name),
        )),
    }
}

/// The file of a disk, which is made the first time: so large, and empty if it is a device. One that was made and is gone is not
/// made again: it was not empty.
fn disk_file(disks: &Disks, store: &Store, id: &DiskId, new: Option<(u32, bool)>) -> Result<PathBuf> {
    let Some((gib, is_device)) = new.filter(|_| !disks.exists(id)) else {
        return disks.find(id);
    };
    if store.disk_made(id)?.is_some() {
        let gone = disks
            .find(id)
            .err()
            .map_or_else(String::new, |error| error.message);
        let text = format!("{gone}, and it was made before: put the file back, or delete the group");
        return Err(Error::new(ErrorKind::DiskNotFound, text));
    }
    let path = if is_device {
        disks.create_empty(id, gib)?
    } else {
        disks.create(id, gib)?
    };
    store.note_disk(id, now_ms())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_whose_file_is_gone_is_not_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::open(dir.path().join("disks")).unwrap();
        let store = Store::open(&dir.path().join("store.redb")).unwrap();
        let id = DiskId::parse("d-0").unwrap();
        let path = disk_file(&disks, &store, &id, Some((20, false))).unwrap();
        assert_eq!(disk_file(&disks, &store, &id, Some((20, false))).unwrap(), path);
        assert_eq!(disk_file(&disks, &store, &id, None).unwrap(), path);
        std::fs::remove_file(&path).unwrap();
        for new in [Some((20, false)), None] {
            let error = disk_file(&disks, &store, &id, new).unwrap_err();
            assert_eq!(error.kind, ErrorKind::DiskNotFound);
            assert!(error.message.contains(path.to_str().unwrap()), "{error}");
            assert!(!path.exists());
        }
        store.forget_disk(&id).unwrap();
        assert!(
            disk_file(&disks, &store, &id, Some((20, false)))
                .unwrap()
                .exists()
        );
    }

    #[tokio::test]
    async fn servers_have_addresses_or_are_named() {
        assert_eq!(address_of("10.1.2.3").await.unwrap(), Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(address_of("localhost").await.unwrap(), Ipv4Addr::LOCALHOST);
        // RFC 6761, section 6.4: never a name.
        let error = address_of("nas.invalid").await.unwrap_err().chain();
        assert!(error.starts_with("look up server nas.invalid: "), "{error}");
    }
}
