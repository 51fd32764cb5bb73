//! Which blocks of the region are plugged, and what may be. Pure state, no I/O.

use std::ops::Range;

use super::request::{Request, Response};

/// Smallest block: a huge page of the host, so that a plugged block can be one.
const MIN_BLOCK_BYTES: u64 = 2 << 20;
/// Most blocks of a region: larger regions have larger blocks.
const MAX_BLOCKS: u64 = 1 << 15;
/// How far beyond the requested size the driver may plug blocks (not how many). Linux adds memory in pieces of 128 MiB
/// and may have begun one that it cannot fill: without room for two more it would not reach the requested size.
const USABLE_EXTRA_BYTES: u64 = 256 << 20;

/// The region's blocks and sizes.
#[derive(Debug)]
pub(super) struct Blocks {
    address: u64,
    block_bytes: u64,
    plugged: Vec<bool>,
    n_plugged: u64,
    requested_bytes: u64,
    usable_bytes: u64,
}

/// What a request leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The answer; all is done.
    Answer(Response),
    /// These blocks are to be given back to the host, and then [`Blocks::unplugged`] to be told.
    GiveBack(Range<usize>),
}

impl Blocks {
    /// A region of `region_bytes` from `address`, nothing of it plugged or requested.
    pub(super) fn new(address: u64, region_bytes: u64) -> Self {
        let block_bytes = (region_bytes / MAX_BLOCKS)
            .next_power_of_two()
            .max(MIN_BLOCK_BYTES);
        let n_blocks = usize::try_from(region_bytes / block_bytes).expect("MAX_BLOCKS is a small number");
        Blocks {
            address,
            block_bytes,
            plugged: vec![false; n_blocks],
            n_plugged: 0,
            requested_bytes: 0,
            usable_bytes: 0,
        }
    }

    /// Sizes and plugged blocks, for a snapshot: requested and usable bytes, then one byte a block up to the last that is
    /// plugged. [`is_untouched`] knows this form.
    pub(super) fn save(&self) -> Vec<u8> {
        let sizes = [self.requested_bytes, self.usable_bytes].map(u64::to_le_bytes);
        let n_blocks = self.end_of_plugged();
        let blocks = self.plugged[..n_blocks].iter().map(|plugged| u8::from(*plugged));
        sizes.into_iter().flatten().chain(blocks).collect()
    }

    /// Number of the block behind the last that is plugged.
    fn end_of_plugged(&self) -> usize {
        let last = self.plugged.iter().rposition(|plugged| *plugged);
        last.map_or(0, |index| index + 1)
    }

    /// Takes what [`Blocks::save`] of a region like this one gave; `false`, and nothing changes, when it cannot be that.
    pub(super) fn load(&mut self, saved: &[u8]) -> bool {
        let Some((sizes, blocks)) = saved.split_at_checked(16) else {
            return false;
        };
        let ([requested, usable], []) = sizes.as_chunks() else {
            return false;
        };
        let [requested, usable] = [u64::from_le_bytes(*requested), u64::from_le_bytes(*usable)];
        let last_end = blocks.len() as u64 * self.block_bytes;
        let is_possible = blocks.len() <= self.plugged.len()
            && blocks.last().is_none_or(|last| *last != 0)
            && usable <= self.region_bytes()
            && requested <= usable
            && last_end <= usable;
        if is_possible {
            self.requested_bytes = requested;
            self.usable_bytes = usable;
            self.plugged.fill(false);
            for (plugged, byte) in self.plugged.iter_mut().zip(blocks) {
                *plugged = *byte != 0;
            }
            self.n_plugged = self.plugged.iter().filter(|plugged| **plugged).count() as u64;
        }
        is_possible
    }

    /// Something is plugged or asked for, or was.
    pub(super) fn is_in_use(&self) -> bool {
        self.usable_bytes != 0
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn region_bytes(&self) -> u64 {
        self.plugged.len() as u64 * self.block_bytes
    }

    pub(super) fn usable_bytes(&self) -> u64 {
        self.usable_bytes
    }

    pub(super) fn plugged_bytes(&self) -> u64 {
        self.n_plugged * self.block_bytes
    }

    pub(super) fn requested_bytes(&self) -> u64 {
        self.requested_bytes
    }

    /// Sets the size the driver is to reach: whole blocks, at most the region. The usable part only grows here: the
    /// driver may have blocks in what is there (virtio 1.2, 5.15.5).
    pub(super) fn request(&mut self, bytes: u64) {
        self.requested_bytes = bytes;
        self.usable_bytes = self.usable_bytes.max(self.usable_for(bytes));
    }

    fn usable_for(&self, requested_bytes: u64) -> u64 {
        match requested_bytes {
            0 => 0,
            bytes => bytes.saturating_add(USABLE_EXTRA_BYTES).min(self.region_bytes()),
        }
    }

    /// Decides about a request, and carries it out as far as no memory has to be given back for it.
    pub(super) fn decide(&mut self, request: Request) -> Verdict {
        let error = Verdict::Answer(Response::Error);
        match request {
            Request::Plug { address, n_blocks } => {
                let Some(blocks) = self.usable(address, n_blocks) else {
                    return error;
                };
                if self.n_plugged_of(&blocks) != 0 {
                    return error;
                }
                let after = self.plugged_bytes() + blocks.len() as u64 * self.block_bytes;
                if after > self.requested_bytes {
                    return Verdict::Answer(Response::Refused);
                }
                self.n_plugged += blocks.len() as u64;
                self.plugged[blocks].fill(true);
                Verdict::Answer(Response::Done)
            }
            Request::Unplug { address, n_blocks } => match self.usable(address, n_blocks) {
                Some(blocks) if self.n_plugged_of(&blocks) == blocks.len() => Verdict::GiveBack(blocks),
                _ => error,
            },
            Request::UnplugAll => Verdict::GiveBack(0..self.plugged.len()),
            Request::State { address, n_blocks } => {
                let Some(blocks) = self.usable(address, n_blocks) else {
                    return error;
                };
                let n_plugged = self.n_plugged_of(&blocks);
                Verdict::Answer(match n_plugged {
                    0 => Response::Unplugged,
                    n if n == blocks.len() => Response::Plugged,
                    _ => Response::Mixed,
                })
            }
        }
    }

    /// These blocks are no longer the guest's. When all are gone, the usable part shrinks to what the requested size needs.
    pub(super) fn unplugged(&mut self, blocks: Range<usize>) {
        self.n_plugged -= self.n_plugged_of(&blocks) as u64;
        let all = blocks.len() == self.plugged.len();
        self.plugged[blocks].fill(false);
        if all {
            self.usable_bytes = self.usable_for(self.requested_bytes);
        }
    }

    /// The blocks' guest addresses.
    pub(super) fn addresses(&self, blocks: &Range<usize>) -> Range<u64> {
        let at = |index: usize| self.address + index as u64 * self.block_bytes;
        at(blocks.start)..at(blocks.end)
    }

    /// The runs of plugged blocks among these.
    pub(super) fn plugged_runs(&self, blocks: &Range<usize>) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for index in blocks.clone().filter(|index| self.plugged[*index]) {
            match runs.last_mut() {
                Some(last) if last.end == index => last.end += 1,
                _ => runs.push(index..index + 1),
            }
        }
        runs
    }

    fn n_plugged_of(&self, blocks: &Range<usize>) -> usize {
        self.plugged[blocks.clone()]
            .iter()
            .filter(|plugged| **plugged)
            .count()
    }

    /// The numbers of `n_blocks` blocks from `address` on: at least one, aligned, all in the usable part.
    fn usable(&self, address: u64, n_blocks: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.address)?;
        let length = u64::from(n_blocks) * self.block_bytes;
        let end = offset.checked_add(length)?;
        if n_blocks == 0 || !offset.is_multiple_of(self.block_bytes) || end > self.usable_bytes {
            return None;
        }
        let index = |offset: u64| usize::try_from(offset / self.block_bytes).ok();
        Some(index(offset)?..index(end)?)
    }
}

/// Whether [`Blocks::save`] gave this of a region that nobody asked anything of.
pub(super) fn is_untouched(saved: &[u8]) -> bool {
    saved.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: u64 = 1 << 32;
    const BLOCK: u64 = 2 << 20;

    #[test]
    fn blocks_grow_with_the_region() {
        for (region_gib, block_mib) in [(1, 2), (64, 2), (65, 4), (128, 4), (512, 16), (1000, 32)] {
            let blocks = Blocks::new(BASE, region_gib << 30);
            assert_eq!(blocks.block_bytes(), block_mib << 20, "{region_gib} GiB");
            assert!(blocks.plugged.len() <= 1 << 15);
        }
    }

    #[test]
    fn a_clone_has_what_was_plugged_and_impossible_states_are_refused() {
        let mut blocks = Blocks::new(BASE, 64 * BLOCK);
        blocks.request(8 * BLOCK);
        let address = BASE + 3 * BLOCK;
        let plug = Request::Plug { address, n_blocks: 5 };
        assert_eq!(blocks.decide(plug), Verdict::Answer(Response::Done));
        let saved = blocks.save();
        assert!(!is_untouched(&saved) && is_untouched(&Blocks::new(BASE, 64 * BLOCK).save()));
        let mut clone = Blocks::new(BASE, 64 * BLOCK);
        assert!(clone.load(&saved));
        assert_eq!(clone.save(), saved);
        assert_eq!(clone.plugged_bytes(), 5 * BLOCK);
        let unplug = Request::Unplug { address, n_blocks: 5 };
        assert_eq!(clone.decide(unplug), Verdict::GiveBack(3..8));

        // Another region, a usable part beyond it, a request beyond the usable part, a plugged block there.
        assert!(!Blocks::new(BASE, 7 * BLOCK).load(&saved));
        let change = |at: usize, value: u64| {
            let mut bad = saved.clone();
            bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
            bad
        };
        for bad in [
            change(8, 65 * BLOCK),
            change(0, u64::MAX),
            change(8, 7 * BLOCK),
            saved[..15].to_vec(),
            [&saved[..], &[0]].concat(),
        ] {
            assert!(!clone.load(&bad));
        }
        assert_eq!(clone.save(), saved);
    }

    fn request() -> impl Strategy<Value = Option<Request>> {
        let address = (0_u64..70).prop_map(|block| BASE - 2 * BLOCK + block * BLOCK);
        let address = prop_oneof![8 => address, 1 => any::<u64>()];
        let n_blocks = prop_oneof![8 => 0_u16..8, 1 => any::<u16>()];
        (0..11, address, n_blocks).prop_map(|(kind, address, n_blocks)| match kind {
            0..=4 => Some(Request::Plug { address, n_blocks }),
            5..=7 => Some(Request::Unplug { address, n_blocks }),
            8 => Some(Request::UnplugAll),
            9 => Some(Request::State { address, n_blocks }),
            _ => None,
        })
    }

    proptest! {
        /// Whatever is asked, in whatever order: the count is right, plugged blocks are usable, and plugging never goes
        /// beyond the requested size.
        #[test]
        fn no_request_breaks_the_books(requests in proptest::collection::vec((request(), 0_u64..64), 1..60)) {
            let mut blocks = Blocks::new(BASE, 64 * BLOCK);
            for (request, size) in requests {
                let before = blocks.plugged_bytes();
                match request {
                    None => blocks.request(size * BLOCK),
                    Some(request) => match blocks.decide(request) {
                        Verdict::GiveBack(range) => {
                            if request != Request::UnplugAll {
                                prop_assert!(blocks.plugged[range.clone()].iter().all(|plugged| *plugged));
                            }
                            blocks.unplugged(range);
                        }
                        Verdict::Answer(Response::Done) => prop_assert!(blocks.plugged_bytes() > before),
                        Verdict::Answer(_) => prop_assert_eq!(blocks.plugged_bytes(), before),
                    },
                }
                let n = blocks.plugged.iter().filter(|plugged| **plugged).count() as u64;
                prop_assert_eq!(n, blocks.n_plugged);
                prop_assert!(blocks.plugged_bytes() <= blocks.requested_bytes().max(before));
                prop_assert!(blocks.usable_bytes() <= blocks.region_bytes());
                let last = blocks.plugged.iter().rposition(|plugged| *plugged).map_or(0, |index| index as u64 + 1);
                prop_assert!(last * BLOCK <= blocks.usable_bytes());
                let runs = blocks.plugged_runs(&(0..64));
                prop_assert_eq!(runs.iter().map(|run| run.len() as u64).sum::<u64>(), n);
                prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
