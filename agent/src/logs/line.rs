//! CRI log lines. Pure. What containers print is in them: nothing of it is trusted.

use std::time::SystemTime;

/// Longest line that is put together from parts, bytes; longer ones are handed out in pieces.
const MAX_LINE_BYTES: usize = 1 << 20;

/// One CRI line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// As written, RFC 3339 with nanoseconds.
    pub time: &'a [u8],
    /// `stdout` or `stderr`.
    pub is_stderr: bool,
    /// More of the same line follows.
    pub is_partial: bool,
    /// The text, without line end.
    pub text: &'a [u8],
}

/// Takes a CRI line (without its line end) apart.
pub fn parse_entry(line: &[u8]) -> Option<Entry<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = parts.next()?;
    let is_stderr = match parts.next()? {
        b"stdout" => false,
        b"stderr" => true,
        _ => return None,
    };
    // The flag is the first of colon-separated tags.
    let is_partial = match parts.next()?.split(|byte| *byte == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    let text = parts.next().unwrap_or_default();
    (!time.is_empty()).then_some(Entry {
        time,
        is_stderr,
        is_partial,
        text,
    })
}

/// Reads an RFC 3339 time.
fn parse_time(text: &[u8]) -> Option<SystemTime> {
    let time: jiff::Timestamp = std::str::from_utf8(text).ok()?.parse().ok()?;
    Some(time.into())
}

/// Puts partial entries together to whole lines; one stream's parts may be between the other's.
#[derive(Debug, Default)]
pub struct Joiner {
    timestamps: bool,
    since: Option<SystemTime>,
    pending: [Option<Vec<u8>>; 2],
}

impl Joiner {
    /// Lines before `since` are left out; `timestamps` puts the time before each line.
    pub fn new(timestamps: bool, since: Option<SystemTime>) -> Self {
        Self {
            timestamps,
            since,
            pending: [None, None],
        }
    }

    /// Takes a CRI line (without line end) and returns the line it completes, with line end.
    pub fn push(&mut self, line: &[u8]) -> Option<Vec<u8>> {
        let entry = parse_entry(line)?;
        if let Some(since) = self.since
            && parse_time(entry.time).is_some_and(|time| time < since)
        {
            return None;
        }
        let pending = &mut self.pending[usize::from(entry.is_stderr)];
        let mut text = pending.take().unwrap_or_else(|| {
            let mut text = Vec::with_capacity(entry.text.len() + 40);
            if self.timestamps {
                text.extend_from_slice(entry.time);
                text.push(b' ');
            }
            text
        });
        text.extend_from_slice(entry.text);
        if entry.is_partial && text.len() < MAX_LINE_BYTES {
            *pending = Some(text);
            return None;
        }
        if !entry.is_partial {
            text.push(b'\n');
        }
        Some(text)
    }

    /// What partial lines are left at the end of the log.
    pub fn finish(&mut self) -> Vec<u8> {
        self.pending
            .iter_mut()
            .filter_map(Option::take)
            .flatten()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::*;

    const TIME: &str = "2026-01-02T03:04:05.123456789Z";

    #[test]
    fn entries() {
        let entry = parse_entry(b"2026-01-02T03:04:05Z stderr P a b").unwrap();
        assert_eq!(
            (entry.text, entry.is_stderr, entry.is_partial),
            (&b"a b"[..], true, true)
        );
        assert_eq!(parse_entry(b"t stdout F").unwrap().text, b"");
        assert_eq!(parse_entry(b"t stdout F ").unwrap().text, b"");
        for bad in [&b""[..], b"x", b"t stdin F x", b"t stdout X x", b" stdout F x"] {
            assert_eq!(parse_entry(bad), None);
        }
    }

    #[test]
    fn lines_before_since_are_left_out() {
        let since = parse_time(TIME.as_bytes()).unwrap();
        for (since, expected) in [(since, true), (since + Duration::from_nanos(1), false)] {
            let mut joiner = Joiner::new(false, Some(since));
            let line = format!("{TIME} stdout F x");
            assert_eq!(joiner.push(line.as_bytes()).is_some(), expected);
        }
    }

    #[test]
    fn parts_are_joined_by_stream() {
        let mut joiner = Joiner::new(true, None);
        let mut push = |stream: &str, flag: &str, text: &str| {
            joiner
                .push(format!("{TIME} {stream} {flag} {text}").as_bytes())
                .map(|line| String::from_utf8(line).unwrap())
        };
        assert_eq!(push("stdout", "P", "a"), None);
        assert_eq!(push("stderr", "F", "x"), Some(format!("{TIME} x\n")));
        assert_eq!(push("stdout", "F", "b"), Some(format!("{TIME} ab\n")));
    }

    #[test]
    fn endless_lines_come_in_pieces() {
        let mut joiner = Joiner::new(false, None);
        let part = format!("{TIME} stdout P {}", "x".repeat(16 << 10));
        let longest = (0..1000)
            .filter_map(|_| joiner.push(part.as_bytes()))
            .map(|line| line.len())
            .max();
        assert_eq!(longest, Some(MAX_LINE_BYTES));
    }

    proptest! {
        #[test]
        fn no_line_breaks_the_parser(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut joiner = Joiner::new(true, Some(UNIX_EPOCH));
            joiner.push(&line);
            let _ = parse_time(&line);
            joiner.push(&[TIME.as_bytes(), b" stdout P ", &line].concat());
        }
    }
}
