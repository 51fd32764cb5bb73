//! The moments right before and right after each write to the store, counted from the agent's start. Between two of them
//! nothing becomes durable, so an agent that survives being killed at each survives being killed at any time. To try that, it
//! can be told to stand still at one of them, by a variable of its environment that is for tests alone.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::sys::signal::{Signal, raise};

use crate::error::{Error, ErrorKind, Result};

/// The number of the moment, from 1, at which the whole agent stops itself with SIGSTOP.
pub const HALT_VARIABLE: &str = "ECI_STORE_HALT_AT";

/// A count of moments.
#[derive(Debug, Default)]
pub struct Moments {
    passed: AtomicU64,
    halt_at: Option<u64>,
}

impl Moments {
    /// As this process's environment has it: without [`HALT_VARIABLE`] they are counted, and that is all.
    ///
    /// # Errors
    /// `InvalidArgument` when the variable is no number from 1.
    pub fn from_environment() -> Result<Self> {
        Self::parse(std::env::var(HALT_VARIABLE).ok().as_deref())
    }

    fn parse(value: Option<&str>) -> Result<Self> {
        let halt_at = match value.map(|text| (text, text.parse())) {
            None => None,
            Some((_, Ok(number @ 1..))) => Some(number),
            Some((text, _)) => {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!("{HALT_VARIABLE} is {text:?}: give the number of a moment, from 1, or unset it"),
                ));
            }
        };
        Ok(Self {
            halt_at,
            ..Self::default()
        })
    }

    /// One more has come; returns once the agent goes on.
    pub(super) fn pass(&self, side: &str, what: fmt::Arguments<'_>) {
        let number = self.passed.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::trace!(number, "{side} the store has that {what}");
        if self.halt_at != Some(number) {
            return;
        }
        tracing::warn!(number, "halted {side} the store has that {what}");
        // To this very thread, which does nothing more before it is continued.
        if let Err(error) = raise(Signal::SIGSTOP) {
            tracing::error!(%error, "the agent did not stop itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_from_one_are_moments() {
        assert_eq!(Moments::parse(None).unwrap().halt_at, None);
        assert_eq!(Moments::parse(Some("7")).unwrap().halt_at, Some(7));
        for wrong in ["0", "", "-1", "x"] {
            let error = Moments::parse(Some(wrong)).unwrap_err();
            assert!(error.message.contains(wrong) && error.kind == ErrorKind::InvalidArgument);
        }
    }
}
