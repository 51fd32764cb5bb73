//! Digests of captured VMs: what was sealed is what is loaded.

use std::{collections::HashMap, fmt::Write as _, fs::File, io, os::unix::fs::FileExt, path::Path};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use sha2::{Digest, Sha256};

/// SHA-256 of each file by name, in hex.
pub type Digests = HashMap<String, String>;

/// The digests of these files. Blocks.
///
/// # Errors
/// Those of the file system.
pub fn digests(directory: &Path, files: &[&str]) -> io::Result<Digests> {
    files
        .iter()
        .map(|name| Ok(((*name).to_owned(), digest_of(&directory.join(name))?)))
        .collect()
}

/// Checks these files against their digests. Blocks.
///
/// # Errors
/// Which file differs, or cannot be read.
pub fn check(directory: &Path, files: &[&str], sealed: &Digests) -> Result<(), String> {
    for name in files {
        let found =
            digest_of(&directory.join(name)).map_err(|error| format!("{name} cannot be read: {error}"))?;
        if sealed.get(*name) != Some(&found) {
            return Err(format!("{name} is not what was sealed"));
        }
    }
    Ok(())
}

/// Bytes as text.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Of a file's length and of what is not a hole in it: most of a memory image is one, and reading holes takes as long as
/// reading data.
pub fn digest_of(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let mut digest = Sha256::new();
    digest.update(file.metadata()?.len().to_le_bytes());
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        offset = match seek(&file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // Only a hole is left, or nothing.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&file, SeekFrom::Hole(offset))?;
        digest.update(offset.to_le_bytes());
        digest.update(end.to_le_bytes());
        while offset < end {
            let wanted = usize::try_from(end - offset)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let n = file.read_at(&mut buffer[..wanted], offset)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            digest.update(&buffer[..n]);
            offset += n as u64;
        }
    }
    Ok(hex(&digest.finalize()))
}
