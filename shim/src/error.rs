//! The one error type of the shim: a small stable kind that callers match, what was tried, and the cause.

use std::{error::Error as StdError, fmt, io};

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request itself is wrong.
    InvalidArgument,
    /// No such sandbox, container or process.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// Right request, wrong state.
    FailedPrecondition,
    /// The program may not be executed.
    PermissionDenied,
    /// A limit was reached.
    ResourceExhausted,
    /// The sandbox is gone.
    Unavailable,
    /// The guest or the VMM did not answer in time.
    DeadlineExceeded,
    /// Not offered by this runtime.
    Unimplemented,
    /// A host error.
    Internal,
}

/// See the module.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Result with the shim's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a cause.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error with its cause.
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// A failed host operation; the kind follows the I/O error where it says something about the request.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            _ => ErrorKind::Internal,
        };
        Self::with_source(kind, context, source)
    }

    /// Puts another step in front.
    #[must_use]
    pub fn context(self, context: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            context: context.into(),
            source: Some(Box::new(self)),
        }
    }

    /// What a caller matches on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The whole chain in one line.
    pub fn chain(&self) -> String {
        let mut text = self.context.clone();
        let mut source = self.source();
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_ref()
            .map(|source| source.as_ref() as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_every_step_once() {
        let error =
            Error::io("open /x", io::Error::new(io::ErrorKind::NotFound, "gone")).context("start sandbox");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(error.chain(), "start sandbox: open /x: gone");
    }
}
