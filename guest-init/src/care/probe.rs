//! What the results of a probe mean, and when it is performed. Pure.

use std::time::Duration;

use tokio::time::Instant;

use super::check::Handler;

/// A probe.
#[derive(Debug, Clone)]
pub struct Probe {
    /// What is done.
    pub handler: Handler,
    /// After the container's start.
    pub initial_delay: Duration,
    /// From one to the next.
    pub period: Duration,
    /// For each.
    pub timeout: Duration,
    /// So many in a row, to pass after it failed.
    pub success_threshold: u32,
    /// So many in a row, to fail after it passed.
    pub failure_threshold: u32,
    /// Instead of the container's, when failing it ends the container.
    pub grace: Option<Duration>,
}

impl Probe {
    /// The rounds of a container that began at `began`; `verdict` is what counts at first.
    #[must_use]
    pub fn rounds(&self, began: Instant, verdict: Option<bool>) -> Rounds {
        Rounds {
            next_at: began + self.initial_delay,
            period: self.period,
            thresholds: (self.success_threshold, self.failure_threshold),
            verdict,
            last: None,
            in_a_row: 0,
        }
    }
}

/// The rounds of a probe.
#[derive(Debug)]
pub struct Rounds {
    next_at: Instant,
    period: Duration,
    thresholds: (u32, u32),
    verdict: Option<bool>,
    last: Option<bool>,
    in_a_row: u32,
}

impl Rounds {
    /// When the next one begins.
    #[must_use]
    pub fn next_at(&self) -> Instant {
        self.next_at
    }

    /// One begins. Those that were missed meanwhile are left out.
    pub fn begin(&mut self, now: Instant) {
        self.next_at = now + self.period;
    }

    /// It has passed or failed: gives the verdict when that changes it.
    pub fn observe(&mut self, passed: bool) -> Option<bool> {
        if self.last == Some(passed) {
            self.in_a_row = self.in_a_row.saturating_add(1);
        } else {
            (self.last, self.in_a_row) = (Some(passed), 1);
        }
        let (success, failure) = self.thresholds;
        let needed = if passed { success } else { failure };
        if self.in_a_row < needed || self.verdict == Some(passed) {
            return None;
        }
        self.verdict = Some(passed);
        self.verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(success_threshold: u32, failure_threshold: u32) -> Probe {
        Probe {
            handler: Handler::Sleep(Duration::ZERO),
            initial_delay: Duration::from_secs(5),
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            success_threshold,
            failure_threshold,
            grace: None,
        }
    }

    #[test]
    fn thresholds_count_what_comes_in_a_row() {
        let mut rounds = probe(2, 3).rounds(Instant::now(), Some(true));
        let seen: Vec<_> = [false, false, true, false, false, false, false, true, true, true]
            .map(|passed| rounds.observe(passed))
            .into();
        let mut expected = vec![None; 10];
        (expected[5], expected[8]) = (Some(false), Some(true));
        assert_eq!(seen, expected);
        // Without a verdict the first one counts too.
        let mut rounds = probe(1, 2).rounds(Instant::now(), None);
        assert_eq!(
            (rounds.observe(false), rounds.observe(false)),
            (None, Some(false))
        );
        let mut rounds = probe(1, 2).rounds(Instant::now(), None);
        assert_eq!(rounds.observe(true), Some(true));
    }

    #[test]
    fn the_first_waits_for_the_delay_and_the_next_for_the_period() {
        let began = Instant::now();
        let mut rounds = probe(1, 1).rounds(began, None);
        assert_eq!(rounds.next_at() - began, Duration::from_secs(5));
        // It was late.
        rounds.begin(began + Duration::from_secs(60));
        assert_eq!(rounds.next_at() - began, Duration::from_secs(70));
    }
}
