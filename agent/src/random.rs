//! Random names, from the kernel.

use std::io;

use crate::{
    error::{Error, ErrorKind, Result},
    group::status::GroupId,
};

/// A fresh id of a group: `eci-` and 20 random lower-case letters and digits.
///
/// # Errors
/// The kernel gives no random bytes.
pub fn group_id() -> Result<GroupId> {
    let id = format!("eci-{}", text(20)?);
    GroupId::parse(&id).ok_or_else(|| Error::new(ErrorKind::Internal, format!("made a bad id {id}")))
}

/// That many random lower-case letters and digits.
///
/// # Errors
/// The kernel gives none.
pub fn text(length: usize) -> Result<String> {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut text = String::with_capacity(length);
    while text.len() < length {
        let mut bytes = [0_u8; 64];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(|error| {
            Error::with_source(ErrorKind::Internal, "get random bytes", io::Error::from(error))
        })?;
        // 252 is the largest multiple of 36 in a byte: above it some letters would be likelier.
        let fair = bytes.iter().filter(|byte| **byte < 252);
        text.extend(
            fair.map(|byte| char::from(ALPHABET[usize::from(byte % 36)]))
                .take(length - text.len()),
        );
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_valid_and_differ() {
        assert_ne!(group_id().unwrap(), group_id().unwrap());
    }
}
