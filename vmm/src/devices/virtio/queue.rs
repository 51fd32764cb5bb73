//! One queue of an active device, seen from its worker half.

use std::io;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::worker::clear_event;
use crate::memory::GuestMemory;

/// Why a worker cannot go on: the driver must reset the device.
#[derive(Debug, thiserror::Error)]
pub enum QueueFailure {
    /// The rings say what cannot be (an index too far ahead), or left guest memory.
    #[error("Failed to use the virtqueue")]
    Ring(#[source] virtio_queue::Error),
    /// A host call that does not depend on the guest failed.
    #[error("Failed to wait for events")]
    Host(#[source] io::Error),
}

impl From<virtio_queue::Error> for QueueFailure {
    fn from(error: virtio_queue::Error) -> Self {
        QueueFailure::Ring(error)
    }
}

impl From<io::Error> for QueueFailure {
    fn from(error: io::Error) -> Self {
        QueueFailure::Host(error)
    }
}

/// One queue of an activated device: the ring and the event that says the driver added to it.
#[derive(Debug)]
pub struct DeviceQueue {
    /// The ring, valid and ready.
    pub queue: Queue,
    /// Readable after the driver kicked. Non-blocking.
    pub kick: EventFd,
}

impl DeviceQueue {
    /// The next available chain.
    ///
    /// # Errors
    /// The available ring is not believable.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemory,
    ) -> Result<Option<DescriptorChain<&'m GuestMemory>>, QueueFailure> {
        Ok(self.queue.iter(memory)?.next())
    }

    /// Gives the chain that was popped last back to the ring.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver, `length` bytes of it written.
    ///
    /// # Errors
    /// The ring left guest memory, or the head is not one of this queue.
    pub fn add_used(&mut self, memory: &GuestMemory, head: u16, length: usize) -> Result<(), QueueFailure> {
        // No chain is longer than 4 GiB.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        Ok(self.queue.add_used(memory, head, length)?)
    }

    /// The driver wants an interrupt for what was returned since the last call.
    ///
    /// # Errors
    /// The ring left guest memory.
    pub fn needs_notification(&mut self, memory: &GuestMemory) -> Result<bool, QueueFailure> {
        Ok(self.queue.needs_notification(memory)?)
    }

    /// Takes a kick in, before the queue is looked at.
    pub fn clear_kick(&self) {
        clear_event(&self.kick);
    }

    /// Asks for no kicks while the queue is worked on anyway.
    ///
    /// # Errors
    /// The ring left guest memory.
    pub fn suppress_kicks(&mut self, memory: &GuestMemory) -> Result<(), QueueFailure> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Asks for kicks again; `true` when there is more in the queue now, for which no kick may come.
    ///
    /// # Errors
    /// The ring left guest memory.
    pub fn expect_kicks(&mut self, memory: &GuestMemory) -> Result<bool, QueueFailure> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// Kicks itself, to come back to the queue after other events had their turn.
    pub fn kick_again(&self) {
        // A full counter is readable, which is all that is wanted.
        let _ = self.kick.write(1);
    }
}
