//! What a disk remembers between events: requests being worked on, and files to be made durable.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Weak};

use vm_memory::GuestAddress;

/// A request whose transfers are not all done.
#[derive(Debug)]
pub(super) struct Job {
    /// The chain to be returned.
    pub(super) head: u16,
    /// Where its status goes.
    pub(super) status: GuestAddress,
    /// Bytes written to guest memory when all went well, without the status.
    pub(super) n_data_bytes: usize,
    /// Transfers that have not ended.
    pub(super) n_left: usize,
    /// No transfer failed.
    pub(super) ok: bool,
}

/// The requests in flight, by number. As many as the driver can have in its queue, not more.
#[derive(Debug)]
pub(super) struct Jobs {
    slots: Vec<Option<Job>>,
    free: Vec<usize>,
}

impl Jobs {
    pub(super) fn new(capacity: u16) -> Self {
        let capacity = usize::from(capacity);
        Jobs {
            slots: (0..capacity).map(|_| None).collect(),
            free: (0..capacity).rev().collect(),
        }
    }

    /// No further request can be taken before one is done.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Nothing is in flight.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Keeps a job; `None` when full.
    pub(super) fn insert(&mut self, job: Job) -> Option<usize> {
        let number = self.free.pop()?;
        self.slots[number] = Some(job);
        Some(number)
    }

    /// Takes in that one transfer of a job ended; gives the job back when it was the last.
    pub(super) fn transfer_ended(&mut self, number: usize, ok: bool) -> Option<Job> {
        let slot = self.slots.get_mut(number)?;
        let job = slot.as_mut()?;
        job.ok &= ok;
        job.n_left -= 1;
        if job.n_left != 0 {
            return None;
        }
        self.free.push(number);
        slot.take()
    }
}

/// Files written to since the last flush. Files that were unmapped meanwhile are forgotten.
#[derive(Debug, Default)]
pub(super) struct DirtyFiles {
    by_identity: BTreeMap<usize, Weak<File>>,
}

impl DirtyFiles {
    pub(super) fn mark(&mut self, file: &Arc<File>) {
        // An address can only come again after the file it stood for is gone: the newer one counts.
        self.by_identity
            .insert(Arc::as_ptr(file).addr(), Arc::downgrade(file));
    }

    /// Takes all that are still mapped.
    pub(super) fn take(&mut self) -> Vec<Arc<File>> {
        std::mem::take(&mut self.by_identity)
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }
}
