//! Which file is behind which part of a slice disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};

use crate::config::{ConfigError, Extent};

/// Why extents were not added or removed; nothing changed then.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SliceError {
    /// An extent that does not fit on a disk.
    #[error("the extent cannot be mapped")]
    Extent(#[source] ConfigError),
    /// The file part passes what file offsets can be.
    #[error("file_offset_bytes is {file_offset:#x} for {length:#x} bytes: the end must be below 2^63")]
    FileOffset {
        /// `file_offset_bytes`.
        file_offset: u64,
        /// `length_bytes`.
        length: u64,
    },
    /// A part of the range is mapped already.
    #[error("extent at {offset:#x}, {length:#x} bytes, overlaps the one mapped at {mapped:#x}")]
    Overlap {
        /// `disk_offset_bytes` of the new one.
        offset: u64,
        /// `length_bytes` of the new one.
        length: u64,
        /// `disk_offset_bytes` of the other.
        mapped: u64,
    },
    /// A range to be removed cuts through an extent.
    #[error(
        "the range {start:#x} to {end:#x} cuts the extent at {mapped:#x}: only whole extents can be removed"
    )]
    Cut {
        /// First byte of the range.
        start: u64,
        /// Byte after the range.
        end: u64,
        /// `disk_offset_bytes` of the extent.
        mapped: u64,
    },
}

/// The extents of one disk, shared with its worker. Changes count from the next request on; requests in flight keep
/// their file open.
#[derive(Debug, Clone, Default)]
pub struct SliceMap {
    extents: Arc<RwLock<Extents<Arc<File>>>>,
}

impl SliceMap {
    /// Maps files, all or none.
    ///
    /// # Errors
    /// A bad extent, or one that overlaps another, new or old.
    pub fn add_extents(&self, extents: Vec<(Extent, OwnedFd)>) -> Result<(), SliceError> {
        let extents = extents
            .into_iter()
            .map(|(extent, fd)| (extent, Arc::new(File::from(fd))))
            .collect();
        self.extents
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .add(extents)
    }

    /// Unmaps all extents inside `range` of the disk, and says how many.
    ///
    /// # Errors
    /// The range cuts through an extent.
    pub fn remove(&self, range: Range<u64>) -> Result<usize, SliceError> {
        // The files close after the lock is released.
        let removed = self
            .extents
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(range)?;
        Ok(removed.len())
    }

    /// What is behind `length` bytes at `offset` of the disk; `None` when a part is not mapped.
    pub(super) fn locate(&self, offset: u64, length: u64) -> Option<Vec<Piece<Arc<File>>>> {
        self.extents
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .locate(offset, length)
    }
}

/// A part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece<F> {
    pub(super) file: F,
    pub(super) file_offset: u64,
    pub(super) length: u64,
}

/// An interval map from disk offsets to files: by first byte, never overlapping.
#[derive(Debug)]
struct Extents<F> {
    by_offset: BTreeMap<u64, Piece<F>>,
}

impl<F> Default for Extents<F> {
    fn default() -> Self {
        Extents {
            by_offset: BTreeMap::new(),
        }
    }
}

impl<F: Clone> Extents<F> {
    fn add(&mut self, extents: Vec<(Extent, F)>) -> Result<(), SliceError> {
        let offsets: Vec<_> = extents
            .iter()
            .map(|(extent, _)| extent.disk_offset_bytes)
            .collect();
        for (n_added, (extent, file)) in extents.into_iter().enumerate() {
            if let Err(e) = self.add_one(extent, file) {
                for offset in &offsets[..n_added] {
                    self.by_offset.remove(offset);
                }
                return Err(e);
            }
        }
        Ok(())
    }

    fn add_one(&mut self, extent: Extent, file: F) -> Result<(), SliceError> {
        extent.validate().map_err(SliceError::Extent)?;
        let Extent {
            disk_offset_bytes: offset,
            file_offset_bytes: file_offset,
            length_bytes: length,
        } = extent;
        let file_end = file_offset.checked_add(length);
        if file_end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(SliceError::FileOffset { file_offset, length });
        }
        // Inside the disk, so without overflow. The last one that begins before the end is the only candidate.
        if let Some((&mapped, piece)) = self.by_offset.range(..offset + length).next_back()
            && mapped + piece.length > offset
        {
            return Err(SliceError::Overlap {
                offset,
                length,
                mapped,
            });
        }
        self.by_offset.insert(
            offset,
            Piece {
                file,
                file_offset,
                length,
            },
        );
        Ok(())
    }

    fn remove(&mut self, range: Range<u64>) -> Result<Vec<F>, SliceError> {
        let touched: Vec<u64> = self
            .by_offset
            .range(..range.end)
            .rev()
            .take_while(|(offset, piece)| **offset + piece.length > range.start)
            .map(|(offset, _)| *offset)
            .collect();
        let cut = touched
            .iter()
            .find(|offset| **offset < range.start || **offset + self.by_offset[*offset].length > range.end);
        if let Some(&mapped) = cut {
            return Err(SliceError::Cut {
                start: range.start,
                end: range.end,
                mapped,
            });
        }
        Ok(touched
            .iter()
            .filter_map(|offset| self.by_offset.remove(offset))
            .map(|piece| piece.file)
            .collect())
    }

    fn locate(&self, offset: u64, length: u64) -> Option<Vec<Piece<F>>> {
        let end = offset.checked_add(length)?;
        let mut pieces = Vec::with_capacity(1);
        let mut at = offset;
        while at < end {
            let (mapped, piece) = self.by_offset.range(..=at).next_back()?;
            let skipped = at - mapped;
            let left = piece.length.checked_sub(skipped).filter(|left| *left != 0)?;
            let taken = left.min(end - at);
            pieces.push(Piece {
                file: piece.file.clone(),
                file_offset: piece.file_offset + skipped,
                length: taken,
            });
            at += taken;
        }
        Some(pieces)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::SLICE_DISK_BYTES;

    const PAGE: u64 = 4096;

    fn extent(disk_page: u64, file_page: u64, n_pages: u64) -> Extent {
        Extent {
            disk_offset_bytes: disk_page * PAGE,
            file_offset_bytes: file_page * PAGE,
            length_bytes: n_pages * PAGE,
        }
    }

    #[test]
    fn additions_are_all_or_nothing() {
        let mut extents = Extents::default();
        extents.add(vec![(extent(10, 0, 10), 'a')]).unwrap();
        let refused = extents.add(vec![(extent(0, 0, 5), 'b'), (extent(5, 0, 6), 'c')]);
        assert_eq!(
            refused,
            Err(SliceError::Overlap {
                offset: 5 * PAGE,
                length: 6 * PAGE,
                mapped: 10 * PAGE
            })
        );
        let refused = extents.add(vec![(extent(0, 0, 5), 'b'), (extent(0, 0, 5), 'b')]);
        assert!(matches!(refused, Err(SliceError::Overlap { .. })));
        assert_eq!(extents.locate(0, 1), None);
        assert_eq!(extents.by_offset.len(), 1);
    }

    #[test]
    fn bad_extents_are_refused() {
        let mut extents = Extents::default();
        for bad in [
            Extent {
                disk_offset_bytes: 1,
                file_offset_bytes: 0,
                length_bytes: PAGE,
            },
            Extent {
                disk_offset_bytes: 0,
                file_offset_bytes: 0,
                length_bytes: 0,
            },
            Extent {
                disk_offset_bytes: SLICE_DISK_BYTES,
                file_offset_bytes: 0,
                length_bytes: PAGE,
            },
        ] {
            assert!(
                matches!(extents.add(vec![(bad, 'a')]), Err(SliceError::Extent(_))),
                "{bad:?}"
            );
        }
        for file_offset_bytes in [u64::MAX, i64::MAX as u64] {
            let bad = Extent {
                disk_offset_bytes: 0,
                file_offset_bytes,
                length_bytes: PAGE,
            };
            assert!(
                matches!(extents.add(vec![(bad, 'a')]), Err(SliceError::FileOffset { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn removal_takes_whole_extents_only() {
        let mut extents = Extents::default();
        extents
            .add(vec![
                (extent(0, 0, 4), 'a'),
                (extent(4, 0, 4), 'b'),
                (extent(20, 0, 4), 'c'),
            ])
            .unwrap();
        for (start, end) in [(0, 3), (1, 4), (2, 6), (4, 21), (21, 22)] {
            let refused = extents.remove(start * PAGE..end * PAGE);
            assert!(matches!(refused, Err(SliceError::Cut { .. })), "{start} to {end}");
        }
        assert_eq!(extents.remove(8 * PAGE..20 * PAGE).unwrap(), []);
        assert_eq!(extents.remove(4 * PAGE..u64::MAX).unwrap(), ['c', 'b']);
        assert_eq!(extents.locate(0, 4 * PAGE).unwrap().len(), 1);
        assert_eq!(extents.locate(0, 4 * PAGE + 1), None);
    }

    proptest! {
        /// Against one entry per page.
        #[test]
        fn locate_agrees_with_a_page_table(
            wanted in proptest::collection::vec((0_u64..60, 0_u64..1000, 1_u64..12), 0..12),
            offset in prop_oneof![0_u64..70 * PAGE, (0_u64..70 * 8).prop_map(|sector| sector * 512)],
            length in 0_u64..30 * PAGE,
        ) {
            let mut extents = Extents::default();
            let mut pages = [None; 110];
            for (id, (disk_page, file_page, n_pages)) in wanted.into_iter().enumerate() {
                let range = usize::try_from(disk_page).unwrap()..usize::try_from(disk_page + n_pages).unwrap();
                let free = pages[range.clone()].iter().all(Option::is_none);
                prop_assert_eq!(extents.add(vec![(extent(disk_page, file_page, n_pages), id)]).is_ok(), free);
                if free {
                    for (i, page) in pages[range].iter_mut().enumerate() {
                        *page = Some((id, (file_page + i as u64) * PAGE));
                    }
                }
            }
            let expected: Option<Vec<_>> = (offset..offset + length).step_by(512)
                .map(|at| pages[usize::try_from(at / PAGE).unwrap()].map(|(id, base)| (id, base + at % PAGE)))
                .collect();
            let last_is_mapped = length == 0 || pages[usize::try_from((offset + length - 1) / PAGE).unwrap()].is_some();
            let located = extents.locate(offset, length);
            prop_assert_eq!(located.is_some(), expected.is_some() && last_is_mapped);
            if let (Some(located), Some(expected)) = (located, expected) {
                prop_assert_eq!(located.iter().map(|piece| piece.length).sum::<u64>(), length);
                let sectors = located.iter().flat_map(|piece| {
                    (0..piece.length).step_by(512).map(move |skip| (piece.file, piece.file_offset + skip))
                });
                // Pieces begin at page borders, so with an aligned start their sectors are the table's.
                if offset.is_multiple_of(512) {
                    prop_assert_eq!(sectors.collect::<Vec<_>>(), expected);
                }
            }
        }
    }
}
