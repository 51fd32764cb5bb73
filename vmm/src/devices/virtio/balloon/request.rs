//! What the driver says, as typed values. No I/O.

use std::ops::Range;

use super::PFN_SHIFT;
use crate::devices::virtio::chain::Ranges;
use crate::memory::GuestMemory;

/// Most page numbers in one request; Linux sends up to 256.
pub(super) const MAX_PFNS: usize = 1024;
/// Most statistics in one buffer; Linux sends up to 16.
const MAX_STATS: usize = 64;
/// `struct virtio_balloon_stat`: a 16-bit tag and a 64-bit value, packed.
const STAT_BYTES: usize = 10;

/// Not page numbers: the length is no multiple of four, or longer than [`MAX_PFNS`] of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotPfns;

/// Reads page numbers, and joins those that follow each other: a range of guest addresses each, in ascending order. Linux
/// takes pages off its free lists mostly in order, so there are far fewer ranges than pages.
pub(super) fn page_ranges(ranges: &Ranges, memory: &GuestMemory) -> Result<Vec<Range<u64>>, NotPfns> {
    if !ranges.len().is_multiple_of(4) || ranges.len() > 4 * MAX_PFNS {
        return Err(NotPfns);
    }
    let mut bytes = vec![0; ranges.len()];
    let n_read = ranges.read(memory, &mut bytes);
    if n_read != bytes.len() {
        return Err(NotPfns);
    }
    let (words, _) = bytes.as_chunks();
    let mut pfns: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    pfns.sort_unstable();
    Ok(join(&pfns))
}

/// Sorted page numbers as ranges of addresses. One that is there twice counts once.
fn join(sorted_pfns: &[u32]) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for pfn in sorted_pfns {
        let start = u64::from(*pfn) << PFN_SHIFT;
        let end = start + (1 << PFN_SHIFT);
        match joined.last_mut() {
            Some(last) if start <= last.end => last.end = end,
            _ => joined.push(start..end),
        }
    }
    joined
}

/// Reads statistics as pairs of tag and value. What is beyond [`MAX_STATS`] of them, or no whole one, is left out.
pub(super) fn stats(ranges: &Ranges, memory: &GuestMemory) -> Vec<(u16, u64)> {
    let mut bytes = vec![0; ranges.len().min(MAX_STATS * STAT_BYTES)];
    let n_read = ranges.read(memory, &mut bytes);
    let (stats, _) = bytes[..n_read].as_chunks::<STAT_BYTES>();
    stats
        .iter()
        .map(|&[t0, t1, v0, v1, v2, v3, v4, v5, v6, v7]| {
            (
                u16::from_le_bytes([t0, t1]),
                u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every page is in exactly one range, nothing else is, and ranges that touch are one.
        #[test]
        fn joining_keeps_every_page_once(pfns in proptest::collection::vec(0_u32..64, 0..80), base in prop_oneof![Just(0), Just(u32::MAX - 63)]) {
            let mut sorted: Vec<_> = pfns.iter().map(|pfn| base + pfn).collect();
            sorted.sort_unstable();
            let joined = join(&sorted);
            prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
            let pages: Vec<u64> = joined.iter().flat_map(|range| range.clone().step_by(4096)).collect();
            let expected: BTreeSet<u64> = sorted.iter().map(|pfn| u64::from(*pfn) << 12).collect();
            prop_assert_eq!(pages, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
