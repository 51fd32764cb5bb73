//! The worker half of a device and its thread.

use std::io;
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use virtio_queue::QueueState;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActivateError, Begin, DeviceQueue};
use crate::memory::GuestMemory;

/// A worker's deepest call copies one frame or packet.
const STACK_BYTES: usize = 512 << 10;

/// What a worker half does on its thread.
pub(super) trait Serve: Send + 'static {
    /// Serves the queues until `stop` is readable. When it returns nothing is in flight, and a later call goes on where
    /// this one ended.
    fn serve(&mut self, stop: &EventFd);

    /// Where it is in each queue, in the device's order.
    fn queue_states(&self) -> Vec<QueueState>;

    /// Asks the driver to notify of its next buffers; `false` when there is something to do already, or may be without a
    /// notification. Called before the first [`Serve::serve`].
    fn can_sleep(&mut self) -> bool {
        false
    }
}

/// Asks for notifications of these queues; `false` when one has buffers already, or is no queue.
pub(super) fn all_empty<'q>(
    queues: impl IntoIterator<Item = &'q mut DeviceQueue>,
    memory: &GuestMemory,
) -> bool {
    queues
        .into_iter()
        .all(|queue| matches!(queue.expect_kicks(memory), Ok(false)))
}

/// The worker half of a device through its life.
///
/// ```text
///            start            pause
///  Inactive ------> Running <-------> Paused
///    ^  |              ^|     resume    |^
///    |  |       wake   |+- take -+      ||
///    |  +--> Asleep ---+         |      ||
///    |          |  +-------------|------|+ pause
///    +---take---+----------------+------+
/// ```
#[derive(Debug)]
pub(super) enum WorkerHalf<W> {
    /// The driver is not ready, or the worker was lost.
    Inactive,
    /// Waits for the driver's first notification, without a thread: one costs more than many a device does in a VM's life.
    Asleep { name: &'static str, worker: W },
    /// On its thread.
    Running(WorkerThread<W>),
    /// Without a thread.
    Paused { name: &'static str, worker: W },
}

impl<W: Serve> WorkerHalf<W> {
    /// Starts a worker on a thread called `name`, now or when it is to be woken.
    ///
    /// # Errors
    /// No thread could be started; the worker is lost.
    pub(super) fn start(name: &'static str, mut worker: W, begin: Begin) -> Result<Self, ActivateError> {
        if begin == Begin::WhenNotified && worker.can_sleep() {
            return Ok(WorkerHalf::Asleep { name, worker });
        }
        let thread = WorkerThread::spawn(name, worker).map_err(|source| ActivateError::Host {
            action: "start the thread of a device",
            source,
        })?;
        Ok(WorkerHalf::Running(thread))
    }

    /// Gives a sleeping worker its thread; nothing in any other state.
    ///
    /// # Errors
    /// No thread could be started; the worker is lost.
    pub(super) fn wake(&mut self) -> Result<(), ActivateError> {
        *self = match std::mem::replace(self, WorkerHalf::Inactive) {
            WorkerHalf::Asleep { name, worker } => WorkerHalf::start(name, worker, Begin::AtOnce)?,
            other => other,
        };
        Ok(())
    }

    /// Stops the thread and keeps the worker: where it is in its queues. `None` when there is none.
    pub(super) fn pause(&mut self) -> Option<Vec<QueueState>> {
        *self = match std::mem::replace(self, WorkerHalf::Inactive) {
            WorkerHalf::Running(thread) => {
                let name = thread.name;
                WorkerHalf::Paused {
                    name,
                    worker: thread.stop()?,
                }
            }
            WorkerHalf::Asleep { name, worker } => WorkerHalf::Paused { name, worker },
            other => other,
        };
        match self {
            WorkerHalf::Paused { worker, .. } => Some(worker.queue_states()),
            _ => None,
        }
    }

    /// The worker while it is paused.
    pub(super) fn paused(&self) -> Option<&W> {
        match self {
            WorkerHalf::Paused { worker, .. } => Some(worker),
            _ => None,
        }
    }

    /// Goes on after [`WorkerHalf::pause`]; nothing in any other state.
    ///
    /// # Errors
    /// No thread could be started; the worker is lost.
    pub(super) fn resume(&mut self) -> Result<(), ActivateError> {
        *self = match std::mem::replace(self, WorkerHalf::Inactive) {
            WorkerHalf::Paused { name, worker } => WorkerHalf::start(name, worker, Begin::AtOnce)?,
            other => other,
        };
        Ok(())
    }

    /// Ends it, for what it holds.
    pub(super) fn take(&mut self) -> Option<W> {
        match std::mem::replace(self, WorkerHalf::Inactive) {
            WorkerHalf::Inactive => None,
            WorkerHalf::Running(thread) => thread.stop(),
            WorkerHalf::Asleep { worker, .. } | WorkerHalf::Paused { worker, .. } => Some(worker),
        }
    }
}

/// A running worker half. Dropping it stops it.
#[derive(Debug)]
pub(super) struct WorkerThread<W> {
    name: &'static str,
    stop: EventFd,
    thread: Option<JoinHandle<W>>,
}

impl<W: Serve> WorkerThread<W> {
    fn spawn(name: &'static str, mut worker: W) -> io::Result<Self> {
        let stop = event_fd()?;
        let stop_seen_by_worker = stop.try_clone()?;
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                worker.serve(&stop_seen_by_worker);
                worker
            })?;
        Ok(WorkerThread {
            name,
            stop,
            thread: Some(thread),
        })
    }
}

impl<W> WorkerThread<W> {
    /// Stops the thread and waits for it. `None` when it panicked.
    fn stop(mut self) -> Option<W> {
        self.join()
    }

    fn join(&mut self) -> Option<W> {
        let thread = self.thread.take()?;
        // The counter cannot overflow with one write; a full counter would still be readable.
        let _ = self.stop.write(1);
        thread.join().ok()
    }
}

impl<W> Drop for WorkerThread<W> {
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
