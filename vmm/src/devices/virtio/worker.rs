//! The thread of a worker half.

use std::io;
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A running worker half. Dropping it stops it.
#[derive(Debug)]
pub(super) struct WorkerThread<T> {
    stop: EventFd,
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> WorkerThread<T> {
    /// Starts `body` on a thread called `name`. The body ends soon after its argument becomes readable, and gives
    /// back what the next activation needs.
    pub(super) fn spawn(name: &str, body: impl FnOnce(EventFd) -> T + Send + 'static) -> io::Result<Self> {
        let stop = event_fd()?;
        let stop_seen_by_body = stop.try_clone()?;
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || body(stop_seen_by_body))?;
        Ok(WorkerThread {
            stop,
            thread: Some(thread),
        })
    }
}

impl<T> WorkerThread<T> {
    /// Stops the thread and waits for it. `None` when it panicked.
    pub(super) fn stop(mut self) -> Option<T> {
        self.join()
    }

    fn join(&mut self) -> Option<T> {
        let thread = self.thread.take()?;
        // The counter cannot overflow with one write; a full counter would still be readable.
        let _ = self.stop.write(1);
        thread.join().ok()
    }
}

impl<T> Drop for WorkerThread<T> {
    fn drop(&mut self) {
        self.join();
    }
}

/// A non-blocking event.
pub(super) fn event_fd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// Sets a non-blocking event back to not readable.
pub(super) fn clear_event(event: &EventFd) {
    // Fails only when it was not readable, which is what is wanted.
    let _ = event.read();
}

/// Waits for events named by a number.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: Epoll,
}

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Poller { epoll: Epoll::new()? })
    }

    /// Reports `token` as long as `fd` is readable.
    pub(super) fn watch_readable(&self, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        self.watch(fd, EventSet::IN, token)
    }

    /// Reports `token` for `events`.
    pub(super) fn watch(&self, fd: &impl AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(
            ControlOperation::Add,
            fd.as_raw_fd(),
            EpollEvent::new(events, token),
        )
    }

    /// Ends the reports for `fd`.
    pub(super) fn unwatch(&self, fd: &impl AsRawFd) {
        // Fails only for a descriptor that is not watched.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default());
    }

    /// Waits for at least one event, at most `timeout_ms` (-1: for ever). Interrupted waits return no event.
    pub(super) fn wait<'e>(
        &self,
        timeout_ms: i32,
        events: &'e mut [EpollEvent],
    ) -> io::Result<&'e [EpollEvent]> {
        match self.epoll.wait(timeout_ms, events) {
            Ok(n) => Ok(&events[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(&[]),
            Err(e) => Err(e),
        }
    }
}
