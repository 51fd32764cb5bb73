//! The driver's requests and their answers (virtio 1.2, 5.15.6.1; linux/virtio_mem.h). No I/O.

/// Length of `struct virtio_mem_req`.
pub(super) const REQUEST_BYTES: usize = 24;
/// Length of `struct virtio_mem_resp`.
pub(super) const RESPONSE_BYTES: usize = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// What the driver asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Give it these blocks.
    Plug {
        /// Guest address of the first.
        address: u64,
        /// How many.
        n_blocks: u16,
    },
    /// Take these blocks back.
    Unplug {
        /// Guest address of the first.
        address: u64,
        /// How many.
        n_blocks: u16,
    },
    /// Take all back.
    UnplugAll,
    /// Are these blocks plugged?
    State {
        /// Guest address of the first.
        address: u64,
        /// How many.
        n_blocks: u16,
    },
}

/// What it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// It is done.
    Done,
    /// That would be more than the owner wants it to have.
    Refused,
    /// Not now.
    Busy,
    /// Such a request makes no sense.
    Error,
    /// All those blocks are plugged.
    Plugged,
    /// None of them is.
    Unplugged,
    /// Some are.
    Mixed,
}

impl Request {
    /// Reads a request; `None` for one of a type that does not exist.
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        // Type, 6 bytes of padding, address, number of blocks, 6 bytes of padding.
        let [
            t0,
            t1,
            _,
            _,
            _,
            _,
            _,
            _,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            n0,
            n1,
            ..,
        ] = *bytes;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let n_blocks = u16::from_le_bytes([n0, n1]);
        match u16::from_le_bytes([t0, t1]) {
            PLUG => Some(Request::Plug { address, n_blocks }),
            UNPLUG => Some(Request::Unplug { address, n_blocks }),
            UNPLUG_ALL => Some(Request::UnplugAll),
            STATE => Some(Request::State { address, n_blocks }),
            _ => None,
        }
    }
}

impl Response {
    /// As the driver reads it: type, 6 bytes of padding, and the state where it was asked for.
    pub(super) fn to_bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state): (u16, u16) = match self {
            Response::Done | Response::Plugged => (ACK, 0),
            Response::Unplugged => (ACK, 1),
            Response::Mixed => (ACK, 2),
            Response::Refused => (NACK, 0),
            Response::Busy => (BUSY, 0),
            Response::Error => (ERROR, 0),
        };
        let mut bytes = [0; RESPONSE_BYTES];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}
