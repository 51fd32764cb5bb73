//! Reads an EROFS of ours from its slice: the metadata file and the blobs behind it, one after the other.
//!
//! Files on the host's disk may be damaged: every number is checked before it is used.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::layout::{
    BLOCK_BYTES, DIRENT_BYTES, FORMAT_FLAT_INLINE, FORMAT_FLAT_PLAIN, INODE_BYTES, SLOT_BYTES, SUPER_BYTES,
    SUPER_MAGIC, SUPER_OFFSET, XATTR_HEADER_BYTES, mode,
};

/// Symbolic links followed for one path, as in the kernel.
const MAX_LINKS: usize = 40;
/// Largest directory or link target read.
const MAX_METADATA_BYTES: u64 = 256 << 20;

/// An open image.
pub(crate) struct Erofs {
    /// First byte, length, file.
    segments: Vec<(u64, u64, File)>,
    root: u64,
}

/// An inode.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) nid: u64,
    /// With the file type.
    pub(crate) mode: u16,
    pub(crate) size: u64,
    format: u16,
    address: u32,
    xattr_bytes: u64,
    /// Whole, for tests that compare everything.
    #[cfg(test)]
    pub(crate) raw: [u8; INODE_BYTES],
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("EROFS image: {reason}"))
}

impl Erofs {
    /// Opens an image of the given files in their order on the device.
    pub(crate) fn open<'path>(files: impl IntoIterator<Item = &'path PathBuf>) -> io::Result<Self> {
        let mut start = 0;
        let mut segments = Vec::new();
        for path in files {
            let file = open_file(path)?;
            let len = file.metadata()?.len();
            segments.push((start, len, file));
            start += len.next_multiple_of(BLOCK_BYTES);
        }
        let mut image = Self { segments, root: 0 };
        let mut head = [0; SUPER_BYTES];
        image.read_at(SUPER_OFFSET as u64, &mut head)?;
        if u32_at(&head, 0) != SUPER_MAGIC {
            return Err(invalid("no superblock"));
        }
        image.root = u16_at(&head, 14).into();
        Ok(image)
    }

    /// The root directory.
    pub(crate) fn root(&self) -> io::Result<Node> {
        self.node(self.root)
    }

    /// Finds a path, following symbolic links within the image, the last component's too.
    pub(crate) fn find(&self, path: &[u8]) -> io::Result<Option<Node>> {
        let mut way = vec![self.root()?];
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
            let here = way.last().expect("the root is never popped");
            if here.mode & mode::MASK != mode::DIRECTORY {
                return Ok(None);
            }
            let Some((_, nid)) = self.list(here)?.into_iter().find(|(found, _)| *found == name) else {
                return Ok(None);
            };
            let node = self.node(nid)?;
            if node.mode & mode::MASK == mode::SYMLINK {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(None);
                }
                let target = self.read(&node, MAX_METADATA_BYTES)?;
                if target.starts_with(b"/") {
                    way.truncate(1);
                }
                for name in target.split(|byte| *byte == b'/').rev() {
                    left.push_front(name.to_vec());
                }
            } else {
                way.push(node);
            }
        }
        Ok(way.pop())
    }

    /// Whether this is a regular file.
    pub(crate) fn is_file(node: &Node) -> bool {
        node.mode & mode::MASK == mode::REGULAR
    }

    /// The names in a directory with their inode numbers, `.` and `..` among them.
    pub(crate) fn list(&self, directory: &Node) -> io::Result<Vec<(Vec<u8>, u64)>> {
        let data = self.read(directory, MAX_METADATA_BYTES)?;
        let mut names = Vec::new();
        for block in data.chunks(usize::try_from(BLOCK_BYTES).expect("a small constant")) {
            let head = block
                .get(..DIRENT_BYTES)
                .ok_or_else(|| invalid("directory block is too short"))?;
            let names_at = usize::from(u16_at(head, 8));
            let entries = block
                .get(..names_at)
                .filter(|entries| entries.len() % DIRENT_BYTES == 0);
            let entries: Vec<&[u8]> = entries
                .ok_or_else(|| invalid("directory offset"))?
                .chunks(DIRENT_BYTES)
                .collect();
            for (at, entry) in entries.iter().enumerate() {
                let start = usize::from(u16_at(entry, 8));
                let end = entries
                    .get(at + 1)
                    .map_or(block.len(), |next| usize::from(u16_at(next, 8)));
                let name = block.get(start..end).ok_or_else(|| invalid("directory name"))?;
                // The last name of a full block ends with the block or with zeros.
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                names.push((name.to_vec(), u64_at(entry, 0)));
            }
        }
        Ok(names)
    }

    /// A file's data.
    ///
    /// # Errors
    /// `FileTooLarge` above `limit` bytes.
    pub(crate) fn read(&self, node: &Node, limit: u64) -> io::Result<Vec<u8>> {
        if node.size > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut data = vec![0; usize::try_from(node.size).map_err(|_| io::ErrorKind::FileTooLarge)?];
        let inline = match node.format {
            FORMAT_FLAT_PLAIN => 0,
            FORMAT_FLAT_INLINE => node.size % BLOCK_BYTES,
            _ => return Err(invalid("unknown data layout")),
        };
        let (blocks, tail) = data.split_at_mut(usize::try_from(node.size - inline).expect("it is in memory"));
        self.read_at(u64::from(node.address) * BLOCK_BYTES, blocks)?;
        self.read_at(
            node.nid * SLOT_BYTES + INODE_BYTES as u64 + node.xattr_bytes,
            tail,
        )?;
        Ok(data)
    }

    /// Reads an inode.
    pub(crate) fn node(&self, nid: u64) -> io::Result<Node> {
        let offset = nid
            .checked_mul(SLOT_BYTES)
            .ok_or_else(|| invalid("inode number"))?;
        let mut raw = [0; INODE_BYTES];
        self.read_at(offset, &mut raw)?;
        Ok(Node {
            nid,
            format: u16_at(&raw, 0),
            xattr_bytes: match u16_at(&raw, 2) {
                0 => 0,
                count => XATTR_HEADER_BYTES as u64 + 4 * (u64::from(count) - 1),
            },
            mode: u16_at(&raw, 4),
            size: u64_at(&raw, 8),
            address: u32_at(&raw, 16),
            #[cfg(test)]
            raw,
        })
    }

    /// The attributes as stored.
    #[cfg(test)]
    pub(crate) fn xattr_area(&self, node: &Node) -> io::Result<Vec<u8>> {
        let mut area = vec![0; usize::try_from(node.xattr_bytes).expect("16 bits")];
        self.read_at(node.nid * SLOT_BYTES + INODE_BYTES as u64, &mut area)?;
        Ok(area)
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let segment = self.segments.iter().rev().find(|(start, _, _)| *start <= offset);
            let (start, len, file) = segment.ok_or_else(|| invalid("address before the image"))?;
            let here = len.saturating_sub(offset - start).min(buf.len() as u64);
            if here == 0 {
                return Err(invalid("address behind the image"));
            }
            let (part, rest) = buf.split_at_mut(usize::try_from(here).expect("no longer than the buffer"));
            file.read_exact_at(part, offset - start)?;
            offset += here;
            buf = rest;
        }
        Ok(())
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    File::open(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
