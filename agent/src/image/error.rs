//! What can go wrong with images.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image could not be pulled. Match on [`PullError::kind`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The registry has no such repository, tag or digest.
    #[error("Image {reference} is not known to its registry")]
    NotFound {
        /// As the user gave it, normalised.
        reference: String,
    },
    /// The policy forbids pulling and the image is not on this host.
    #[error("Image {reference} is not on this host and the pull policy is Never")]
    NotPresent {
        /// As the user gave it, normalised.
        reference: String,
    },
    /// The index has no image for this host's platform.
    #[error("Image {reference} has no {wanted} variant, only: {available}")]
    NoPlatform {
        /// As the user gave it, normalised.
        reference: String,
        /// What this host runs.
        wanted: String,
        /// What the index lists.
        available: String,
    },
    /// Credentials are missing, wrong, or not enough.
    #[error("Registry {registry} refused access to {reference}: {reason}")]
    Unauthorized {
        /// As the user gave it, normalised.
        reference: String,
        /// Registry address.
        registry: String,
        /// What exactly was refused.
        reason: String,
    },
    /// Bytes received are not the bytes asked for.
    #[error("Digest of {what} is {got}, expected {expected}")]
    DigestMismatch {
        /// Manifest, configuration or layer.
        what: String,
        /// The digest asked for.
        expected: String,
        /// The digest of what arrived.
        got: String,
    },
    /// No answer from the registry: name, connection, TLS or broken transfer.
    #[error("Failed to reach registry {address}")]
    Unreachable {
        /// The URL tried, without credentials.
        address: String,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The registry answered something no pull can continue with.
    #[error("Registry {address} answered status {status} for {what}")]
    Refused {
        /// Registry address.
        address: String,
        /// What was asked for.
        what: String,
        /// HTTP status.
        status: u16,
    },
    /// More layers than the host accepts.
    #[error("Image {reference} has {n_layers} layers, at most {limit} are supported")]
    TooManyLayers {
        /// As the user gave it, normalised.
        reference: String,
        /// Layers in the manifest.
        n_layers: usize,
        /// Highest accepted.
        limit: usize,
    },
    /// Something the registry sent is larger than the host accepts.
    #[error("{what} is larger than the limit of {limit} {unit}")]
    TooLarge {
        /// Manifest, configuration, layer, ...
        what: String,
        /// Highest accepted.
        limit: u64,
        /// What is counted: bytes, entries.
        unit: &'static str,
    },
    /// No space left for the image.
    #[error("No space left to write {}", path.display())]
    DiskFull {
        /// File being written.
        path: PathBuf,
        /// Cause: no space, quota exceeded, or file size limit.
        #[source]
        source: io::Error,
    },
    /// The reference cannot be parsed.
    #[error(
        "Image reference '{reference}' is not valid ({reason}): expected [registry[:port]/]name[:tag][@sha256:digest], \
         name in lower case"
    )]
    InvalidReference {
        /// As the user gave it.
        reference: String,
        /// What the parser stumbled over.
        reason: String,
    },
    /// A manifest, configuration or layer of a kind this host does not read.
    #[error("Media type '{media_type}' of {what} is not supported")]
    UnsupportedMediaType {
        /// Manifest, configuration or layer.
        what: String,
        /// As the registry named it.
        media_type: String,
    },
    /// A manifest or configuration that contradicts itself or the specification.
    #[error("{what} is not valid: {reason}")]
    InvalidManifest {
        /// Manifest, index or configuration, with its digest.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A layer that is no tar archive, or an entry of it that cannot be accepted.
    #[error("Layer entry '{entry}' is not valid: {reason}")]
    InvalidEntry {
        /// Path of the entry, escaped.
        entry: String,
        /// What is wrong.
        reason: String,
    },
    /// A layer's compressed stream is broken.
    #[error("Failed to unpack the {format} stream of a layer")]
    InvalidStream {
        /// gzip, zstd or tar.
        format: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The host's own storage failed.
    #[error("Failed to {action} {}", path.display())]
    Storage {
        /// Verb.
        action: &'static str,
        /// Object.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The work was given up because nobody waits for it any more.
    #[error("Pull was cancelled")]
    Cancelled,
}

/// The stable kinds of [`PullError`], for mapping to a door's own codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PullErrorKind {
    /// The image does not exist.
    NotFound,
    /// The image is not on this host and may not be pulled.
    NotPresent,
    /// Credentials are missing or insufficient.
    Unauthorized,
    /// Content does not match its digest.
    DigestMismatch,
    /// The registry does not answer, or answers with an error of its own; trying again may help.
    Unavailable,
    /// More layers than allowed.
    TooManyLayers,
    /// Another size limit was exceeded.
    TooLarge,
    /// No space left on the host.
    DiskFull,
    /// The reference is malformed.
    InvalidReference,
    /// Unknown media type.
    UnsupportedMediaType,
    /// The image itself is malformed.
    InvalidImage,
    /// A fault of the host.
    Internal,
    /// Nobody waits any more.
    Cancelled,
}

impl PullError {
    /// The stable kind of this error.
    #[must_use]
    pub fn kind(&self) -> PullErrorKind {
        match self {
            Self::NotFound { .. } | Self::NoPlatform { .. } => PullErrorKind::NotFound,
            Self::NotPresent { .. } => PullErrorKind::NotPresent,
            Self::Unauthorized { .. } => PullErrorKind::Unauthorized,
            Self::DigestMismatch { .. } => PullErrorKind::DigestMismatch,
            Self::Unreachable { .. } | Self::Refused { .. } => PullErrorKind::Unavailable,
            Self::TooManyLayers { .. } => PullErrorKind::TooManyLayers,
            Self::TooLarge { .. } => PullErrorKind::TooLarge,
            Self::DiskFull { .. } => PullErrorKind::DiskFull,
            Self::InvalidReference { .. } => PullErrorKind::InvalidReference,
            Self::UnsupportedMediaType { .. } => PullErrorKind::UnsupportedMediaType,
            Self::InvalidManifest { .. } | Self::InvalidEntry { .. } | Self::InvalidStream { .. } => {
                PullErrorKind::InvalidImage
            }
            Self::Storage { .. } => PullErrorKind::Internal,
            Self::Cancelled => PullErrorKind::Cancelled,
        }
    }

    /// Wraps an error of writing to the host's storage; a full disk becomes [`PullError::DiskFull`].
    pub(super) fn storage(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::DiskFull { path, source }
            }
            _ => Self::Storage { action, path, source },
        }
    }

    /// An entry that cannot be accepted; the name comes from the archive and is escaped.
    pub(super) fn entry(path: &[u8], reason: impl Into<String>) -> Self {
        Self::InvalidEntry {
            entry: path.escape_ascii().to_string(),
            reason: reason.into(),
        }
    }
}

/// Why the image store could not do something other than pulling.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has this store open.
    #[error("Image store {} is in use by another process", path.display())]
    Locked {
        /// Folder of the store.
        path: PathBuf,
    },
    /// No such image on this host.
    #[error("Image {reference} is not on this host")]
    NotFound {
        /// As the caller gave it.
        reference: String,
    },
    /// The reference cannot be parsed.
    #[error("Image reference '{reference}' is not valid")]
    InvalidReference {
        /// As the caller gave it.
        reference: String,
    },
    /// A running group holds a lease.
    #[error("Image {reference} is in use by {n_leases} leases")]
    InUse {
        /// As the caller gave it.
        reference: String,
        /// Leases held.
        n_leases: usize,
    },
    /// A configured certificate authority cannot be used.
    #[error("Failed to load certificate authorities from {}: {reason}", path.display())]
    Certificates {
        /// File, or the host's store.
        path: PathBuf,
        /// Cause.
        reason: String,
    },
    /// The host's own storage failed.
    #[error("Failed to {action} {}", path.display())]
    Storage {
        /// Verb.
        action: &'static str,
        /// Object.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    pub(super) fn storage(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Storage {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
