//! Errors as ttrpc status codes.

use ttrpc::Code;

use crate::error::{Error, ErrorKind};

fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        ErrorKind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        ErrorKind::Internal => Code::INTERNAL,
    }
}

/// The status the caller gets: the kind, and the message with its causes.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn status(error: Error) -> ttrpc::Error {
    let message = crate::log::chain(&error);
    if error.kind == ErrorKind::Internal {
        crate::log::error(&message);
    }
    ttrpc::Error::RpcStatus(ttrpc::get_status(code(error.kind), message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_told_once() {
        let cause = std::io::Error::from_raw_os_error(libc::ENOENT);
        let error = Error::system("execute /bin/x", cause).with_kind(ErrorKind::NotFound);
        let ttrpc::Error::RpcStatus(status) = status(error) else {
            panic!("a status")
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(
            status.message(),
            "execute /bin/x: No such file or directory (os error 2)"
        );
    }
}
