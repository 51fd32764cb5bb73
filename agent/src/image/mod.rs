//! Container images: from a registry to a block-device slice that a guest mounts as EROFS.
//!
//! What happens to an image, in order:
//!
//! 1. [`registry`] fetches manifest and configuration; every digest is verified.
//! 2. [`layer`] turns each layer, while it is being downloaded, into a *blob* (the data of its regular files, every
//!    file starting at a 4 KiB block) and an *index* (its tree: modes, owners, extended attributes, whiteouts, and
//!    where in the blob each file lies). Once per host, whatever images share the layer.
//! 3. [`tree`] merges the indexes of an image's layers, and [`erofs`] writes the merged tree as a file system that
//!    holds metadata only: a file's block address points past its end, into the blobs.
//! 4. [`store`] keeps all of it on disk, survives being killed at any moment, and knows what is still in use.
//!
//! What a guest gets is the concatenation `metadata, blob 1, blob 2, ...` ([`ImageRootfs`]) as one read-only block
//! device; nothing is ever unpacked into, or mounted on, the host's own file system. The decision is ADR 0002.

mod disk;
mod erofs;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod layer;
mod pull;
mod record;
mod reference;
mod registry;
pub mod runtime_config;
mod store;
mod tree;

#[cfg(test)]
mod tests;

pub use error::{PullError, PullErrorKind, StoreError};
pub use pull::{Progress, PullPhase, PullPolicy, PullProgress};
pub use record::{Image, ImageRootfs};
pub use reference::ImageReference;
pub use registry::Credentials;
pub use store::{ImageConfig, ImageStore, Lease};
