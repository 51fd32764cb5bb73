//! PAX extended headers (POSIX.1-2001, pax interchange format).

use super::super::error::PullError;

/// Prefix of extended attributes in every writer seen in the field: libarchive's star-compatible keys.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// The records this host honours.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Real length of a sparse file.
    pub(super) sparse_size: Option<u64>,
    /// Format 0.1 has the map here, format 1.0 before the data.
    pub(super) sparse_map: Option<Vec<(u64, u64)>>,
}

impl Pax {
    /// Parses records of the form `length key=value\n`, the length counting all of the record.
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, PullError> {
        let mut pax = Self::default();
        let mut sparse_name = None;
        while !bytes.is_empty() {
            let (key, value, rest) = split_record(bytes)
                .ok_or_else(|| PullError::entry(&bytes[..bytes.len().min(64)], "malformed PAX record"))?;
            bytes = rest;
            let invalid =
                || PullError::entry(key, format!("PAX value '{}' is not valid", value.escape_ascii()));
            match key {
                b"path" => pax.path = Some(value.to_vec()),
                b"linkpath" => pax.link = Some(value.to_vec()),
                b"size" => pax.size = Some(number(value).ok_or_else(invalid)?),
                b"uid" => pax.uid = Some(number(value).ok_or_else(invalid)?),
                b"gid" => pax.gid = Some(number(value).ok_or_else(invalid)?),
                b"mtime" => pax.mtime = Some(time(value).ok_or_else(invalid)?),
                b"GNU.sparse.name" => sparse_name = Some(value.to_vec()),
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                    pax.sparse_size = Some(number(value).ok_or_else(invalid)?);
                }
                b"GNU.sparse.map" => pax.sparse_map = Some(sparse_map(value).ok_or_else(invalid)?),
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    return Err(PullError::entry(
                        key,
                        "PAX sparse format 0.0 is not supported, 0.1 and 1.0 are",
                    ));
                }
                _ => {
                    if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                        pax.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        // The ordinary path of a sparse file is a made-up one.
        pax.path = sparse_name.or(pax.path);
        Ok(pax)
    }
}

fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(8).position(|byte| *byte == b' ')?;
    let len = usize::try_from(number(&bytes[..space])?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], rest))
}

fn number(value: &[u8]) -> Option<u64> {
    if !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Seconds since 1970 with an optional fraction; the fraction of a negative time counts downwards.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (is_negative, value) = match value.strip_prefix(b"-") {
        Some(value) => (true, value),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(number(parts.next()?)?).ok()?;
    let mut nanos = 0;
    let fraction = parts.next().unwrap_or_default();
    number(fraction)
        .filter(|_| fraction.len() <= 18)
        .or(fraction.is_empty().then_some(0))?;
    for place in 0..9 {
        nanos = nanos * 10 + fraction.get(place).map_or(0, |digit| u32::from(digit - b'0'));
    }
    match (is_negative, nanos) {
        (false, _) => Some((seconds, nanos)),
        (true, 0) => Some((-seconds, 0)),
        (true, _) => Some((-seconds - 1, 1_000_000_000 - nanos)),
    }
}

fn sparse_map(value: &[u8]) -> Option<Vec<(u64, u64)>> {
    let numbers = value
        .split(|byte| *byte == b',')
        .map(number)
        .collect::<Option<Vec<_>>>()?;
    let (pairs, rest) = numbers.as_chunks::<2>();
    rest.is_empty()
        .then(|| pairs.iter().map(|[offset, len]| (*offset, *len)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_records_with_newlines_and_equals_signs_in_values() {
        let pax = Pax::parse(b"30 SCHILY.xattr.user.a=x\ny=\0z\n12 uid=1234\n23 mtime=1700000000.25\n");
        let pax = pax.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(pax.xattrs, [(b"user.a".to_vec(), b"x\ny=\0z".to_vec())]);
        assert_eq!(pax.uid, Some(1234));
        assert_eq!(pax.mtime, Some((1_700_000_000, 250_000_000)));
    }

    #[test]
    fn times_before_1970_round_down() {
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"-3"), Some((-3, 0)));
        assert_eq!(time(b"5.000000001"), Some((5, 1)));
        assert_eq!(time(b"x"), None);
        assert_eq!(time(b"1.x"), None);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pax::parse(&bytes);
        }
    }
}
