//! The end of the guest's console file, made safe to show: the guest wrote it.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

/// Most bytes read from the end of the file.
const TAIL_MAX_BYTES: u64 = 4096;
/// Most lines shown.
const TAIL_MAX_LINES: usize = 20;

/// The last lines, printable characters only; empty when there are none or the file cannot be read.
pub fn tail(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_MAX_BYTES)))?;
        file.take(TAIL_MAX_BYTES).read_to_end(&mut bytes)
    });
    if read.is_err() {
        return String::new();
    }
    last_lines(&bytes)
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(TAIL_MAX_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_printable_lines() {
        let mut bytes = b"\x1b[2Jcleared\r\n\n\xff\xfe\n".to_vec();
        for n in 0..30 {
            bytes.extend_from_slice(format!("line {n}\r\n").as_bytes());
        }
        let shown = last_lines(&bytes);
        assert_eq!(shown.lines().count(), TAIL_MAX_LINES);
        assert!(shown.starts_with("line 10") && shown.ends_with("line 29"));
        assert_eq!(last_lines(b"\x1b[2Jcleared\r\n"), "[2Jcleared");
        assert_eq!(tail(Path::new("/nonexistent")), "");
    }
}
