//! Where vCPU threads stop.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
const ENDED: u8 = 2;

/// Open, closed, or closed for good.
#[derive(Debug, Default)]
pub struct Gate {
    /// A copy of the state that is cheap to look at on every exit; changed under the lock.
    state: AtomicU8,
    n_parked: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// vCPUs stop here after their next exit.
    pub fn close(&self) {
        let _lock = self.lock();
        // Fails when it has ended: stays so.
        let _ = self
            .state
            .compare_exchange(OPEN, CLOSED, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Lets all through.
    pub fn open(&self) {
        let _lock = self.lock();
        let _ = self
            .state
            .compare_exchange(CLOSED, OPEN, Ordering::SeqCst, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// The machine has ended: no vCPU runs again.
    pub fn end(&self) {
        let _lock = self.lock();
        self.state.store(ENDED, Ordering::SeqCst);
    }

    /// vCPUs are to stop.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::SeqCst) != OPEN
    }

    /// vCPUs are to stop for good.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.state.load(Ordering::SeqCst) == ENDED
    }

    /// On a vCPU's thread: counts as parked until the gate opens.
    pub fn wait_until_open(&self) {
        let mut n_parked = self.lock();
        *n_parked += 1;
        self.changed.notify_all();
        while self.is_closed() {
            n_parked = self
                .changed
                .wait(n_parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *n_parked -= 1;
    }

    /// On a vCPU's thread: counts as parked from now on.
    pub fn park_for_ever(&self) -> ! {
        let mut n_parked = self.lock();
        *n_parked += 1;
        self.changed.notify_all();
        loop {
            n_parked = self
                .changed
                .wait(n_parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until that many are parked; `false` when the deadline passes first.
    #[must_use]
    pub fn wait_for_parked(&self, n: usize, deadline: Duration) -> bool {
        let lock = self.lock();
        let (_lock, result) = self
            .changed
            .wait_timeout_while(lock, deadline, |n_parked| *n_parked < n)
            .unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.n_parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn closed_gate_holds_threads_until_it_opens() {
        let gate = Arc::new(Gate::default());
        gate.close();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let gate = Arc::clone(&gate);
                std::thread::spawn(move || gate.wait_until_open())
            })
            .collect();
        assert!(gate.wait_for_parked(3, Duration::from_secs(10)));
        assert!(!gate.wait_for_parked(4, Duration::from_millis(1)));
        gate.open();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(!gate.wait_for_parked(1, Duration::from_millis(1)));
    }

    #[test]
    fn ended_gate_stays_so() {
        let gate = Gate::default();
        gate.end();
        gate.open();
        gate.close();
        assert!(gate.has_ended() && gate.is_closed());
    }
}
