//! The data of a layer's regular files, each starting at a 4 KiB block.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::super::error::PullError;

/// Block size of blobs and of the file system that points into them.
pub(crate) const BLOCK_BYTES: u64 = 4096;
const CHUNK_BYTES: usize = 1 << 20;

/// Appends files to a blob; blocks of zeros become holes of the host's file.
pub(super) struct BlobWriter {
    file: File,
    next_block: u64,
    buffer: Vec<u8>,
}

impl BlobWriter {
    /// Writes into `file`, which is empty.
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            next_block: 0,
            buffer: vec![0; CHUNK_BYTES],
        }
    }

    /// Appends a file of `size` bytes and returns its first block. `pieces` are offset and length of its data, rising
    /// and within `size`; `read` fills a buffer with the next bytes of them.
    pub(super) fn append(
        &mut self,
        size: u64,
        pieces: &[(u64, u64)],
        mut read: impl FnMut(&mut [u8]) -> Result<(), PullError>,
        storage: impl Fn(io::Error) -> PullError,
    ) -> Result<u32, PullError> {
        if size == 0 {
            return Ok(0);
        }
        let blocks = size.div_ceil(BLOCK_BYTES);
        let block = u32::try_from(self.next_block)
            .ok()
            .filter(|_| self.next_block + blocks <= u32::MAX.into());
        let block = block.ok_or(PullError::TooLarge {
            what: "Data of a layer".into(),
            limit: u64::from(u32::MAX) * BLOCK_BYTES,
            unit: "bytes",
        })?;
        let start = self.next_block * BLOCK_BYTES;
        for (offset, len) in pieces {
            let mut done = 0;
            while done < *len {
                let part = usize::try_from(len - done).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
                read(&mut self.buffer[..part])?;
                self.write_data(start + offset + done, part).map_err(&storage)?;
                done += part as u64;
            }
        }
        self.next_block += blocks;
        Ok(block)
    }

    /// Writes the first `len` bytes of the buffer, leaving out runs of zeros.
    fn write_data(&self, at: u64, len: usize) -> io::Result<()> {
        let is_zero = |range: &[u8]| range.iter().all(|byte| *byte == 0);
        let block = usize::try_from(BLOCK_BYTES).expect("a small constant");
        let mut start = 0;
        while start < len {
            let mut end = (start + block).min(len);
            if is_zero(&self.buffer[start..end]) {
                start = end;
                continue;
            }
            while end < len && !is_zero(&self.buffer[end..(end + block).min(len)]) {
                end = (end + block).min(len);
            }
            self.file
                .write_all_at(&self.buffer[start..end], at + start as u64)?;
            start = end;
        }
        Ok(())
    }

    /// Sets the blob's length to whole blocks and makes it durable. Returns the length in blocks.
    pub(super) fn finish(self) -> io::Result<u32> {
        self.file.set_len(self.next_block * BLOCK_BYTES)?;
        self.file.sync_all()?;
        Ok(u32::try_from(self.next_block).expect("checked when a file was appended"))
    }
}
