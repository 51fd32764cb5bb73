//! RFC 3339 text of a time, as log lines want it. No time zone but UTC.

use std::{
    io::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Nanoseconds since the epoch; zero for times before it.
pub fn unix_nanos(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX))
}

/// The time that many nanoseconds after the epoch.
pub fn from_unix_nanos(nanos: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(nanos)
}

/// Appends e.g. `2026-01-02T03:04:05.000000006Z`.
pub fn append_rfc3339_nano(time: SystemTime, out: &mut Vec<u8>) {
    let elapsed = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second_of_day) = (elapsed.as_secs() / 86_400, elapsed.as_secs() % 86_400);
    let (year, month, day) = civil_from_days(days);
    write!(
        out,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
        elapsed.subsec_nanos(),
    )
    .expect("writing to a Vec cannot fail");
}

/// Gregorian date of a day counted from 1970-01-01 (Hinnant, "chrono-compatible low-level date algorithms",
/// `civil_from_days`, for days that are not negative).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(seconds: u64, nanos: u32, expected: &str) {
        let mut out = Vec::new();
        append_rfc3339_nano(UNIX_EPOCH + Duration::new(seconds, nanos), &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn known_dates() {
        check(0, 0, "1970-01-01T00:00:00.000000000Z");
        check(951_782_399, 1, "2000-02-28T23:59:59.000000001Z");
        check(951_782_400, 0, "2000-02-29T00:00:00.000000000Z");
        check(1_709_251_199, 999_999_999, "2024-02-29T23:59:59.999999999Z");
        check(1_767_225_600, 0, "2026-01-01T00:00:00.000000000Z");
        check(4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z");
    }
}
