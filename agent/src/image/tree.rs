//! Layers merged into one tree, as a union file system over them would show it.
//!
//! A layer's whiteouts and opaque marks apply to the layers below it only, wherever in the archive they stand; then
//! its entries apply in order. A missing parent directory is created; a symbolic link among the parents is followed
//! within the image, as the common engines do; a non-directory in a parent's place gives way to a directory.

use std::collections::{BTreeMap, VecDeque};

use super::error::PullError;
use super::layer::{Entry, EntryKind, LayerIndex, Meta};

/// Symbolic links followed for one path, as in the kernel.
const MAX_LINKS: usize = 40;
/// NAME_MAX; a link's target may hold longer ones, which name nothing.
const MAX_NAME_BYTES: usize = 255;
/// Files of a whole image; a hostile one could imply directories without end.
const MAX_INODES: usize = 4_000_000;

/// Position of an inode in [`Tree::inodes`].
pub(super) type InodeIndex = usize;
pub(super) const ROOT: InodeIndex = 0;

/// A file, whatever its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inode {
    pub(super) meta: Meta,
    pub(super) body: Body,
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Directory(BTreeMap<Vec<u8>, InodeIndex>),
    /// Contiguous data from `block` on in the blob of layer `layer`, counted from the lowest.
    File {
        layer: usize,
        block: u32,
        size: u64,
    },
    Symlink(Vec<u8>),
    Device {
        character: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// The merged tree. Inodes without a name left stay in the list, unreachable.
#[derive(Debug)]
pub(super) struct Tree {
    inodes: Vec<Inode>,
    n_layers: usize,
}

impl Tree {
    /// An empty root directory.
    pub(super) fn new() -> Self {
        Self {
            inodes: vec![implied_directory()],
            n_layers: 0,
        }
    }

    pub(super) fn inode(&self, index: InodeIndex) -> &Inode {
        &self.inodes[index]
    }

    /// Puts a layer on top.
    ///
    /// # Errors
    /// `InvalidEntry` for a hard link to nothing or to a directory, and for a path through too many symbolic links.
    pub(super) fn apply(&mut self, layer: &LayerIndex) -> Result<(), PullError> {
        for entry in &layer.entries {
            match entry.kind {
                EntryKind::Whiteout => {
                    let (parent, name) = split(&entry.path);
                    if let Some(parent) = self.directory(parent, false, &entry.path)? {
                        self.children_mut(parent).remove(name);
                    }
                }
                EntryKind::Opaque => {
                    if let Some(directory) = self.directory(&entry.path, false, &entry.path)? {
                        self.children_mut(directory).clear();
                    }
                }
                _ => {}
            }
        }
        for entry in &layer.entries {
            self.add(entry)?;
        }
        self.n_layers += 1;
        Ok(())
    }

    fn add(&mut self, entry: &Entry) -> Result<(), PullError> {
        let layer = self.n_layers;
        let (meta, body) = match &entry.kind {
            EntryKind::Whiteout | EntryKind::Opaque => return Ok(()),
            EntryKind::HardLink { target } => return self.link(&entry.path, target),
            EntryKind::Directory(meta) => (meta, Body::Directory(BTreeMap::new())),
            EntryKind::File { meta, block, size } => (
                meta,
                Body::File {
                    layer,
                    block: *block,
                    size: *size,
                },
            ),
            EntryKind::Symlink { meta, target } => (meta, Body::Symlink(target.clone())),
            EntryKind::Device {
                meta,
                character,
                major,
                minor,
            } => (
                meta,
                Body::Device {
                    character: *character,
                    major: *major,
                    minor: *minor,
                },
            ),
            EntryKind::Fifo(meta) => (meta, Body::Fifo),
        };
        let is_directory = matches!(body, Body::Directory(_));
        if entry.path.is_empty() {
            self.inodes[ROOT].meta = meta.clone();
            return Ok(());
        }
        let (parent, name) = split(&entry.path);
        let parent = self.create_directory(parent, &entry.path)?;
        if is_directory
            && let Some(&existing) = self.children(parent).and_then(|children| children.get(name))
            && self.children(existing).is_some()
        {
            self.inodes[existing].meta = meta.clone();
            return Ok(());
        }
        let index = self.push(Inode {
            meta: meta.clone(),
            body,
        })?;
        self.children_mut(parent).insert(name.to_vec(), index);
        Ok(())
    }

    fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), PullError> {
        let (target_parent, target_name) = split(target);
        let found = self.directory(target_parent, false, path)?;
        let found = found.and_then(|parent| self.children(parent)?.get(target_name).copied());
        let index = found.ok_or_else(|| {
            PullError::entry(
                path,
                format!("hard link to '{}', which does not exist", target.escape_ascii()),
            )
        })?;
        if self.children(index).is_some() {
            return Err(PullError::entry(path, "hard link to a directory"));
        }
        let (parent, name) = split(path);
        let parent = self.create_directory(parent, path)?;
        self.children_mut(parent).insert(name.to_vec(), index);
        Ok(())
    }

    fn create_directory(&mut self, path: &[u8], of: &[u8]) -> Result<InodeIndex, PullError> {
        Ok(self
            .directory(path, true, of)?
            .expect("a missing directory was to be created"))
    }

    /// Finds a directory by its path, links followed. With `create`, what is missing on the way is created.
    fn directory(&mut self, path: &[u8], create: bool, of: &[u8]) -> Result<Option<InodeIndex>, PullError> {
        let mut way = vec![ROOT];
        let mut left: VecDeque<Vec<u8>> = path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if way.len() > 1 {
                        way.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let here = *way.last().expect("the root is never popped");
            let child = self
                .children(here)
                .and_then(|children| children.get(&name))
                .copied();
            match child.map(|child| (child, &self.inodes[child].body)) {
                Some((child, Body::Directory(_))) => way.push(child),
                Some((_, Body::Symlink(target))) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(PullError::entry(of, "path leads through too many symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    for name in target.split(|byte| *byte == b'/').rev() {
                        left.push_front(name.to_vec());
                    }
                }
                _ if !create => return Ok(None),
                _ if name.len() > MAX_NAME_BYTES => {
                    return Err(PullError::entry(of, "path leads through a name that is too long"));
                }
                _ => {
                    let created = self.push(implied_directory())?;
                    self.children_mut(here).insert(name, created);
                    way.push(created);
                }
            }
        }
        Ok(way.pop())
    }

    fn push(&mut self, inode: Inode) -> Result<InodeIndex, PullError> {
        if self.inodes.len() >= MAX_INODES {
            return Err(PullError::TooLarge {
                what: "Image".into(),
                limit: MAX_INODES as u64,
                unit: "files",
            });
        }
        self.inodes.push(inode);
        Ok(self.inodes.len() - 1)
    }

    /// The names in a directory; `None` for anything else.
    pub(super) fn children(&self, index: InodeIndex) -> Option<&BTreeMap<Vec<u8>, InodeIndex>> {
        match &self.inodes[index].body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, index: InodeIndex) -> &mut BTreeMap<Vec<u8>, InodeIndex> {
        match &mut self.inodes[index].body {
            Body::Directory(children) => children,
            _ => unreachable!("`directory` returns directories only"),
        }
    }
}

fn implied_directory() -> Inode {
    Inode {
        meta: Meta {
            mode: 0o755,
            ..Meta::default()
        },
        body: Body::Directory(BTreeMap::new()),
    }
}

/// Parent path and name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}
