//! Fuzz target of the log reader: what containers print, and what a broken guest makes of it.

use std::fs::File;
use std::io::Write;
use std::time::UNIX_EPOCH;

use rustix::fs::MemfdFlags;

use super::line::{Joiner, parse_entry};
use super::read::tail_offset;

/// A log file. The first byte is the number of lines wanted from its end.
///
/// # Panics
/// When more lines come out than were wanted, or more bytes than are in the log.
pub fn cri_log(data: &[u8]) {
    let Some((n, log)) = data.split_first() else {
        return;
    };
    let memfd = rustix::fs::memfd_create("log", MemfdFlags::CLOEXEC).expect("descriptors can be had");
    let mut file = File::from(memfd);
    file.write_all(log).expect("memory can be had");
    let wanted = u64::from(*n);
    let (offset, n_found) = tail_offset(&mut file, wanted).expect("a file in memory can be read");
    assert!(n_found <= wanted);
    let tail = usize::try_from(offset)
        .ok()
        .and_then(|offset| log.get(offset..))
        .expect("the offset is in the file");
    let lines = || tail.split(|byte| *byte == b'\n');
    let n_whole = lines()
        .filter_map(parse_entry)
        .filter(|entry| !entry.is_partial)
        .count();
    assert_eq!(n_whole as u64, n_found, "from offset {offset} on");
    let mut joiner = Joiner::new(false, Some(UNIX_EPOCH));
    let mut n_bytes: usize = lines()
        .filter_map(|line| joiner.push(line))
        .map(|line| line.len())
        .sum();
    n_bytes += joiner.finish().len();
    assert!(n_bytes <= tail.len(), "{n_bytes} bytes of {}", tail.len());
}
