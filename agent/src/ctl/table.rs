//! Tables and times for people.

use std::{
    io::{self, Write},
    time::{SystemTime, UNIX_EPOCH},
};

/// Writes to standard output; a reader that went away is an error, not a panic.
pub(super) fn print(text: &[u8]) -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(text)?;
    output.flush()
}

/// Lines of columns, as wide as their longest cell.
pub(super) fn columns(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    let header: Vec<_> = header.iter().map(|cell| (*cell).to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{:width$}   ", clean(cell)));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Text of a guest or registry can't move the cursor.
pub(super) fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Unix milliseconds now.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How long ago: `5s`, `3m`, `2h`, `4d`.
pub(super) fn age(then_ms: u64, now_ms: u64) -> String {
    let seconds = now_ms.saturating_sub(then_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// An RFC 3339 time in seconds.
pub(super) fn time(at_ms: u64) -> String {
    i64::try_from(at_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(|| at_ms.to_string(), |time| format!("{time:.0}"))
}

/// `1.5GiB`
pub(super) fn bytes(count: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| count >= 1 << shift);
    match unit {
        Some((shift, name)) => {
            let tenths = (u128::from(count) * 10) >> shift;
            format!("{}.{}{name}", tenths / 10, tenths % 10)
        }
        None => format!("{count}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = vec![
            vec!["a".into(), "long cell".into()],
            vec!["bbb".into(), "x\x1b[2J".into()],
        ];
        assert_eq!(
            columns(&["ID", "NAME"], &rows),
            "ID    NAME\na     long cell\nbbb   x [2J\n"
        );
    }

    #[test]
    fn ages_and_sizes() {
        assert_eq!(age(0, 59_000), "59s");
        assert_eq!(age(0, 600_000), "10m");
        assert_eq!(age(0, 3_600_000 * 5), "5h");
        assert_eq!(age(0, 86_400_000 * 3), "3d");
        assert_eq!(age(5, 0), "0s");
        assert_eq!(bytes(512), "512B");
        assert_eq!(bytes(3 << 29), "1.5GiB");
        assert_eq!(time(1_767_225_600_000), "2026-01-01T00:00:00Z");
    }
}
