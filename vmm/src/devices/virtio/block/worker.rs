//! The worker half: the queue on one side, the engine on the other.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EpollEvent;
use vmm_sys_util::eventfd::EventFd;

use super::device::BlockCounters;
use super::engine::{Engine, Transfer, Work};
use super::jobs::{DirtyFiles, Job, Jobs};
use super::request::{Operation, Request, Status};
use super::slices::Piece;
use super::{QUEUE_SIZES, REQUEST_QUEUE, SliceMap};
use crate::config::SliceDisk;
use crate::devices::virtio::chain::{Buffers, Ranges};
use crate::devices::virtio::worker::{Poller, Serve, all_empty, clear_event, event_fd};
use crate::devices::virtio::{DeviceQueue, NeedsReset, QueueFailure};
use crate::irq::{Interrupt, InterruptCause};
use crate::memory::GuestMemory;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

const STOP: u64 = 0;
const KICK: u64 = 1;
const COMPLETED: u64 = 2;

/// Longest chain accepted: an indirect table may be as long as the queue.
const MAX_DESCRIPTORS: usize = QUEUE_SIZES[REQUEST_QUEUE] as usize;

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) disk: SliceDisk,
    pub(super) map: SliceMap,
    pub(super) counters: Arc<BlockCounters>,
    pub(super) memory: GuestMemory,
    pub(super) queue: DeviceQueue,
    pub(super) interrupt: Interrupt,
    pub(super) needs_reset: NeedsReset,
    pub(super) jobs: Jobs,
    pub(super) dirty: DirtyFiles,
    /// The driver has no flush: every write is made durable before it is answered.
    pub(super) write_through: bool,
    /// Whether that engine may be used.
    pub(super) io_uring: bool,
}

impl Serve for Worker {
    fn serve(&mut self, stop: &EventFd) {
        if self.serve_queue(stop).is_err() {
            self.needs_reset.raise();
        }
    }

    fn queue_states(&self) -> Vec<QueueState> {
        vec![self.queue.state()]
    }

    fn can_sleep(&mut self) -> bool {
        all_empty([&mut self.queue], &self.memory)
    }
}

impl Worker {
    fn serve_queue(&mut self, stop: &EventFd) -> Result<(), QueueFailure> {
        let completed = event_fd()?;
        let poller = Poller::new()?;
        poller.watch_readable(stop, STOP)?;
        poller.watch_readable(&self.queue.kick, KICK)?;
        poller.watch_readable(&completed, COMPLETED)?;
        // Made for the first request: a ring costs more than the rest of a start. Dropped at the end, which waits for what
        // the kernel still works on.
        let mut engine = None;
        // The driver may have added requests before this thread looked.
        self.queue.kick_again();
        loop {
            let mut events = [EpollEvent::default(); 3];
            for event in poller.wait(-1, &mut events)? {
                match event.data() {
                    STOP => {
                        poller.unwatch(stop);
                        poller.unwatch(&self.queue.kick);
                        return engine
                            .map_or(Ok(()), |mut engine| self.drain(&mut engine, &poller, &completed));
                    }
                    KICK => self.queue.clear_kick(),
                    _ => clear_event(&completed),
                }
            }
            let engine =
                engine.get_or_insert_with(|| Engine::new(self.memory.clone(), self.io_uring, &completed));
            self.process(engine)?;
        }
    }

    /// Ends what is in flight, taking nothing new. `poller` waits for `completed` only.
    fn drain(
        &mut self,
        engine: &mut Engine,
        poller: &Poller,
        completed: &EventFd,
    ) -> Result<(), QueueFailure> {
        loop {
            self.finish_jobs(engine)?;
            if self.jobs.is_empty() {
                return self.notify();
            }
            let mut events = [EpollEvent::default(); 3];
            poller.wait(-1, &mut events)?;
            clear_event(completed);
        }
    }

    /// Takes what is in the queue and returns what is done, at most about one queue of each, so that `stop` is seen
    /// whatever the driver does.
    fn process(&mut self, engine: &mut Engine) -> Result<(), QueueFailure> {
        self.finish_jobs(engine)?;
        self.queue.suppress_kicks(&self.memory)?;
        let mut n_taken = 0;
        loop {
            while n_taken < MAX_DESCRIPTORS && !self.jobs.is_full() {
                let Some(chain) = self.queue.pop(&self.memory)? else {
                    break;
                };
                n_taken += 1;
                let head = chain.head_index();
                let request = Buffers::parse(chain, MAX_DESCRIPTORS)
                    .and_then(|buffers| Request::parse(buffers, &self.memory, self.disk));
                match request {
                    Ok(request) => self.begin(engine, head, request)?,
                    Err(_) => {
                        self.counters.bad_requests.increment();
                        self.queue.add_used(&self.memory, head, 0)?;
                    }
                }
            }
            self.finish_jobs(engine)?;
            if self.jobs.is_full() {
                // Completions bring this back here.
                break;
            }
            if !self.queue.expect_kicks(&self.memory)? {
                break;
            }
            if n_taken >= MAX_DESCRIPTORS {
                self.queue.kick_again();
                break;
            }
        }
        self.notify()
    }

    fn notify(&mut self) -> Result<(), QueueFailure> {
        if self.queue.needs_notification(&self.memory)? {
            self.interrupt.trigger(InterruptCause::UsedBuffer);
        }
        Ok(())
    }

    /// Begins a request; simple ones end here too.
    fn begin(&mut self, engine: &mut Engine, head: u16, request: Request) -> Result<(), QueueFailure> {
        let job = |n_data_bytes| Job {
            head,
            status: request.status,
            n_data_bytes,
            n_left: 0,
            ok: true,
        };
        match request.operation {
            Err(status) => self.answer(head, request.status, status, 0),
            Ok(Operation::Read { offset, into }) => {
                self.counters.reads.increment();
                let job = job(into.len());
                self.transfer(engine, job, offset, into, Work::Read)
            }
            Ok(Operation::Write { offset, from }) => {
                self.counters.writes.increment();
                self.transfer(engine, job(0), offset, from, Work::Write)
            }
            Ok(Operation::Flush) => {
                self.counters.flushes.increment();
                let transfers = self
                    .dirty
                    .take()
                    .into_iter()
                    .map(|file| (file, Work::Sync))
                    .collect();
                self.start(engine, job(0), transfers)
            }
            Ok(Operation::Identify { into }) => {
                let n = into.write(&self.memory, &identity(self.disk));
                self.answer(head, request.status, Status::Ok, n)
            }
            Ok(Operation::Discard { offset, length }) => {
                let status = self.deallocate(offset, length, discard);
                self.answer(head, request.status, status, 0)
            }
            Ok(Operation::WriteZeroes {
                offset,
                length,
                may_unmap,
            }) => {
                let status = self.deallocate(offset, length, |piece| write_zeroes(piece, may_unmap));
                self.answer(head, request.status, status, 0)
            }
        }
    }

    /// Cuts a read or write along the extents.
    fn transfer(
        &mut self,
        engine: &mut Engine,
        job: Job,
        offset: u64,
        mut data: Ranges,
        work: impl Fn(u64, Ranges) -> Work,
    ) -> Result<(), QueueFailure> {
        let Some(pieces) = self.map.locate(offset, data.len() as u64) else {
            return self.answer(job.head, job.status, Status::IoError, 0);
        };
        let mut transfers = Vec::with_capacity(pieces.len());
        for Piece {
            file,
            file_offset,
            length,
        } in pieces
        {
            let part = usize::try_from(length)
                .ok()
                .and_then(|length| data.split_front(length).ok());
            let Some(part) = part else {
                // The pieces of a range have its length.
                return self.answer(job.head, job.status, Status::IoError, 0);
            };
            transfers.push((file, work(file_offset, part)));
        }
        self.start(engine, job, transfers)
    }

    fn start(
        &mut self,
        engine: &mut Engine,
        mut job: Job,
        transfers: Vec<(Arc<File>, Work)>,
    ) -> Result<(), QueueFailure> {
        if transfers.is_empty() {
            return self.answer(job.head, job.status, Status::Ok, job.n_data_bytes);
        }
        job.n_left = transfers.len();
        let (head, status) = (job.head, job.status);
        let Some(number) = self.jobs.insert(job) else {
            return self.answer(head, status, Status::IoError, 0);
        };
        if engine.is_io_uring() {
            self.counters.io_uring_transfers.add(transfers.len() as u64);
        }
        for (file, work) in transfers {
            match &work {
                // Marked now for a reset while it is in flight, and again when done for a flush meanwhile.
                Work::Write(_, from) => {
                    self.counters.write_bytes.add(from.len() as u64);
                    self.dirty.mark(&file);
                }
                Work::Read(_, into) => self.counters.read_bytes.add(into.len() as u64),
                Work::Sync => {}
            }
            engine.start(Transfer {
                job: number,
                file,
                work,
            });
        }
        Ok(())
    }

    /// Answers the requests whose transfers have all ended.
    fn finish_jobs(&mut self, engine: &mut Engine) -> Result<(), QueueFailure> {
        engine.progress()?;
        while let Some(outcome) = engine.next_outcome() {
            let mut ok = outcome.ok;
            match outcome.transfer.work {
                Work::Write(..) if self.write_through => ok &= outcome.transfer.file.sync_data().is_ok(),
                Work::Write(..) => self.dirty.mark(&outcome.transfer.file),
                Work::Sync if !ok => self.dirty.mark(&outcome.transfer.file),
                Work::Sync | Work::Read(..) => {}
            }
            if let Some(job) = self.jobs.transfer_ended(outcome.transfer.job, ok) {
                let (status, n) = if job.ok {
                    (Status::Ok, job.n_data_bytes)
                } else {
                    (Status::IoError, 0)
                };
                self.answer(job.head, job.status, status, n)?;
            }
        }
        Ok(())
    }

    fn answer(
        &mut self,
        head: u16,
        address: GuestAddress,
        status: Status,
        n_data_bytes: usize,
    ) -> Result<(), QueueFailure> {
        if status != Status::Ok {
            self.counters.failures.increment();
        }
        // The address was checked when the chain was parsed, and memory regions stay.
        let _ = self.memory.write_obj(status as u8, address);
        self.queue.add_used(&self.memory, head, n_data_bytes + 1)
    }

    fn deallocate(
        &mut self,
        offset: u64,
        length: u64,
        action: impl Fn(&Piece<Arc<File>>) -> io::Result<()>,
    ) -> Status {
        self.counters.discards.increment();
        let Some(pieces) = self.map.locate(offset, length) else {
            return Status::IoError;
        };
        for piece in &pieces {
            self.dirty.mark(&piece.file);
            let done = action(piece).and_then(|()| {
                if self.write_through {
                    piece.file.sync_data()
                } else {
                    Ok(())
                }
            });
            if done.is_err() {
                return Status::IoError;
            }
        }
        Status::Ok
    }
}

/// What `GET_ID` answers, padded with zeroes.
fn identity(disk: SliceDisk) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
    let name: &[u8] = match disk {
        SliceDisk::ReadOnly => b"eci-read-only",
        SliceDisk::ReadWrite => b"eci-read-write",
    };
    let mut identity = [0; VIRTIO_BLK_ID_BYTES as usize];
    identity[..name.len()].copy_from_slice(name);
    identity
}

fn allocate(piece: &Piece<Arc<File>>, mode: FallocateFlags) -> io::Result<()> {
    Ok(rustix::fs::fallocate(
        &piece.file,
        mode | FallocateFlags::KEEP_SIZE,
        piece.file_offset,
        piece.length,
    )?)
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

/// Gives the storage back. A hint: not an error where the filesystem has no holes.
fn discard(piece: &Piece<Arc<File>>) -> io::Result<()> {
    match allocate(piece, FallocateFlags::PUNCH_HOLE) {
        Err(e) if is_unsupported(&e) => Ok(()),
        result => result,
    }
}

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Makes a part of a file read as zeroes.
fn write_zeroes(piece: &Piece<Arc<File>>, may_unmap: bool) -> io::Result<()> {
    let modes = if may_unmap {
        [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE]
    } else {
        [FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE]
    };
    for mode in modes {
        match allocate(piece, mode) {
            Err(e) if is_unsupported(&e) => {}
            result => return result,
        }
    }
    // Past the end of the file there are zeroes already.
    let end = piece.file.metadata()?.len().min(piece.file_offset + piece.length);
    let mut at = piece.file_offset;
    while at < end {
        let n = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROES.len());
        piece.file.write_all_at(&ZEROES[..n], at)?;
        at += n as u64;
    }
    Ok(())
}
