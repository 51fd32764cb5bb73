//! Decompression of a layer, chosen by its first bytes.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The decompressed bytes of a layer.
pub(super) enum Decompressor<R: BufRead> {
    Plain(R),
    Gzip(Box<MultiGzDecoder<R>>),
    Zstd(Box<ZstdFrames<R>>),
}

impl<R: BufRead> Decompressor<R> {
    /// Looks at the first bytes, which stay in `source`. A skippable zstd frame in front is recognised as well.
    pub(super) fn new(mut source: R) -> io::Result<Self> {
        let start = source.fill_buf()?;
        let is_skippable = start.len() >= 4 && (start[0] & 0xf0) == 0x50 && start[1..4] == [0x2a, 0x4d, 0x18];
        if start.starts_with(&GZIP_MAGIC) {
            Ok(Self::Gzip(Box::new(MultiGzDecoder::new(source))))
        } else if start.starts_with(&ZSTD_MAGIC) || is_skippable {
            Ok(Self::Zstd(Box::new(ZstdFrames::new(source))))
        } else {
            Ok(Self::Plain(source))
        }
    }

    pub(super) fn format(&self) -> &'static str {
        match self {
            Self::Plain(_) => "tar",
            Self::Gzip(_) => "gzip",
            Self::Zstd(_) => "zstd",
        }
    }
}

impl<R: BufRead> Read for Decompressor<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(buf),
            Self::Gzip(source) => source.read(buf),
            Self::Zstd(source) => source.read(buf),
        }
    }
}

/// Reads a sequence of zstd frames; the library's decoder reads one and refuses skippable ones.
pub(super) struct ZstdFrames<R: BufRead> {
    source: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> ZstdFrames<R> {
    fn new(source: R) -> Self {
        Self {
            source,
            decoder: FrameDecoder::new(),
            in_frame: false,
        }
    }

    /// Starts the next frame; `false` at the end of input.
    fn start_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.init(&mut self.source) {
                Ok(()) => {
                    self.in_frame = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let skipped = io::copy(&mut self.source.by_ref().take(length.into()), &mut io::sink())?;
                    if skipped != u64::from(length) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buf);
            }
            if self.in_frame && self.decoder.is_finished() {
                self.in_frame = false;
            }
            if !self.in_frame && !self.start_frame()? {
                return Ok(0);
            }
            self.decoder
                .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBytes(buf.len()))
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn decompressed(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decompressor::new(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn sample() -> Vec<u8> {
        (0..300_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect()
    }

    #[test]
    fn reads_plain_bytes_and_several_gzip_members() {
        assert_eq!(decompressed(b"plain").unwrap(), b"plain");
        let mut bytes = Vec::new();
        for part in sample().chunks(500_000) {
            let mut encoder = GzEncoder::new(&mut bytes, Compression::fast());
            encoder.write_all(part).unwrap();
            encoder.finish().unwrap();
        }
        assert_eq!(decompressed(&bytes).unwrap(), sample());
        assert!(decompressed(&bytes[..bytes.len() - 9]).is_err());
    }

    #[test]
    fn reads_several_zstd_frames_with_skippable_ones_between() {
        let skippable = [0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9];
        let mut bytes = skippable.to_vec();
        for part in sample().chunks(500_000) {
            bytes.extend(compress_to_vec(part, CompressionLevel::Fastest));
            bytes.extend(skippable);
        }
        assert_eq!(decompressed(&bytes).unwrap(), sample());
        assert!(decompressed(&bytes[..bytes.len() - 1]).is_err());
        assert!(decompressed(&bytes[..bytes.len() - 30]).is_err());
    }
}
