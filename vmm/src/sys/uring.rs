//! File I/O on guest memory through io_uring.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};
use vm_memory::{GuestMemoryMmap, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::iovec::{GuestIovecs, GuestRange};

/// What to do with a file.
#[derive(Debug, Clone, Copy)]
pub enum Operation<'r> {
    /// Fill guest memory from this offset of the file.
    Read(u64, &'r [GuestRange]),
    /// Write guest memory at this offset of the file.
    Write(u64, &'r [GuestRange]),
    /// fdatasync(2).
    Sync,
}

/// A ring that owns what the kernel works on: guest memory, files and scatter lists stay until their completion.
pub struct Uring {
    ring: IoUring,
    memory: GuestMemoryMmap,
    /// By slot; the slot's number is the kernel's user data.
    in_flight: Vec<Option<InFlight>>,
    free: Vec<usize>,
}

/// Kept alive for the kernel.
#[derive(Debug)]
struct InFlight {
    token: u64,
    _iovecs: Vec<libc::iovec>,
    _file: Arc<File>,
}

// SAFETY: the scatter lists point into guest memory that `memory` keeps mapped for every thread; nothing else in here is
// bound to a thread.
unsafe impl Send for Uring {}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("n_in_flight", &self.n_in_flight())
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// A ring for `n_entries` operations at a time (a power of two) on `memory`; `completed` becomes readable after
    /// completions.
    ///
    /// # Errors
    /// The kernel has no io_uring, or it is forbidden here.
    pub fn new(n_entries: u16, memory: GuestMemoryMmap, completed: &EventFd) -> io::Result<Self> {
        let ring = IoUring::new(u32::from(n_entries))?;
        ring.submitter().register_eventfd(completed.as_raw_fd())?;
        let n_slots = usize::from(n_entries);
        Ok(Uring {
            ring,
            memory,
            in_flight: (0..n_slots).map(|_| None).collect(),
            free: (0..n_slots).rev().collect(),
        })
    }

    /// No more operations can be started before one completes.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Operations started and not completed.
    pub fn n_in_flight(&self) -> usize {
        self.in_flight.len() - self.free.len()
    }

    /// Queues an operation for [`Uring::submit`]; its completion brings `token` back.
    ///
    /// # Errors
    /// `EFAULT` or `EINVAL` for ranges that cannot be used; `EBUSY` when the ring is full.
    pub fn start(&mut self, file: Arc<File>, operation: Operation<'_>, token: u64) -> io::Result<()> {
        let busy = || io::Error::from_raw_os_error(libc::EBUSY);
        let &slot = self.free.last().ok_or_else(busy)?;
        let fd = types::Fd(file.as_raw_fd());
        let list =
            |ranges, access| GuestIovecs::new(&self.memory, ranges, access).map(GuestIovecs::into_unborrowed);
        let length = |iovecs: &Vec<libc::iovec>| {
            u32::try_from(iovecs.len()).expect("a list has at most MAX_IOVECS entries")
        };
        let (entry, iovecs) = match operation {
            Operation::Read(offset, ranges) => {
                let iovecs = list(ranges, Permissions::Write)?;
                (
                    opcode::Readv::new(fd, iovecs.as_ptr(), length(&iovecs))
                        .offset(offset)
                        .build(),
                    iovecs,
                )
            }
            Operation::Write(offset, ranges) => {
                let iovecs = list(ranges, Permissions::Read)?;
                (
                    opcode::Writev::new(fd, iovecs.as_ptr(), length(&iovecs))
                        .offset(offset)
                        .build(),
                    iovecs,
                )
            }
            Operation::Sync => (
                opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
                Vec::new(),
            ),
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: file, list and memory are kept in `in_flight[slot]` and `memory` until the completion was taken from
        // the ring (`next_completion`); when that can never happen they are leaked (`drop`). Moving the Vec into the
        // slot does not move its entries.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| busy())?;
        self.in_flight[slot] = Some(InFlight {
            token,
            _iovecs: iovecs,
            _file: file,
        });
        self.free.pop();
        Ok(())
    }

    /// Hands the started operations to the kernel.
    ///
    /// # Errors
    /// Those of io_uring_enter(2). What was not taken stays queued.
    pub fn submit(&mut self) -> io::Result<()> {
        loop {
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The next completed operation: its token and the bytes done.
    pub fn next_completion(&mut self) -> Option<(u64, io::Result<usize>)> {
        loop {
            let entry = self.ring.completion().next()?;
            let slot = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(operation) = self.in_flight.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().wrapping_neg()));
            return Some((operation.token, result));
        }
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self) -> io::Result<()> {
        while self.n_in_flight() != 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            while self.next_completion().is_some() {}
        }
        Ok(())
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if self.drain().is_err() {
            // The kernel may still write: its targets must outlive the process' other uses of the addresses.
            std::mem::forget(self.memory.clone());
            std::mem::forget(std::mem::take(&mut self.in_flight));
        }
    }
}
