//! The one error of the agent's engine: a small stable kind that doors map to their own status codes, and a message for
//! the user.

use std::fmt;

use crate::group::violation::{ViolationKind, Violations};

/// What a caller may match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is wrong; the message names field, value and what is valid.
    InvalidArgument,
    /// No such group, container or image.
    NotFound,
    /// No such disk.
    DiskNotFound,
    /// The name is taken.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// A limit or quota of the host is reached (disk, memory, addresses).
    ResourceExhausted,
    /// A peer (registry, sandbox) can't be reached now.
    Unavailable,
    /// It took too long.
    DeadlineExceeded,
    /// A defect or a host failure; details are in the agent's log.
    Internal,
}

/// An error of the engine.
#[derive(Debug)]
pub struct Error {
    /// What a caller may match on.
    pub kind: ErrorKind,
    /// One or more sentences for the user; the source is not repeated in it.
    pub message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    violations: Option<Violations>,
}

/// Result of the engine.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
            violations: None,
        }
    }

    /// An error with its cause.
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            message: message.into(),
            source: Some(source.into()),
            violations: None,
        }
    }

    /// A group that this host does not take, for these reasons.
    pub fn refused(violations: Violations) -> Self {
        let kind = match violations.0.first().map(|violation| violation.kind) {
            Some(ViolationKind::UnknownSecurityGroup) => ErrorKind::NotFound,
            Some(ViolationKind::PortTaken) => ErrorKind::AlreadyExists,
            _ => ErrorKind::InvalidArgument,
        };
        Self {
            kind,
            message: violations.to_string(),
            source: None,
            violations: Some(violations),
        }
    }

    /// What is wrong with the group, for doors with codes of their own.
    pub fn violations(&self) -> Option<&Violations> {
        self.violations.as_ref()
    }

    /// The message followed by the whole chain of causes, as logs and users see it.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
