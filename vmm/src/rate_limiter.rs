//! Token bucket. Pure: the caller brings the time.

use std::time::Duration;

/// Lets `burst` units pass at once and `per_second` in the long run.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    burst: u64,
    per_second: u64,
    /// Nanoseconds times units per second, at most `burst` seconds' worth: no rounding is lost between calls.
    level: u128,
    updated: Duration,
}

const NANOS_PER_SECOND: u128 = 1_000_000_000;

impl TokenBucket {
    /// A full bucket at time zero of the caller's clock.
    #[must_use]
    pub fn new(burst: u64, per_second: u64) -> Self {
        Self {
            burst,
            per_second,
            level: u128::from(burst) * NANOS_PER_SECOND,
            updated: Duration::ZERO,
        }
    }

    /// Takes `units` if they are there; takes none otherwise. `now` that runs backwards counts as standing still.
    pub fn take(&mut self, units: u64, now: Duration) -> bool {
        let elapsed = now.saturating_sub(self.updated);
        self.updated = self.updated.max(now);
        let gained = elapsed.as_nanos().saturating_mul(self.per_second.into());
        self.level = self
            .level
            .saturating_add(gained)
            .min(u128::from(self.burst) * NANOS_PER_SECOND);
        match self.level.checked_sub(u128::from(units) * NANOS_PER_SECOND) {
            Some(rest) => {
                self.level = rest;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_passes_then_the_rate_holds() {
        let mut bucket = TokenBucket::new(10, 2);
        let second = Duration::from_secs(1);
        assert!(bucket.take(10, second));
        assert!(!bucket.take(1, second));
        assert!(!bucket.take(1, second + Duration::from_millis(499)));
        assert!(bucket.take(1, second + Duration::from_millis(500)));
        assert!(bucket.take(10, second * 60));
        assert!(!bucket.take(1, second * 60));
    }

    proptest::proptest! {
        #[test]
        fn never_more_than_burst_and_rate_allow(
            burst in 0_u64..1000,
            rate in 0_u64..1000,
            steps in proptest::collection::vec((0_u64..50, 0_u64..2_000_000_000), 1..50),
        ) {
            let mut bucket = TokenBucket::new(burst, rate);
            let (mut taken, mut now) = (0_u128, Duration::ZERO);
            for (units, nanos) in steps {
                now += Duration::from_nanos(nanos);
                if bucket.take(units, now) {
                    taken += u128::from(units);
                }
                let allowed = u128::from(burst) * NANOS_PER_SECOND + now.as_nanos() * u128::from(rate);
                proptest::prop_assert!(taken * NANOS_PER_SECOND <= allowed);
            }
        }
    }
}
