//! Which part of a slice disk belongs to which set of files: partition numbers and offsets. Pure.
//!
//! A slice stays where it is after its last user left, so that a container that is restarted finds its image mapped.
//! Unused slices go, oldest first, when a new one needs their number, their space or their descriptors.

use std::hash::Hash;

/// Slices begin at multiples of this. The first multiple is the first slice: nothing is where a partition table would be.
pub const SLICE_BEGIN_ALIGN_BYTES: u64 = 1 << 20;
/// Partition numbers are 1 to this (Linux `include/linux/blkdev.h`, `DISK_MAX_PARTS`, less the whole disk).
pub const MAX_PARTITION: u32 = 255;
/// Most files mapped into one disk; the VMM holds a descriptor for each.
pub const MAX_FILES: usize = 768;

/// A slice: a partition and where each of its files is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Partition number, from 1.
    pub partition: u32,
    /// First byte on the disk.
    pub offset_bytes: u64,
    /// Length, a multiple of the file alignment.
    pub length_bytes: u64,
    /// Where the files begin and how long their extents are, in the order given.
    pub files: Vec<FilePlace>,
}

/// One file of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePlace {
    /// First byte on the disk.
    pub offset_bytes: u64,
    /// Length rounded up to the alignment.
    pub length_bytes: u64,
}

impl Slice {
    fn at(partition: u32, offset_bytes: u64, relative: Vec<FilePlace>, length_bytes: u64) -> Self {
        let files = relative
            .into_iter()
            .map(|file| FilePlace {
                offset_bytes: offset_bytes + file.offset_bytes,
                ..file
            })
            .collect();
        Self {
            partition,
            offset_bytes,
            length_bytes,
            files,
        }
    }
}

/// What [`SliceTable::acquire`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// The same files are in this slice already; one more user.
    Shared(Slice),
    /// A new slice with one user. Unmap `evicted` first: their space may be part of it.
    New {
        /// The new slice.
        slice: Slice,
        /// Slices that had no user and gave way.
        evicted: Vec<Slice>,
    },
}

/// Why there is no slice.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SliceError {
    /// No files, or an empty one.
    #[error("file {index} of the slice is empty")]
    Empty {
        /// Which file.
        index: usize,
    },
    /// A slice that is taken over has the number or the place of another.
    #[error("partition {partition} is outside of the disk, or where another one is")]
    Clash {
        /// Its number.
        partition: u32,
    },
    /// All partitions, bytes or descriptors are in use.
    #[error("the disk is full: {used} slices in use, {wanted_bytes} bytes in {n_files} files wanted")]
    Full {
        /// Slices with users.
        used: usize,
        /// Bytes asked for.
        wanted_bytes: u64,
        /// Files asked for.
        n_files: usize,
    },
}

#[derive(Debug)]
struct Entry<K> {
    key: K,
    slice: Slice,
    users: usize,
    released_at: u64,
}

/// The slices of one disk. `K` identifies a set of files.
#[derive(Debug)]
pub struct SliceTable<K> {
    disk_bytes: u64,
    file_align_bytes: u64,
    entries: Vec<Entry<K>>,
    releases: u64,
}

impl<K: Eq + Hash> SliceTable<K> {
    /// An empty disk of `disk_bytes`; files begin at multiples of `file_align_bytes`.
    pub fn new(disk_bytes: u64, file_align_bytes: u64) -> Self {
        Self {
            disk_bytes,
            file_align_bytes,
            entries: Vec::new(),
            releases: 0,
        }
    }

    /// A slice for files of these lengths; shared when `key` is there already.
    ///
    /// # Errors
    /// [`SliceError`]; nothing has changed then.
    pub fn acquire(&mut self, key: K, file_lengths: &[u64]) -> Result<Acquired, SliceError> {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.key == key) {
            entry.users += 1;
            return Ok(Acquired::Shared(entry.slice.clone()));
        }
        let (relative, length_bytes) = self.lay_out(file_lengths)?;
        // Decide on a copy of the order, so that a refusal leaves everything in place.
        let mut idle: Vec<u32> = self.idle_oldest_first();
        let mut victims: Vec<u32> = Vec::new();
        let (partition, offset_bytes) = loop {
            if let Some(found) = self.find_room(length_bytes, relative.len(), &victims) {
                break found;
            }
            if idle.is_empty() {
                return Err(SliceError::Full {
                    used: self.entries.iter().filter(|entry| entry.users > 0).count(),
                    wanted_bytes: length_bytes,
                    n_files: relative.len(),
                });
            }
            victims.push(idle.remove(0));
        };
        let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.entries)
            .into_iter()
            .partition(|entry| victims.contains(&entry.slice.partition));
        self.entries = kept;
        let slice = Slice::at(partition, offset_bytes, relative, length_bytes);
        self.entries.push(Entry {
            key,
            slice: slice.clone(),
            users: 1,
            released_at: 0,
        });
        self.entries.sort_by_key(|entry| entry.slice.offset_bytes);
        Ok(Acquired::New {
            slice,
            evicted: gone.into_iter().map(|entry| entry.slice).collect(),
        })
    }

    /// Takes a slice over that is where it was in another VM, without users.
    ///
    /// # Errors
    /// What is there already, or its number or place is taken.
    pub fn import(&mut self, key: K, slice: Slice) -> Result<(), SliceError> {
        let end = slice.offset_bytes.checked_add(slice.length_bytes);
        let clashes = |entry: &Entry<K>| {
            let other = &entry.slice;
            entry.key == key
                || other.partition == slice.partition
                || (other.offset_bytes < slice.offset_bytes + slice.length_bytes
                    && slice.offset_bytes < other.offset_bytes + other.length_bytes)
        };
        if !(1..=MAX_PARTITION).contains(&slice.partition)
            || end.is_none_or(|end| end > self.disk_bytes)
            || self.entries.iter().any(clashes)
        {
            return Err(SliceError::Clash {
                partition: slice.partition,
            });
        }
        self.entries.push(Entry {
            key,
            slice,
            users: 0,
            released_at: 0,
        });
        self.entries.sort_by_key(|entry| entry.slice.offset_bytes);
        Ok(())
    }

    /// One user more of a slice that is there.
    pub fn reuse(&mut self, partition: u32) -> Option<Slice> {
        let entry = self
            .entries
            .iter_mut()
            .find(|entry| entry.slice.partition == partition)?;
        entry.users += 1;
        Some(entry.slice.clone())
    }

    /// Every slice, in the order of their places.
    pub fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.entries.iter().map(|entry| &entry.slice)
    }

    /// One user less.
    pub fn release(&mut self, partition: u32) {
        self.releases += 1;
        let releases = self.releases;
        if let Some(entry) = self
            .entries
            .iter_mut()
            .find(|entry| entry.slice.partition == partition)
        {
            entry.users = entry.users.saturating_sub(1);
            entry.released_at = releases;
        }
    }

    /// The slice that files of these lengths make when they begin at `offset_bytes`; it is not entered.
    ///
    /// # Errors
    /// [`SliceError::Empty`], or [`SliceError::Clash`] for a place past any end.
    pub fn slice_at(
        &self,
        partition: u32,
        offset_bytes: u64,
        file_lengths: &[u64],
    ) -> Result<Slice, SliceError> {
        let (relative, length_bytes) = self.lay_out(file_lengths)?;
        if offset_bytes.checked_add(length_bytes).is_none() {
            return Err(SliceError::Clash { partition });
        }
        Ok(Slice::at(partition, offset_bytes, relative, length_bytes))
    }

    /// Files after each other, and their length together.
    fn lay_out(&self, file_lengths: &[u64]) -> Result<(Vec<FilePlace>, u64), SliceError> {
        let mut length_bytes = 0_u64;
        let mut relative = Vec::with_capacity(file_lengths.len());
        for (index, length) in file_lengths.iter().enumerate() {
            let rounded = length
                .checked_next_multiple_of(self.file_align_bytes)
                .filter(|length| *length != 0);
            let rounded = rounded.ok_or(SliceError::Empty { index })?;
            relative.push(FilePlace {
                offset_bytes: length_bytes,
                length_bytes: rounded,
            });
            length_bytes = length_bytes.saturating_add(rounded);
        }
        if relative.is_empty() {
            return Err(SliceError::Empty { index: 0 });
        }
        Ok((relative, length_bytes))
    }

    fn idle_oldest_first(&self) -> Vec<u32> {
        let mut idle: Vec<_> = self.entries.iter().filter(|entry| entry.users == 0).collect();
        idle.sort_by_key(|entry| entry.released_at);
        idle.iter().map(|entry| entry.slice.partition).collect()
    }

    /// The lowest free partition number and the first gap that is long enough, as if `victims` were gone.
    fn find_room(&self, length_bytes: u64, n_files: usize, victims: &[u32]) -> Option<(u32, u64)> {
        let remaining = || {
            self.entries
                .iter()
                .map(|entry| &entry.slice)
                .filter(|s| !victims.contains(&s.partition))
        };
        if remaining().map(|slice| slice.files.len()).sum::<usize>() + n_files > MAX_FILES {
            return None;
        }
        let partition =
            (1..=MAX_PARTITION).find(|number| remaining().all(|slice| slice.partition != *number))?;
        let mut begin = SLICE_BEGIN_ALIGN_BYTES;
        for slice in remaining() {
            if begin.checked_add(length_bytes)? <= slice.offset_bytes {
                return Some((partition, begin));
            }
            begin = (slice.offset_bytes + slice.length_bytes).next_multiple_of(SLICE_BEGIN_ALIGN_BYTES);
        }
        (begin.checked_add(length_bytes)? <= self.disk_bytes).then_some((partition, begin))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK_BYTES: u64 = 64 << 20;

    fn new(table: &mut SliceTable<u32>, key: u32, lengths: &[u64]) -> (Slice, Vec<Slice>) {
        match table.acquire(key, lengths).unwrap() {
            Acquired::New { slice, evicted } => (slice, evicted),
            Acquired::Shared(slice) => panic!("{slice:?} was there already"),
        }
    }

    #[test]
    fn files_follow_each_other_and_the_same_set_is_shared() {
        let mut table = SliceTable::new(DISK_BYTES, 4096);
        let (slice, _) = new(&mut table, 1, &[1, 4096, 4097]);
        assert_eq!(
            (slice.partition, slice.offset_bytes, slice.length_bytes),
            (1, 1 << 20, 4 * 4096)
        );
        let offsets: Vec<u64> = slice.files.iter().map(|file| file.offset_bytes).collect();
        assert_eq!(offsets, [1 << 20, (1 << 20) + 4096, (1 << 20) + 8192]);
        assert_eq!(table.acquire(1, &[1, 4096, 4097]), Ok(Acquired::Shared(slice)));
        let (other, _) = new(&mut table, 2, &[5]);
        assert_eq!((other.partition, other.offset_bytes), (2, 2 << 20));
    }

    #[test]
    fn an_idle_slice_stays_until_room_is_needed() {
        let mut table = SliceTable::new(4 << 20, 4096);
        let (first, _) = new(&mut table, 1, &[1 << 20]);
        let (second, _) = new(&mut table, 2, &[1 << 20]);
        table.release(second.partition);
        table.release(first.partition);
        assert_eq!(table.acquire(1, &[1 << 20]), Ok(Acquired::Shared(first.clone())));
        table.release(first.partition);
        let (third, evicted) = new(&mut table, 3, &[2 << 20]);
        assert_eq!(evicted, [second]);
        assert_eq!((third.partition, third.offset_bytes), (2, 2 << 20));
        // What is in use does not give way, and a refusal evicts nothing.
        assert!(matches!(
            table.acquire(4, &[3 << 20]),
            Err(SliceError::Full { used: 1, .. })
        ));
        assert_eq!(table.acquire(1, &[]), Ok(Acquired::Shared(first)));
    }

    #[test]
    fn a_slice_of_another_vm_is_taken_over_where_it_was() {
        let mut table = SliceTable::new(DISK_BYTES, 4096);
        let slice = table.slice_at(7, 3 << 20, &[4096, 1]).unwrap();
        assert_eq!(slice.files[1].offset_bytes, (3 << 20) + 4096);
        table.import(1, slice.clone()).unwrap();
        assert_eq!(table.acquire(1, &[4096, 1]), Ok(Acquired::Shared(slice)));
        // Key, number, place, end.
        for (key, partition, offset) in [
            (1, 8, 9 << 20),
            (2, 7, 9 << 20),
            (2, 8, (3 << 20) + 4096),
            (2, 8, DISK_BYTES),
            (2, 0, 9 << 20),
        ] {
            let other = table.slice_at(partition, offset, &[1]).unwrap();
            assert_eq!(table.import(key, other), Err(SliceError::Clash { partition }));
        }
        assert!(table.slice_at(1, u64::MAX, &[1]).is_err());
    }

    #[test]
    fn refusals() {
        let mut table = SliceTable::new(DISK_BYTES, 4096);
        assert_eq!(table.acquire(1, &[]), Err(SliceError::Empty { index: 0 }));
        assert_eq!(table.acquire(1, &[1, 0]), Err(SliceError::Empty { index: 1 }));
        assert!(matches!(
            table.acquire(1, &[u64::MAX - 4096, u64::MAX - 4096]),
            Err(SliceError::Full { .. })
        ));
        assert!(matches!(
            table.acquire(1, &vec![1; MAX_FILES + 1]),
            Err(SliceError::Full { .. })
        ));
    }

    proptest! {
        #[test]
        fn slices_never_overlap(steps in prop::collection::vec((0_u32..12, 1_u64..(20 << 20), any::<bool>()), 1..200)) {
            let mut table = SliceTable::new(DISK_BYTES, 4096);
            let mut held: Vec<(u32, Slice)> = Vec::new();
            for (key, length, acquire) in steps {
                if acquire {
                    match table.acquire(key, &[length, 1]) {
                        Ok(Acquired::Shared(slice)) => held.push((key, slice)),
                        Ok(Acquired::New { slice, evicted }) => {
                            for gone in &evicted {
                                prop_assert!(held.iter().all(|(_, used)| used != gone));
                            }
                            held.push((key, slice));
                        }
                        Err(error) => {
                            let full = matches!(error, SliceError::Full { .. });
                            prop_assert!(full);
                        }
                    }
                } else if let Some(position) = held.iter().position(|(used, _)| *used == key) {
                    table.release(held.swap_remove(position).1.partition);
                }
                for (at, (key, slice)) in held.iter().enumerate() {
                    prop_assert!(slice.offset_bytes + slice.length_bytes <= DISK_BYTES);
                    prop_assert!((1..=MAX_PARTITION).contains(&slice.partition));
                    for (other_key, other) in &held[at + 1..] {
                        if key == other_key {
                            prop_assert_eq!(slice, other);
                        } else {
                            prop_assert!(slice.partition != other.partition);
                            let apart = slice.offset_bytes + slice.length_bytes <= other.offset_bytes
                                || other.offset_bytes + other.length_bytes <= slice.offset_bytes;
                            prop_assert!(apart, "{:?} {:?}", slice, other);
                        }
                    }
                }
            }
        }
    }
}
