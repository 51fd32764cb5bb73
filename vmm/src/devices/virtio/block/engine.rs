//! Runs transfers between guest memory and files: on io_uring, or one after the other.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::Permissions;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::chain::Ranges;
use crate::memory::GuestMemory;
use crate::sys::file;
use crate::sys::iovec::GuestIovecs;
use crate::sys::uring::{Operation, Uring};

/// Transfers in the kernel at a time.
const RING_ENTRIES: u16 = 128;

/// What a transfer does with its file, and with which part of guest memory.
#[derive(Debug)]
pub(super) enum Work {
    /// From the file, from this offset on.
    Read(u64, Ranges),
    /// To the file, from this offset on.
    Write(u64, Ranges),
    /// Makes what was written durable.
    Sync,
}

/// One file's share of a job.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) job: usize,
    pub(super) file: Arc<File>,
    pub(super) work: Work,
}

/// A transfer that ended.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) transfer: Transfer,
    pub(super) ok: bool,
}

/// Takes transfers and gives outcomes back.
#[derive(Debug)]
pub(super) struct Engine {
    memory: GuestMemory,
    ring: Option<Ring>,
    done: VecDeque<Outcome>,
}

#[derive(Debug)]
struct Ring {
    uring: Uring,
    next_token: u64,
    in_kernel: BTreeMap<u64, Transfer>,
    waiting: VecDeque<Transfer>,
}

impl Engine {
    /// An engine on io_uring if `io_uring` and the kernel allow it; `completed` becomes readable when
    /// [`Engine::progress`] is worth calling.
    pub(super) fn new(memory: GuestMemory, io_uring: bool, completed: &EventFd) -> Self {
        let uring = io_uring
            .then(|| Uring::new(RING_ENTRIES, memory.clone(), completed))
            .and_then(Result::ok);
        let ring = uring.map(|uring| Ring {
            uring,
            next_token: 0,
            in_kernel: BTreeMap::new(),
            waiting: VecDeque::new(),
        });
        Engine {
            memory,
            ring,
            done: VecDeque::new(),
        }
    }

    /// Transfers run on io_uring.
    pub(super) fn is_io_uring(&self) -> bool {
        self.ring.is_some()
    }

    /// Takes a transfer. It may be done at once, or only after [`Engine::progress`].
    pub(super) fn start(&mut self, mut transfer: Transfer) {
        match &mut self.ring {
            Some(ring) => ring.waiting.push_back(transfer),
            None => {
                let ok = loop {
                    let result = run(&self.memory, &transfer);
                    if let Some(ok) = advance(&self.memory, &mut transfer, result) {
                        break ok;
                    }
                };
                self.done.push_back(Outcome { transfer, ok });
            }
        }
    }

    /// Hands waiting transfers to the kernel and collects what it has done.
    ///
    /// # Errors
    /// The ring cannot be used any more.
    pub(super) fn progress(&mut self) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        loop {
            ring.fill(&mut self.done);
            match ring.uring.submit() {
                Ok(()) => {}
                // The kernel wants completions to be taken first, or is short of memory.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {}
                Err(e) => return Err(e),
            }
            let mut n_completed = 0;
            while let Some((token, result)) = ring.uring.next_completion() {
                n_completed += 1;
                let Some(mut transfer) = ring.in_kernel.remove(&token) else {
                    continue;
                };
                match advance(&self.memory, &mut transfer, result) {
                    Some(ok) => self.done.push_back(Outcome { transfer, ok }),
                    None => ring.waiting.push_front(transfer),
                }
            }
            if n_completed == 0 || ring.waiting.is_empty() {
                return Ok(());
            }
        }
    }

    /// The next transfer that ended.
    pub(super) fn next_outcome(&mut self) -> Option<Outcome> {
        self.done.pop_front()
    }
}

impl Ring {
    /// Moves transfers from the queue into the ring while it has room.
    fn fill(&mut self, done: &mut VecDeque<Outcome>) {
        while !self.uring.is_full() {
            let Some(transfer) = self.waiting.pop_front() else {
                break;
            };
            let operation = match &transfer.work {
                Work::Read(offset, ranges) => Operation::Read(*offset, ranges.as_slice()),
                Work::Write(offset, ranges) => Operation::Write(*offset, ranges.as_slice()),
                Work::Sync => Operation::Sync,
            };
            match self
                .uring
                .start(Arc::clone(&transfer.file), operation, self.next_token)
            {
                Ok(()) => {
                    self.in_kernel.insert(self.next_token, transfer);
                    self.next_token += 1;
                }
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    self.waiting.push_front(transfer);
                    break;
                }
                Err(_) => done.push_back(Outcome { transfer, ok: false }),
            }
        }
    }
}

/// One system call of a transfer.
fn run(memory: &GuestMemory, transfer: &Transfer) -> io::Result<usize> {
    match &transfer.work {
        Work::Read(offset, ranges) => file::read_at(
            &transfer.file,
            &GuestIovecs::new(memory, ranges.as_slice(), Permissions::Write)?,
            *offset,
        ),
        Work::Write(offset, ranges) => file::write_at(
            &transfer.file,
            &GuestIovecs::new(memory, ranges.as_slice(), Permissions::Read)?,
            *offset,
        ),
        Work::Sync => transfer.file.sync_data().map(|()| 0),
    }
}

/// Takes in what a call has done: `Some(ok)` when the transfer ended, `None` when the rest of it is to be run again.
fn advance(memory: &GuestMemory, transfer: &mut Transfer, result: io::Result<usize>) -> Option<bool> {
    let n = match result {
        Ok(n) => n,
        Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => return None,
        Err(_) => return Some(false),
    };
    match &mut transfer.work {
        Work::Sync => Some(true),
        Work::Read(_, ranges) if n == 0 => {
            // Past the end of the file an extent is zeroes.
            ranges.zero_from(memory, 0);
            Some(true)
        }
        Work::Write(..) if n == 0 => Some(false),
        Work::Read(offset, ranges) | Work::Write(offset, ranges) => {
            *offset += n as u64;
            if ranges.split_front(n).is_err() {
                return Some(false);
            }
            ranges.is_empty().then_some(true)
        }
    }
}
