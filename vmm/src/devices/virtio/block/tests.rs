use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;
use virtio_bindings::virtio_blk as blk;

use super::*;
use crate::config::{Extent, SLICE_DISK_BYTES, SliceDisk};
use crate::devices::virtio::testing::{Buffer, Driver, HEAP, readable, writable};

const HEADER: u64 = HEAP;
const STATUS: u64 = HEAP + 0x800;
const DATA: u64 = HEAP + 0x1000;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn map_file(map: &SliceMap, file: &File, disk_offset: u64, file_offset: u64, length: u64) {
    let extent = Extent {
        disk_offset_bytes: disk_offset,
        file_offset_bytes: file_offset,
        length_bytes: length,
    };
    map.add_extents(vec![(extent, OwnedFd::from(file.try_clone().unwrap()))])
        .unwrap();
}

fn start(disk: SliceDisk, io_uring: bool) -> (Driver, SliceMap) {
    let (block, map) = Block::new(disk, io_uring);
    (Driver::start(Box::new(block), 0), map)
}

/// Runs one request and gives its status.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
    begin(driver, kind, sector, data, 0);
    driver.kick(0);
    driver.wait_used(0);
    driver.read_memory(STATUS, 1)[0]
}

/// Adds one request; `slot` keeps headers and states of several apart.
fn begin(driver: &mut Driver, kind: u32, sector: u64, data: &[Buffer], slot: u64) -> u16 {
    let header = HEADER + 16 * slot;
    driver.write_memory(
        header,
        &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
    );
    driver.write_memory(STATUS + slot, &[0xaa]);
    let chain = [&[readable(header, 16)], data, &[writable(STATUS + slot, 1)]].concat();
    driver.add(0, &chain)
}

fn segment(driver: &Driver, sector: u64, n_sectors: u32, flags: u32) -> Buffer {
    let bytes = [
        &sector.to_le_bytes()[..],
        &n_sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat();
    driver.write_memory(DATA, &bytes);
    readable(DATA, bytes.len())
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i * 7 + i / 256 + seed * 31) % 251).unwrap())
        .collect()
}

/// Every test that moves data runs with both engines; where the kernel refuses io_uring the second run proves that the
/// device then works all the same.
fn with_both_engines(test: impl Fn(bool)) {
    test(false);
    test(true);
}

#[test]
fn config_says_eight_tebibytes_whatever_is_mapped() {
    let (mut driver, _map) = start(SliceDisk::ReadOnly, false);
    assert_eq!(driver.config(0, 8), (SLICE_DISK_BYTES / 512).to_le_bytes());
    assert_eq!(driver.config(12, 4), 254_u32.to_le_bytes());
    assert_ne!(driver.device_features() & 1 << blk::VIRTIO_BLK_F_RO, 0);
    let (mut driver, _map) = start(SliceDisk::ReadWrite, false);
    assert_eq!(driver.device_features() & 1 << blk::VIRTIO_BLK_F_RO, 0);
    assert_eq!(driver.config(56, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn engine_that_runs_is_the_one_asked_for() {
    let event = crate::devices::virtio::worker::event_fd().unwrap();
    let memory = crate::memory::GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 0x1000)]).unwrap();
    let offered = crate::sys::uring::Uring::new(8, memory, &event).is_ok();
    for io_uring in [false, true] {
        let (mut driver, map) = start(SliceDisk::ReadWrite, io_uring);
        map_file(&map, &file(&[1; 4096]), 0, 0, 4096);
        assert_eq!(
            request(&mut driver, blk::VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]),
            OK
        );
        assert_eq!(
            driver.counter("blk_vdb_io_uring_transfers"),
            u64::from(io_uring && offered)
        );
    }
}

#[test]
fn read_spans_extents_and_is_zero_past_the_end_of_a_file() {
    with_both_engines(|io_uring| {
        let (mut driver, map) = start(SliceDisk::ReadOnly, io_uring);
        let (first, second) = (pattern(20_000, 1), pattern(5000, 2));
        // The second file ends inside its extent.
        map_file(&map, &file(&first), 1 << 40, 4096, 8192);
        map_file(&map, &file(&second), (1 << 40) + 8192, 0, 12288);
        driver.write_memory(DATA, &[0xee; 0x8000]);
        let data = [
            writable(DATA, 1024),
            writable(DATA + 0x2000, 10_240),
            writable(DATA + 0x7000, 4096),
        ];
        assert_eq!(
            request(&mut driver, blk::VIRTIO_BLK_T_IN, (1 << 31) + 8, &data),
            OK
        );
        let expected = [&first[4096 + 4096..4096 + 8192], &second[..], &[0; 6264]].concat();
        let seen = [
            driver.read_memory(DATA, 1024),
            driver.read_memory(DATA + 0x2000, 10_240),
            driver.read_memory(DATA + 0x7000, 4096),
        ]
        .concat();
        assert_eq!(seen, expected[..15_360]);
        assert_eq!(driver.counter("blk_vda_read_bytes"), 15_360);
    });
}

#[test]
fn write_then_flush_reaches_the_files() {
    with_both_engines(|io_uring| {
        let (mut driver, map) = start(SliceDisk::ReadWrite, io_uring);
        let (first, second) = (file(&[]), file(&[9; 100]));
        map_file(&map, &first, 4096, 0, 4096);
        map_file(&map, &second, 8192, 4096, 4096);
        let data = pattern(4096, 3);
        driver.write_memory(DATA, &data);
        assert_eq!(
            request(&mut driver, blk::VIRTIO_BLK_T_OUT, 12, &[readable(DATA, 4096)]),
            OK
        );
        assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        let mut seen = vec![0; 2048];
        first.read_exact_at(&mut seen, 2048).unwrap();
        assert_eq!(seen, data[..2048]);
        second.read_exact_at(&mut seen, 4096).unwrap();
        assert_eq!(seen, data[2048..]);
        assert_eq!(driver.counter("blk_vdb_write_bytes"), 4096);
    });
}

#[test]
fn unmapped_parts_fail_and_come_and_go_while_running() {
    with_both_engines(|io_uring| {
        let (mut driver, map) = start(SliceDisk::ReadWrite, io_uring);
        let one = file(&pattern(8192, 4));
        for (sector, n) in [(0, 512), (u64::from(u32::MAX), 512), (8, 8192)] {
            assert_eq!(
                request(&mut driver, blk::VIRTIO_BLK_T_IN, sector, &[writable(DATA, n)]),
                IO_ERROR
            );
        }
        map_file(&map, &one, 0, 0, 8192);
        assert_eq!(
            request(&mut driver, blk::VIRTIO_BLK_T_IN, 8, &[writable(DATA, 4096)]),
            OK
        );
        assert_eq!(
            request(&mut driver, blk::VIRTIO_BLK_T_IN, 8, &[writable(DATA, 4608)]),
            IO_ERROR
        );
        assert_eq!(map.remove(0..8192), Ok(1));
        assert_eq!(
            request(&mut driver, blk::VIRTIO_BLK_T_IN, 8, &[writable(DATA, 4096)]),
            IO_ERROR
        );
        // What was written before the removal needs no flush any more, and does not keep the file open.
        assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert_eq!(driver.counter("blk_vdb_failures"), 5);
    });
}

#[test]
fn read_only_disk_refuses_changes() {
    let (mut driver, map) = start(SliceDisk::ReadOnly, false);
    let one = file(&[5; 8192]);
    map_file(&map, &one, 0, 0, 8192);
    assert_eq!(
        request(&mut driver, blk::VIRTIO_BLK_T_OUT, 0, &[readable(DATA, 512)]),
        IO_ERROR
    );
    for kind in [blk::VIRTIO_BLK_T_DISCARD, blk::VIRTIO_BLK_T_WRITE_ZEROES] {
        let data = segment(&driver, 0, 8, 0);
        assert_eq!(request(&mut driver, kind, 0, &[data]), IO_ERROR);
    }
    let mut content = [0; 8192];
    one.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(content, [5; 8192]);
}

#[test]
fn identity_is_per_disk() {
    for (disk, name) in [
        (SliceDisk::ReadOnly, "eci-read-only"),
        (SliceDisk::ReadWrite, "eci-read-write"),
    ] {
        let (mut driver, _map) = start(disk, false);
        assert_eq!(
            request(&mut driver, blk::VIRTIO_BLK_T_GET_ID, 0, &[writable(DATA, 20)]),
            OK
        );
        let seen = driver.read_memory(DATA, 20);
        assert_eq!(String::from_utf8(seen).unwrap().trim_end_matches('\0'), name);
    }
}

#[test]
fn discard_and_write_zeroes_make_holes() {
    let (mut driver, map) = start(SliceDisk::ReadWrite, true);
    let one = file(&vec![7; 1 << 20]);
    one.sync_all().unwrap();
    map_file(&map, &one, 0, 0, 1 << 20);
    let before = one.metadata().unwrap().blocks();
    for (kind, sector, flags) in [
        (blk::VIRTIO_BLK_T_DISCARD, 0, 0),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, 512, 0),
        (
            blk::VIRTIO_BLK_T_WRITE_ZEROES,
            1024,
            blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
        ),
    ] {
        let data = segment(&driver, sector, 256, flags);
        assert_eq!(request(&mut driver, kind, 0, &[data]), OK);
        let mut seen = vec![1; 256 * 512];
        one.read_exact_at(&mut seen, sector * 512).unwrap();
        assert!(seen.iter().all(|&byte| byte == 0));
    }
    assert_eq!(one.metadata().unwrap().len(), 1 << 20);
    assert!(one.metadata().unwrap().blocks() < before);
    // Unknown flags, too long, two segments, outside.
    for (kind, n_sectors, flags, status) in [
        (blk::VIRTIO_BLK_T_DISCARD, 8, 1, UNSUPPORTED),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, 8, 2, UNSUPPORTED),
        (blk::VIRTIO_BLK_T_DISCARD, u32::MAX, 0, IO_ERROR),
        (blk::VIRTIO_BLK_T_DISCARD, 4096, 0, IO_ERROR),
    ] {
        let data = segment(&driver, 0, n_sectors, flags);
        assert_eq!(request(&mut driver, kind, 0, &[data]), status);
    }
    assert_eq!(
        request(&mut driver, blk::VIRTIO_BLK_T_DISCARD, 0, &[readable(DATA, 32)]),
        IO_ERROR
    );
}

#[test]
fn hostile_requests_are_refused_and_the_disk_lives_on() {
    with_both_engines(|io_uring| {
        let (mut driver, map) = start(SliceDisk::ReadWrite, io_uring);
        map_file(&map, &file(&[3; 8192]), 0, 0, 8192);
        let read = blk::VIRTIO_BLK_T_IN;
        // Not whole sectors; past the end; overflowing; too long; unknown.
        assert_eq!(request(&mut driver, read, 0, &[writable(DATA, 513)]), IO_ERROR);
        assert_eq!(
            request(&mut driver, read, SLICE_DISK_BYTES / 512, &[writable(DATA, 512)]),
            IO_ERROR
        );
        assert_eq!(
            request(&mut driver, read, u64::MAX, &[writable(DATA, 512)]),
            IO_ERROR
        );
        assert_eq!(
            request(&mut driver, read, u64::MAX / 512, &[writable(DATA, 512)]),
            IO_ERROR
        );
        assert_eq!(
            request(&mut driver, read, 0, &[writable(DATA, 32 << 20)]),
            IO_ERROR
        );
        assert_eq!(request(&mut driver, 77, 0, &[]), UNSUPPORTED);
        // Wrong direction: a read without room for data is a read of nothing.
        assert_eq!(request(&mut driver, read, 0, &[readable(DATA, 512)]), OK);
        // No answer possible: short header, no status, data outside of memory.
        for chain in [
            vec![readable(HEADER, 15), writable(STATUS, 1)],
            vec![readable(HEADER, 16)],
            vec![writable(STATUS, 1)],
            vec![readable(HEADER, 16), writable(1 << 45, 512), writable(STATUS, 1)],
            vec![readable(HEADER, 16), writable(STATUS, 1), readable(DATA, 512)],
        ] {
            driver.add(0, &chain);
            driver.kick(0);
            assert_eq!(driver.wait_used(0).1, 0);
        }
        assert_eq!(driver.counter("blk_vdb_bad_requests"), 5);
        // Header and data in one descriptor, status behind data in another: framing is the driver's business.
        driver.write_memory(HEADER, &[0; 16]);
        driver.add(
            0,
            &[readable(HEADER, 7), readable(HEADER + 7, 9), writable(DATA, 513)],
        );
        driver.kick(0);
        assert_eq!(driver.wait_used(0).1, 513);
        assert_eq!(driver.read_memory(DATA, 513), [&[3; 512][..], &[OK]].concat());
    });
}

#[test]
fn many_requests_in_flight_then_reset() {
    with_both_engines(|io_uring| {
        let (mut driver, map) = start(SliceDisk::ReadWrite, io_uring);
        let one = file(&pattern(1 << 20, 5));
        map_file(&map, &one, 0, 0, 1 << 20);
        for slot in 0..80 {
            let data = writable(DATA + slot * 4096, 4096);
            begin(&mut driver, blk::VIRTIO_BLK_T_IN, slot * 8, &[data], slot);
        }
        driver.kick(0);
        for _ in 0..80 {
            assert_eq!(driver.wait_used(0).1, 4097);
        }
        let mut expected = Vec::new();
        (&one).rewind().unwrap();
        (&one).take(80 * 4096).read_to_end(&mut expected).unwrap();
        assert_eq!(driver.read_memory(DATA, 80 * 4096), expected);
        // A reset in the middle of as many.
        for slot in 0..80 {
            begin(
                &mut driver,
                blk::VIRTIO_BLK_T_IN,
                slot * 8,
                &[writable(DATA, 4096)],
                slot,
            );
        }
        driver.kick(0);
        driver.negotiate(0);
        driver.set_up_queues();
        driver.set_status(15);
        assert_eq!(
            request(&mut driver, blk::VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]),
            OK
        );
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random writes and reads over several extents agree with one big array.
    #[test]
    fn disk_behaves_like_an_array(
        io_uring: bool,
        operations in proptest::collection::vec((any::<bool>(), 0_u64..40, 1_usize..24, 0_usize..200), 1..30),
    ) {
        let (mut driver, map) = start(SliceDisk::ReadWrite, io_uring);
        let files = [file(&[]), file(&[])];
        // 16 KiB in four extents, out of order over two files.
        for (i, (index, page)) in [(1, 3), (0, 0), (1, 1), (0, 7)].into_iter().enumerate() {
            map_file(&map, &files[index], i as u64 * 4096, page * 4096, 4096);
        }
        let mut model = vec![0; 16384];
        for (write, sector, n_sectors, seed) in operations {
            let start = usize::try_from(sector).unwrap() * 512;
            let length = n_sectors * 512;
            let inside = start + length <= model.len();
            let halves = |writable| {
                let make = if writable { super::tests::writable } else { super::tests::readable };
                [make(DATA, length - 200), make(DATA + length as u64 - 200, 200)]
            };
            if write {
                let data = pattern(length, seed);
                driver.write_memory(DATA, &data);
                let status = request(&mut driver, blk::VIRTIO_BLK_T_OUT, sector, &halves(false));
                prop_assert_eq!(status == OK, inside);
                if inside {
                    model[start..start + length].copy_from_slice(&data);
                }
            } else {
                let status = request(&mut driver, blk::VIRTIO_BLK_T_IN, sector, &halves(true));
                prop_assert_eq!(status == OK, inside);
                if inside {
                    prop_assert_eq!(driver.read_memory(DATA, length), &model[start..start + length]);
                }
            }
        }
    }
}
