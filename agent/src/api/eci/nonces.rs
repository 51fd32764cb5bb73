//! Nonces of the last minutes, so that a request is not done twice. Bounded: when it is full, requests are refused rather
//! than forgotten.

use std::{
    collections::{BTreeSet, HashSet},
    time::SystemTime,
};

use super::signing::{Caller, FRESHNESS};

/// Most nonces kept; a request every 18 ms for half an hour.
const MOST: usize = 100_000;

/// The nonces.
#[derive(Debug)]
pub(super) struct Nonces {
    known: HashSet<(String, String)>,
    by_end: BTreeSet<(SystemTime, String, String)>,
    most: usize,
}

/// Why a nonce is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NonceError {
    /// It was used.
    Used,
    /// Too many requests.
    Full,
}

impl Default for Nonces {
    fn default() -> Self {
        Self {
            known: HashSet::new(),
            by_end: BTreeSet::new(),
            most: MOST,
        }
    }
}

impl Nonces {
    /// Takes note of a request whose signature is right.
    ///
    /// # Errors
    /// Its nonce was used, or too many are known.
    pub(super) fn take(&mut self, caller: &Caller, now: SystemTime) -> Result<(), NonceError> {
        while let Some((end, ..)) = self.by_end.first()
            && *end < now
        {
            if let Some((_, key, nonce)) = self.by_end.pop_first() {
                self.known.remove(&(key, nonce));
            }
        }
        let entry = (caller.access_key_id.clone(), caller.nonce.clone());
        if self.known.contains(&entry) {
            return Err(NonceError::Used);
        }
        if self.known.len() >= self.most {
            return Err(NonceError::Full);
        }
        self.known.insert(entry.clone());
        // After this its time stamp alone refuses it.
        self.by_end.insert((caller.at + FRESHNESS, entry.0, entry.1));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn caller(nonce: &str, at: SystemTime) -> Caller {
        Caller {
            access_key_id: "a".into(),
            nonce: nonce.into(),
            at,
        }
    }

    #[test]
    fn a_nonce_counts_until_its_time_stamp_does_not() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let mut nonces = Nonces::default();
        assert_eq!(nonces.take(&caller("n", start), start), Ok(()));
        let later = start + FRESHNESS;
        assert_eq!(nonces.take(&caller("n", start), later), Err(NonceError::Used));
        let after = later + Duration::from_secs(1);
        assert_eq!(nonces.take(&caller("n", after), after), Ok(()));
        assert_eq!(nonces.known.len(), 1);
        assert_eq!(nonces.by_end.len(), 1);
    }

    #[test]
    fn it_is_bounded() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let mut nonces = Nonces {
            most: 2,
            ..Nonces::default()
        };
        assert!(nonces.take(&caller("1", now), now).is_ok() && nonces.take(&caller("2", now), now).is_ok());
        assert_eq!(nonces.take(&caller("3", now), now), Err(NonceError::Full));
        let after = now + FRESHNESS + Duration::from_secs(1);
        assert!(nonces.take(&caller("3", after), after).is_ok());
    }
}
