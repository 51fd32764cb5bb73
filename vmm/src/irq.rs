//! Interrupts to the guest: which GSI belongs to whom, and [`Interrupt`], all that a device sees of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A global system interrupt: an input pin of the interrupt controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gsi(pub u32);

/// Hands out each GSI of a range once.
#[derive(Debug)]
pub struct GsiAllocator {
    free: std::ops::RangeInclusive<u32>,
}

impl GsiAllocator {
    /// An allocator of `first` to `last`, both included.
    #[must_use]
    pub fn new(first: Gsi, last: Gsi) -> Self {
        Self {
            free: first.0..=last.0,
        }
    }

    /// The next free one; `None` when all are taken.
    pub fn allocate(&mut self) -> Option<Gsi> {
        self.free.next().map(Gsi)
    }
}

/// Why a virtio device interrupts: bits of `InterruptStatus` (virtio 1.2, 4.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum InterruptCause {
    /// A buffer was used in at least one virtqueue.
    UsedBuffer = 1,
    /// The device's configuration changed.
    ConfigChange = 2,
}

/// One edge-triggered interrupt line of one device, and the status register that tells the driver why. Clones share
/// both.
#[derive(Debug, Clone)]
pub struct Interrupt {
    line: Arc<EventFd>,
    status: Arc<AtomicU32>,
}

impl Interrupt {
    /// A line that nobody listens to yet: register [`Self::event_fd`] with KVM.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            line: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            status: Arc::new(AtomicU32::new(0)),
        })
    }

    /// Sets the status bit and interrupts the guest.
    pub fn trigger(&self, cause: InterruptCause) {
        // The driver reads the status after the interrupt: set first.
        self.status.fetch_or(cause as u32, Ordering::SeqCst);
        self.raise_line();
    }

    /// Interrupts the guest and leaves the status alone.
    pub fn raise_line(&self) {
        // It can only fail with EAGAIN when the counter is at its end, and then the interrupt is pending anyway.
        let _ = self.line.write(1);
    }

    /// Puts the status back to what it was in a snapshot.
    pub fn set_status(&self, bits: u32) {
        self.status.store(bits, Ordering::SeqCst);
    }

    /// `InterruptStatus` as the driver reads it.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver's write to `InterruptACK`: clears these bits.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// What raises the interrupt when written to: for KVM (irqfd), and for back-ends in the kernel (vhost), which
    /// leave the status alone.
    #[must_use]
    pub fn event_fd(&self) -> &EventFd {
        &self.line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocator_gives_each_once() {
        let mut allocator = GsiAllocator::new(Gsi(22), Gsi(23));
        assert_eq!(allocator.allocate(), Some(Gsi(22)));
        assert_eq!(allocator.allocate(), Some(Gsi(23)));
        assert_eq!(allocator.allocate(), None);
    }

    #[test]
    fn trigger_sets_status_and_signals_all_clones() {
        let interrupt = Interrupt::new().unwrap();
        let device = interrupt.clone();
        device.trigger(InterruptCause::UsedBuffer);
        device.trigger(InterruptCause::ConfigChange);
        assert_eq!(interrupt.status(), 3);
        assert_eq!(interrupt.event_fd().read().unwrap(), 2);
        interrupt.acknowledge(1);
        assert_eq!(device.status(), 2);
        interrupt.acknowledge(u32::MAX);
        assert_eq!(device.status(), 0);
    }
}
