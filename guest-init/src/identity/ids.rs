//! The ids containers see: machine, boot, generation.

use std::{fmt::Write as _, io};

use crate::{
    boot::entropy,
    error::{Error, Result},
};

/// A 128-bit id.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id([u8; 16]);

impl std::fmt::Debug for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.hex())
    }
}

impl Id {
    /// A random UUID (RFC 9562, section 5.4), from the kernel's generator.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        entropy::fill(&mut bytes)?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    /// Reads 32 lower-case hex digits; `field` is their name in messages.
    ///
    /// # Errors
    /// `InvalidArgument` names the field. All zeroes are no id (machine-id(5)).
    pub fn parse_hex(field: &str, text: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(format!(
                "{field} is {text:?}: give 32 lower-case hex digits, not all zero"
            ))
        };
        let digits = text.as_bytes();
        if digits.len() != 32 || digits.iter().any(u8::is_ascii_uppercase) {
            return Err(wrong());
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            let digit = |digit: u8| {
                char::from(digit)
                    .to_digit(16)
                    .and_then(|value| u8::try_from(value).ok())
            };
            let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else {
                return Err(wrong());
            };
            *byte = high << 4 | low;
        }
        if bytes == [0; 16] {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }

    /// 32 hex digits.
    #[must_use]
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(32);
        for byte in self.0 {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    /// The form of a UUID: 8-4-4-4-12 hex digits.
    #[must_use]
    pub fn uuid(&self) -> String {
        let mut text = self.hex();
        for at in [20, 16, 12, 8] {
            text.insert(at, '-');
        }
        text
    }
}

/// The ids of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// `/etc/machine-id`.
    pub machine: Id,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: Id,
    /// `/run/eci/generation`.
    pub generation: Id,
}

impl Ids {
    /// New ones; `machine` if it is given.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn draw(machine: Option<Id>) -> io::Result<Self> {
        Ok(Self {
            machine: machine.map_or_else(Id::random, Ok)?,
            boot: Id::random()?,
            generation: Id::random()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_as_they_are_read() {
        let text = "0123456789abcdef0123456789abcdef";
        let id = Id::parse_hex("machine_id", text).unwrap();
        assert_eq!(id.hex(), text);
        assert_eq!(id.uuid(), "01234567-89ab-cdef-0123-456789abcdef");
    }

    #[test]
    fn what_is_no_machine_id_is_named() {
        for text in [
            "1",
            "0123456789ABCDEF0123456789abcdef",
            "0123456789abcdef0123456789abcdeg",
            &"0".repeat(32),
            &"1".repeat(33),
        ] {
            let error = Id::parse_hex("machine_id", text).unwrap_err();
            assert!(error.to_string().starts_with("machine_id is"), "{error}");
        }
    }

    #[test]
    fn drawn_ids_differ_and_are_uuids() {
        let (one, two) = (Ids::draw(None).unwrap(), Ids::draw(None).unwrap());
        let all = [
            one.machine,
            one.boot,
            one.generation,
            two.machine,
            two.boot,
            two.generation,
        ];
        for (index, id) in all.iter().enumerate() {
            assert!(!all[..index].contains(id), "{all:?}");
            assert_eq!(id.uuid().as_bytes()[14], b'4');
            assert!(b"89ab".contains(&id.uuid().as_bytes()[19]));
        }
        let given = Id::parse_hex("", &"1".repeat(32)).unwrap();
        assert_eq!(Ids::draw(Some(given)).unwrap().machine, given);
    }
}
