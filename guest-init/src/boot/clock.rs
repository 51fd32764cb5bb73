//! The guest's clocks.

use std::io;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

const NS_PER_SECOND: u64 = 1_000_000_000;

fn nanoseconds(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(NS_PER_SECOND)
        .saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Wall clock, nanoseconds since the Unix epoch.
#[must_use]
pub fn now_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::Realtime))
}

/// Microseconds since the guest's kernel started.
#[must_use]
pub fn uptime_us() -> u64 {
    nanoseconds(clock_gettime(ClockId::Monotonic)) / 1000
}

/// Sets the wall clock.
///
/// # Errors
/// What the kernel answers.
pub fn set(ns: u64) -> io::Result<()> {
    let out_of_range = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let time = Timespec {
        tv_sec: i64::try_from(ns / NS_PER_SECOND).map_err(out_of_range)?,
        tv_nsec: i64::try_from(ns % NS_PER_SECOND).map_err(out_of_range)?,
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}
