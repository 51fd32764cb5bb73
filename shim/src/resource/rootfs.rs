//! Image files of containers and their slices on the read-only disk.

use std::{
    collections::HashMap,
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::OnceCell;
use vmm::{
    config::{Extent, SLICE_DISK_BYTES, SliceDisk},
    control::MAX_MESSAGE_FDS,
};

use super::slices::{Acquired, Slice, SliceTable};
use crate::{
    error::{Error, ErrorKind, Result},
    sandbox::snapshot::CapturedImage,
    vmm::VmmClient,
};

/// One file, whatever its path: device and inode.
type FileKey = (u64, u64);

/// An opened image: the metadata file, then the layer blobs.
#[derive(Debug)]
pub struct ImageFiles {
    paths: Vec<PathBuf>,
    key: Vec<FileKey>,
    lengths: Vec<u64>,
    fds: Vec<OwnedFd>,
}

impl ImageFiles {
    /// Opens the files of an image. Blocks.
    ///
    /// # Errors
    /// A file is missing, not a regular file, or empty.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        if paths.len() > MAX_MESSAGE_FDS {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("rootfs has {} files: at most {MAX_MESSAGE_FDS}", paths.len()),
            ));
        }
        let mut files = Self {
            paths: paths.to_vec(),
            key: Vec::new(),
            lengths: Vec::new(),
            fds: Vec::new(),
        };
        for path in paths {
            let (file, length) = open_file(path)?;
            let metadata = file
                .metadata()
                .map_err(|error| Error::io(format!("stat {}", path.display()), error))?;
            files.key.push((metadata.dev(), metadata.ino()));
            files.lengths.push(length);
            files.fds.push(file.into());
        }
        Ok(files)
    }
}

fn open_file(path: &Path) -> Result<(File, u64)> {
    let refuse = |what: &str| {
        Error::new(
            ErrorKind::InvalidArgument,
            format!("rootfs file {} is {what}: give an EROFS file", path.display()),
        )
    };
    let metadata = std::fs::metadata(path)
        .map_err(|error| Error::io(format!("open rootfs file {}", path.display()), error))?;
    if metadata.file_type().is_fifo() || !metadata.is_file() {
        return Err(refuse("not a regular file"));
    }
    if metadata.len() == 0 {
        return Err(refuse("empty"));
    }
    let file =
        File::open(path).map_err(|error| Error::io(format!("open rootfs file {}", path.display()), error))?;
    Ok((file, metadata.len()))
}

/// The read-only disk of one VM.
#[derive(Debug)]
pub struct ImageDisk {
    layout: Mutex<Layout>,
    /// Slices that gave way and are still mapped. Held while mapping, so that space is unmapped before it is mapped.
    stale: tokio::sync::Mutex<Vec<Slice>>,
}

#[derive(Debug)]
struct Layout {
    table: SliceTable<Vec<FileKey>>,
    /// Set once the slice is mapped.
    mapped: HashMap<u32, Arc<OnceCell<()>>>,
    /// Names of the files, for who makes the same disk again.
    paths: HashMap<u32, Vec<PathBuf>>,
}

/// What a new VM needs to have the disk of a captured one.
#[derive(Debug)]
pub struct RestoredDisk {
    /// The disk.
    pub disk: Arc<ImageDisk>,
    /// What is mapped, in the order of the descriptors.
    pub extents: Vec<Extent>,
    /// The files.
    pub fds: Vec<OwnedFd>,
}

/// A container's use of an image slice; ends when dropped.
#[derive(Debug)]
pub struct ImageSlice {
    disk: Arc<ImageDisk>,
    slice: Slice,
}

impl ImageDisk {
    /// An empty disk.
    pub fn new() -> Arc<Self> {
        let table = SliceTable::new(SLICE_DISK_BYTES, protocol::SLICE_ALIGN_BYTES);
        Arc::new(Self {
            layout: Mutex::new(Layout {
                table,
                mapped: HashMap::new(),
                paths: HashMap::new(),
            }),
            stale: tokio::sync::Mutex::new(Vec::new()),
        })
    }

    /// What is on the disk: every slice whose files are mapped.
    pub fn captured(&self) -> Vec<CapturedImage> {
        let layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        let is_mapped = |slice: &&Slice| {
            let cell = layout.mapped.get(&slice.partition);
            cell.is_some_and(|cell| cell.initialized())
        };
        let image = |slice: &Slice| CapturedImage {
            partition: slice.partition,
            offset_bytes: slice.offset_bytes,
            paths: layout.paths.get(&slice.partition).cloned().unwrap_or_default(),
        };
        layout.table.slices().filter(is_mapped).map(image).collect()
    }

    /// The disk as it was captured. Blocks.
    ///
    /// # Errors
    /// A file is missing, or the slices do not fit on a disk.
    pub fn restore(images: &[CapturedImage]) -> Result<RestoredDisk> {
        let disk = Self::new();
        let (mut extents_of_all, mut fds) = (Vec::new(), Vec::new());
        {
            let mut layout = disk.layout.lock().unwrap_or_else(PoisonError::into_inner);
            for image in images {
                let files = ImageFiles::open(&image.paths)
                    .map_err(|error| error.context("open an image of the snapshot"))?;
                let bad = |error| {
                    Error::with_source(
                        ErrorKind::FailedPrecondition,
                        "lay out the snapshot's images",
                        error,
                    )
                };
                let slice = layout
                    .table
                    .slice_at(image.partition, image.offset_bytes, &files.lengths)
                    .map_err(bad)?;
                extents_of_all.extend(extents(&slice));
                layout.table.import(files.key, slice).map_err(bad)?;
                layout
                    .mapped
                    .insert(image.partition, Arc::new(OnceCell::new_with(Some(()))));
                layout.paths.insert(image.partition, files.paths);
                fds.extend(files.fds);
            }
        }
        Ok(RestoredDisk {
            disk,
            extents: extents_of_all,
            fds,
        })
    }

    /// The use of a slice by a container that was captured with it.
    ///
    /// # Errors
    /// `FailedPrecondition` when there is no such slice.
    pub fn reuse(self: &Arc<Self>, partition: u32) -> Result<ImageSlice> {
        let mut layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        let slice = layout.table.reuse(partition).ok_or_else(|| {
            Error::new(
                ErrorKind::FailedPrecondition,
                format!("the snapshot has no image in partition {partition}"),
            )
        })?;
        Ok(ImageSlice {
            disk: Arc::clone(self),
            slice,
        })
    }

    /// Finds or makes the slice of these files and maps it into the VM.
    ///
    /// # Errors
    /// `ResourceExhausted` when the disk is full; the VMM refuses.
    pub async fn map(self: &Arc<Self>, files: ImageFiles, vmm: &VmmClient) -> Result<ImageSlice> {
        let (slice, mapped, evicted) = self.place(files.key, &files.lengths, files.paths)?;
        let used = ImageSlice {
            disk: Arc::clone(self),
            slice,
        };
        if !evicted.is_empty() {
            self.stale.lock().await.extend(evicted);
        }
        mapped
            .get_or_try_init(async || {
                let mut stale = self.stale.lock().await;
                while let Some(old) = stale.last() {
                    vmm.remove_extents(SliceDisk::ReadOnly, old.offset_bytes, old.length_bytes)
                        .await?;
                    stale.pop();
                }
                vmm.add_extents(SliceDisk::ReadOnly, extents(&used.slice), &files.fds)
                    .await
            })
            .await
            .map_err(|error| error.context("map image files into the VM"))?;
        Ok(used)
    }

    fn place(
        &self,
        key: Vec<FileKey>,
        lengths: &[u64],
        paths: Vec<PathBuf>,
    ) -> Result<(Slice, Arc<OnceCell<()>>, Vec<Slice>)> {
        let mut layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        let acquired = layout.table.acquire(key, lengths).map_err(|error| {
            Error::with_source(ErrorKind::ResourceExhausted, "find room on the image disk", error)
        })?;
        let (slice, evicted) = match acquired {
            Acquired::Shared(slice) => (slice, Vec::new()),
            Acquired::New { slice, evicted } => {
                for old in &evicted {
                    layout.mapped.remove(&old.partition);
                }
                layout.paths.insert(slice.partition, paths);
                (slice, evicted)
            }
        };
        let mapped = Arc::clone(layout.mapped.entry(slice.partition).or_default());
        Ok((slice, mapped, evicted))
    }
}

fn extents(slice: &Slice) -> Vec<Extent> {
    let extent = |file: &super::slices::FilePlace| Extent {
        disk_offset_bytes: file.offset_bytes,
        file_offset_bytes: 0,
        length_bytes: file.length_bytes,
    };
    slice.files.iter().map(extent).collect()
}

impl ImageSlice {
    /// Where it is.
    pub fn slice(&self) -> &Slice {
        &self.slice
    }
}

impl Drop for ImageSlice {
    fn drop(&mut self) {
        let mut layout = self.disk.layout.lock().unwrap_or_else(PoisonError::into_inner);
        layout.table.release(self.slice.partition);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_checked_and_known_by_inode() {
        let dir = tempfile::tempdir().unwrap();
        let (meta, link, empty) = (
            dir.path().join("meta"),
            dir.path().join("link"),
            dir.path().join("empty"),
        );
        std::fs::write(&meta, [1; 5000]).unwrap();
        std::fs::hard_link(&meta, &link).unwrap();
        std::fs::write(&empty, []).unwrap();
        let opened = ImageFiles::open(std::slice::from_ref(&meta)).unwrap();
        assert_eq!(opened.lengths, [5000]);
        assert_eq!(opened.key, ImageFiles::open(&[link]).unwrap().key);
        for (path, expected) in [
            (empty, "empty"),
            (dir.path().to_owned(), "regular"),
            (dir.path().join("no"), "open"),
        ] {
            let error = ImageFiles::open(&[meta.clone(), path]).unwrap_err();
            assert!(error.chain().contains(expected), "{}", error.chain());
        }
    }
}
