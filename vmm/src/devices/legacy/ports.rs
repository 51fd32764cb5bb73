//! The ports by which a guest ends its machine: reset, power off, panic.

use crate::bus::BusDevice;

/// What a port calls when the guest asks. It may be called more than once.
type Ask = Box<dyn FnMut() + Send>;

/// The command port of a keyboard controller that knows one command, "pulse the reset line".
pub struct ResetPort {
    value: u8,
    ask: Ask,
}

/// The ACPI sleep control and status registers (ACPI 6.5, 4.8.3.7), which know one state, soft off.
pub struct SleepPort {
    off: u8,
    ask: Ask,
}

/// The pvpanic port (qemu: docs/specs/pvpanic.rst).
pub struct PanicPort {
    ask: Ask,
}

impl ResetPort {
    /// Calls `ask` when the guest writes `value`.
    pub fn new(value: u8, ask: impl FnMut() + Send + 'static) -> Self {
        Self {
            value,
            ask: Box::new(ask),
        }
    }
}

impl BusDevice for ResetPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Neither input nor output buffer full: Linux waits for that before it writes the command.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [self.value] {
            (self.ask)();
        }
    }
}

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

impl SleepPort {
    /// Calls `ask` when the guest enters sleep type `off`.
    pub fn new(off: u8, ask: impl FnMut() + Send + 'static) -> Self {
        Self {
            off,
            ask: Box::new(ask),
        }
    }
}

impl BusDevice for SleepPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Never woken up.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [SLEEP_ENABLE | (self.off << SLEEP_TYPE_SHIFT)] {
            (self.ask)();
        }
    }
}

/// The guest panicked and runs no crash kernel.
const PANICKED: u8 = 1 << 0;

impl PanicPort {
    /// Calls `ask` when the guest panicked.
    pub fn new(ask: impl FnMut() + Send + 'static) -> Self {
        Self { ask: Box::new(ask) }
    }
}

impl BusDevice for PanicPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // The events we know.
        data.fill(0);
        data[0] = PANICKED;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data[0] & PANICKED != 0 {
            (self.ask)();
        }
    }
}

macro_rules! debug_by_name {
    ($($name:ident),*) => {
        $(impl std::fmt::Debug for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        })*
    };
}
debug_by_name!(ResetPort, SleepPort, PanicPort);

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn counted(make: impl FnOnce(Ask) -> Box<dyn BusDevice>, writes: &[(u64, &[u8])]) -> u32 {
        let count = Arc::new(AtomicU32::new(0));
        let seen = Arc::clone(&count);
        let mut device = make(Box::new(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        }));
        for (offset, data) in writes {
            device.write(*offset, data);
        }
        count.load(Ordering::Relaxed)
    }

    #[test]
    fn only_the_exact_command_resets() {
        let reset = |ask| -> Box<dyn BusDevice> { Box::new(ResetPort::new(0xfe, ask)) };
        assert_eq!(counted(reset, &[(0, &[0xfe])]), 1);
        assert_eq!(
            counted(reset, &[(0, &[0xd1]), (1, &[0xfe]), (0, &[0xfe, 0xfe])]),
            0
        );
    }

    #[test]
    fn only_soft_off_with_enable_powers_off() {
        let sleep = |ask| -> Box<dyn BusDevice> { Box::new(SleepPort::new(5, ask)) };
        assert_eq!(counted(sleep, &[(0, &[0x34])]), 1);
        assert_eq!(counted(sleep, &[(0, &[0x14]), (0, &[0x2c]), (1, &[0x34])]), 0);
    }

    #[test]
    fn panic_is_told_from_a_loaded_crash_kernel() {
        let panic = |ask| -> Box<dyn BusDevice> { Box::new(PanicPort::new(ask)) };
        assert_eq!(counted(panic, &[(0, &[1])]), 1);
        assert_eq!(counted(panic, &[(0, &[2])]), 0);
    }
}
