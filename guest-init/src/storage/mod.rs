//! What containers keep data on: image slices, the scratch slice, volumes. Every mount the guest init makes for itself
//! is made here, below one directory.

mod attached;
mod files;
mod host_path;
mod nfs;
mod slice;
mod subpath;
mod volume;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

pub use self::{
    attached::AttachedVolume,
    files::File,
    nfs::{Export, NfsVolume, NfsVolumes, Parts},
    slice::{Disks, Slice},
};
use crate::{
    container::spec,
    error::{Context, Error, ErrorKind, Result},
};

/// Identifies a mounted slice: disk and partition.
type SliceKey = (String, u32);

/// Slices and volumes of the sandbox.
#[derive(Debug)]
pub struct Storage {
    directory: PathBuf,
    disks: Disks,
    scratch: Option<Slice>,
    /// Mounted image slices and how many containers use each.
    images: HashMap<SliceKey, (Slice, usize)>,
    /// Volumes in memory, mounted when first used.
    memory_volumes: Vec<String>,
    attached: attached::Attached,
    nfs: NfsVolumes,
}

/// A container's root file system, mounted.
#[derive(Debug)]
pub struct Rootfs {
    /// Where.
    pub path: PathBuf,
    /// The writable layer.
    pub upper: PathBuf,
    container: PathBuf,
    /// Slices in use: the image, then those of mounts.
    slices: Vec<SliceKey>,
    /// Mounts that hold parts of volumes.
    pins: Vec<PathBuf>,
}

impl Storage {
    /// Storage below `directory`, which is on a file system in memory, with slices of `disks`.
    ///
    /// # Errors
    /// When the directories cannot be made.
    pub fn prepare(directory: &Path, disks: Disks) -> Result<Self> {
        for name in [
            "containers",
            "images",
            "scratch/containers",
            "scratch/volumes",
            "volumes",
        ] {
            let path = directory.join(name);
            fs::create_dir_all(&path).context(|| format!("make {}", path.display()))?;
        }
        Ok(Self {
            directory: directory.to_owned(),
            disks,
            scratch: None,
            images: HashMap::new(),
            memory_volumes: Vec::new(),
            attached: attached::Attached::default(),
            nfs: NfsVolumes::new(directory.join("nfs")),
        })
    }

    /// Mounts the scratch slice. Without one, writable layers and volumes are in memory.
    ///
    /// # Errors
    /// When it is not a slice of ext4 on a disk, or cannot be mounted.
    pub fn mount_scratch(&mut self, slice: Slice) -> Result<()> {
        // Directories on it are made by who needs them first: each is a journalled write, and the start waits for this.
        slice.mount(&self.disks, &self.scratch())?;
        self.scratch = Some(slice);
        Ok(())
    }

    /// Where the scratch slice is mounted.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.directory.join("scratch")
    }

    /// Mounts the root file system of container `id`: an overlay of `image` and an empty writable layer. Turns the
    /// mounts of `spec` that the storage provides (`emptydir`, `slice`) into bind mounts; `parts` are those of its volumes on
    /// servers. On error nothing is left.
    ///
    /// # Errors
    /// `InvalidArgument` for wrong slices and volumes, `Internal` when a mount fails.
    pub fn create_rootfs(
        &mut self,
        id: &str,
        image: Slice,
        mounts: &mut [spec::Mount],
        parts: Parts,
    ) -> Result<Rootfs> {
        let writable = self.scratch().join("containers").join(id);
        let container = self.directory.join("containers").join(id);
        let mut rootfs = Rootfs {
            path: container.join("rootfs"),
            upper: writable.join("upper"),
            container,
            slices: Vec::new(),
            pins: Vec::new(),
        };
        let result = self.build_rootfs(&mut rootfs, &writable, image, mounts, parts);
        match result {
            Ok(()) => Ok(rootfs),
            Err(error) => {
                if let Err(error) = self.remove_rootfs(&rootfs) {
                    crate::log::error(&format!("clean up after a failed create: {error}"));
                }
                Err(error)
            }
        }
    }

    fn build_rootfs(
        &mut self,
        rootfs: &mut Rootfs,
        writable: &Path,
        image: Slice,
        mounts: &mut [spec::Mount],
        mut parts: Parts,
    ) -> Result<()> {
        let lower = self.acquire(image, rootfs)?;
        let work = writable.join("work");
        for path in [&rootfs.path, &rootfs.upper, &work] {
            fs::create_dir_all(path).context(|| format!("make {}", path.display()))?;
        }
        // Lost with the guest, so syncing to the disk would be for nothing. No device nodes: the slice disks hold every
        // container's data.
        let options = format!(
            "lowerdir={},upperdir={},workdir={},volatile",
            lower.display(),
            rootfs.upper.display(),
            work.display()
        );
        let options =
            std::ffi::CString::new(options).map_err(|_| Error::invalid("container_id has a NUL byte"))?;
        mount(
            "overlay",
            &rootfs.path,
            "overlay",
            MountFlags::NODEV,
            options.as_c_str(),
        )
        .context(|| format!("mount the overlay {options:?} at {}", rootfs.path.display()))?;
        for (index, mount) in mounts.iter_mut().enumerate() {
            let source = match mount.kind.as_str() {
                volume::KIND => {
                    let path = self.volume(index, mount)?;
                    pin(rootfs, index, mount, path, true)?
                }
                host_path::KIND => {
                    let path = self.host_path(rootfs, index, mount)?;
                    pin(rootfs, index, mount, path, true)?
                }
                files::KIND => {
                    let path = self.files(index, mount)?;
                    pin(rootfs, index, mount, path, false)?
                }
                attached::KIND => {
                    let path = self.attached.find(index, mount)?;
                    pin(rootfs, index, mount, path, true)?
                }
                nfs::KIND => match parts.take(index) {
                    Some(part) => {
                        rootfs.pins.push(part.clone());
                        part
                    }
                    None => self.nfs.find(index, mount)?,
                },
                slice::KIND => {
                    let (slice, below) = slice::parse_mount(index, mount)?;
                    self.acquire(slice, rootfs)?.join(below)
                }
                _ => continue,
            };
            mount.options.retain(|option| !option.contains('='));
            mount.source = source.to_string_lossy().into_owned();
            "bind".clone_into(&mut mount.kind);
        }
        Ok(())
    }

    /// Turns the mounts of volumes that are devices into devices of the specification.
    ///
    /// # Errors
    /// `FailedPrecondition` when there is no such volume, or it is none.
    pub fn give_devices(&self, spec: &mut spec::Spec) -> Result<()> {
        let is_device = |mount: &spec::Mount| mount.kind == attached::DEVICE_KIND;
        for (index, mount) in spec
            .mounts
            .iter()
            .enumerate()
            .filter(|(_, mount)| is_device(mount))
        {
            spec.linux.devices.push(self.attached.device(index, mount)?);
        }
        spec.mounts.retain(|mount| !is_device(mount));
        Ok(())
    }

    /// Unmounts the root file system and lets go of its slices; the writable layer is left to
    /// [`Storage::discard`].
    ///
    /// # Errors
    /// When something is still in use.
    pub fn remove_rootfs(&mut self, rootfs: &Rootfs) -> Result<()> {
        unmount_if_mounted(&rootfs.path)?;
        for pin in rootfs.pins.iter().rev() {
            unmount_if_mounted(pin)?;
            nfs::remove_mount_point(pin);
        }
        for key in &rootfs.slices {
            self.release(key)?;
        }
        match fs::remove_dir_all(&rootfs.container) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::system(
                format!("remove {}", rootfs.container.display()),
                error,
            )),
            _ => Ok(()),
        }
    }

    /// Whether there is a writable layer of container `id`.
    #[must_use]
    pub fn has_layer(&self, id: &str) -> bool {
        self.scratch().join("containers").join(id).exists()
    }

    /// Moves the writable layer of container `id` out of the way, so that the id can be used again at once, and gives
    /// where it is now, to be removed at leisure.
    ///
    /// # Errors
    /// When it cannot be moved.
    pub fn discard(&self, id: &str) -> Result<PathBuf> {
        let containers = self.scratch().join("containers");
        let old = containers.join(id);
        // No id begins with a dot.
        let (mut number, mut rubbish) = (0_u32, containers.join(".0"));
        while rubbish.exists() {
            number += 1;
            rubbish = containers.join(format!(".{number}"));
        }
        fs::rename(&old, &rubbish).context(|| format!("rename {}", old.display()))?;
        Ok(rubbish)
    }

    /// Mounts a volume that has a slice of its own, or grows it to the slice's length.
    ///
    /// # Errors
    /// `FailedPrecondition` when it is attached in another slice; `Internal` when it cannot be mounted.
    pub fn attach(&mut self, volume: AttachedVolume) -> Result<()> {
        self.attached.attach(volume, &self.disks, &self.directory)
    }

    /// The volumes on servers: what waits for these must not hold the storage.
    #[must_use]
    pub fn nfs(&self) -> NfsVolumes {
        self.nfs.clone()
    }

    /// Unmounts the scratch slice and the attached volumes, so that they are clean.
    ///
    /// # Errors
    /// When the scratch slice is still in use.
    pub fn unmount_all(&mut self) -> Result<()> {
        self.attached.unmount_all(&self.disks);
        match self.scratch.take() {
            Some(slice) => slice.unmount(&self.disks, &self.scratch()),
            None => Ok(()),
        }
    }

    /// Mounts `slice` for `user`, or finds it mounted.
    fn acquire(&mut self, slice: Slice, user: &mut Rootfs) -> Result<PathBuf> {
        let key = slice.key();
        let path = self.directory.join("images").join(format!("{}-{}", key.0, key.1));
        match self.images.get_mut(&key) {
            Some((known, users)) if *known == slice => *users += 1,
            Some(_) => {
                return Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    format!(
                        "partition {} of {} is in use for another part of the disk",
                        key.1, key.0
                    ),
                ));
            }
            None => {
                fs::create_dir_all(&path).context(|| format!("make {}", path.display()))?;
                slice.mount(&self.disks, &path)?;
                self.images.insert(key.clone(), (slice, 1));
            }
        }
        user.slices.push(key);
        Ok(path)
    }

    fn release(&mut self, key: &SliceKey) -> Result<()> {
        let Some((slice, users)) = self.images.get_mut(key) else {
            return Ok(());
        };
        *users -= 1;
        if *users > 0 {
            return Ok(());
        }
        let path = self.directory.join("images").join(format!("{}-{}", key.0, key.1));
        let result = slice.unmount(&self.disks, &path);
        self.images.remove(key);
        result
    }

    /// Makes the volume of files `name` hold `files` and no others; they get the group `gid`.
    ///
    /// # Errors
    /// `InvalidArgument` names what is wrong; the volume is as it was.
    pub fn put_files(&self, name: &str, files: &[File], gid: Option<u32>) -> Result<()> {
        volume::check_name("volume", name)?;
        // Made when first needed: the start waits for what is made before.
        let all = self.directory.join("files");
        fs::create_dir_all(&all).context(|| format!("make {}", all.display()))?;
        files::put(&all.join(name), files, gid)
    }

    /// A path of the guest; what is on the scratch slice is held by a mount.
    fn host_path(&self, rootfs: &mut Rootfs, index: usize, mount: &mut spec::Mount) -> Result<PathBuf> {
        let tree = self.scratch().join("host");
        fs::create_dir_all(&tree).context(|| format!("make {}", tree.display()))?;
        match host_path::find(index, mount, &tree)? {
            host_path::Found::Own(path) => {
                mount.options.push("rbind".to_owned());
                Ok(path)
            }
            host_path::Found::InTree(found) => {
                let target = rootfs.container.join("parts").join(format!("{index}-host"));
                subpath::hold(&found, &target)?;
                rootfs.pins.push(target.clone());
                Ok(target)
            }
        }
    }

    /// The directory of a volume of files.
    fn files(&self, index: usize, mount: &spec::Mount) -> Result<PathBuf> {
        volume::check_name(&format!("mounts[{index}].source"), &mount.source)?;
        let path = self.directory.join("files").join(&mount.source);
        if !path.is_dir() {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "mounts[{index}].source is {:?}: no files were put there",
                    mount.source
                ),
            ));
        }
        Ok(path)
    }

    /// The directory of a shared volume, made when first used.
    fn volume(&mut self, index: usize, mount: &spec::Mount) -> Result<PathBuf> {
        let wanted = volume::parse(index, mount)?;
        if !wanted.in_memory {
            let volumes = self.scratch().join("volumes");
            fs::create_dir_all(&volumes).context(|| format!("make {}", volumes.display()))?;
            let path = volumes.join(&wanted.name);
            volume::make_directory(&path, wanted.gid)?;
            return Ok(path);
        }
        let path = self.directory.join("volumes").join(&wanted.name);
        if !self.memory_volumes.contains(&wanted.name) {
            fs::create_dir_all(&path).context(|| format!("make {}", path.display()))?;
            volume::mount_memory(&path, &wanted)?;
            self.memory_volumes.push(wanted.name);
        }
        Ok(path)
    }
}

/// What to mount of the volume at `path`: all of it, or the part that the mount's `subpath` names, held by a mount.
fn pin(rootfs: &mut Rootfs, index: usize, mount: &spec::Mount, path: PathBuf, make: bool) -> Result<PathBuf> {
    let mut options = mount.options.iter();
    let Some(below) = options.find_map(|option| option.strip_prefix("subpath=")) else {
        return Ok(path);
    };
    let target = rootfs.container.join("parts").join(index.to_string());
    let field = format!("mounts[{index}].options: subpath");
    subpath::pin(&field, &path, below, &target, make)?;
    rootfs.pins.push(target.clone());
    Ok(target)
}

fn unmount_if_mounted(path: &Path) -> Result<()> {
    match unmount(path, UnmountFlags::NOFOLLOW) {
        // Not a mount point, or not made yet.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::system(format!("unmount {}", path.display()), error)),
    }
}
