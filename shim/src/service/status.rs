//! Errors as ttrpc status codes.

use ttrpc::{Code, get_status};

use crate::error::{Error, ErrorKind};

/// The code callers match.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        ErrorKind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        ErrorKind::Unavailable => Code::UNAVAILABLE,
        ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        ErrorKind::Internal => Code::INTERNAL,
    }
}

/// An error as the caller gets it; logged here, once.
#[expect(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
pub fn to_ttrpc(error: Error) -> ttrpc::Error {
    tracing::warn!(kind = ?error.kind(), error = error.chain(), "request failed");
    ttrpc::Error::RpcStatus(get_status(code(error.kind()), error.chain()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_and_the_code_arrive() {
        let error = Error::new(ErrorKind::NotFound, "no such file").context("start");
        let ttrpc::Error::RpcStatus(status) = to_ttrpc(error) else {
            panic!("not a status")
        };
        assert_eq!(
            (status.code(), status.message.as_str()),
            (Code::NOT_FOUND, "start: no such file")
        );
    }
}
