//! Slices: parts of the two wide disks, made visible as partitions and mounted.

use std::{
    ffi::CStr,
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    container::spec,
    error::{Context, Error, Result},
    sys,
};

/// Blocks that are freed go back to the host, and a mount starts no work of its own: Linux would read the bitmaps of all block
/// groups, two pages of memory for each 128 MiB of the disk, and write zeroes over inode tables, which a sparse file has already.
const EXT4_OPTIONS: &CStr = c"discard,no_prefetch_block_bitmaps,noinit_itable";

/// Mount type of a slice inside a container: options `disk=`, `partition=`, `offset=`, `length=` (bytes), `fstype=`,
/// and `subpath=` for a file or directory in it.
pub(super) const KIND: &str = "slice";
/// Highest partition number the kernel gives a block device.
const MAX_PARTITION: u32 = 255;

/// The device files of the two disks.
#[derive(Debug, Clone)]
pub struct Disks {
    /// `vda`.
    pub read_only: PathBuf,
    /// `vdb`.
    pub read_write: PathBuf,
}

impl Default for Disks {
    fn default() -> Self {
        Self {
            read_only: "/dev/vda".into(),
            read_write: "/dev/vdb".into(),
        }
    }
}

/// A part of a disk with a file system on it; checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    disk: Disk,
    partition: i32,
    offset_bytes: i64,
    length_bytes: i64,
    file_system: FileSystem,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disk {
    ReadOnly,
    ReadWrite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileSystem {
    Erofs,
    Ext4,
}

impl Disks {
    fn path(&self, disk: Disk) -> &Path {
        match disk {
            Disk::ReadOnly => &self.read_only,
            Disk::ReadWrite => &self.read_write,
        }
    }

    /// The device file of a partition, by the kernel's rule: a `p` between name and number when the name ends in a
    /// digit.
    fn partition(&self, disk: Disk, partition: i32) -> PathBuf {
        let disk = self.path(disk).to_string_lossy();
        let separator = if disk.ends_with(|last: char| last.is_ascii_digit()) {
            "p"
        } else {
            ""
        };
        format!("{disk}{separator}{partition}").into()
    }
}

impl Slice {
    /// Checks the parts of a slice; `field` is its name in messages.
    ///
    /// # Errors
    /// `InvalidArgument` names the field.
    pub fn parse(
        field: &str,
        disk: &str,
        partition: u32,
        offset_bytes: u64,
        length_bytes: u64,
        file_system: &str,
    ) -> Result<Self> {
        let disk = match disk {
            "vda" => Disk::ReadOnly,
            "vdb" => Disk::ReadWrite,
            other => {
                return Err(Error::invalid(format!(
                    "{field}.disk is {other:?}: give vda or vdb"
                )));
            }
        };
        let file_system = match file_system {
            "erofs" => FileSystem::Erofs,
            "ext4" => FileSystem::Ext4,
            other => {
                return Err(Error::invalid(format!(
                    "{field}.fs_type is {other:?}: give erofs or ext4"
                )));
            }
        };
        if !(1..=MAX_PARTITION).contains(&partition) {
            return Err(Error::invalid(format!(
                "{field}.partition is {partition}: give 1 to {MAX_PARTITION}"
            )));
        }
        let bytes = |name: &str, value: u64| {
            i64::try_from(value)
                .ok()
                .filter(|bytes| bytes % 512 == 0)
                .ok_or_else(|| {
                    Error::invalid(format!(
                        "{field}.{name} is {value}: give a multiple of 512 below 2^63"
                    ))
                })
        };
        let slice = Self {
            disk,
            partition: i32::try_from(partition).expect("at most 255"),
            offset_bytes: bytes("offset_bytes", offset_bytes)?,
            length_bytes: bytes("length_bytes", length_bytes)?,
            file_system,
        };
        if slice.length_bytes == 0 || slice.offset_bytes.checked_add(slice.length_bytes).is_none() {
            return Err(Error::invalid(format!(
                "{field}.length_bytes is {length_bytes}: give a part of the disk"
            )));
        }
        Ok(slice)
    }

    /// What tells it from other slices in use.
    pub(super) fn key(&self) -> (String, u32) {
        let disk = match self.disk {
            Disk::ReadOnly => "vda",
            Disk::ReadWrite => "vdb",
        };
        (disk.to_owned(), self.partition.unsigned_abs())
    }

    /// Adds the partition, and says where its device is.
    pub(super) fn add(&self, disks: &Disks) -> Result<PathBuf> {
        let path = disks.path(self.disk);
        let disk = File::open(path).context(|| format!("open {}", path.display()))?;
        sys::block::add_partition(disk.as_fd(), self.partition, self.offset_bytes, self.length_bytes)
            .context(|| {
                format!(
                    "add partition {} to {} at {:#x}, {:#x} bytes",
                    self.partition,
                    path.display(),
                    self.offset_bytes,
                    self.length_bytes
                )
            })?;
        Ok(disks.partition(self.disk, self.partition))
    }

    /// Adds the partition and mounts it at `target`.
    pub(super) fn mount(&self, disks: &Disks, target: &Path) -> Result<()> {
        let device = self.add(disks)?;
        let (kind, flags, options): (_, _, &CStr) = match self.file_system {
            FileSystem::Erofs => ("erofs", MountFlags::RDONLY | MountFlags::NODEV, c""),
            FileSystem::Ext4 if self.disk == Disk::ReadOnly => {
                ("ext4", MountFlags::RDONLY | MountFlags::NODEV, c"noload")
            }
            FileSystem::Ext4 => ("ext4", MountFlags::NODEV | MountFlags::NOATIME, EXT4_OPTIONS),
        };
        let mounted = mount(&device, target, kind, flags, options)
            .context(|| format!("mount {kind} from {} at {}", device.display(), target.display()));
        if mounted.is_err() {
            let _ = self.remove(disks);
        }
        mounted
    }

    /// Length.
    pub(super) fn length_bytes(&self) -> u64 {
        self.length_bytes.unsigned_abs()
    }

    /// Whether `other` is this slice, longer.
    pub(super) fn grows_to(&self, other: &Self) -> bool {
        let longer = Self {
            length_bytes: other.length_bytes,
            ..self.clone()
        };
        longer == *other && other.length_bytes > self.length_bytes
    }

    /// Gives its partition, which may be mounted, its length.
    pub(super) fn resize(&self, disks: &Disks) -> Result<()> {
        let path = disks.path(self.disk);
        let disk = File::open(path).context(|| format!("open {}", path.display()))?;
        sys::block::resize_partition(disk.as_fd(), self.partition, self.offset_bytes, self.length_bytes)
            .context(|| {
                let (number, length) = (self.partition, self.length_bytes);
                format!(
                    "resize partition {number} of {} to {length:#x} bytes",
                    path.display()
                )
            })
    }

    /// Unmounts `target` and removes the partition.
    pub(super) fn unmount(&self, disks: &Disks, target: &Path) -> Result<()> {
        unmount(target, UnmountFlags::NOFOLLOW).context(|| format!("unmount {}", target.display()))?;
        self.remove(disks)
    }

    /// Removes the partition; what was written to it is on the disk then.
    pub(super) fn remove(&self, disks: &Disks) -> Result<()> {
        let path = disks.path(self.disk);
        let disk = File::open(path).context(|| format!("open {}", path.display()))?;
        sys::block::remove_partition(disk.as_fd(), self.partition)
            .context(|| format!("remove partition {} of {}", self.partition, path.display()))
    }
}

/// Reads a mount of type `slice`: the slice and the path in it.
pub(super) fn parse_mount(index: usize, mount: &spec::Mount) -> Result<(Slice, PathBuf)> {
    let field = format!("mounts[{index}].options");
    let value = |name: &str| {
        mount
            .options
            .iter()
            .find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or("")
    };
    let number = |name: &str| {
        let text = value(name);
        text.parse::<u64>()
            .map_err(|_| Error::invalid(format!("{field}: {name} is {text:?}: give a number")))
    };
    let partition = u32::try_from(number("partition")?).unwrap_or(u32::MAX);
    let slice = Slice::parse(
        &field,
        value("disk"),
        partition,
        number("offset")?,
        number("length")?,
        value("fstype"),
    )?;
    let below = Path::new(value("subpath"));
    if below
        .components()
        .any(|part| !matches!(part, std::path::Component::Normal(_)))
    {
        return Err(Error::invalid(format!(
            "{field}: subpath is {below:?}: give a relative path without \"..\""
        )));
    }
    Ok((slice, below.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_slices_are_named() {
        for (disk, partition, offset, length, kind, message) in [
            ("sda", 1, 0, 4096, "erofs", "rootfs.disk is \"sda\""),
            ("vda", 0, 0, 4096, "erofs", "rootfs.partition is 0"),
            ("vda", 256, 0, 4096, "erofs", "rootfs.partition is 256"),
            ("vda", 1, 1, 4096, "erofs", "rootfs.offset_bytes is 1"),
            ("vda", 1, 0, 0, "erofs", "rootfs.length_bytes is 0"),
            (
                "vda",
                1,
                u64::MAX,
                4096,
                "erofs",
                "rootfs.offset_bytes is 18446744073709551615",
            ),
            ("vda", 1, 0, 4096, "xfs", "rootfs.fs_type is \"xfs\""),
        ] {
            let error = Slice::parse("rootfs", disk, partition, offset, length, kind).unwrap_err();
            assert!(error.to_string().starts_with(message), "{error}");
        }
        assert!(Slice::parse("rootfs", "vda", 255, 1 << 42, 4096, "erofs").is_ok());
    }

    #[test]
    fn partitions_are_named_as_the_kernel_does() {
        let disks = Disks {
            read_only: "/dev/loop3".into(),
            ..Default::default()
        };
        assert_eq!(disks.partition(Disk::ReadOnly, 4), Path::new("/dev/loop3p4"));
        assert_eq!(disks.partition(Disk::ReadWrite, 4), Path::new("/dev/vdb4"));
    }

    #[test]
    fn a_slice_mount_is_read_from_its_options() {
        let options = [
            "ro",
            "disk=vda",
            "partition=9",
            "offset=8192",
            "length=4096",
            "fstype=erofs",
            "subpath=a/b",
        ];
        let mut mount = spec::Mount {
            options: options.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let (slice, below) = parse_mount(0, &mount).unwrap();
        assert_eq!(slice, Slice::parse("", "vda", 9, 8192, 4096, "erofs").unwrap());
        assert_eq!(below, Path::new("a/b"));
        mount.options.pop();
        mount.options.push("subpath=../b".into());
        assert!(
            parse_mount(0, &mount)
                .unwrap_err()
                .to_string()
                .contains("subpath is \"../b\"")
        );
    }
}
