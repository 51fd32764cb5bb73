//! When a container is tried again: the kubelet's rules. Pure.

use super::spec::RestartPolicy;

/// First delay.
const FIRST_MS: u64 = 10_000;
/// Longest delay.
const LONGEST_MS: u64 = 300_000;
/// A run of this length makes earlier ends forgotten.
const FORGET_MS: u64 = 600_000;

/// Whether a container that ended with this code is started again.
pub fn restarts(policy: RestartPolicy, exit_code: i32) -> bool {
    match policy {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => exit_code != 0,
        RestartPolicy::Never => false,
    }
}

/// The delay after `failures` failures in a row: 10 s doubling to 300 s; none after none.
pub fn delay_ms(failures: u32) -> u64 {
    match failures.checked_sub(1) {
        None => 0,
        Some(doublings) => FIRST_MS
            .checked_shl(doublings.min(16))
            .map_or(LONGEST_MS, |ms| ms.min(LONGEST_MS)),
    }
}

/// Failures that count before the end of a run of this length: the kubelet restarts at once after the first end, and
/// forgets all after a long run.
pub fn failures_before(failures: u32, ran_ms: u64) -> u32 {
    if ran_ms >= FORGET_MS { 0 } else { failures }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_five_minutes() {
        let delays: Vec<u64> = (0..8).map(|failures| delay_ms(failures) / 1000).collect();
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(delay_ms(u32::MAX), LONGEST_MS);
    }

    #[test]
    fn a_long_run_resets() {
        assert_eq!(failures_before(5, 599_999), 5);
        assert_eq!(failures_before(5, 600_000), 0);
    }

    #[test]
    fn policies() {
        for (policy, zero, one) in [
            (RestartPolicy::Always, true, true),
            (RestartPolicy::OnFailure, false, true),
            (RestartPolicy::Never, false, false),
        ] {
            assert_eq!((restarts(policy, 0), restarts(policy, 1)), (zero, one));
        }
    }
}
