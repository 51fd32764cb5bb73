//! The header of a packet (virtio 1.2, 5.10.6). No I/O.
//!
//! `virtio_vsock::packet::VsockPacket` wants a packet's data in one descriptor; Linux 6.7 and newer cut zero-copy packets
//! into one per page, so packets are ranges here.

use crate::devices::virtio::chain::{ChainError, Ranges};
use crate::memory::GuestMemory;

/// Length of `struct virtio_vsock_hdr`.
pub(super) const HEADER_BYTES: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;

/// The sender of a shutdown receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of a shutdown sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `VIRTIO_VSOCK_OP_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    fn from_number(number: u16) -> Option<Op> {
        let all = [
            Op::Request,
            Op::Response,
            Op::Reset,
            Op::Shutdown,
            Op::Data,
            Op::CreditUpdate,
            Op::CreditRequest,
        ];
        all.into_iter().find(|op| *op as u16 == number)
    }
}

/// A decoded header. `op` is `None` for numbers that have no meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) length: u32,
    pub(super) socket_type: u16,
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Header {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            length: u32_at(24),
            socket_type: u16_at(28),
            op: Op::from_number(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &self.socket_type.to_le_bytes());
        put(30, &self.op.map_or(0, |op| op as u16).to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers a packet nobody expects.
    pub(super) fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            length: 0,
            socket_type: self.socket_type,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

/// Cuts a packet of the driver into its header, copied once, and its data.
///
/// # Errors
/// `TooShort` when there is no whole header, or less data than the header says.
pub(super) fn parse(mut readable: Ranges, memory: &GuestMemory) -> Result<(Header, Ranges), ChainError> {
    let header_range = readable.split_front(HEADER_BYTES)?;
    let mut bytes = [0; HEADER_BYTES];
    if header_range.read(memory, &mut bytes) != HEADER_BYTES {
        return Err(ChainError::TooShort);
    }
    let header = Header::decode(&bytes);
    let length = usize::try_from(header.length).map_err(|_| ChainError::TooShort)?;
    let data = readable.split_front(length)?;
    Ok((header, data))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::virtio::chain::GuestRange;

    proptest! {
        #[test]
        fn decode_and_encode_agree(bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES), op in 0_u16..9) {
            let mut bytes: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            let header = Header::decode(&bytes);
            prop_assert_eq!(header.op.is_some(), (1..=7).contains(&op));
            if header.op.is_none() {
                bytes[30..32].fill(0);
            }
            prop_assert_eq!(header.encode(), bytes);
        }

        /// However it is cut, a packet is accepted exactly when its data is all there.
        #[test]
        fn parse_takes_what_the_header_says(lengths in proptest::collection::vec(0_u32..60, 0..6), says in 0_u32..200) {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
            let mut header = Header::decode(&[0; HEADER_BYTES]);
            header.length = says;
            memory.write_slice(&header.encode(), GuestAddress(64)).unwrap();
            let mut at = 64;
            let ranges: Vec<_> = lengths.iter().map(|&length| {
                let range = GuestRange { address: GuestAddress(at), length };
                at += u64::from(length);
                range
            }).collect();
            let readable = Ranges::from(ranges);
            let enough = readable.len() >= HEADER_BYTES + says as usize;
            let whole = readable.len();
            match parse(readable, &memory) {
                Ok((parsed, data)) => {
                    prop_assert!(enough);
                    prop_assert_eq!(parsed, header);
                    prop_assert_eq!(data.len(), says as usize);
                }
                Err(e) => {
                    prop_assert!(!enough, "{} bytes", whole);
                    prop_assert_eq!(e, ChainError::TooShort);
                }
            }
        }
    }
}
