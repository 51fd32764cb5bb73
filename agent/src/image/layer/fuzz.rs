//! The part of converting a layer that comes before its digests are compared.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use super::{LayerIndex, LayerLimits, PullError, convert_stream};

const LIMITS: LayerLimits = LayerLimits {
    max_unpacked_bytes: 1 << 20,
    max_entries: 1000,
};

/// The index of an archive, as if its digests were right.
pub(crate) fn convert_archive(archive: &[u8], blob: File) -> Result<LayerIndex, PullError> {
    let mut source = BufReader::new(archive);
    convert_stream(&mut source, blob, Path::new("blob"), LIMITS).map(|(index, _)| index)
}
