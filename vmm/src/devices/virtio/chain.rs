//! A descriptor chain as two lists of guest memory ranges, checked once. No I/O.
//!
//! Devices may not assume how a driver cuts a message into descriptors (virtio 1.2, 2.7.4), so everything after this file
//! works on ranges and byte counts.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory as _, Permissions};

use crate::memory::GuestMemory;
pub use crate::sys::iovec::GuestRange;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It ends at a descriptor that points nowhere, loops, or is longer than 4 GiB.
    #[error("the descriptor chain is broken")]
    Broken,
    /// More descriptors than the device takes.
    #[error("the descriptor chain has more than {limit} descriptors")]
    TooLong {
        /// The device's limit.
        limit: usize,
    },
    /// A readable descriptor after a writable one (virtio 1.2, 2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    Order,
    /// A buffer outside of guest memory.
    #[error("a buffer of {length:#x} bytes at {address:#x} is not inside guest memory")]
    OutsideMemory {
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// Fewer bytes than the device needs.
    #[error("the descriptor chain is too short")]
    TooShort,
}

/// The buffers of one chain: readable ones come first in the chain, each list in chain order, without empty ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers {
    /// What the driver says.
    pub readable: Ranges,
    /// Where the device answers.
    pub writable: Ranges,
}

impl Buffers {
    /// Walks `chain` once and checks every descriptor.
    ///
    /// # Errors
    /// The first [`ChainError`] found; never [`ChainError::TooShort`].
    pub fn parse<M>(mut chain: DescriptorChain<M>, max_descriptors: usize) -> Result<Self, ChainError>
    where
        M: Deref<Target = GuestMemory>,
    {
        let mut buffers = Buffers::default();
        let mut n_descriptors = 0;
        // The iterator ends silently at a bad descriptor: the last one then still announces a next one.
        let mut announced = true;
        while let Some(descriptor) = chain.next() {
            n_descriptors += 1;
            if n_descriptors > max_descriptors {
                return Err(ChainError::TooLong {
                    limit: max_descriptors,
                });
            }
            announced = descriptor.has_next();
            let range = GuestRange {
                address: descriptor.addr(),
                length: descriptor.len(),
            };
            if range.length == 0 {
                continue;
            }
            let access = if descriptor.is_write_only() {
                Permissions::Write
            } else {
                Permissions::Read
            };
            if !chain.memory().check_range(range.address, range.len(), access) {
                return Err(ChainError::OutsideMemory {
                    address: range.address.0,
                    length: range.length,
                });
            }
            if descriptor.is_write_only() {
                buffers.writable.push(range);
            } else if buffers.writable.is_empty() {
                buffers.readable.push(range);
            } else {
                return Err(ChainError::Order);
            }
        }
        if announced {
            Err(ChainError::Broken)
        } else {
            Ok(buffers)
        }
    }
}

/// Guest memory ranges in order, none of them empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    ranges: Vec<GuestRange>,
    length: usize,
}

impl Ranges {
    fn push(&mut self, range: GuestRange) {
        self.length += range.len();
        self.ranges.push(range);
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.length
    }

    /// No bytes at all.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The ranges.
    pub fn as_slice(&self) -> &[GuestRange] {
        &self.ranges
    }

    /// Takes the first `n` bytes away.
    ///
    /// # Errors
    /// [`ChainError::TooShort`]; then nothing changes.
    pub fn split_front(&mut self, n: usize) -> Result<Ranges, ChainError> {
        if self.length < n {
            return Err(ChainError::TooShort);
        }
        let mut front = Ranges::default();
        let mut n_whole = 0;
        for range in &mut self.ranges {
            let wanted = n - front.length;
            if wanted == 0 {
                break;
            }
            let taken = range.prefix(wanted);
            front.push(taken);
            *range = range.suffix(taken.len());
            if range.length == 0 {
                n_whole += 1;
            }
        }
        self.ranges.drain(..n_whole);
        self.length -= n;
        Ok(front)
    }

    /// Takes the last `n` bytes away.
    ///
    /// # Errors
    /// [`ChainError::TooShort`]; then nothing changes.
    pub fn split_back(&mut self, n: usize) -> Result<Ranges, ChainError> {
        let kept = self.length.checked_sub(n).ok_or(ChainError::TooShort)?;
        let front = self.split_front(kept)?;
        Ok(std::mem::replace(self, front))
    }

    /// Keeps the first `n` bytes only.
    pub fn truncate(&mut self, n: usize) {
        if let Ok(front) = self.split_front(n) {
            *self = front;
        }
    }

    /// Copies the first bytes of the ranges into `buffer`, and says how many.
    pub fn read(&self, memory: &GuestMemory, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for range in &self.ranges {
            let part = range.prefix(buffer.len() - done);
            if part.length == 0
                || memory
                    .read_slice(&mut buffer[done..done + part.len()], part.address)
                    .is_err()
            {
                break;
            }
            done += part.len();
        }
        done
    }

    /// Copies `bytes` to the start of the ranges, and says how many fit.
    pub fn write(&self, memory: &GuestMemory, bytes: &[u8]) -> usize {
        let mut done = 0;
        for range in &self.ranges {
            let part = range.prefix(bytes.len() - done);
            if part.length == 0
                || memory
                    .write_slice(&bytes[done..done + part.len()], part.address)
                    .is_err()
            {
                break;
            }
            done += part.len();
        }
        done
    }

    /// Writes zeroes from byte `offset` on to the end.
    pub fn zero_from(&self, memory: &GuestMemory, offset: usize) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut rest = self.clone();
        if rest.split_front(offset).is_err() {
            return;
        }
        for range in &rest.ranges {
            let mut range = *range;
            while range.length != 0 {
                let part = range.prefix(ZEROES.len());
                // The range was checked when the chain was parsed, and memory regions stay.
                let _ = memory.write_slice(&ZEROES[..part.len()], part.address);
                range = range.suffix(part.len());
            }
        }
    }
}

#[cfg(any(test, fuzzing))]
impl From<Vec<GuestRange>> for Ranges {
    fn from(ranges: Vec<GuestRange>) -> Self {
        let mut all = Ranges::default();
        ranges
            .into_iter()
            .filter(|range| range.length != 0)
            .for_each(|range| all.push(range));
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    proptest! {
        /// Splitting keeps every byte once and in order.
        #[test]
        fn split_partitions(lengths in proptest::collection::vec(0_u32..50, 0..8), at in 0_usize..450, back: bool) {
            let mut address = 0;
            let ranges: Vec<_> = lengths.iter().map(|&length| {
                address += 1000;
                GuestRange { address: GuestAddress(address), length }
            }).collect();
            let all = Ranges::from(ranges);
            let bytes = |ranges: &Ranges| -> Vec<u64> {
                ranges.as_slice().iter().flat_map(|r| r.address.0..r.address.0 + u64::from(r.length)).collect()
            };
            let mut rest = all.clone();
            let taken = if back { rest.split_back(at) } else { rest.split_front(at) };
            match taken {
                Err(e) => {
                    prop_assert_eq!(e, ChainError::TooShort);
                    prop_assert!(at > all.len());
                    prop_assert_eq!(rest, all);
                }
                Ok(taken) => {
                    prop_assert_eq!(taken.len(), at);
                    prop_assert_eq!(taken.len() + rest.len(), all.len());
                    prop_assert_eq!(bytes(&taken).len(), taken.len());
                    let (first, second) = if back { (&rest, &taken) } else { (&taken, &rest) };
                    prop_assert_eq!([bytes(first), bytes(second)].concat(), bytes(&all));
                }
            }
        }
    }

    #[test]
    fn zero_from_touches_only_the_tail() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        memory.write_slice(&[0xff; 0x6000], GuestAddress(0)).unwrap();
        let ranges = Ranges::from(vec![
            GuestRange {
                address: GuestAddress(0),
                length: 10,
            },
            GuestRange {
                address: GuestAddress(100),
                length: 0x2000,
            },
        ]);
        ranges.zero_from(&memory, 15);
        let mut seen = vec![0; 0x3000];
        memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
        assert!(seen[..105].iter().all(|&b| b == 0xff));
        assert!(seen[105..100 + 0x2000].iter().all(|&b| b == 0));
        assert!(seen[100 + 0x2000..].iter().all(|&b| b == 0xff));
    }
}
