//! From the buffers of a chain to a block request (virtio 1.2, 5.2.6). No I/O.

use virtio_bindings::virtio_blk as blk;
use vm_memory::GuestAddress;

use super::{MAX_DISCARD_SECTORS, MAX_REQUEST_BYTES, MAX_WRITE_ZEROES_SECTORS, SECTOR_BYTES};
use crate::config::{SLICE_DISK_BYTES, SliceDisk};
use crate::devices::virtio::chain::{Buffers, ChainError, Ranges};
use crate::memory::GuestMemory;

/// `struct virtio_blk_outhdr`: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const SEGMENT_BYTES: usize = 16;

/// How a request ended, as the driver sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request that can be answered: it has a place for its status.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// What to do, or the answer where the request itself is wrong.
    pub(super) operation: Result<Operation, Status>,
}

/// Offsets and lengths are bytes on the disk, whole sectors, and inside of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read {
        offset: u64,
        into: Ranges,
    },
    Write {
        offset: u64,
        from: Ranges,
    },
    Flush,
    Identify {
        into: Ranges,
    },
    Discard {
        offset: u64,
        length: u64,
    },
    WriteZeroes {
        offset: u64,
        length: u64,
        may_unmap: bool,
    },
}

impl Request {
    /// Reads the header (and the segment of a discard) once, and checks everything in it.
    ///
    /// # Errors
    /// `TooShort` unless there are a header and a status byte; such a chain cannot be answered.
    pub(super) fn parse(
        mut buffers: Buffers,
        memory: &GuestMemory,
        disk: SliceDisk,
    ) -> Result<Self, ChainError> {
        let header_range = buffers.readable.split_front(HEADER_BYTES)?;
        let status_range = buffers.writable.split_back(1)?;
        let status = status_range
            .as_slice()
            .first()
            .ok_or(ChainError::TooShort)?
            .address;
        let mut header = [0; HEADER_BYTES];
        if header_range.read(memory, &mut header) != HEADER_BYTES {
            return Err(ChainError::TooShort);
        }
        Ok(Request {
            status,
            operation: parse_operation(header, buffers, memory, disk),
        })
    }
}

fn parse_operation(
    header: [u8; HEADER_BYTES],
    buffers: Buffers,
    memory: &GuestMemory,
    disk: SliceDisk,
) -> Result<Operation, Status> {
    let kind = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    let changes = matches!(
        kind,
        blk::VIRTIO_BLK_T_OUT | blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES
    );
    if changes && disk == SliceDisk::ReadOnly {
        return Err(Status::IoError);
    }
    match kind {
        blk::VIRTIO_BLK_T_IN => Ok(Operation::Read {
            offset: data_offset(sector, &buffers.writable)?,
            into: buffers.writable,
        }),
        blk::VIRTIO_BLK_T_OUT => Ok(Operation::Write {
            offset: data_offset(sector, &buffers.readable)?,
            from: buffers.readable,
        }),
        blk::VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        blk::VIRTIO_BLK_T_GET_ID => Ok(Operation::Identify {
            into: buffers.writable,
        }),
        blk::VIRTIO_BLK_T_DISCARD => {
            let (offset, length, flags) = parse_segment(&buffers.readable, memory, MAX_DISCARD_SECTORS)?;
            if flags != 0 {
                return Err(Status::Unsupported);
            }
            Ok(Operation::Discard { offset, length })
        }
        blk::VIRTIO_BLK_T_WRITE_ZEROES => {
            let (offset, length, flags) = parse_segment(&buffers.readable, memory, MAX_WRITE_ZEROES_SECTORS)?;
            if flags & !blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                return Err(Status::Unsupported);
            }
            Ok(Operation::WriteZeroes {
                offset,
                length,
                may_unmap: flags != 0,
            })
        }
        _ => Err(Status::Unsupported),
    }
}

/// The one segment of a discard or write-zeroes request (more were not offered).
fn parse_segment(ranges: &Ranges, memory: &GuestMemory, max_sectors: u32) -> Result<(u64, u64, u32), Status> {
    let mut segment = [0; SEGMENT_BYTES];
    if ranges.len() != SEGMENT_BYTES || ranges.read(memory, &mut segment) != SEGMENT_BYTES {
        return Err(Status::IoError);
    }
    let n_sectors = u32_at(&segment, 8);
    if n_sectors > max_sectors {
        return Err(Status::IoError);
    }
    let length = u64::from(n_sectors) * SECTOR_BYTES;
    Ok((
        disk_offset(u64_at(&segment, 0), length)?,
        length,
        u32_at(&segment, 12),
    ))
}

fn data_offset(sector: u64, data: &Ranges) -> Result<u64, Status> {
    let length = data.len() as u64;
    if !length.is_multiple_of(SECTOR_BYTES) || data.len() > MAX_REQUEST_BYTES {
        return Err(Status::IoError);
    }
    disk_offset(sector, length)
}

fn disk_offset(sector: u64, length: u64) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    match offset.checked_add(length) {
        Some(end) if end <= SLICE_DISK_BYTES => Ok(offset),
        _ => Err(Status::IoError),
    }
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::devices::virtio::chain::GuestRange;

    fn ranges(address: u64, lengths: &[u32]) -> Ranges {
        let mut at = address;
        let list: Vec<_> = lengths
            .iter()
            .map(|&length| {
                let range = GuestRange {
                    address: GuestAddress(at),
                    length,
                };
                at += u64::from(length);
                range
            })
            .collect();
        Ranges::from(list)
    }

    proptest! {
        /// Whatever the guest writes and however it cuts it, a request that comes out is inside the disk.
        #[test]
        fn accepted_requests_are_inside_the_disk(
            bytes in proptest::collection::vec(any::<u8>(), 64),
            kind in prop_oneof![0_u32..16, any::<u32>()],
            sector in prop_oneof![any::<u64>(), (SLICE_DISK_BYTES / 512 - 40)..(SLICE_DISK_BYTES / 512 + 2), 0_u64..99],
            readable in proptest::collection::vec(1_u32..40, 0..5),
            writable in proptest::collection::vec(prop_oneof![1_u32..1000, Just(512), Just(1)], 0..5),
            read_only: bool,
        ) {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            memory.write_slice(&bytes, GuestAddress(0x100)).unwrap();
            memory.write_obj(kind.to_le(), GuestAddress(0x100)).unwrap();
            memory.write_obj(sector.to_le(), GuestAddress(0x108)).unwrap();
            let buffers = Buffers { readable: ranges(0x100, &readable), writable: ranges(0x1000, &writable) };
            let answerable = buffers.readable.len() >= 16 && !buffers.writable.is_empty();
            let disk = if read_only { SliceDisk::ReadOnly } else { SliceDisk::ReadWrite };
            let request = Request::parse(buffers.clone(), &memory, disk);
            prop_assert_eq!(request.is_ok(), answerable);
            let Ok(request) = request else { return Ok(()) };
            prop_assert_eq!(request.status.0, 0x1000 + buffers.writable.len() as u64 - 1);
            let (offset, length) = match request.operation {
                Ok(Operation::Read { offset, into }) => (offset, into.len() as u64),
                Ok(Operation::Write { offset, from }) => {
                    prop_assert!(!read_only);
                    (offset, from.len() as u64)
                }
                Ok(Operation::Discard { offset, length } | Operation::WriteZeroes { offset, length, .. }) => {
                    prop_assert!(!read_only);
                    (offset, length)
                }
                Ok(Operation::Flush | Operation::Identify { .. }) | Err(_) => (0, 0),
            };
            prop_assert!(offset.checked_add(length).is_some_and(|end| end <= SLICE_DISK_BYTES));
            prop_assert!(offset.is_multiple_of(512) && length.is_multiple_of(512));
        }
    }
}
