//! From a layer's byte stream to blob and index. Pure of the network; runs on a blocking thread.

mod blob;
mod decompress;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod index;
mod pax;
mod tar;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use ::tar::EntryType;
use sha2::{Digest, Sha256};

use self::blob::BlobWriter;
use self::decompress::Decompressor;
use self::tar::{TarEntry, TarStream};
use super::error::PullError;

pub(super) use self::blob::BLOCK_BYTES;
pub(super) use self::index::{Entry, EntryKind, LayerIndex, Meta};

/// PATH_MAX, with the final NUL.
const MAX_PATH_BYTES: usize = 4095;
/// NAME_MAX.
const MAX_NAME_BYTES: usize = 255;
/// Paths, link targets and attributes of a whole layer.
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// What one file may carry: bounded by the 16-bit count of the inode that EROFS keeps it in.
const MAX_XATTR_BYTES: usize = 128 << 10;
const BUFFER_BYTES: usize = 256 << 10;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";
/// Notes that AUFS left to itself.
const AUFS_PREFIX: &[u8] = b".wh..wh.";

/// What a layer may cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerLimits {
    /// Bytes of the archive after decompression, and bytes of its files, holes included.
    pub(super) max_unpacked_bytes: u64,
    pub(super) max_entries: u64,
}

/// Reads a layer (tar, plain or compressed with gzip or zstd) from `source`, writes its files' data into `blob`, which
/// is durable afterwards. `sha256` is that of the bytes as they come, `diff_sha256` that of the archive, both in hex.
///
/// # Errors
/// `DigestMismatch` also for a stream that made no sense: that the bytes are wrong says more than what is wrong in
/// them.
pub(super) fn convert(
    source: impl Read,
    blob: File,
    blob_path: &Path,
    limits: LayerLimits,
    (sha256, diff_sha256): (&str, &str),
) -> Result<LayerIndex, PullError> {
    let mut compressed = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(source, u64::MAX));
    let result = convert_stream(&mut compressed, blob, blob_path, limits);
    if !matches!(
        result,
        Ok(_) | Err(PullError::InvalidEntry { .. } | PullError::InvalidStream { .. })
    ) {
        return result.map(|(index, _)| index);
    }
    // The archive, or a decompressor, may end before the last byte.
    io::copy(&mut compressed, &mut io::sink()).map_err(|source| stream_error("layer", source, limits))?;
    check_digest("layer", sha256, &compressed.into_inner().into_hex())?;
    let (index, diff) = result?;
    check_digest("unpacked layer", diff_sha256, &diff)?;
    Ok(index)
}

/// The index and the archive's SHA-256.
fn convert_stream(
    compressed: &mut impl BufRead,
    blob: File,
    blob_path: &Path,
    limits: LayerLimits,
) -> Result<(LayerIndex, String), PullError> {
    let decompressor =
        Decompressor::new(compressed).map_err(|source| stream_error("layer", source, limits))?;
    let format = decompressor.format();
    let archive = HashingReader::new(decompressor, limits.max_unpacked_bytes);
    let mut stream = TarStream::new(BufReader::with_capacity(BUFFER_BYTES, archive), format, limits);
    let mut writer = LayerWriter::new(blob, blob_path, limits);
    while let Some(entry) = stream.next_entry()? {
        writer.add(&mut stream, &entry)?;
    }
    let diff_sha256 = stream.finish()?.into_inner().into_hex();
    let blob_blocks = writer
        .blob
        .finish()
        .map_err(|source| PullError::storage("write", blob_path, source))?;
    Ok((
        LayerIndex {
            blob_blocks,
            entries: writer.entries,
        },
        diff_sha256,
    ))
}

pub(super) fn check_digest(what: &str, expected: &str, got: &str) -> Result<(), PullError> {
    if expected == got {
        return Ok(());
    }
    Err(PullError::DigestMismatch {
        what: what.to_owned(),
        expected: format!("sha256:{expected}"),
        got: format!("sha256:{got}"),
    })
}

/// Turns an error of reading the stream into ours.
fn stream_error(format: &'static str, source: io::Error, limits: LayerLimits) -> PullError {
    match source.kind() {
        io::ErrorKind::FileTooLarge => PullError::TooLarge {
            what: "Unpacked layer".into(),
            limit: limits.max_unpacked_bytes,
            unit: "bytes",
        },
        _ => PullError::InvalidStream { format, source },
    }
}

struct LayerWriter<'path> {
    blob: BlobWriter,
    blob_path: &'path Path,
    limits: LayerLimits,
    entries: Vec<Entry>,
    n_entries: u64,
    index_bytes: u64,
    file_bytes: u64,
}

impl<'path> LayerWriter<'path> {
    fn new(blob: File, blob_path: &'path Path, limits: LayerLimits) -> Self {
        let blob = BlobWriter::new(blob);
        Self {
            blob,
            blob_path,
            limits,
            entries: Vec::new(),
            n_entries: 0,
            index_bytes: 0,
            file_bytes: 0,
        }
    }

    fn add<R: Read>(&mut self, stream: &mut TarStream<R>, entry: &TarEntry) -> Result<(), PullError> {
        self.n_entries += 1;
        if self.n_entries > self.limits.max_entries {
            let limit = self.limits.max_entries;
            return Err(PullError::TooLarge {
                what: "Layer".into(),
                limit,
                unit: "entries",
            });
        }
        let path = normalised(&entry.path)?;
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let parent = &path[..path.len() - name.len()];
        let parent = parent.strip_suffix(b"/").unwrap_or(parent);
        if name == OPAQUE_MARK {
            return self.push(parent.to_vec(), EntryKind::Opaque);
        }
        if name.starts_with(AUFS_PREFIX) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(PullError::entry(&path, "whiteout of no valid name"));
            }
            let hidden = if parent.is_empty() {
                hidden.to_vec()
            } else {
                [parent, b"/", hidden].concat()
            };
            return self.push(hidden, EntryKind::Whiteout);
        }
        let is_old_directory = entry.kind == EntryType::Regular && entry.path.ends_with(b"/");
        let kind = match entry.kind {
            EntryType::Directory => EntryKind::Directory(meta(entry)?),
            EntryType::Regular if is_old_directory => EntryKind::Directory(meta(entry)?),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => self.file(stream, entry)?,
            EntryType::Symlink => EntryKind::Symlink {
                meta: meta(entry)?,
                target: symlink_target(entry)?,
            },
            EntryType::Link => EntryKind::HardLink {
                target: normalised(&entry.link)?,
            },
            EntryType::Char | EntryType::Block => device(entry)?,
            EntryType::Fifo => EntryKind::Fifo(meta(entry)?),
            other => {
                let reason = format!("type '{}' is not supported", other.as_byte().escape_ascii());
                return Err(PullError::entry(&path, reason));
            }
        };
        if path.is_empty() && !matches!(kind, EntryKind::Directory(_)) {
            return Err(PullError::entry(&entry.path, "the root must be a directory"));
        }
        self.push(path, kind)
    }

    fn file<R: Read>(&mut self, stream: &mut TarStream<R>, entry: &TarEntry) -> Result<EntryKind, PullError> {
        let meta = meta(entry)?;
        // Holes cost no disk, but address space of the guest's device.
        self.file_bytes = self.file_bytes.saturating_add(entry.size);
        if self.file_bytes > self.limits.max_unpacked_bytes {
            let limit = self.limits.max_unpacked_bytes;
            return Err(PullError::TooLarge {
                what: "Unpacked layer".into(),
                limit,
                unit: "bytes",
            });
        }
        let whole = [(0, entry.size)];
        let pieces = entry.sparse.as_deref().unwrap_or(&whole);
        let path = self.blob_path;
        let read = |buf: &mut [u8]| stream.read_data(buf);
        let block = self.blob.append(entry.size, pieces, read, |source| {
            PullError::storage("write", path, source)
        })?;
        Ok(EntryKind::File {
            meta,
            block,
            size: entry.size,
        })
    }

    fn push(&mut self, path: Vec<u8>, kind: EntryKind) -> Result<(), PullError> {
        let attributes = match &kind {
            EntryKind::Directory(meta) | EntryKind::Fifo(meta) => meta,
            EntryKind::File { meta, .. }
            | EntryKind::Symlink { meta, .. }
            | EntryKind::Device { meta, .. } => meta,
            EntryKind::HardLink { .. } | EntryKind::Whiteout | EntryKind::Opaque => &Meta::default(),
        };
        let bytes: usize = attributes
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        self.index_bytes += (path.len() + bytes) as u64;
        if self.index_bytes > MAX_INDEX_BYTES {
            return Err(PullError::TooLarge {
                what: "Index of a layer".into(),
                limit: MAX_INDEX_BYTES,
                unit: "bytes",
            });
        }
        self.entries.push(Entry { path, kind });
        Ok(())
    }
}

/// A path as the index keeps it: relative to the image's root, whatever the archive says.
fn normalised(path: &[u8]) -> Result<Vec<u8>, PullError> {
    if path.len() > MAX_PATH_BYTES {
        return Err(PullError::entry(
            &path[..MAX_NAME_BYTES],
            format!("path is longer than {MAX_PATH_BYTES} bytes"),
        ));
    }
    if path.contains(&0) {
        return Err(PullError::entry(path, "path contains a NUL byte"));
    }
    let mut out = Vec::with_capacity(path.len());
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(PullError::entry(path, "path contains '..'")),
            name if name.len() > MAX_NAME_BYTES => {
                return Err(PullError::entry(
                    path,
                    format!("a name is longer than {MAX_NAME_BYTES} bytes"),
                ));
            }
            name => {
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(name);
            }
        }
    }
    Ok(out)
}

fn meta(entry: &TarEntry) -> Result<Meta, PullError> {
    let id = |value: u64, what: &str| {
        let value = u32::try_from(value).ok().filter(|id| *id != u32::MAX);
        value.ok_or_else(|| PullError::entry(&entry.path, format!("{what} is out of range")))
    };
    let mut xattrs: Vec<_> = entry
        .xattrs
        .iter()
        .filter(|(name, _)| is_kept_xattr(name))
        .cloned()
        .collect();
    xattrs.sort();
    xattrs.dedup_by(|second, first| second.0 == first.0);
    let total: usize = xattrs
        .iter()
        .map(|(name, value)| name.len() + value.len() + 8)
        .sum();
    if total > MAX_XATTR_BYTES
        || xattrs
            .iter()
            .any(|(name, value)| name.len() > 255 || value.len() > 65535)
    {
        return Err(PullError::entry(&entry.path, "extended attributes are too large"));
    }
    Ok(Meta {
        mode: u16::try_from(entry.mode & 0o7777).expect("twelve bits"),
        uid: id(entry.uid, "uid")?,
        gid: id(entry.gid, "gid")?,
        mtime: entry.mtime.0,
        mtime_nsec: entry.mtime.1,
        xattrs,
    })
}

/// Attributes that mean the same in the guest. Dropped: `trusted.*` and `user.overlay.*`, with which an image could
/// steer the overlay file system stacked on it, and labels of the builder's security modules.
fn is_kept_xattr(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        name if name.starts_with(b"user.overlay.") => false,
        name => name.len() > b"user.".len() && name.starts_with(b"user.") && !name.contains(&0),
    }
}

fn symlink_target(entry: &TarEntry) -> Result<Vec<u8>, PullError> {
    let target = &entry.link;
    if target.is_empty() || target.len() > MAX_PATH_BYTES || target.contains(&0) {
        return Err(PullError::entry(
            &entry.path,
            "symbolic link without a valid target",
        ));
    }
    Ok(target.clone())
}

fn device(entry: &TarEntry) -> Result<EntryKind, PullError> {
    let (major, minor) = entry.device;
    // The kernel's dev_t: 12 and 20 bits.
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(PullError::entry(
            &entry.path,
            format!("device number {major}:{minor} is out of range"),
        ));
    }
    Ok(EntryKind::Device {
        meta: meta(entry)?,
        character: entry.kind == EntryType::Char,
        major,
        minor,
    })
}

/// Hashes and counts what passes; more than `limit` bytes are an error of kind `FileTooLarge`.
struct HashingReader<R> {
    inner: R,
    hash: Sha256,
    left: u64,
}

impl<R> HashingReader<R> {
    fn new(inner: R, limit: u64) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            left: limit,
        }
    }

    fn into_hex(self) -> String {
        hex::encode(self.hash.finalize())
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buf)?;
        self.left = self
            .left
            .checked_sub(got as u64)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.hash.update(&buf[..got]);
        Ok(got)
    }
}
