//! Fuzz target of the disks.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use super::{BlockCounters, DirtyFiles, Engine, Jobs, QUEUE_SIZES, REQUEST_QUEUE, SliceMap, Worker};
use crate::config::{Extent, SliceDisk};
use crate::devices::virtio::fuzz::activation;
use crate::devices::virtio::worker::event_fd;

const FILE_BYTES: usize = 16 << 10;
/// The part of the file that is on the disk, in two extents with a gap between them.
const MAPPED: std::ops::Range<usize> = (4 << 10)..(12 << 10);

/// Requests of a hostile driver, on a disk of each kind.
///
/// # Panics
/// When a byte changes that is not on the disk, or any byte of a read-only one.
pub fn block_queue(data: &[u8]) {
    let Some((flags, image)) = data.split_first() else {
        return;
    };
    let disk = if flags & 1 == 0 {
        SliceDisk::ReadWrite
    } else {
        SliceDisk::ReadOnly
    };
    let before = vec![0x5a; FILE_BYTES];
    let file =
        File::from(rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC).expect("descriptors can be had"));
    file.write_all_at(&before, 0).expect("memory can be had");
    let map = SliceMap::default();
    for (disk_offset_bytes, file_offset_bytes) in [(0, 4 << 10), (64 << 10, 8 << 10)] {
        let extent = Extent {
            disk_offset_bytes,
            file_offset_bytes,
            length_bytes: 4 << 10,
        };
        let file = file.try_clone().expect("descriptors can be had");
        map.add_extents(vec![(extent, file.into())])
            .expect("apart and aligned");
    }
    let mut activation = activation(image, 1, 0, flags & 2 != 0);
    let completed = event_fd().expect("descriptors can be had");
    let mut engine = Engine::new(activation.memory.clone(), false, &completed);
    let mut worker = Worker {
        disk,
        map,
        counters: Arc::new(BlockCounters::new("blk_fuzz")),
        memory: activation.memory,
        queue: activation.queues.swap_remove(REQUEST_QUEUE),
        interrupt: activation.interrupt,
        needs_reset: activation.needs_reset,
        jobs: Jobs::new(QUEUE_SIZES[REQUEST_QUEUE]),
        dirty: DirtyFiles::default(),
        write_through: flags & 4 != 0,
        io_uring: false,
    };
    // A broken ring ends the worker.
    drop(worker.process(&mut engine));
    let mut after = vec![0; FILE_BYTES];
    file.read_exact_at(&mut after, 0)
        .expect("the file keeps its length");
    if disk == SliceDisk::ReadOnly {
        assert_eq!(after, before, "a read-only disk was written to");
    }
    assert_eq!(
        after[..MAPPED.start],
        before[..MAPPED.start],
        "written before an extent"
    );
    assert_eq!(
        after[MAPPED.end..],
        before[MAPPED.end..],
        "written behind an extent"
    );
}
