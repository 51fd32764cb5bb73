//! The index of a layer: its tree, and where in the blob each file's data lies.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// First bytes of an index file; the last one is the version.
const MAGIC: [u8; 8] = *b"ECILAYR\x01";
const SUM_BYTES: usize = 32;

/// Owner, mode, time and extended attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Permission bits with setuid, setgid and sticky; no file type.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    /// Full names, sorted, without duplicates.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// One entry of a layer, in the order of the archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Components joined by `/`, no leading one, never `.`, `..` or empty; the root directory is "".
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EntryKind {
    Directory(Meta),
    /// `block` counts 4 KiB blocks from the blob's start; the data is contiguous.
    File {
        meta: Meta,
        block: u32,
        size: u64,
    },
    Symlink {
        meta: Meta,
        target: Vec<u8>,
    },
    Device {
        meta: Meta,
        character: bool,
        major: u32,
        minor: u32,
    },
    Fifo(Meta),
    /// Another name for an earlier path of this or a lower layer, in the form of [`Entry::path`].
    HardLink {
        target: Vec<u8>,
    },
    /// Removes the path from the layers below.
    Whiteout,
    /// Removes everything in the directory from the layers below.
    Opaque,
}

/// A layer's tree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerIndex {
    /// Length of the blob in 4 KiB blocks.
    pub(crate) blob_blocks: u32,
    pub(crate) entries: Vec<Entry>,
}

impl LayerIndex {
    /// Writes magic, body and SHA-256 of both.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let body = postcard::to_stdvec(self).map_err(io::Error::other)?;
        let sum = Sha256::new().chain_update(MAGIC).chain_update(&body).finalize();
        out.write_all(&MAGIC)?;
        out.write_all(&body)?;
        out.write_all(&sum)
    }

    /// Reads what [`LayerIndex::write`] wrote.
    ///
    /// # Errors
    /// `InvalidData` for another version or a damaged file.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        Self::decode(&bytes)
    }

    fn decode(bytes: &[u8]) -> io::Result<Self> {
        let invalid =
            |reason: &str| io::Error::new(io::ErrorKind::InvalidData, format!("layer index: {reason}"));
        let (content, sum) = bytes
            .len()
            .checked_sub(SUM_BYTES)
            .map(|at| bytes.split_at(at))
            .ok_or_else(|| invalid("too short"))?;
        let body = content
            .strip_prefix(&MAGIC)
            .ok_or_else(|| invalid("unknown format or version"))?;
        if Sha256::digest(content).as_slice() != sum {
            return Err(invalid("checksum does not match"));
        }
        postcard::from_bytes(body).map_err(|source| io::Error::new(io::ErrorKind::InvalidData, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_a_round_trip_and_notices_any_changed_byte() {
        let index = LayerIndex {
            blob_blocks: 7,
            entries: vec![
                Entry {
                    path: b"a".to_vec(),
                    kind: EntryKind::Directory(Meta {
                        mode: 0o755,
                        ..Meta::default()
                    }),
                },
                Entry {
                    path: b"a/b".to_vec(),
                    kind: EntryKind::Whiteout,
                },
            ],
        };
        let mut bytes = Vec::new();
        index.write(&mut bytes).unwrap();
        assert_eq!(LayerIndex::decode(&bytes).unwrap(), index);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(LayerIndex::decode(&damaged).is_err(), "byte {at}");
            assert!(LayerIndex::decode(&bytes[..at]).is_err(), "length {at}");
        }
    }
}
