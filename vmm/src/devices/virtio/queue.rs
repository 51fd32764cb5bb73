//! One queue of an active device, seen from its worker half.

use std::io;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
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
    /// `next_used` when the driver was last considered for an interrupt.
    considered: u16,
}

impl DeviceQueue {
    /// A queue that nothing was taken from.
    pub fn new(queue: Queue, kick: EventFd) -> Self {
        let considered = queue.next_used();
        DeviceQueue {
            queue,
            kick,
            considered,
        }
    }

    /// Where the device is in it.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Takes the queue over from a back-end that has taken the buffers before `next_avail`, and returned all of them: its
    /// place in the used ring is what the ring says.
    ///
    /// # Errors
    /// The ring left guest memory.
    pub fn set_position(&mut self, next_avail: u16, memory: &GuestMemory) -> Result<(), QueueFailure> {
        let next_used = self.queue.used_idx(memory, Ordering::Acquire)?;
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(next_used.0);
        self.considered = next_used.0;
        Ok(())
    }

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

    /// Returns several chains that the driver must see together, as merged network buffers.
    ///
    /// # Errors
    /// The ring left guest memory, or a head is not one of this queue.
    pub fn add_used_together(
        &mut self,
        memory: &GuestMemory,
        used: &[(u16, usize)],
    ) -> Result<(), QueueFailure> {
        let Some((&(last_head, last_length), others)) = used.split_last() else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for &(head, length) in others {
            // The used ring: flags and index, 2 bytes each, then elements of 8 bytes (virtio 1.2, 2.7.8).
            let slot = 4 + 8 * u64::from(next % self.queue.size());
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            let address = GuestAddress(self.queue.used_ring().wrapping_add(slot));
            memory
                .write_obj([u32::from(head).to_le(), length.to_le()], address)
                .map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        // Only the last one moves the index that the driver looks at, over all of them.
        self.queue.set_next_used(next);
        self.add_used(memory, last_head, last_length)
    }

    /// The driver wants an interrupt for what was returned since the last call (virtio 1.2, 2.7.7.2). Instead of the
    /// library's, which neither knows of [`DeviceQueue::add_used_together`] nor of `VIRTQ_AVAIL_F_NO_INTERRUPT`.
    ///
    /// # Errors
    /// The ring left guest memory.
    pub fn needs_notification(&mut self, memory: &GuestMemory) -> Result<bool, QueueFailure> {
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.considered, new);
        // The index must be visible before the driver's wish is read: it writes and reads in the other order.
        fence(Ordering::SeqCst);
        let avail_ring = self.queue.avail_ring();
        let load = |offset: u64| -> Result<u16, QueueFailure> {
            let value: u16 = memory
                .load(GuestAddress(avail_ring.wrapping_add(offset)), Ordering::Relaxed)
                .map_err(virtio_queue::Error::GuestMemory)?;
            Ok(u16::from_le(value))
        };
        if self.queue.event_idx_enabled() {
            let used_event = load(4 + 2 * u64::from(self.queue.size()))?;
            Ok(new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            let no_interrupt = u16::try_from(VRING_AVAIL_F_NO_INTERRUPT).expect("the flag is 1");
            Ok(new != old && load(0)? & no_interrupt == 0)
        }
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

    /// How many buffers the driver has added, ever (modulo 2^16). Asks for a kick when it adds another, whatever is left
    /// in the queue.
    ///
    /// # Errors
    /// The ring left guest memory.
    pub fn expect_another(&mut self, memory: &GuestMemory) -> Result<u16, QueueFailure> {
        self.queue.enable_notification(memory)?;
        let added = self.queue.avail_idx(memory, Ordering::Acquire)?.0;
        if self.queue.event_idx_enabled() {
            // avail_event, after the elements of the used ring (virtio 1.2, 2.7.10), is where a kick is wanted.
            let offset = 4 + 8 * u64::from(self.queue.size());
            let address = GuestAddress(self.queue.used_ring().wrapping_add(offset));
            memory
                .store(added.to_le(), address, Ordering::Relaxed)
                .map_err(virtio_queue::Error::GuestMemory)?;
        }
        // The wish must be visible before the index is looked at again.
        fence(Ordering::SeqCst);
        Ok(added)
    }

    /// As [`DeviceQueue::expect_another`], without asking for anything.
    ///
    /// # Errors
    /// The ring left guest memory.
    pub fn added(&self, memory: &GuestMemory) -> Result<u16, QueueFailure> {
        Ok(self.queue.avail_idx(memory, Ordering::Acquire)?.0)
    }

    /// Kicks itself, to come back to the queue after other events had their turn.
    pub fn kick_again(&self) {
        // A full counter is readable, which is all that is wanted.
        let _ = self.kick.write(1);
    }
}
