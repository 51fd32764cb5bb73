//! Fuzz target of layers: archives of a hostile registry.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::MemfdFlags;

use super::erofs::{Erofs, write_metadata};
use super::layer::{LayerIndex, fuzz::convert_archive};
pub use super::pull::fuzz::registry_documents;
use super::tree::Tree;

const MAX_NODES: usize = 4096;
/// S_IFMT and S_IFDIR.
const FORMAT: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;

/// Two layers, the second on top of the first. The first two bytes say how long the lower one is. Each is a tar archive,
/// plain or compressed.
///
/// # Panics
/// When layers that were accepted do not become an image that can be read.
pub fn layer_archive(data: &[u8]) {
    let Some((length, archives)) = data.split_first_chunk::<2>() else {
        return;
    };
    let length = usize::from(u16::from_le_bytes(*length));
    let (lower, upper) = archives.split_at(length.min(archives.len()));
    let mut tree = Tree::new();
    let mut blob_blocks = Vec::new();
    let mut files = vec![memfd()];
    for archive in [lower, upper] {
        let blob = memfd();
        let Ok(index) = convert_archive(archive, blob.try_clone().expect("descriptors can be had")) else {
            return;
        };
        check_index(&index, &blob);
        if tree.apply(&index).is_err() {
            return;
        }
        blob_blocks.push(index.blob_blocks);
        if index.blob_blocks > 0 {
            files.push(blob);
        }
    }
    let Ok(metadata) = write_metadata(&tree, &blob_blocks, [7; 16]) else {
        return;
    };
    files[0].write_all(&metadata).expect("memory can be had");
    read_all(&files);
}

fn memfd() -> File {
    rustix::fs::memfd_create("layer", MemfdFlags::CLOEXEC)
        .expect("descriptors can be had")
        .into()
}

fn check_index(index: &LayerIndex, blob: &File) {
    let n_bytes = blob.metadata().expect("a file in memory").len();
    assert_eq!(n_bytes, u64::from(index.blob_blocks) * super::layer::BLOCK_BYTES);
    let mut bytes = Vec::new();
    index.write(&mut bytes).expect("a list in memory");
}

fn read_all(files: &[File]) {
    let paths: Vec<_> = files
        .iter()
        .map(|file| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())))
        .collect();
    let image = Erofs::open(&paths).expect("what was written can be opened");
    let mut left = VecDeque::from([image.root().expect("there is a root")]);
    let mut n_nodes = 0;
    while let Some(node) = left.pop_front() {
        n_nodes += 1;
        if n_nodes > MAX_NODES {
            return;
        }
        image.xattr_area(&node).expect("attributes can be read");
        if node.mode & FORMAT == DIRECTORY {
            for (name, nid) in image.list(&node).expect("a directory can be listed") {
                assert!(!name.is_empty() && !name.contains(&b'/'), "{name:?} is no name");
                if name != b"." && name != b".." {
                    left.push_back(image.node(nid).expect("a name leads to a file"));
                }
            }
        } else if Erofs::is_file(&node) {
            image.read(&node, u64::MAX).expect("a file can be read");
        }
    }
}
