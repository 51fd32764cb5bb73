//! What the halves of the device and its owner share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::blocks::Blocks;
use crate::devices::virtio::Counters;
use crate::devices::virtio::counters::define_counters;
use crate::irq::{Interrupt, InterruptCause};

define_counters!(
    /// What the device counts.
    MemCounters {
        /// Requests carried out, or answered if they were questions.
        requests,
        /// Requests for more than the owner wants the guest to have.
        refused_requests,
        /// Requests that make no sense, and chains that are no request.
        bad_requests,
        /// Bytes given back to the host.
        discarded_bytes,
        /// Requests that failed because the host did not take memory back.
        discard_failures,
    }
);

/// Why the device does not take a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ResizeError {
    /// More than there is.
    #[error("{plugged_mib} MiB are more than this guest can have plugged: give at most {region_mib} MiB")]
    TooLarge {
        /// What was asked for.
        plugged_mib: u64,
        /// The whole region.
        region_mib: u64,
    },
    /// Not whole blocks.
    #[error("{plugged_mib} MiB cannot be plugged: give a multiple of {block_mib} MiB")]
    NotWholeBlocks {
        /// What was asked for.
        plugged_mib: u64,
        /// The size of a block.
        block_mib: u64,
    },
}

/// Blocks, sizes and counters of one device.
#[derive(Debug)]
pub(super) struct Shared {
    blocks: Mutex<Blocks>,
    /// One more after every change of the configuration space: it has fields of 64 bits, which drivers read in halves.
    generation: AtomicU32,
    announcer: Mutex<Announcer>,
    pub(super) counters: MemCounters,
}

/// Tells the driver of another size: from the owner's thread, so that the device needs none for it.
#[derive(Debug, Default)]
struct Announcer {
    /// `None` while the device is inactive or paused.
    interrupt: Option<Interrupt>,
    /// The driver is to be told once it can be.
    is_due: bool,
}

impl Shared {
    pub(super) fn new(blocks: Blocks) -> Self {
        Shared {
            blocks: Mutex::new(blocks),
            generation: AtomicU32::new(0),
            announcer: Mutex::default(),
            counters: MemCounters::new("mem"),
        }
    }

    /// Announces another size by this interrupt from now on, or not until there is one again.
    pub(super) fn announce_on(&self, interrupt: Option<Interrupt>) {
        let mut announcer = self.announcer.lock().unwrap_or_else(PoisonError::into_inner);
        announcer.interrupt = interrupt;
        announcer.announce();
    }

    /// The driver is to look at what it is to have.
    pub(super) fn announce(&self) {
        let mut announcer = self.announcer.lock().unwrap_or_else(PoisonError::into_inner);
        announcer.is_due = true;
        announcer.announce();
    }

    /// Held for bookkeeping only, never while memory is given back: vCPUs wait for it when they read the configuration.
    pub(super) fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something that the configuration space shows.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Blocks) -> T) -> T {
        let mut blocks = self.blocks();
        self.generation.fetch_add(1, Ordering::AcqRel);
        change(&mut blocks)
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn resize(&self, plugged_mib: u64) -> Result<(), ResizeError> {
        self.change(|blocks| {
            let region_mib = blocks.region_bytes() >> 20;
            if plugged_mib > region_mib {
                return Err(ResizeError::TooLarge {
                    plugged_mib,
                    region_mib,
                });
            }
            let block_mib = blocks.block_bytes() >> 20;
            if !plugged_mib.is_multiple_of(block_mib) {
                return Err(ResizeError::NotWholeBlocks {
                    plugged_mib,
                    block_mib,
                });
            }
            blocks.request(plugged_mib << 20);
            Ok(())
        })?;
        self.announce();
        Ok(())
    }

    /// `struct virtio_mem_config` (virtio 1.2, 5.15.4).
    pub(super) fn config(&self) -> [u8; 56] {
        let blocks = self.blocks();
        let mut config = [0; 56];
        for (offset, field) in [
            (0, blocks.block_bytes()),
            // 8: the NUMA node, for VIRTIO_MEM_F_ACPI_PXM only.
            (16, blocks.address()),
            (24, blocks.region_bytes()),
            (32, blocks.usable_bytes()),
            (40, blocks.plugged_bytes()),
            (48, blocks.requested_bytes()),
        ] {
            config[offset..offset + 8].copy_from_slice(&field.to_le_bytes());
        }
        config
    }
}

impl Announcer {
    fn announce(&mut self) {
        if let Some(interrupt) = self.interrupt.as_ref().filter(|_| self.is_due) {
            self.is_due = false;
            interrupt.trigger(InterruptCause::ConfigChange);
        }
    }
}

impl Counters for Shared {
    fn collect(&self, into: &mut BTreeMap<String, u64>) {
        self.counters.collect(into);
        let blocks = self.blocks();
        for (name, bytes) in [
            ("mem_region_bytes", blocks.region_bytes()),
            ("mem_usable_bytes", blocks.usable_bytes()),
            ("mem_plugged_bytes", blocks.plugged_bytes()),
            ("mem_requested_bytes", blocks.requested_bytes()),
        ] {
            into.insert(name.to_owned(), bytes);
        }
    }
}
