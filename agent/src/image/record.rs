//! What is kept about an image, on disk and in answers.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::erofs::Erofs;

/// Largest file [`Image::read_file`] returns.
const MAX_READ_BYTES: u64 = 4 << 20;

/// An image on this host.
#[derive(Clone, Debug)]
pub struct Image {
    /// Normalised reference it was pulled by.
    pub reference: String,
    /// Digest of the configuration, `sha256:...`: what the image is, whatever its names.
    pub id: String,
    /// Digest of the platform's manifest, `sha256:...`.
    pub manifest_digest: String,
    /// As the image's author wrote it.
    pub config: Arc<ImageConfiguration>,
    /// Files to put before the guest.
    pub rootfs: ImageRootfs,
    /// Length of the rootfs in bytes, layers shared with other images included.
    pub size_bytes: u64,
    /// When it was pulled last.
    pub pulled_at: SystemTime,
}

/// The slice of an image: the concatenation of these files, in this order, as one read-only block device that holds an
/// EROFS. Every file is a whole number of 4 KiB blocks long; do not change or write them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRootfs {
    /// Superblock, inodes, directories.
    pub metadata: PathBuf,
    /// Data of the layers, lowest first; layers without data are left out.
    pub blobs: Vec<PathBuf>,
}

impl ImageRootfs {
    /// All files in slice order.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> + Clone {
        std::iter::once(&self.metadata).chain(&self.blobs)
    }
}

impl Image {
    /// Reads a regular file of the image, links followed within the image. `None` when there is none of that name.
    /// Blocking.
    ///
    /// # Errors
    /// Those of reading; `FileTooLarge` above 4 MiB.
    pub fn read_file(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let image = Erofs::open(self.rootfs.files())?;
        let found = image.find(path.as_bytes())?.filter(Erofs::is_file);
        found.map(|node| image.read(&node, MAX_READ_BYTES)).transpose()
    }
}

/// `images/<id>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    /// Hex of the configuration's SHA-256.
    pub(super) id: String,
    /// Hex of the diff ids, lowest first.
    pub(super) layers: Vec<String>,
    /// Those of `layers` that have data.
    pub(super) blobs: Vec<String>,
    pub(super) size_bytes: u64,
    pub(super) config: Arc<ImageConfiguration>,
}

/// `refs/<SHA-256 of the reference>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ReferenceRecord {
    pub(super) reference: String,
    /// [`ImageRecord::id`].
    pub(super) id: String,
    pub(super) manifest_digest: String,
    pub(super) pulled_at: SystemTime,
}
