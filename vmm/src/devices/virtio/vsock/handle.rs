//! How the rest of the VMM reaches the guest's sockets.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::worker::event_fd;

/// Connections asked for and not yet seen by the worker.
const MAX_WAITING: usize = 256;

/// Why a connection to the guest did not come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The guest has no vsock driver, or not yet.
    #[error("the guest's vsock driver is not running")]
    NotActive,
    /// Nobody listens on that port.
    #[error("the guest refused the connection")]
    Refused,
    /// The guest did not answer.
    #[error("the guest did not answer in time")]
    TimedOut,
    /// The guest reset the device meanwhile.
    #[error("the guest reset its vsock device")]
    DeviceReset,
    /// No room for one more.
    #[error("too many vsock connections are open")]
    TooMany,
    /// The socket that was passed cannot be used.
    #[error("the socket passed for the connection cannot be used")]
    BadSocket,
}

/// Is told how a connection attempt ended, on the `vsock` thread: it must not block.
pub type ConnectReply = Box<dyn FnOnce(Result<(), ConnectError>) + Send>;

/// A wish to connect.
pub(super) struct Connect {
    pub(super) port: u32,
    pub(super) stream: UnixStream,
    pub(super) reply: ConnectReply,
}

/// Connects unix sockets to ports of the guest. Clones share the device.
#[derive(Clone)]
pub struct VsockHandle {
    inbox: Arc<Inbox>,
}

impl std::fmt::Debug for VsockHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VsockHandle").finish_non_exhaustive()
    }
}

impl VsockHandle {
    pub(super) fn new(inbox: Arc<Inbox>) -> Self {
        VsockHandle { inbox }
    }

    /// Makes `stream` the host's end of a connection to `port` of the guest. Returns at once; `reply` is called exactly
    /// once, here or later on the `vsock` thread. The other end of `stream` may be written to before that.
    pub fn connect(&self, port: u32, stream: UnixStream, reply: ConnectReply) {
        self.inbox.push(Connect { port, stream, reply });
    }
}

/// Wishes on their way to the worker.
pub(super) struct Inbox {
    state: Mutex<InboxState>,
    event: EventFd,
}

#[derive(Default)]
struct InboxState {
    /// There is a worker.
    open: bool,
    waiting: VecDeque<Connect>,
}

impl Inbox {
    /// A closed inbox.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Inbox {
            state: Mutex::default(),
            event: event_fd()?,
        })
    }

    /// Readable when there is something in it.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    pub(super) fn open(&self) {
        self.lock().open = true;
    }

    /// Refuses what is in it, and all that comes.
    pub(super) fn close(&self) {
        let waiting = {
            let mut state = self.lock();
            state.open = false;
            std::mem::take(&mut state.waiting)
        };
        for connect in waiting {
            (connect.reply)(Err(ConnectError::DeviceReset));
        }
    }

    pub(super) fn pop(&self) -> Option<Connect> {
        self.lock().waiting.pop_front()
    }

    fn push(&self, connect: Connect) {
        // The reply is called without the lock.
        let (connect, error) = {
            let mut state = self.lock();
            if !state.open {
                (connect, ConnectError::NotActive)
            } else if state.waiting.len() >= MAX_WAITING {
                (connect, ConnectError::TooMany)
            } else {
                state.waiting.push_back(connect);
                // A full counter is readable, which is all that is wanted.
                let _ = self.event.write(1);
                return;
            }
        };
        (connect.reply)(Err(error));
    }

    fn lock(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
