//! The one error of the guest API: a kind the caller can act on, and a message for people.

use std::{fmt, io};

/// What a caller can act on; each is one ttrpc status code (`service::status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request or the specification in it is wrong.
    InvalidArgument,
    /// No such container, process or program.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// Right request, wrong time.
    FailedPrecondition,
    /// The program may not be run.
    PermissionDenied,
    /// A limit is reached.
    ResourceExhausted,
    /// What was waited for did not come in time.
    DeadlineExceeded,
    /// Everything else.
    Internal,
}

/// Why a request failed.
#[derive(Debug)]
pub struct Error {
    /// What the caller can act on.
    pub kind: ErrorKind,
    message: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error without a cause below it.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// [`ErrorKind::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// [`ErrorKind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// [`ErrorKind::FailedPrecondition`].
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::FailedPrecondition, message)
    }

    /// [`ErrorKind::Internal`]: `action` (a verb with its object) failed because of `source`.
    pub fn system(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            kind: ErrorKind::Internal,
            message: action.into(),
            source: Some(source.into()),
        }
    }

    /// The same error under another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

/// [`std::result::Result`] with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Adds what was tried to an [`io::Error`].
pub trait Context<T> {
    /// `action` is a verb with its object; it runs only on failure.
    ///
    /// # Errors
    /// The error of `self`, as [`ErrorKind::Internal`].
    fn context<M: Into<String>>(self, action: impl FnOnce() -> M) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<M: Into<String>>(self, action: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|source| Error::system(action(), source))
    }
}
