//! Writes a merged tree as EROFS metadata whose files lie in blobs behind it.
//!
//! ```text
//! block 0   superblock at 1024, then inodes: each with its attributes, then a short directory or link target
//!           ...
//!           directory blocks and long link targets
//! m         blob of layer 0        m = blocks of the metadata
//!           blob of layer 1 ...
//! ```
//!
//! The output depends on the tree and the blobs' lengths only: the same image gives the same bytes.

use std::collections::HashMap;

use super::super::error::PullError;
use super::super::layer::Meta;
use super::super::tree::{Body, Inode, InodeIndex, ROOT, Tree};
use super::layout::{
    BLOCK_BITS, BLOCK_BYTES, DIRENT_BYTES, FEATURE_COMPAT, FORMAT_FLAT_INLINE, FORMAT_FLAT_PLAIN,
    INODE_BYTES, SLOT_BYTES, SUPER_BYTES, SUPER_MAGIC, SUPER_OFFSET, XATTR_ENTRY_BYTES, XATTR_HEADER_BYTES,
    XATTR_PREFIXES, crc32c, file_type, mode,
};

const BLOCK: usize = 1 << BLOCK_BITS;
/// Longest piece put behind its inode: a longer one wastes less in a block of its own.
const MAX_INLINE_BYTES: usize = BLOCK / 2;

/// Writes `tree` for a device that holds the result and then `blob_blocks` blocks for each layer, lowest first.
/// `uuid` becomes the file system's. The result is a whole number of blocks long.
///
/// # Errors
/// `TooLarge` when the whole exceeds 2^32 blocks.
pub(crate) fn write_metadata(tree: &Tree, blob_blocks: &[u32], uuid: [u8; 16]) -> Result<Vec<u8>, PullError> {
    let mut plan = Plan::new(tree);
    let metadata_blocks = plan.place();
    let mut next = metadata_blocks;
    let mut blob_starts = Vec::new();
    for blocks in blob_blocks {
        blob_starts.push(next);
        next += u64::from(*blocks);
    }
    // EROFS_NULL_ADDR is the highest number.
    let total_blocks = u32::try_from(next)
        .ok()
        .filter(|blocks| *blocks < u32::MAX)
        .ok_or(PullError::TooLarge {
            what: "Image".into(),
            limit: u64::from(u32::MAX) * BLOCK_BYTES,
            unit: "bytes",
        })?;
    let mut out = vec![0; to_len(metadata_blocks * BLOCK_BYTES)];
    for file in &plan.files {
        plan.write_file(file, &blob_starts, &mut out);
    }
    let root = plan.files[plan.position[&ROOT]].nid();
    write_superblock(
        &mut out,
        u16::try_from(root).expect("the root is placed first"),
        total_blocks,
        &plan,
        uuid,
    );
    Ok(out)
}

/// One inode to be written.
struct Placed {
    index: InodeIndex,
    n_links: u32,
    /// Of the inode, in bytes from the start.
    offset: u64,
    xattr_bytes: usize,
    data: Data,
}

/// Data that lies in the metadata.
struct Data {
    size: usize,
    /// The last piece, behind the inode.
    inline_bytes: usize,
    first_block: u64,
}

impl Placed {
    fn nid(&self) -> u64 {
        self.offset / SLOT_BYTES
    }
}

struct Plan<'tree> {
    tree: &'tree Tree,
    files: Vec<Placed>,
    position: HashMap<InodeIndex, usize>,
    parents: HashMap<InodeIndex, InodeIndex>,
}

impl<'tree> Plan<'tree> {
    /// Lists what can be reached, a directory's files beside each other, and counts links.
    fn new(tree: &'tree Tree) -> Self {
        let mut plan = Self {
            tree,
            files: Vec::new(),
            position: HashMap::new(),
            parents: HashMap::new(),
        };
        plan.parents.insert(ROOT, ROOT);
        plan.reach(ROOT);
        let mut left = vec![ROOT];
        while let Some(directory) = left.pop() {
            let mut below = Vec::new();
            for child in tree
                .children(directory)
                .into_iter()
                .flatten()
                .map(|(_, child)| *child)
            {
                plan.reach(child);
                if tree.children(child).is_some() {
                    plan.parents.insert(child, directory);
                    let here = plan.position[&directory];
                    // The entry `..` of the child.
                    plan.files[here].n_links += 1;
                    below.push(child);
                }
            }
            left.extend(below.into_iter().rev());
        }
        plan
    }

    /// Counts a name; a directory's own entry `.` is counted with its first.
    fn reach(&mut self, index: InodeIndex) {
        if let Some(known) = self.position.get(&index) {
            self.files[*known].n_links += 1;
            return;
        }
        self.position.insert(index, self.files.len());
        let inode = self.tree.inode(index);
        let (n_links, size) = match &inode.body {
            Body::Directory(_) => (2, directory_bytes(&self.names(index))),
            Body::Symlink(target) => (1, target.len()),
            Body::File { .. } | Body::Device { .. } | Body::Fifo => (1, 0),
        };
        let tail = size % BLOCK;
        let inline_bytes = if tail <= MAX_INLINE_BYTES { tail } else { 0 };
        let data = Data {
            size,
            inline_bytes,
            first_block: 0,
        };
        self.files.push(Placed {
            index,
            n_links,
            offset: 0,
            xattr_bytes: xattr_bytes(&inode.meta),
            data,
        });
    }

    /// A directory's entries in the order of their bytes, `.` and `..` among them.
    fn names(&self, directory: InodeIndex) -> Vec<(&'tree [u8], InodeIndex)> {
        let parent = self.parents.get(&directory).copied().unwrap_or(ROOT);
        let children = self.tree.children(directory).into_iter().flatten();
        let mut names: Vec<_> = children.map(|(name, child)| (name.as_slice(), *child)).collect();
        names.extend([(b".".as_slice(), directory), (b"..".as_slice(), parent)]);
        names.sort_unstable();
        names
    }

    /// Gives every inode and every data block its place; returns the metadata's length in blocks.
    fn place(&mut self) -> u64 {
        let mut offset = (SUPER_OFFSET + SUPER_BYTES) as u64;
        for file in &mut self.files {
            let head = (INODE_BYTES + file.xattr_bytes) as u64;
            let inline_bytes = file.data.inline_bytes as u64;
            // What lies behind the inode may not cross a block's end; the offset in its slot stays the same.
            let tail = (offset + head) % BLOCK_BYTES;
            if inline_bytes > 0 && tail + inline_bytes > BLOCK_BYTES {
                offset += (BLOCK_BYTES - tail).next_multiple_of(SLOT_BYTES);
            }
            file.offset = offset;
            offset = (offset + head + inline_bytes).next_multiple_of(SLOT_BYTES);
        }
        let mut block = offset.div_ceil(BLOCK_BYTES);
        for file in &mut self.files {
            let blocks = (file.data.size - file.data.inline_bytes).div_ceil(BLOCK);
            if blocks > 0 {
                file.data.first_block = block;
                block += blocks as u64;
            }
        }
        block
    }

    fn write_file(&self, file: &Placed, blob_starts: &[u64], out: &mut [u8]) {
        let inode = self.tree.inode(file.index);
        let (kind, size, address) = match &inode.body {
            Body::Directory(_) => (
                mode::DIRECTORY,
                file.data.size as u64,
                block_number(file.data.first_block),
            ),
            Body::Symlink(_) => (
                mode::SYMLINK,
                file.data.size as u64,
                block_number(file.data.first_block),
            ),
            Body::File { size: 0, .. } => (mode::REGULAR, 0, 0),
            Body::File { layer, block, size } => (
                mode::REGULAR,
                *size,
                block_number(blob_starts[*layer] + u64::from(*block)),
            ),
            // new_encode_dev() of the kernel.
            Body::Device {
                character,
                major,
                minor,
            } => {
                let device = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
                (if *character { mode::CHARACTER } else { mode::BLOCK }, 0, device)
            }
            Body::Fifo => (mode::FIFO, 0, 0),
        };
        let format = if file.data.inline_bytes > 0 {
            FORMAT_FLAT_INLINE
        } else {
            FORMAT_FLAT_PLAIN
        };
        let xattr_count = match file.xattr_bytes {
            0 => 0,
            bytes => {
                u16::try_from((bytes - XATTR_HEADER_BYTES) / 4 + 1).expect("bounded when the layer was read")
            }
        };
        let at = to_len(file.offset);
        let number = u32::try_from(self.position[&file.index] + 1).expect("the tree's size is bounded");
        let mut put = Cursor {
            out: &mut out[at..],
            at: 0,
        };
        put.bytes(&format.to_le_bytes());
        put.bytes(&xattr_count.to_le_bytes());
        put.bytes(&(kind | inode.meta.mode).to_le_bytes());
        put.bytes(&[0; 2]);
        put.bytes(&size.to_le_bytes());
        put.bytes(&address.to_le_bytes());
        put.bytes(&number.to_le_bytes());
        put.bytes(&inode.meta.uid.to_le_bytes());
        put.bytes(&inode.meta.gid.to_le_bytes());
        put.bytes(&inode.meta.mtime.to_le_bytes());
        put.bytes(&inode.meta.mtime_nsec.to_le_bytes());
        put.bytes(&file.n_links.to_le_bytes());
        put.bytes(&[0; 16]);
        put_xattrs(&mut put, &inode.meta);
        debug_assert_eq!(put.at, INODE_BYTES + file.xattr_bytes);
        let data = self.data(file, inode);
        let (blocks, tail) = data.split_at(file.data.size - file.data.inline_bytes);
        put.bytes(tail);
        let at = to_len(file.data.first_block * BLOCK_BYTES);
        out[at..at + blocks.len()].copy_from_slice(blocks);
    }

    fn data(&self, file: &Placed, inode: &Inode) -> Vec<u8> {
        match &inode.body {
            Body::Symlink(target) => target.clone(),
            Body::Directory(_) => self.directory_data(&self.names(file.index)),
            _ => Vec::new(),
        }
    }

    fn directory_data(&self, names: &[(&[u8], InodeIndex)]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut left = names;
        while !left.is_empty() {
            out.resize(out.len().next_multiple_of(BLOCK), 0);
            let (block, rest) = left.split_at(names_in_block(left));
            left = rest;
            let mut name_offset = block.len() * DIRENT_BYTES;
            for (name, index) in block {
                let target = &self.files[self.position[index]];
                out.extend(target.nid().to_le_bytes());
                out.extend(u16::try_from(name_offset).expect("within a block").to_le_bytes());
                out.extend([file_type(type_bits(&self.tree.inode(*index).body)), 0]);
                name_offset += name.len();
            }
            for (name, _) in block {
                out.extend_from_slice(name);
            }
        }
        out
    }
}

/// How many of the names fit in one directory block.
fn names_in_block(names: &[(&[u8], InodeIndex)]) -> usize {
    let mut used = 0;
    names
        .iter()
        .take_while(|(name, _)| {
            used += DIRENT_BYTES + name.len();
            used <= BLOCK
        })
        .count()
}

/// Length of a directory: whole blocks, the last one cut after its last name.
fn directory_bytes(names: &[(&[u8], InodeIndex)]) -> usize {
    let mut bytes: usize = 0;
    let mut left = names;
    while !left.is_empty() {
        let (block, rest) = left.split_at(names_in_block(left));
        let used: usize = block.iter().map(|(name, _)| DIRENT_BYTES + name.len()).sum();
        bytes = bytes.next_multiple_of(BLOCK) + used;
        left = rest;
    }
    bytes
}

fn type_bits(body: &Body) -> u16 {
    match body {
        Body::Directory(_) => mode::DIRECTORY,
        Body::File { .. } => mode::REGULAR,
        Body::Symlink(_) => mode::SYMLINK,
        Body::Device { character: true, .. } => mode::CHARACTER,
        Body::Device { character: false, .. } => mode::BLOCK,
        Body::Fifo => mode::FIFO,
    }
}

/// Prefix number and the rest of an attribute's name; names without a known prefix are not stored.
fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES
        .iter()
        .find_map(|(index, prefix)| Some((*index, name.strip_prefix(*prefix)?)))
}

fn xattr_bytes(meta: &Meta) -> usize {
    let entries = meta
        .xattrs
        .iter()
        .filter_map(|(name, value)| Some((split_xattr(name)?.1, value)));
    let bytes: usize = entries
        .map(|(name, value)| (XATTR_ENTRY_BYTES + name.len() + value.len()).next_multiple_of(4))
        .sum();
    if bytes == 0 { 0 } else { XATTR_HEADER_BYTES + bytes }
}

fn put_xattrs(put: &mut Cursor<'_>, meta: &Meta) {
    if xattr_bytes(meta) == 0 {
        return;
    }
    // Name filter (unused), number of shared attributes (none), reserved.
    put.bytes(&[0; XATTR_HEADER_BYTES]);
    for (name, value) in &meta.xattrs {
        let Some((prefix, name)) = split_xattr(name) else {
            continue;
        };
        put.bytes(&[
            u8::try_from(name.len()).expect("bounded when the layer was read"),
            prefix,
        ]);
        put.bytes(
            &u16::try_from(value.len())
                .expect("bounded when the layer was read")
                .to_le_bytes(),
        );
        put.bytes(name);
        put.bytes(value);
        put.at = put.at.next_multiple_of(4);
    }
}

fn write_superblock(out: &mut [u8], root_nid: u16, blocks: u32, plan: &Plan<'_>, uuid: [u8; 16]) {
    let mut put = Cursor {
        out: &mut out[SUPER_OFFSET..],
        at: 0,
    };
    put.bytes(&SUPER_MAGIC.to_le_bytes());
    put.bytes(&[0; 4]);
    put.bytes(&FEATURE_COMPAT.to_le_bytes());
    put.bytes(&[BLOCK_BITS, 0]);
    put.bytes(&root_nid.to_le_bytes());
    put.bytes(&(plan.files.len() as u64).to_le_bytes());
    // Build time: none, every inode has its own.
    put.bytes(&[0; 12]);
    put.bytes(&blocks.to_le_bytes());
    // Metadata and shared attributes are counted from block 0.
    put.bytes(&[0; 8]);
    put.bytes(&uuid);
    // All that remains is zero: no volume name, no incompatible features, no further devices.
    let sum = crc32c(&out[SUPER_OFFSET..BLOCK]);
    out[SUPER_OFFSET + 4..SUPER_OFFSET + 8].copy_from_slice(&sum.to_le_bytes());
}

struct Cursor<'out> {
    out: &'out mut [u8],
    at: usize,
}

impl Cursor<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        self.out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
}

fn block_number(block: u64) -> u32 {
    u32::try_from(block).expect("the total is checked before anything is written")
}

fn to_len(bytes: u64) -> usize {
    usize::try_from(bytes).expect("the metadata is in memory")
}
