//! Events for the owner from threads that must not block: sent at once, or kept for the VMM thread while the owner
//! does not read.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::EventfdFlags;

use crate::control::{ControlError, Event, VmmSocket};

/// Guest connections kept for an owner that does not read; more are refused. Answers to commands are always kept: the
/// owner bounds them by what it asks.
const MAX_KEPT_CONNECTIONS: usize = 256;

/// The way to the owner.
#[derive(Debug)]
pub struct Reporter {
    owner: VmmSocket,
    kept: Mutex<VecDeque<(Event, Option<OwnedFd>)>>,
    /// Readable while something is kept.
    wake: OwnedFd,
}

impl Reporter {
    /// Reports over `owner`.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(owner: VmmSocket) -> std::io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            owner,
            kept: Mutex::default(),
            wake,
        })
    }

    /// The socket, to receive from.
    #[must_use]
    pub fn owner(&self) -> &VmmSocket {
        &self.owner
    }

    /// Sends an event with its descriptor, now or later; never blocks. Order is kept. A guest's connection is dropped
    /// when too many are kept already.
    pub fn report(&self, event: Event, fd: Option<OwnedFd>) {
        let mut kept = self.lock();
        if kept.is_empty() {
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            match self.owner.try_send(&event, &fds) {
                Err(ControlError::WouldBlock) => {}
                // Sent; or the owner is gone, which the VMM thread sees by itself.
                _ => return,
            }
        }
        if matches!(event, Event::GuestConnected { .. }) && kept.len() >= MAX_KEPT_CONNECTIONS {
            return;
        }
        kept.push_back((event, fd));
        // Fails only when the counter is full, and then it is readable too.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Sends an event after all that is kept; waits for the owner to read. For the VMM thread.
    ///
    /// # Errors
    /// [`ControlError`]: the owner is gone.
    pub fn send(&self, event: &Event) -> Result<(), ControlError> {
        self.send_with(event, &[])
    }

    /// [`Self::send`], with copies of descriptors.
    ///
    /// # Errors
    /// [`ControlError`]: the owner is gone.
    pub fn send_with(&self, event: &Event, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        self.flush()?;
        self.owner.send(event, fds)
    }

    /// Sends what is kept; waits for the owner to read. For the VMM thread.
    ///
    /// # Errors
    /// [`ControlError`]: the owner is gone.
    pub fn flush(&self) -> Result<(), ControlError> {
        // Fails when it is not readable: nothing to take back then.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        loop {
            // The lock is not held while sending: whoever reports meanwhile finds the queue and must not block.
            let Some((event, fd)) = self.lock().pop_front() else {
                return Ok(());
            };
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            self.owner.send(&event, &fds)?;
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(Event, Option<OwnedFd>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable while something is kept: time to [`Reporter::flush`].
impl AsFd for Reporter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control;

    #[test]
    fn nothing_is_lost_while_the_owner_does_not_read() {
        let (owner, vmm) = control::pair().unwrap();
        let reporter = Reporter::new(vmm).unwrap();
        for id in 0..2000 {
            reporter.report(Event::Done { id }, None);
        }
        let received =
            std::thread::spawn(move || (0..2000).map(|_| owner.recv().unwrap().0).collect::<Vec<_>>());
        reporter.flush().unwrap();
        let expected: Vec<_> = (0..2000).map(|id| Event::Done { id }).collect();
        assert_eq!(received.join().unwrap(), expected);
    }

    #[test]
    fn guest_connections_are_bounded() {
        let (_owner, vmm) = control::pair().unwrap();
        let reporter = Reporter::new(vmm).unwrap();
        for port in 0..2000 {
            reporter.report(
                Event::GuestConnected { port },
                Some(tempfile::tempfile().unwrap().into()),
            );
        }
        assert_eq!(reporter.lock().len(), MAX_KEPT_CONNECTIONS);
    }
}
