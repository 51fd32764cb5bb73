//! Copies files that are mostly empty: disks of container groups.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
};

use rustix::fs::{SeekFrom, copy_file_range, fstat, ioctl_ficlone, seek};

/// Copies a file by reference where the file system can, else only the parts that have data. What was at `to` is replaced;
/// the copy is for its owner alone. Blocks.
///
/// # Errors
/// Those of the file system; what is at `to` then is no copy.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(to)?;
    if ioctl_ficlone(target.as_fd(), source.as_fd()).is_ok() {
        return Ok(());
    }
    let length = u64::try_from(fstat(&source)?.st_size).unwrap_or(0);
    target.set_len(length)?;
    let mut at = 0;
    // ENXIO: no data after this offset (lseek(2)).
    while let Ok(start) = seek(&source, SeekFrom::Data(at)) {
        let end = seek(&source, SeekFrom::Hole(start))?;
        let (mut read_at, mut write_at) = (start, start);
        while read_at < end {
            let chunk = usize::try_from(end - read_at).unwrap_or(usize::MAX);
            if copy_file_range(&source, Some(&mut read_at), &target, Some(&mut write_at), chunk)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn copies_keep_content_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"middle", 500 << 20).unwrap();
        copy(&from, &to).unwrap();
        let copied = File::open(&to).unwrap();
        let mut bytes = [0; 6];
        copied.read_exact_at(&mut bytes, 500 << 20).unwrap();
        assert_eq!(&bytes, b"middle");
        let metadata = copied.metadata().unwrap();
        assert_eq!(metadata.len(), 1 << 30);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    }
}
