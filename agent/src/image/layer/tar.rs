//! A tar archive as a bounded stream of entries: ustar, GNU and PAX, sparse files of GNU and PAX.
//!
//! The `tar` crate decodes the headers; the iteration is our own because the archive comes from a stranger: the
//! crate reads extended headers of any claimed size into memory and splits PAX records at newlines, which breaks
//! binary attribute values.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::super::error::PullError;
use super::LayerLimits;
use super::pax::Pax;

const BLOCK_BYTES: usize = 512;
/// Longest PAX header accepted; a Linux extended attribute value has at most 64 KiB.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Most pieces of data of one sparse file.
const MAX_SPARSE_SEGMENTS: usize = 1 << 17;

/// One entry, extensions already merged in. Its data is read from the stream that returned it.
#[derive(Debug)]
pub(super) struct TarEntry {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: EntryType,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: (i64, u32),
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    /// Length of the file, holes included.
    pub(super) size: u64,
    /// Pieces of data as offset and length, rising; `None` when the file has no holes.
    pub(super) sparse: Option<Vec<(u64, u64)>>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads an archive front to back.
pub(super) struct TarStream<R> {
    reader: R,
    format: &'static str,
    limits: LayerLimits,
    /// Data of the current entry not read yet.
    remaining: u64,
    /// Zeros between the data and the next header.
    padding: u64,
    has_ended: bool,
}

impl<R: Read> TarStream<R> {
    /// `format` names the compression in errors.
    pub(super) fn new(reader: R, format: &'static str, limits: LayerLimits) -> Self {
        Self {
            reader,
            format,
            limits,
            remaining: 0,
            padding: 0,
            has_ended: false,
        }
    }

    /// The next file, directory, link or device; the rest of the current one's data is skipped.
    pub(super) fn next_entry(&mut self) -> Result<Option<TarEntry>, PullError> {
        let mut pax = Pax::default();
        let mut gnu_path = None;
        let mut gnu_link = None;
        while let Some(header) = self.next_header()? {
            let name = header.path_bytes().into_owned();
            let field = |result: io::Result<u64>, what: &str| {
                result.map_err(|error| PullError::entry(&name, format!("{what}: {error}")))
            };
            let stored = match pax.size {
                Some(size) => size,
                None => field(header.entry_size(), "size")?,
            };
            self.remaining = stored;
            self.padding = stored.next_multiple_of(BLOCK_BYTES as u64).wrapping_sub(stored);
            if stored > u64::MAX / 4 {
                return Err(PullError::entry(&name, format!("size {stored} is impossible")));
            }
            match header.entry_type() {
                EntryType::XHeader => pax = Pax::parse(&self.read_extension(&name)?)?,
                EntryType::XGlobalHeader => {
                    self.read_extension(&name)?;
                }
                EntryType::GNULongName => gnu_path = Some(without_nul(self.read_extension(&name)?)),
                EntryType::GNULongLink => gnu_link = Some(without_nul(self.read_extension(&name)?)),
                // The volume's label; no file.
                kind if kind.as_byte() == b'V' => {}
                kind => {
                    let path = pax.path.take().or(gnu_path).unwrap_or(name.clone());
                    let link = pax.link.take().or(gnu_link);
                    let link = link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
                    let device = |result: io::Result<Option<u32>>| {
                        result.map_err(|error| PullError::entry(&name, format!("device number: {error}")))
                    };
                    let is_device = matches!(kind, EntryType::Char | EntryType::Block);
                    let mut entry = TarEntry {
                        link: link.unwrap_or_default(),
                        kind,
                        mode: header
                            .mode()
                            .map_err(|error| PullError::entry(&path, format!("mode: {error}")))?,
                        uid: pax.uid.map_or_else(|| field(header.uid(), "uid"), Ok)?,
                        gid: pax.gid.map_or_else(|| field(header.gid(), "gid"), Ok)?,
                        mtime: match pax.mtime {
                            Some(mtime) => mtime,
                            // Times before 1970 are stored as negative 64-bit numbers.
                            None => (field(header.mtime(), "mtime")?.cast_signed(), 0),
                        },
                        device: if is_device {
                            let major = device(header.device_major())?;
                            (major.unwrap_or(0), device(header.device_minor())?.unwrap_or(0))
                        } else {
                            (0, 0)
                        },
                        size: stored,
                        sparse: None,
                        xattrs: std::mem::take(&mut pax.xattrs),
                        path,
                    };
                    if kind == EntryType::GNUSparse {
                        self.read_gnu_sparse(&header, &mut entry)?;
                    } else if let Some(size) = pax.sparse_size {
                        entry.size = size;
                        entry.sparse = Some(match pax.sparse_map.take() {
                            Some(map) => map,
                            None => self.read_pax_sparse(&entry.path)?,
                        });
                    }
                    self.check_sparse(&entry)?;
                    return Ok(Some(entry));
                }
            }
        }
        Ok(None)
    }

    /// Reads data of the current entry, as stored: the pieces of a sparse file follow each other.
    pub(super) fn read_data(&mut self, buf: &mut [u8]) -> Result<(), PullError> {
        if buf.len() as u64 > self.remaining {
            return Err(self.broken(io::ErrorKind::UnexpectedEof.into()));
        }
        self.fill(buf)?;
        self.remaining -= buf.len() as u64;
        Ok(())
    }

    /// Reads the stream to its end, whatever follows the archive: digests cover all of it.
    pub(super) fn finish(mut self) -> Result<R, PullError> {
        let mut buf = vec![0; 64 << 10];
        loop {
            match self.reader.read(&mut buf) {
                Ok(0) => return Ok(self.reader),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    fn next_header(&mut self) -> Result<Option<Header>, PullError> {
        if self.has_ended {
            return Ok(None);
        }
        self.skip(self.remaining)?;
        // Some writers leave out the padding of the last file; then the next header is missing too.
        io::copy(&mut self.reader.by_ref().take(self.padding), &mut io::sink())
            .map_err(|e| self.broken(e))?;
        (self.remaining, self.padding) = (0, 0);
        let mut header = Header::new_old();
        if !self.fill_or_end(header.as_mut_bytes())? {
            // Some writers leave out the end marker.
            self.has_ended = true;
            return Ok(None);
        }
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            self.has_ended = true;
            return Ok(None);
        }
        let sum: u32 = header.as_bytes()[..148]
            .iter()
            .chain(&header.as_bytes()[156..])
            .map(|b| u32::from(*b))
            .sum();
        // The checksum field itself counts as eight spaces.
        if header.cksum().ok() != Some(sum + 8 * u32::from(b' ')) {
            return Err(PullError::entry(
                &header.path_bytes(),
                "header checksum does not match, this is no tar archive",
            ));
        }
        Ok(Some(header))
    }

    fn read_extension(&mut self, name: &[u8]) -> Result<Vec<u8>, PullError> {
        if self.remaining > MAX_EXTENSION_BYTES {
            return Err(PullError::entry(
                name,
                format!("extended header of {} bytes", self.remaining),
            ));
        }
        let len = usize::try_from(self.remaining).expect("bounded above");
        let mut data = vec![0; len];
        self.read_data(&mut data)?;
        Ok(data)
    }

    fn read_gnu_sparse(&mut self, header: &Header, entry: &mut TarEntry) -> Result<(), PullError> {
        let invalid = |error: io::Error| PullError::entry(&entry.path, format!("sparse map: {error}"));
        let gnu = header
            .as_gnu()
            .ok_or_else(|| PullError::entry(&entry.path, "sparse map without a GNU header"))?;
        let mut map = Vec::new();
        for piece in gnu.sparse.iter().filter(|piece| !piece.is_empty()) {
            map.push((piece.offset().map_err(invalid)?, piece.length().map_err(invalid)?));
        }
        let mut is_extended = gnu.is_extended();
        while is_extended {
            let mut extension = GnuExtSparseHeader::new();
            self.fill(extension.as_mut_bytes())?;
            for piece in extension.sparse.iter().filter(|piece| !piece.is_empty()) {
                map.push((piece.offset().map_err(invalid)?, piece.length().map_err(invalid)?));
            }
            if map.len() > MAX_SPARSE_SEGMENTS {
                return Err(PullError::entry(&entry.path, "sparse map is too long"));
            }
            is_extended = extension.is_extended();
        }
        entry.size = gnu.real_size().map_err(invalid)?;
        entry.sparse = Some(map);
        Ok(())
    }

    /// PAX sparse format 1.0: decimal numbers, one a line, before the data and padded to a block.
    fn read_pax_sparse(&mut self, path: &[u8]) -> Result<Vec<(u64, u64)>, PullError> {
        let mut block = [0; BLOCK_BYTES];
        let mut at = BLOCK_BYTES;
        let mut next = |stream: &mut Self| -> Result<u64, PullError> {
            let mut number: u64 = 0;
            loop {
                if at == BLOCK_BYTES {
                    stream.read_data(&mut block)?;
                    at = 0;
                }
                let byte = block[at];
                at += 1;
                match byte {
                    b'\n' => return Ok(number),
                    b'0'..=b'9' if number < u64::MAX / 20 => number = number * 10 + u64::from(byte - b'0'),
                    _ => return Err(PullError::entry(path, "sparse map is not made of numbers")),
                }
            }
        };
        let count = next(self)?;
        if count > MAX_SPARSE_SEGMENTS as u64 {
            return Err(PullError::entry(path, "sparse map is too long"));
        }
        (0..count).map(|_| Ok((next(self)?, next(self)?))).collect()
    }

    /// The pieces rise, lie within the file, and are what the archive holds.
    fn check_sparse(&self, entry: &TarEntry) -> Result<(), PullError> {
        let Some(map) = &entry.sparse else { return Ok(()) };
        let mut end = 0;
        let mut total = 0;
        for (offset, len) in map {
            let next = offset
                .checked_add(*len)
                .filter(|next| *offset >= end && *next <= entry.size);
            end = next.ok_or_else(|| PullError::entry(&entry.path, "sparse map is out of order or range"))?;
            total += len;
        }
        if total != self.remaining {
            return Err(PullError::entry(
                &entry.path,
                "sparse map does not cover the stored data",
            ));
        }
        Ok(())
    }

    fn skip(&mut self, len: u64) -> Result<(), PullError> {
        let skipped =
            io::copy(&mut self.reader.by_ref().take(len), &mut io::sink()).map_err(|e| self.broken(e))?;
        if skipped < len {
            return Err(self.broken(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), PullError> {
        self.reader.read_exact(buf).map_err(|error| self.broken(error))
    }

    /// Like `fill`, but `false` when there is not a single byte.
    fn fill_or_end(&mut self, buf: &mut [u8]) -> Result<bool, PullError> {
        loop {
            match self.reader.read(buf) {
                Ok(0) => return Ok(false),
                Ok(got) => return self.fill(&mut buf[got..]).map(|()| true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    fn broken(&self, source: io::Error) -> PullError {
        super::stream_error(self.format, source, self.limits)
    }
}

fn without_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
