//! Finds where the last lines of a log begin.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use super::line::parse_entry;

const CHUNK_BYTES: u64 = 64 << 10;

/// The offset where the last `n` whole lines of the file begin; parts of a line count with its end.
pub(super) fn tail_offset(file: &mut File, n: u64) -> io::Result<(u64, u64)> {
    let end = file.metadata()?.len();
    if n == 0 {
        return Ok((end, 0));
    }
    let mut lines = 0;
    let mut line_end = end;
    // Bytes from `start` on that are not yet taken apart.
    let mut carry: Vec<u8> = Vec::new();
    let mut start = end;
    while start > 0 {
        let step = CHUNK_BYTES.min(start);
        start -= step;
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.by_ref().take(step).read_to_end(&mut bytes)?;
        bytes.extend_from_slice(&carry);
        // From the back: every line break but the file's last byte begins a line.
        let mut until = bytes.len();
        while let Some(at) = bytes[..until].iter().rposition(|byte| *byte == b'\n') {
            let line = &bytes[at + 1..until];
            let begins = start + at as u64 + 1;
            if !line.is_empty() && parse_entry(line).is_some_and(|entry| !entry.is_partial) {
                lines += 1;
                if lines > n {
                    return Ok((line_end, n));
                }
            }
            line_end = begins;
            until = at;
        }
        bytes.truncate(until);
        carry = bytes;
    }
    if parse_entry(&carry).is_some_and(|entry| !entry.is_partial) {
        lines += 1;
        if lines > n {
            return Ok((line_end, n));
        }
    }
    Ok((0, lines))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn check(content: &str, n: u64, expected: &str) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        let (offset, _) = tail_offset(&mut file, n).unwrap();
        assert_eq!(
            &content[usize::try_from(offset).unwrap()..],
            expected,
            "{n} of {content:?}"
        );
    }

    #[test]
    fn last_lines() {
        let log = "t stdout F a\nt stdout P b\nt stdout F c\nt stdout F d\n";
        check(log, 0, "");
        check(log, 1, "t stdout F d\n");
        check(log, 2, "t stdout P b\nt stdout F c\nt stdout F d\n");
        check(log, 3, log);
        check(log, 9, log);
        check("", 1, "");
    }

    #[test]
    fn lines_across_chunks() {
        let long = format!("t stdout F {}\n", "x".repeat(100 << 10));
        let log = format!("{long}{long}t stdout F end\n");
        check(&log, 1, "t stdout F end\n");
        check(&log, 2, &log[long.len()..]);
        check(&log, 3, &log);
    }
}
