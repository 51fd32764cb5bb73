//! The virtio devices: each gets a place on the bus, an interrupt, and its queues' notifications wired into KVM.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use super::{BuildError, host};
use crate::arch::acpi::VirtioMmio;
use crate::arch::layout;
use crate::bus::Bus;
use crate::config::{Extent, SliceDisk};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{Block, SliceMap};
use crate::devices::virtio::transport::{MMIO_REGION_BYTES, MmioTransport, QUEUE_NOTIFY_OFFSET};
use crate::irq::{GsiAllocator, Interrupt};
use crate::kvm;
use crate::memory::GuestMemory;
use crate::vm::StatsSource;

/// Places devices one after the other.
pub(super) struct Slots<'b> {
    pub(super) kvm: &'b kvm::Vm,
    pub(super) memory: &'b GuestMemory,
    pub(super) bus: Bus,
    pub(super) gsis: GsiAllocator,
    pub(super) placed: Vec<VirtioMmio>,
    pub(super) transports: Vec<Arc<Mutex<MmioTransport>>>,
    pub(super) stats: Vec<StatsSource>,
}

impl<'b> Slots<'b> {
    pub(super) fn new(kvm: &'b kvm::Vm, memory: &'b GuestMemory) -> Self {
        Self {
            kvm,
            memory,
            bus: Bus::new(),
            gsis: GsiAllocator::new(layout::FIRST_DEVICE_GSI, layout::LAST_DEVICE_GSI),
            placed: Vec::new(),
            transports: Vec::new(),
            stats: Vec::new(),
        }
    }

    /// Puts a device into the next slot.
    pub(super) fn add(
        &mut self,
        name: &'static str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), BuildError> {
        let gsi = self
            .gsis
            .allocate()
            .ok_or(BuildError::NoInterrupt { device: name })?;
        let base = layout::VIRTIO_MMIO_START + self.placed.len() as u64 * MMIO_REGION_BYTES;
        let interrupt = Interrupt::new().map_err(host("make a virtio interrupt"))?;
        self.kvm
            .connect_interrupt(interrupt.event_fd(), gsi)
            .map_err(BuildError::Kvm)?;
        let mut transport = MmioTransport::new(device, self.memory.clone(), interrupt)
            .map_err(host("make a virtio notification"))?;
        let kvm = self.kvm.clone();
        transport.connect_kicks(Box::new(move |kicks| {
            (0..)
                .zip(kicks)
                .all(|(index, kick)| kvm.connect_kick(kick, base + QUEUE_NOTIFY_OFFSET, index).is_ok())
        }));
        let counters = transport.counters();
        self.stats.push(Box::new(move |into: &mut BTreeMap<String, u64>| {
            counters.collect(into);
        }));
        let transport = Arc::new(Mutex::new(transport));
        self.bus
            .insert(
                base,
                MMIO_REGION_BYTES,
                Arc::<Mutex<MmioTransport>>::clone(&transport),
            )
            .map_err(|source| BuildError::Place { device: name, source })?;
        self.transports.push(transport);
        self.placed.push(VirtioMmio {
            base,
            length: MMIO_REGION_BYTES,
            gsi,
        });
        Ok(())
    }

    /// Puts a slice disk into the next slot, with the extents known at start.
    pub(super) fn add_disk(
        &mut self,
        disk: SliceDisk,
        io_uring: bool,
        extents: &[Extent],
        files: Vec<OwnedFd>,
    ) -> Result<SliceMap, BuildError> {
        let (block, map) = Block::new(disk, io_uring);
        map.add_extents(extents.iter().copied().zip(files).collect())
            .map_err(BuildError::Extents)?;
        self.add("slice disk", Box::new(block))?;
        Ok(map)
    }
}
