//! The end of a log as a message.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use super::line::parse_entry;

/// Most bytes of the file that are looked at; each line has a head of about 50 bytes.
const READ_BYTES: u64 = 16 << 10;

/// The last `lines` lines of a log, of them the last `bytes` bytes.
///
/// # Errors
/// When it cannot be read.
pub fn last_text(path: &Path, lines: usize, bytes: usize) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(READ_BYTES)))?;
    let mut read = Vec::new();
    file.take(READ_BYTES).read_to_end(&mut read)?;
    let mut text = Vec::new();
    // The first line may be the end of one.
    for line in read.split(|byte| *byte == b'\n') {
        if let Some(entry) = parse_entry(line) {
            text.extend_from_slice(entry.text);
            if !entry.is_partial {
                text.push(b'\n');
            }
        }
    }
    let text = String::from_utf8_lossy(&text);
    let mut begin = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(begin) {
        begin += 1;
    }
    let kept: Vec<&str> = text[begin..].lines().collect();
    Ok(kept[kept.len().saturating_sub(lines)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_counts_in_lines_and_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines: String = (0..1000).map(|n| format!("t stdout F line {n}\n")).collect();
        std::fs::write(file.path(), lines + "t stderr P pa\nt stderr F rt\n").unwrap();
        let text = last_text(file.path(), 3, 2048).unwrap();
        assert_eq!(text, "line 998\nline 999\npart");
        assert_eq!(last_text(file.path(), 80, 7).unwrap(), "9\npart");
    }
}
