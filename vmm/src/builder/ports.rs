//! The devices at I/O ports.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{BuildError, host};
use crate::arch::layout;
use crate::bus::Bus;
use crate::control::ExitReason;
use crate::devices::legacy::{Console, ConsoleOutput, ConsoleState, PanicPort, ResetPort, SleepPort};
use crate::kvm;
use crate::vm::{EndSignal, StatsSource};

/// The I/O ports: serial console, and the ways for the guest to end the machine. `saved` is the console's state in a
/// snapshot.
pub(super) fn build(
    console: File,
    saved: Option<&ConsoleState>,
    kvm: &kvm::Vm,
    end: &Arc<EndSignal>,
    stats: &mut Vec<StatsSource>,
) -> Result<(Bus, Arc<Mutex<Console>>), BuildError> {
    let mut ports = Bus::new();
    let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make the serial interrupt"))?;
    kvm.connect_interrupt(&line, layout::SERIAL_GSI)
        .map_err(BuildError::Kvm)?;
    let output = ConsoleOutput::new(console);
    let console_stats = output.stats();
    stats.push(Box::new(move |counters| {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        counters.insert(
            "console_written_bytes".to_owned(),
            read(&console_stats.written_bytes),
        );
        counters.insert(
            "console_dropped_bytes".to_owned(),
            read(&console_stats.dropped_bytes),
        );
    }));
    let raise = |reason: ExitReason| {
        let end = Arc::clone(end);
        move || end.raise(reason.clone())
    };
    let reset = ResetPort::new(layout::RESET_VALUE, raise(ExitReason::Reset));
    let sleep = SleepPort::new(layout::SLEEP_TYPE_S5, raise(ExitReason::Shutdown));
    let panic = PanicPort::new(raise(ExitReason::GuestPanic));
    let mut place = |device: &'static str, port: u16, length, shared| {
        ports
            .insert(port.into(), length, shared)
            .map_err(|source| BuildError::Place { device, source })
    };
    let console = match saved {
        None => Console::new(output, line),
        Some(saved) => Console::restore(saved, output, line).map_err(host("raise the serial interrupt"))?,
    };
    let console = Arc::new(Mutex::new(console));
    place(
        "serial port",
        layout::SERIAL_PORT,
        8,
        Arc::<Mutex<Console>>::clone(&console),
    )?;
    place("reset port", layout::RESET_PORT, 1, Arc::new(Mutex::new(reset)))?;
    place("panic port", layout::PANIC_PORT, 1, Arc::new(Mutex::new(panic)))?;
    place("sleep port", layout::SLEEP_PORT, 2, Arc::new(Mutex::new(sleep)))?;
    Ok((ports, console))
}
