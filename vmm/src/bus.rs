//! Port and memory-mapped I/O: which device answers at which address. Knows no device kinds.

use std::sync::{Arc, Mutex, PoisonError};

/// A device seen from a vCPU: registers at offsets from wherever it was put.
///
/// `data` is 1 to 8 bytes, as long as the guest's access. Any offset inside the device's range and any length can
/// come, whatever is sensible for the device: the guest chooses them.
pub trait BusDevice: Send {
    /// Fills `data`. It holds ones (`0xff`) when called: what an access that nobody answers reads as.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that several vCPUs can reach.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// An address space, either of ports or of memory.
#[derive(Clone, Default)]
pub struct Bus {
    /// Sorted by first address, not overlapping.
    ranges: Vec<Range>,
}

#[derive(Clone)]
struct Range {
    base: u64,
    length: u64,
    device: SharedDevice,
}

/// A range that cannot be taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "The range {base:#x}, {length:#x} bytes, is empty, passes the end of the address space or is taken already"
)]
pub struct RangeError {
    base: u64,
    length: u64,
}

impl Bus {
    /// A bus without devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `base`, for `length` bytes.
    ///
    /// # Errors
    /// [`RangeError`] when the range is empty, passes the end of the address space, or meets another.
    pub fn insert(&mut self, base: u64, length: u64, device: SharedDevice) -> Result<(), RangeError> {
        let error = RangeError { base, length };
        let last = length
            .checked_sub(1)
            .and_then(|length| base.checked_add(length))
            .ok_or(error)?;
        let position = self.ranges.partition_point(|range| range.base < base);
        let after_previous = position
            .checked_sub(1)
            .is_none_or(|previous| base - self.ranges[previous].base >= self.ranges[previous].length);
        let before_next = self.ranges.get(position).is_none_or(|next| last < next.base);
        if !after_previous || !before_next {
            return Err(RangeError { base, length });
        }
        self.ranges.insert(position, Range { base, length, device });
        Ok(())
    }

    /// Reads at `address`: all ones when no device is there or the access leaves it.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            // A poisoned lock means another vCPU's access panicked; registers are still plain values.
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset, data);
        }
    }

    /// Writes at `address`; lost when no device is there or the access leaves it.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&SharedDevice, u64)> {
        let position = self
            .ranges
            .partition_point(|range| range.base <= address)
            .checked_sub(1)?;
        let range = &self.ranges[position];
        let offset = address - range.base;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= range.length).then_some((&range.device, offset))
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges = self.ranges.iter().map(|range| (range.base, range.length));
        formatter.debug_list().entries(ranges).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the last write, reads as its offset.
    #[derive(Default)]
    struct Probe {
        written: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written = Some((offset, data.to_vec()));
        }
    }

    fn bus(ranges: &[(u64, u64)]) -> Bus {
        let mut bus = Bus::new();
        for (base, length) in ranges {
            bus.insert(*base, *length, Arc::new(Mutex::new(Probe::default())))
                .unwrap();
        }
        bus
    }

    fn read(bus: &Bus, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        bus.read(address, &mut data);
        data
    }

    #[test]
    fn access_reaches_the_device_with_its_offset() {
        let bus = bus(&[(0x3000, 0x100), (0x1000, 0x10)]);
        assert_eq!(read(&bus, 0x1004, 1), [4]);
        assert_eq!(read(&bus, 0x30ff, 1), [0xff]);
        assert_eq!(read(&bus, 0x3010, 4), [0x10, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn access_beside_or_across_a_range_reads_as_ones() {
        let bus = bus(&[(0x1000, 0x10)]);
        for (address, length) in [
            (0xfff, 1),
            (0x1010, 1),
            (0x100e, 4),
            (0, 8),
            (u64::MAX, 1),
            (u64::MAX, 8),
        ] {
            assert_eq!(read(&bus, address, length), vec![0xff; length], "{address:#x}");
        }
    }

    #[test]
    fn write_across_the_end_is_lost() {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::new();
        bus.insert(0x10, 4, probe.clone()).unwrap();
        bus.write(0x12, &[1, 2, 3, 4]);
        assert_eq!(probe.lock().unwrap().written, None);
        bus.write(0x12, &[1, 2]);
        assert_eq!(probe.lock().unwrap().written, Some((2, vec![1, 2])));
    }

    #[test]
    fn ranges_that_meet_or_overflow_are_refused() {
        for (base, length) in [
            (0x1000, 0x10),
            (0xfff, 2),
            (0x100f, 1),
            (0x1008, 0x100),
            (0, 0x2000),
            (5, 0),
            (u64::MAX, 2),
        ] {
            let mut bus = bus(&[(0x1000, 0x10)]);
            let refused = bus.insert(base, length, Arc::new(Mutex::new(Probe::default())));
            assert_eq!(refused, Err(RangeError { base, length }));
        }
        let mut bus = bus(&[(0x1000, 0x10)]);
        for (base, length) in [(0xff0, 0x10), (0x1010, 1), (u64::MAX, 1)] {
            bus.insert(base, length, Arc::new(Mutex::new(Probe::default())))
                .unwrap();
        }
    }
}
