//! The room left for one stream of one session.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Counts how many bytes the receiver has room for; senders wait here until there is some.
#[derive(Debug)]
pub(crate) struct Window {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    n_bytes: usize,
    closed: bool,
}

impl Window {
    pub(crate) fn new(n_bytes: u32) -> Self {
        Self {
            state: Mutex::new(State {
                n_bytes: n_bytes as usize,
                closed: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Waits for room and takes up to `wanted` bytes of it; `None` once the window is closed.
    pub(crate) fn take(&self, wanted: usize) -> Option<usize> {
        let mut state = self
            .changed
            .wait_while(self.state(), |state| state.n_bytes == 0 && !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        let taken = state.n_bytes.min(wanted);
        state.n_bytes -= taken;
        Some(taken)
    }

    pub(crate) fn give(&self, n_bytes: u32) {
        let mut state = self.state();
        state.n_bytes = state.n_bytes.saturating_add(n_bytes as usize);
        self.changed.notify_all();
    }

    /// Nobody will give room any more.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Whether a sender would have to wait.
    pub(crate) fn is_used_up(&self) -> bool {
        let state = self.state();
        state.n_bytes == 0 && !state.closed
    }

    // The state is two plain values, valid whatever thread panicked.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn taking_is_bounded_by_what_was_given() {
        let window = Window::new(10);
        assert_eq!(window.take(4), Some(4));
        assert_eq!(window.take(100), Some(6));
        window.give(3);
        assert_eq!(window.take(100), Some(3));
    }

    #[test]
    fn closing_wakes_a_waiting_sender() {
        let window = Window::new(0);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| window.take(1));
            window.close();
            assert_eq!(waiting.join().unwrap(), None);
        });
    }
}
