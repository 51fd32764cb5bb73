//! Errors of the ECI OpenAPI: a code, an HTTP status, a message.

use crate::{
    error::{Error, ErrorKind},
    group::violation::{ViolationKind, Violations},
};

use super::{nonces::NonceError, signing::SigningError};

/// An error reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) status: u16,
    pub(super) code: &'static str,
    pub(super) message: String,
}

impl ApiError {
    pub(super) fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }

    /// A value that is not valid.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(400, "InvalidParameter", message)
    }

    /// A required parameter that is missing.
    pub(super) fn missing(name: &str) -> Self {
        Self::new(400, "MissingParameter", format!("{name} is required"))
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        if let Some(violations) = error.violations() {
            return violations.clone().into();
        }
        let (status, code) = match error.kind {
            ErrorKind::InvalidArgument => (400, "InvalidParameter"),
            ErrorKind::NotFound => (404, "InvalidParameter.NotFound"),
            ErrorKind::DiskNotFound => (404, "InvalidDiskId.NotFound"),
            ErrorKind::AlreadyExists => (400, "OperationConflict"),
            ErrorKind::FailedPrecondition => (400, "IncorrectStatus"),
            ErrorKind::ResourceExhausted => (403, "OperationDenied.NoStock"),
            ErrorKind::Unavailable | ErrorKind::DeadlineExceeded => (503, "ServiceUnavailable"),
            ErrorKind::Internal => {
                tracing::error!("A request failed: {}", error.chain());
                (500, "InternalError")
            }
        };
        Self::new(status, code, error.message)
    }
}

impl From<Violations> for ApiError {
    /// The first mistake chooses the code, the message holds all.
    fn from(violations: Violations) -> Self {
        let kind = violations.0.first().map(|violation| violation.kind);
        let (status, code) = match kind {
            Some(ViolationKind::Missing) => (400, "MissingParameter"),
            Some(ViolationKind::TooLong) => (400, "InvalidParameter.LengthExceeded"),
            Some(ViolationKind::DuplicateContainer) => (400, "InvalidParameter.DuplicatedName"),
            Some(ViolationKind::DuplicateVolume) => (400, "InvalidParameter.DuplicatedVolumeName"),
            Some(ViolationKind::Size) => (400, "InvalidParameter.CPU.Memory"),
            Some(ViolationKind::Restricted) => (403, "FeatureAccessRestricted"),
            Some(ViolationKind::NoIpv6) => (400, "Ipv6AddressNotSupport"),
            Some(ViolationKind::PortTaken) => (400, "OperationConflict"),
            Some(ViolationKind::UnknownSecurityGroup) => (404, "InvalidSecurityGroupId.NotFound"),
            Some(ViolationKind::Invalid | ViolationKind::Unsupported) | None => (400, "InvalidParameter"),
        };
        let texts: Vec<_> = violations.0.iter().map(ToString::to_string).collect();
        Self::new(status, code, texts.join("; "))
    }
}

impl From<SigningError> for ApiError {
    fn from(error: SigningError) -> Self {
        let (status, code) = match &error {
            SigningError::NotSigned | SigningError::Missing { .. } => (400, "MissingParameter"),
            SigningError::Incomplete(_) | SigningError::BodyHash => (400, "IncompleteSignature"),
            SigningError::Scheme(_) => (400, "InvalidParameter"),
            SigningError::UnknownKey => (404, "InvalidAccessKeyId.NotFound"),
            SigningError::TimeFormat(_) => (400, "InvalidTimeStamp.Format"),
            SigningError::Expired(_) => (400, "InvalidTimeStamp.Expired"),
            SigningError::Mismatch { .. } => (400, "SignatureDoesNotMatch"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<NonceError> for ApiError {
    fn from(error: NonceError) -> Self {
        match error {
            NonceError::Used => Self::new(
                400,
                "SignatureNonceUsed",
                "Specified signature nonce was used already",
            ),
            NonceError::Full => Self::new(400, "Throttling", "Request was denied due to request throttling"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_disk_has_a_code_of_its_own() {
        for (kind, expected) in [
            (ErrorKind::NotFound, "InvalidParameter.NotFound"),
            (ErrorKind::DiskNotFound, "InvalidDiskId.NotFound"),
        ] {
            let answer = ApiError::from(Error::new(kind, "no such thing"));
            assert_eq!((answer.status, answer.code), (404, expected));
        }
    }
}
