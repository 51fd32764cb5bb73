//! Partitions of a disk, told to the kernel one at a time (`BLKPG`, `linux/blkpg.h`).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `_IO(0x12, 105)` of `linux/blkpg.h`.
const BLKPG: libc::Ioctl = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
const BLKPG_DEL_PARTITION: libc::c_int = 2;
const BLKPG_RESIZE_PARTITION: libc::c_int = 3;
/// `EXT4_IOC_RESIZE_FS`, `_IOW('f', 16, __u64)` of `linux/ext4.h`.
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;

#[repr(C)]
struct BlkpgPartition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

#[repr(C)]
struct BlkpgIoctlArg {
    op: libc::c_int,
    flags: libc::c_int,
    data_length: libc::c_int,
    data: *mut BlkpgPartition,
}

fn blkpg(disk: BorrowedFd<'_>, op: libc::c_int, start: i64, length: i64, number: i32) -> io::Result<()> {
    let mut partition = BlkpgPartition {
        start,
        length,
        number,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let data_length = libc::c_int::try_from(size_of::<BlkpgPartition>()).expect("the structure is 152 bytes");
    let mut argument = BlkpgIoctlArg {
        op,
        flags: 0,
        data_length,
        data: &raw mut partition,
    };
    // SAFETY: `argument` and the `partition` it points to are live for the call, laid out as linux/blkpg.h says, and
    // the kernel writes to neither.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw mut argument) };
    super::check(result.into()).map(drop)
}

/// Adds partition `number`, `length` bytes from byte `start` of `disk`.
///
/// # Errors
/// What the kernel answers: `EBUSY` when the partition exists or overlaps another.
pub fn add_partition(disk: BorrowedFd<'_>, number: i32, start: i64, length: i64) -> io::Result<()> {
    blkpg(disk, BLKPG_ADD_PARTITION, start, length, number)
}

/// Removes partition `number` of `disk`.
///
/// # Errors
/// What the kernel answers: `EBUSY` while the partition is open.
pub fn remove_partition(disk: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    blkpg(disk, BLKPG_DEL_PARTITION, 0, 0, number)
}

/// Gives partition `number` of `disk`, which begins at byte `start`, the length `length`; it may be mounted.
///
/// # Errors
/// What the kernel answers: `EBUSY` when it would overlap another.
pub fn resize_partition(disk: BorrowedFd<'_>, number: i32, start: i64, length: i64) -> io::Result<()> {
    blkpg(disk, BLKPG_RESIZE_PARTITION, start, length, number)
}

/// Grows the mounted ext4 file system that `directory` is on to `n_blocks` of its blocks.
///
/// # Errors
/// What the kernel answers: `EINVAL` when it has more.
pub fn grow_ext4(directory: &std::fs::File, n_blocks: u64) -> io::Result<()> {
    // SAFETY: the kernel reads the one number that the argument points to, which is live for the call.
    let result = unsafe { libc::ioctl(directory.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const n_blocks) };
    super::check(result.into()).map(drop)
}
