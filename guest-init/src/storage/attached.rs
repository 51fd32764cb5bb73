//! Volumes that have a slice of their own: limited empty directories, and disks, as file systems or as the devices they are.
//! They stay as long as the sandbox lives, whichever containers come and go, and grow when their slice does.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, lchown},
    path::{Path, PathBuf},
};

use super::{
    Disks, Slice,
    volume::{SET_GROUP, check_name, make_directory},
};
use crate::{
    container::spec,
    error::{Context, Error, ErrorKind, Result},
    sys,
};

/// Mount type of a volume with a slice of its own.
pub(super) const KIND: &str = protocol::VOLUME_MOUNT_TYPE;
/// Mount type of such a volume that is a device.
pub(super) const DEVICE_KIND: &str = protocol::DEVICE_MOUNT_TYPE;
/// Permissions of a device, and the group that Linux systems have for disks.
const DEVICE_MODE: u32 = 0o660;
const DEVICE_GROUP: u32 = 6;
/// What the group of a disk may do with a directory, and with a file (Kubernetes, `pkg/volume/volume_linux.go`).
const GROUP_DIRECTORY: u32 = 0o070 | SET_GROUP;
const GROUP_FILE: u32 = 0o060;

/// What is attached.
#[derive(Debug, Default)]
pub(super) struct Attached {
    volumes: Vec<Volume>,
}

#[derive(Debug)]
struct Volume {
    name: String,
    slice: Slice,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// Where its file system is mounted, and what containers see as its root.
    Mounted { at: PathBuf, root: PathBuf },
    /// Its device.
    Device(PathBuf),
}

/// A volume to attach.
#[derive(Debug)]
pub struct AttachedVolume {
    /// Name.
    pub name: String,
    /// Where its file system is.
    pub slice: Slice,
    /// Containers see an empty directory, not the root of its file system.
    pub is_empty_dir: bool,
    /// Containers see its device, and whatever is on it.
    pub is_device: bool,
    /// Group that owns it.
    pub gid: Option<u32>,
}

impl Attached {
    /// Mounts a volume below `directory`, or grows it.
    pub(super) fn attach(&mut self, wanted: AttachedVolume, disks: &Disks, directory: &Path) -> Result<()> {
        check_name("volume", &wanted.name)?;
        if let Some(volume) = self.volumes.iter_mut().find(|volume| volume.name == wanted.name) {
            let is_device = matches!(volume.place, Place::Device(_));
            if is_device != wanted.is_device {
                let text = format!("volume {:?} is a device or mounted, not both", wanted.name);
                return Err(Error::new(ErrorKind::FailedPrecondition, text));
            }
            if volume.slice == wanted.slice {
                return Ok(());
            }
            if !volume.slice.grows_to(&wanted.slice) {
                let text = format!("volume {:?} is attached already, in another slice", wanted.name);
                return Err(Error::new(ErrorKind::FailedPrecondition, text));
            }
            wanted.slice.resize(disks)?;
            if let Place::Mounted { at, .. } = &volume.place {
                grow(at, &wanted.slice)?;
            }
            volume.slice = wanted.slice;
            return Ok(());
        }
        if self.volumes.len() >= protocol::MAX_ATTACHED_VOLUMES {
            let text = format!("the sandbox has {} volumes", protocol::MAX_ATTACHED_VOLUMES);
            return Err(Error::new(ErrorKind::ResourceExhausted, text));
        }
        if wanted.is_device {
            let device = wanted.slice.add(disks)?;
            self.volumes.push(Volume {
                name: wanted.name,
                slice: wanted.slice,
                place: Place::Device(device),
            });
            return Ok(());
        }
        let mounted = directory.join("attached").join(&wanted.name);
        fs::create_dir_all(&mounted).context(|| format!("make {}", mounted.display()))?;
        wanted.slice.mount(disks, &mounted)?;
        match prepare(&wanted, &mounted) {
            Ok(root) => {
                self.volumes.push(Volume {
                    name: wanted.name,
                    slice: wanted.slice,
                    place: Place::Mounted { at: mounted, root },
                });
                Ok(())
            }
            Err(error) => {
                if let Err(error) = wanted.slice.unmount(disks, &mounted) {
                    crate::log::failure("unmount a volume that could not be prepared", &error);
                }
                Err(error)
            }
        }
    }

    fn place(&self, index: usize, mount: &spec::Mount) -> Result<&Place> {
        let found = self.volumes.iter().find(|volume| volume.name == mount.source);
        found.map(|volume| &volume.place).ok_or_else(|| {
            let text = format!(
                "mounts[{index}].source is {:?}: no such volume is attached",
                mount.source
            );
            Error::new(ErrorKind::FailedPrecondition, text)
        })
    }

    /// The directory of the volume that a mount names.
    pub(super) fn find(&self, index: usize, mount: &spec::Mount) -> Result<PathBuf> {
        match self.place(index, mount)? {
            Place::Mounted { root, .. } => Ok(root.clone()),
            Place::Device(_) => Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "mounts[{index}].source is {:?}: that volume is a device",
                    mount.source
                ),
            )),
        }
    }

    /// The device of the volume that a mount names, as the container is to have it.
    pub(super) fn device(&self, index: usize, mount: &spec::Mount) -> Result<spec::Device> {
        let Place::Device(path) = self.place(index, mount)? else {
            let text = format!(
                "mounts[{index}].source is {:?}: that volume is no device",
                mount.source
            );
            return Err(Error::new(ErrorKind::FailedPrecondition, text));
        };
        let number = fs::metadata(path)
            .context(|| format!("look at {}", path.display()))?
            .rdev();
        Ok(spec::Device {
            path: mount.destination.clone(),
            kind: "b".into(),
            major: rustix::fs::major(number),
            minor: rustix::fs::minor(number),
            file_mode: Some(DEVICE_MODE),
            uid: 0,
            gid: DEVICE_GROUP,
        })
    }

    /// Unmounts all, so that they are clean. Failures are told and passed over.
    pub(super) fn unmount_all(&mut self, disks: &Disks) {
        for volume in self.volumes.drain(..) {
            let ended = match &volume.place {
                Place::Mounted { at, .. } => volume.slice.unmount(disks, at),
                Place::Device(_) => volume.slice.remove(disks),
            };
            if let Err(error) = ended {
                crate::log::failure("unmount a volume", &error);
            }
        }
    }
}

/// Makes a mounted volume what containers are to see, and says where.
fn prepare(wanted: &AttachedVolume, mounted: &Path) -> Result<PathBuf> {
    if wanted.is_empty_dir {
        // Not the root, in which `lost+found` is.
        let root = mounted.join("data");
        make_directory(&root, wanted.gid)?;
        return Ok(root);
    }
    // Its file may have grown while it was used by nobody.
    grow(mounted, &wanted.slice)?;
    if let Some(gid) = wanted.gid {
        give_to_group(mounted, gid)?;
    }
    Ok(mounted.to_owned())
}

fn grow(mounted: &Path, slice: &Slice) -> Result<()> {
    let action = || format!("grow the file system at {}", mounted.display());
    let directory = fs::File::open(mounted).context(action)?;
    let block_bytes = rustix::fs::fstatvfs(&directory).context(action)?.f_bsize.max(1);
    sys::block::grow_ext4(&directory, slice.length_bytes() / block_bytes).context(action)
}

/// Gives all that is on a disk to a group, unless its root is the group's already (`fsGroupChangePolicy: OnRootMismatch`).
/// Nothing of a container runs on it yet.
fn give_to_group(root: &Path, gid: u32) -> Result<()> {
    let action = |path: &Path| format!("give {} to group {gid}", path.display());
    let found = fs::symlink_metadata(root).context(|| action(root))?;
    if found.gid() == gid && found.mode() & GROUP_DIRECTORY == GROUP_DIRECTORY {
        return Ok(());
    }
    // The root comes last: when this is broken off, it begins anew.
    let mut directories = vec![root.to_owned()];
    let mut at = 0;
    while let Some(directory) = directories.get(at).cloned() {
        at += 1;
        for entry in fs::read_dir(&directory).context(|| action(&directory))? {
            let path = entry.context(|| action(&directory))?.path();
            let kind = fs::symlink_metadata(&path).context(|| action(&path))?;
            if kind.is_dir() {
                directories.push(path);
            } else {
                give(&path, &kind, gid, GROUP_FILE).context(|| action(&path))?;
            }
        }
    }
    for directory in directories.iter().rev() {
        let kind = fs::symlink_metadata(directory).context(|| action(directory))?;
        give(directory, &kind, gid, GROUP_DIRECTORY).context(|| action(directory))?;
    }
    Ok(())
}

fn give(path: &Path, kind: &fs::Metadata, gid: u32, mode: u32) -> std::io::Result<()> {
    lchown(path, None, Some(gid))?;
    if kind.is_symlink() {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(kind.mode() & 0o7777 | mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_a_device_or_mounted() {
        let slice = |partition| Slice::parse("slice", "vdb", partition, 0, 4096, "ext4").unwrap();
        let mut attached = Attached {
            volumes: vec![
                Volume {
                    name: "device".into(),
                    slice: slice(2),
                    // One whose numbers are the same everywhere.
                    place: Place::Device("/dev/null".into()),
                },
                Volume {
                    name: "mounted".into(),
                    slice: slice(3),
                    place: Place::Mounted {
                        at: "/at".into(),
                        root: "/at/data".into(),
                    },
                },
            ],
        };
        let mount = |source: &str| spec::Mount {
            destination: "/dev/xvda".into(),
            source: source.into(),
            ..Default::default()
        };
        let device = attached.device(4, &mount("device")).unwrap();
        assert_eq!(
            (
                device.path.as_str(),
                device.kind.as_str(),
                device.major,
                device.minor
            ),
            ("/dev/xvda", "b", 1, 3)
        );
        assert_eq!(
            attached.find(4, &mount("mounted")).unwrap(),
            Path::new("/at/data")
        );
        for error in [
            attached.find(4, &mount("device")).unwrap_err(),
            attached.device(4, &mount("mounted")).unwrap_err(),
            attached.device(4, &mount("other")).unwrap_err(),
        ] {
            assert_eq!(error.kind, ErrorKind::FailedPrecondition);
            assert!(error.to_string().starts_with("mounts[4].source"), "{error}");
        }
        let again = AttachedVolume {
            name: "device".into(),
            slice: slice(2),
            is_empty_dir: false,
            is_device: false,
            gid: None,
        };
        let error = attached
            .attach(again, &Disks::default(), Path::new("/"))
            .unwrap_err();
        assert!(error.to_string().contains("not both"), "{error}");
    }
}
