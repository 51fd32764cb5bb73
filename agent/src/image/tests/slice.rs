//! An image's slice seen by three readers: ours, the kernel's (where this process may mount) and `fsck.erofs`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::super::erofs::{Erofs, Node};

/// A tree by path; the root is "".
pub(super) type Seen = BTreeMap<Vec<u8>, SeenFile>;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Content {
    Directory,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Device(bool, u32, u32),
    Fifo,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SeenFile {
    pub(super) content: Content,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) n_links: u64,
    /// First path in order that is the same file.
    pub(super) same_as: Vec<u8>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Writes the device's bytes into one file.
pub(super) fn concatenate<'p>(files: impl IntoIterator<Item = &'p PathBuf>, dir: &TempDir) -> PathBuf {
    let path = dir.path().join("slice");
    let mut slice = File::create(&path).unwrap();
    for file in files {
        let len = io::copy(&mut File::open(file).unwrap(), &mut slice).unwrap();
        assert_eq!(len % 4096, 0, "{}", file.display());
    }
    path
}

/// What our reader sees.
pub(super) fn read<'p>(files: impl IntoIterator<Item = &'p PathBuf>) -> Seen {
    let image = Erofs::open(files).unwrap();
    let mut seen = Seen::new();
    let mut first: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut left = vec![(Vec::new(), image.root().unwrap())];
    while let Some((path, node)) = left.pop() {
        let (mode, data) = (node.mode, || image.read(&node, u64::MAX).unwrap());
        let content = match mode & 0o170_000 {
            0o040_000 => {
                for (name, nid) in image.list(&node).unwrap() {
                    if name != b"." && name != b".." {
                        left.push((join(&path, &name), image.node(nid).unwrap()));
                    }
                }
                Content::Directory
            }
            0o100_000 => Content::File(data()),
            0o120_000 => Content::Symlink(data()),
            0o010_000 => Content::Fifo,
            kind => {
                let device = node.device();
                Content::Device(kind == 0o020_000, device.0, device.1)
            }
        };
        let attrs = node.attributes();
        first
            .entry(node.nid)
            .and_modify(|known| *known = known.clone().min(path.clone()))
            .or_insert(path.clone());
        let file = SeenFile {
            content,
            mode: u32::from(mode & 0o7777),
            uid: attrs.0,
            gid: attrs.1,
            mtime: attrs.2,
            n_links: attrs.3.into(),
            same_as: node.nid.to_le_bytes().to_vec(),
            xattrs: image.xattrs(&node).unwrap(),
        };
        seen.insert(path, file);
    }
    for file in seen.values_mut() {
        file.same_as = first[&u64::from_le_bytes(file.same_as.as_slice().try_into().unwrap())].clone();
    }
    seen
}

/// What the kernel sees; `None`, said aloud, where it cannot be asked.
pub(super) fn mount_and_read(slice: &Path) -> Option<Seen> {
    let knows_erofs = fs::read_to_string("/proc/filesystems").unwrap().contains("erofs");
    if !knows_erofs || !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: this kernel has no erofs, or this process is not root");
        return None;
    }
    let dir = TempDir::new().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "erofs", "-o", "ro,loop"])
        .arg(slice)
        .arg(dir.path())
        .output();
    let mounted = mounted.unwrap();
    if !mounted.status.success() {
        let message = String::from_utf8_lossy(&mounted.stderr).into_owned();
        assert!(
            message.contains("loop") || message.contains("denied"),
            "{message}"
        );
        eprintln!("SKIPPED: this process may not mount: {message}");
        return None;
    }
    let _mount = Mount(dir.path().to_owned());
    Some(walk(dir.path()))
}

struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(&self.0).status().unwrap();
        assert!(status.success());
    }
}

/// Checks the slice with `fsck.erofs` and returns what it extracts; `None`, said aloud, where it is not installed.
/// It extracts neither extended attributes nor hard links.
pub(super) fn fsck_and_extract(slice: &Path) -> Option<Seen> {
    let dir = TempDir::new().unwrap();
    let target = dir.path().join("out");
    let run = Command::new("fsck.erofs")
        .arg(format!("--extract={}", target.display()))
        .arg(slice)
        .output();
    let Ok(run) = run else {
        eprintln!("SKIPPED: fsck.erofs is not installed");
        return None;
    };
    assert!(
        run.status.success(),
        "{}{}",
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr)
    );
    Some(walk(&target))
}

fn walk(root: &Path) -> Seen {
    let mut seen = Seen::new();
    let mut first: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut left = vec![Vec::new()];
    while let Some(path) = left.pop() {
        let at = root.join(OsString::from_vec(path.clone()));
        let found = fs::symlink_metadata(&at).unwrap();
        let kind = found.file_type();
        let content = if kind.is_dir() {
            for entry in fs::read_dir(&at).unwrap() {
                left.push(join(&path, entry.unwrap().file_name().as_bytes()));
            }
            Content::Directory
        } else if kind.is_file() {
            Content::File(fs::read(&at).unwrap())
        } else if kind.is_symlink() {
            Content::Symlink(fs::read_link(&at).unwrap().into_os_string().into_vec())
        } else if kind.is_fifo() {
            Content::Fifo
        } else {
            let device = found.rdev();
            Content::Device(
                kind.is_char_device(),
                rustix::fs::major(device),
                rustix::fs::minor(device),
            )
        };
        first
            .entry(found.ino())
            .and_modify(|known| *known = known.clone().min(path.clone()))
            .or_insert(path.clone());
        let file = SeenFile {
            content,
            mode: found.mode() & 0o7777,
            uid: found.uid(),
            gid: found.gid(),
            mtime: found.mtime(),
            n_links: found.nlink(),
            same_as: found.ino().to_le_bytes().to_vec(),
            xattrs: xattrs(&at),
        };
        seen.insert(path, file);
    }
    for file in seen.values_mut() {
        file.same_as = first[&u64::from_le_bytes(file.same_as.as_slice().try_into().unwrap())].clone();
    }
    seen
}

fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let mut found: Vec<_> = names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 64 << 10];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect();
    found.sort();
    found
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() {
        name.to_vec()
    } else {
        [parent, b"/", name].concat()
    }
}

/// All three readers agree; returns what they see.
pub(super) fn check_readers_agree<'p>(files: impl IntoIterator<Item = &'p PathBuf> + Clone) -> Seen {
    let dir = TempDir::new().unwrap();
    let slice = concatenate(files.clone(), &dir);
    let ours = read(files);
    if let Some(kernels) = mount_and_read(&slice) {
        assert_same(&ours, &kernels);
    }
    if let Some(extracted) = fsck_and_extract(&slice) {
        let reduced = |seen: &Seen| -> Seen {
            let reduce = |file: &SeenFile| SeenFile {
                mtime: 0,
                n_links: 0,
                same_as: Vec::new(),
                xattrs: Vec::new(),
                // A link's mode is no attribute of other file systems; fsck.erofs 1.5 changes owners last, which
                // clears setuid.
                mode: if matches!(file.content, Content::Symlink(_)) {
                    0
                } else {
                    file.mode & 0o777
                },
                ..file.clone()
            };
            seen.iter()
                .map(|(path, file)| (path.clone(), reduce(file)))
                .collect()
        };
        assert_same(&reduced(&ours), &reduced(&extracted));
    }
    ours
}

pub(super) fn assert_same(left: &Seen, right: &Seen) {
    for path in left.keys().chain(right.keys()) {
        assert_eq!(left.get(path), right.get(path), "{}", path.escape_ascii());
    }
}

/// Fields that only tests look at.
impl Node {
    fn field(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.raw[at..at + 4].try_into().unwrap())
    }

    fn attributes(&self) -> (u32, u32, i64, u32) {
        let mtime = i64::from_le_bytes(self.raw[32..40].try_into().unwrap());
        (self.field(24), self.field(28), mtime, self.field(44))
    }

    /// `new_decode_dev()` of the kernel.
    fn device(&self) -> (u32, u32) {
        let device = self.field(16);
        (
            (device & 0xfff00) >> 8,
            (device & 0xff) | ((device >> 12) & 0xfff00),
        )
    }
}

impl Erofs {
    fn xattrs(&self, node: &Node) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let bytes = self.xattr_area(node)?;
        let mut left = bytes.get(12..).unwrap_or_default();
        let mut found = Vec::new();
        while left.len() >= 4 {
            let (name_len, value_len) = (
                usize::from(left[0]),
                usize::from(u16::from_le_bytes([left[2], left[3]])),
            );
            let prefix: &[u8] = match left[1] {
                1 => b"user.",
                2 => b"system.posix_acl_access",
                3 => b"system.posix_acl_default",
                6 => b"security.",
                other => panic!("prefix {other}"),
            };
            let name = [prefix, &left[4..4 + name_len]].concat();
            found.push((name, left[4 + name_len..4 + name_len + value_len].to_vec()));
            left = &left[(4 + name_len + value_len).next_multiple_of(4)..];
        }
        found.sort();
        Ok(found)
    }
}
