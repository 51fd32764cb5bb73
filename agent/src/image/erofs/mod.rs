//! EROFS, the read-only file system of the guest's images: written and read without the kernel or outside tools.
//!
//! Format: Linux `fs/erofs/erofs_fs.h`. Used of it: one device, 4 KiB blocks, extended inodes, flat data (plain, or
//! with the last piece behind the inode), attributes behind the inode; no compression, no chunks, no shared
//! attributes. Readable by Linux 5.4 and newer.

mod layout;
mod reader;
mod writer;

pub(super) use reader::Erofs;
pub(super) use writer::write_metadata;

#[cfg(test)]
pub(super) use reader::Node;
