//! Page cache that no container uses any more is given up, so that the balloon's free page reporting returns it to the
//! host: an image is read once at the start of its container, and would stay in the guest for ever.
//!
//! Every [`PERIOD`] the policy looks at the containers' cgroup. When they were quiet for a while it asks the kernel to
//! reclaim a part of their cache (`memory.reclaim`, Documentation/admin-guide/cgroup-v2.rst), a little at a time; when what
//! it took is read again, it waits longer and longer. A container that does anything is left alone.

use std::{fs, path::Path, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::container::cgroup::{Cgroup, value_of};

/// How often to look. The files read take some microseconds.
const PERIOD: Duration = Duration::from_secs(10);
/// Quiet periods before anything is taken.
const QUIET_PERIODS: u32 = 3;
/// Containers are quiet below this part of one CPU, in percent.
const QUIET_CPU_PERCENT: u64 = 5;
/// Pages read again within a period that say the cache was needed.
const REFAULT_LIMIT: u64 = 256;
/// Most periods to wait after that: 20 minutes.
const MAX_WAIT: u32 = 120;
/// Cache that is left in any case.
const FLOOR_BYTES: u64 = 8 << 20;
/// Most to take in a period.
const MAX_ROUND_BYTES: u64 = 64 << 20;
/// Most to ask of the kernel at once: this thread serves the guest API too, and waits for the kernel meanwhile.
const STEP_BYTES: u64 = 4 << 20;

/// What the containers did so far, and have in memory now.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    /// Processor time, microseconds.
    cpu_us: u64,
    /// Time in which some process waited for memory, microseconds (`/proc/pressure/memory`).
    memory_stall_us: u64,
    /// Pages of files that were read again after they had been reclaimed.
    refaults: u64,
    /// Page cache that is not mapped by a process, bytes.
    cache_bytes: u64,
}

/// Decides how much to take. No I/O.
#[derive(Debug, Default)]
struct Policy {
    last: Option<Sample>,
    quiet_periods: u32,
    /// Something was taken since the last sample.
    has_taken: bool,
    /// Periods to wait yet, and how many it will be the next time.
    wait: u32,
    next_wait: u32,
}

impl Policy {
    /// How many bytes to take now, `elapsed` after the last sample.
    fn decide(&mut self, sample: Sample, elapsed: Duration) -> u64 {
        let has_taken = std::mem::take(&mut self.has_taken);
        let Some(last) = self.last.replace(sample) else {
            return 0;
        };
        let grown = |field: fn(&Sample) -> u64| field(&sample).saturating_sub(field(&last));
        let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        if has_taken && grown(|sample| sample.refaults) > REFAULT_LIMIT {
            self.next_wait = (self.next_wait * 2).clamp(QUIET_PERIODS, MAX_WAIT);
            self.wait = self.next_wait;
        }
        let is_quiet = grown(|sample| sample.cpu_us).saturating_mul(100)
            < elapsed_us.saturating_mul(QUIET_CPU_PERCENT)
            && grown(|sample| sample.memory_stall_us) == 0;
        if !is_quiet {
            self.quiet_periods = 0;
            return 0;
        }
        self.quiet_periods = self.quiet_periods.saturating_add(1);
        if self.wait > 0 {
            self.wait -= 1;
            return 0;
        }
        let spare = sample.cache_bytes.saturating_sub(FLOOR_BYTES);
        if self.quiet_periods <= QUIET_PERIODS || spare < STEP_BYTES {
            return 0;
        }
        self.has_taken = true;
        // Half: what is in use shows itself before all is gone.
        (spare / 2).clamp(STEP_BYTES, MAX_ROUND_BYTES)
    }
}

impl Sample {
    /// `None` without the memory controller or pressure accounting: then there is nothing to decide by.
    fn take(containers: &Cgroup) -> Option<Self> {
        let memory = containers.read("memory.stat").ok()?;
        let cpu = containers.read("cpu.stat").ok()?;
        let pressure = fs::read_to_string("/proc/pressure/memory").ok()?;
        let memory = |key| value_of(&memory, key);
        let cache_bytes = memory("inactive_file") + memory("active_file");
        Some(Self {
            cpu_us: value_of(&cpu, "usage_usec"),
            memory_stall_us: some_total_us(&pressure)?,
            refaults: memory("workingset_refault_file"),
            cache_bytes: cache_bytes.saturating_sub(memory("file_mapped")),
        })
    }
}

/// `total` of the line `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` (Documentation/accounting/psi.rst).
fn some_total_us(pressure: &str) -> Option<u64> {
    let line = pressure.lines().find(|line| line.starts_with("some "))?;
    line.split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("total="))?
        .parse()
        .ok()
}

/// Runs for as long as the guest does, in a task of its own. `containers` is the cgroup of all containers.
pub fn start(containers: Cgroup) {
    tokio::spawn(async move {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut policy = Policy::default();
        let mut last = Instant::now();
        loop {
            let now = ticks.tick().await;
            let Some(sample) = Sample::take(&containers) else {
                return;
            };
            let bytes = policy.decide(sample, now - last);
            last = now;
            give_up(&containers.file("memory.reclaim"), bytes).await;
        }
    });
}

/// Reclaims page cache step by step. There is no swap, so that nothing else can go.
async fn give_up(file: &Path, bytes: u64) {
    for _ in 0..bytes / STEP_BYTES {
        // The kernel says so (EAGAIN) when less could be reclaimed: enough for this time.
        if fs::write(file, STEP_BYTES.to_string()).is_err() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Feeds a policy with what happens in one period after another.
    struct World {
        policy: Policy,
        sample: Sample,
    }

    impl World {
        fn new(cache_bytes: u64) -> Self {
            let sample = Sample {
                cache_bytes,
                ..Sample::default()
            };
            let mut policy = Policy::default();
            assert_eq!(policy.decide(sample, PERIOD), 0);
            Self { policy, sample }
        }

        /// A period in which containers used that much processor time and read that many pages again.
        fn period(&mut self, cpu_ms: u64, refaults: u64) -> u64 {
            self.sample.cpu_us += cpu_ms * 1000;
            self.sample.refaults += refaults;
            let taken = self.policy.decide(self.sample, PERIOD);
            self.sample.cache_bytes -= taken;
            taken
        }

        fn quiet(&mut self, periods: u32) -> u64 {
            (0..periods).map(|_| self.period(10, 0)).sum()
        }
    }

    #[test]
    fn cache_of_quiet_containers_is_taken_down_to_the_floor_a_part_at_a_time() {
        let mut world = World::new(300 * MIB);
        assert_eq!(world.quiet(QUIET_PERIODS), 0);
        assert_eq!(world.period(10, 0), MAX_ROUND_BYTES);
        let first = world.sample.cache_bytes;
        assert_eq!(first, 236 * MIB);
        world.quiet(20);
        assert!(world.sample.cache_bytes >= FLOOR_BYTES);
        assert!(world.sample.cache_bytes < FLOOR_BYTES + 2 * STEP_BYTES);
        assert_eq!(world.quiet(20), 0);
    }

    #[test]
    fn who_is_busy_or_waits_for_memory_is_left_alone() {
        let mut world = World::new(300 * MIB);
        for _ in 0..20 {
            assert_eq!(world.period(501, 0), 0);
        }
        // A busy period starts the waiting anew.
        world.quiet(QUIET_PERIODS);
        world.period(501, 0);
        assert_eq!(world.quiet(QUIET_PERIODS), 0);
        world.sample.memory_stall_us += 1;
        assert_eq!(world.period(10, 0), 0);
        assert_eq!(world.quiet(QUIET_PERIODS), 0);
        assert_ne!(world.period(10, 0), 0);
    }

    #[test]
    fn what_is_read_again_is_taken_less_and_less_often() {
        let mut world = World::new(4096 * MIB);
        world.quiet(QUIET_PERIODS);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let mut wait = 0;
            while world.period(10, 0) == 0 {
                wait += 1;
            }
            waits.push(wait);
            // The next period reads it again.
            assert_eq!(world.period(10, REFAULT_LIMIT + 1), 0);
        }
        assert!(waits.is_sorted(), "{waits:?}");
        assert!(waits[7] > 100 && waits[7] <= MAX_WAIT, "{waits:?}");
    }

    #[test]
    fn pressure_is_read_from_its_line() {
        let text = "some avg10=1.00 avg60=0.00 avg300=0.00 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=45\n";
        assert_eq!(some_total_us(text), Some(123));
        assert_eq!(some_total_us("full total=1\n"), None);
        assert_eq!(some_total_us("some total=x\n"), None);
    }
}
