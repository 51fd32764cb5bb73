//! Constants and offsets of Linux `fs/erofs/erofs_fs.h`.

pub(super) use super::super::layer::BLOCK_BYTES;

/// log2 of the block size.
pub(super) const BLOCK_BITS: u8 = 12;
/// EROFS_SUPER_OFFSET.
pub(super) const SUPER_OFFSET: usize = 1024;
pub(super) const SUPER_BYTES: usize = 128;
/// EROFS_SUPER_MAGIC_V1.
pub(super) const SUPER_MAGIC: u32 = 0xE0F5_E1E2;
/// EROFS_FEATURE_COMPAT_SB_CHKSUM and _MTIME: mtimes are stored, not ctimes.
pub(super) const FEATURE_COMPAT: u32 = 0x1 | 0x2;
/// An inode number counts slots of this size from the metadata's start.
pub(super) const SLOT_BYTES: u64 = 32;
/// struct erofs_inode_extended.
pub(super) const INODE_BYTES: usize = 64;
/// i_format: bit 0 extended, bits 1 to 3 the data layout.
pub(super) const FORMAT_FLAT_PLAIN: u16 = 1;
pub(super) const FORMAT_FLAT_INLINE: u16 = 1 | (2 << 1);
/// struct erofs_dirent.
pub(super) const DIRENT_BYTES: usize = 12;
/// struct erofs_xattr_ibody_header.
pub(super) const XATTR_HEADER_BYTES: usize = 12;
/// struct erofs_xattr_entry.
pub(super) const XATTR_ENTRY_BYTES: usize = 4;

/// Attribute name prefixes and their EROFS_XATTR_INDEX_*.
pub(super) const XATTR_PREFIXES: [(u8, &[u8]); 4] = [
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (1, b"user."),
    (6, b"security."),
];

/// File type bits of a mode (`S_IF*`).
pub(super) mod mode {
    pub(in super::super) const MASK: u16 = 0o170_000;
    pub(in super::super) const FIFO: u16 = 0o010_000;
    pub(in super::super) const CHARACTER: u16 = 0o020_000;
    pub(in super::super) const DIRECTORY: u16 = 0o040_000;
    pub(in super::super) const BLOCK: u16 = 0o060_000;
    pub(in super::super) const REGULAR: u16 = 0o100_000;
    pub(in super::super) const SYMLINK: u16 = 0o120_000;
}

/// The directory entry's type for a mode (`FT_*`).
pub(super) fn file_type(mode: u16) -> u8 {
    match mode & mode::MASK {
        mode::REGULAR => 1,
        mode::DIRECTORY => 2,
        mode::CHARACTER => 3,
        mode::BLOCK => 4,
        mode::FIFO => 5,
        mode::SYMLINK => 7,
        _ => 0,
    }
}

/// CRC-32C as the kernel's `crc32c(~0, ...)`: no final inversion.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 & 0u32.wrapping_sub(crc & 1))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_the_published_check_value() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }
}
