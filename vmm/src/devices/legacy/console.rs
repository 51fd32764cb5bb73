//! The serial port as a one-way console: what the guest writes goes to a file, bounded; nothing ever comes in.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::rate_limiter::TokenBucket;

/// A boot with all kernel messages is some 40 KiB.
const BURST_BYTES: u64 = 256 << 10;
const BYTES_PER_SECOND: u64 = 64 << 10;
/// After that many the console is silent.
const TOTAL_BYTES: u64 = 64 << 20;

/// A 16550 without input.
#[derive(Debug)]
pub struct Console {
    serial: Serial<InterruptLine, NoEvents, ConsoleOutput>,
}

#[derive(Debug)]
struct InterruptLine(EventFd);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Console {
    /// Writes to `output`, interrupts through `line`.
    #[must_use]
    pub fn new(output: ConsoleOutput, line: EventFd) -> Self {
        Self {
            serial: Serial::new(InterruptLine(line), output),
        }
    }

    /// Its registers.
    #[must_use]
    pub fn save(&self) -> ConsoleState {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            // Nothing ever comes in.
            in_buffer: _,
        } = self.serial.state();
        ConsoleState {
            baud_divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        }
    }

    /// A console whose driver goes on from a saved state.
    ///
    /// # Errors
    /// The interrupt that the state asks for could not be raised.
    pub fn restore(state: &ConsoleState, output: ConsoleOutput, line: EventFd) -> io::Result<Self> {
        let state = SerialState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: Vec::new(),
        };
        let serial = Serial::from_state(&state, InterruptLine(line), NoEvents, output)
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(Self { serial })
    }
}

/// The registers of a console, for a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConsoleState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            *value = self.serial.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        // More than one byte is a string instruction, or nonsense that does no harm as one.
        for value in data {
            // Fails when the console file does, which must not disturb the guest.
            let _ = self.serial.write(offset, *value);
        }
    }
}

/// What became of the bytes.
#[derive(Debug, Default)]
pub struct ConsoleStats {
    /// Written to the file.
    pub written_bytes: AtomicU64,
    /// Dropped: over the limits, or the file refused them.
    pub dropped_bytes: AtomicU64,
}

/// The console file with limits on rate and length.
#[derive(Debug)]
pub struct ConsoleOutput {
    file: File,
    bucket: TokenBucket,
    start: Instant,
    stats: Arc<ConsoleStats>,
}

impl ConsoleOutput {
    /// Appends to `file`.
    #[must_use]
    pub fn new(file: File) -> Self {
        let bucket = TokenBucket::new(BURST_BYTES, BYTES_PER_SECOND);
        Self {
            file,
            bucket,
            start: Instant::now(),
            stats: Arc::default(),
        }
    }

    /// Its counters.
    #[must_use]
    pub fn stats(&self) -> Arc<ConsoleStats> {
        Arc::clone(&self.stats)
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len() as u64;
        let written = self.stats.written_bytes.load(Ordering::Relaxed);
        let allowed =
            written.saturating_add(length) <= TOTAL_BYTES && self.bucket.take(length, self.start.elapsed());
        let counter = if allowed && self.file.write_all(bytes).is_ok() {
            &self.stats.written_bytes
        } else {
            &self.stats.dropped_bytes
        };
        counter.fetch_add(length, Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;

    fn console() -> (Console, File, EventFd) {
        let file = tempfile::tempfile().unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let console = Console::new(
            ConsoleOutput::new(file.try_clone().unwrap()),
            line.try_clone().unwrap(),
        );
        (console, file, line)
    }

    fn text(file: &mut File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn bytes_and_strings_reach_the_file_at_once() {
        let (mut console, mut file, _) = console();
        console.write(DATA, b"o");
        console.write(DATA, b"k\n");
        assert_eq!(text(&mut file), "ok\n");
    }

    #[test]
    fn transmitter_is_always_empty_and_interrupts_when_enabled() {
        let (mut console, _, line) = console();
        let mut status = [0];
        console.read(LINE_STATUS, &mut status);
        assert_eq!(status[0] & 0x61, 0x60);
        console.write(INTERRUPT_ENABLE, &[2]);
        console.write(DATA, b"x");
        assert!(line.read().is_ok());
    }

    #[test]
    fn accesses_that_are_nonsense_do_nothing() {
        let (mut console, mut file, _) = console();
        let mut data = [0xff; 4];
        console.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        console.write(300, b"x");
        console.write(7, b"scratch");
        assert_eq!(text(&mut file), "");
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut file = tempfile::tempfile().unwrap();
        let mut output = ConsoleOutput::new(file.try_clone().unwrap());
        let stats = output.stats();
        let flood = [b'x'; 4096];
        for _ in 0..4096 {
            output.write_all(&flood).unwrap();
        }
        let written = stats.written_bytes.load(Ordering::Relaxed);
        assert!((BURST_BYTES..16 << 20).contains(&written), "{written}");
        assert_eq!(stats.dropped_bytes.load(Ordering::Relaxed), (16 << 20) - written);
        assert_eq!(text(&mut file).len() as u64, written);
    }

    #[test]
    fn a_console_that_cannot_be_written_does_not_disturb_the_guest() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        drop(write);
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let output = ConsoleOutput::new(File::from(read));
        let stats = output.stats();
        Console::new(output, line).write(DATA, b"lost");
        assert_eq!(stats.dropped_bytes.load(Ordering::Relaxed), 4);
    }
}
