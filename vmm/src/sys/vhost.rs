//! vhost-net: the kernel works on the queues itself.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::tap::Tap;

/// The kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("Failed to {action} of vhost-net")]
pub struct VhostError {
    action: &'static str,
    #[source]
    source: vhost::Error,
}

/// `/dev/vhost-net`, owned by this process.
#[derive(Debug)]
pub struct VhostNet {
    fd: OwnedFd,
    features: u64,
}

/// The device together with the memory that its rings are in.
#[derive(Debug)]
struct WithMemory<'d> {
    device: &'d VhostNet,
    memory: Arc<GuestMemoryMmap>,
}

impl AsRawFd for WithMemory<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.device.fd.as_raw_fd()
    }
}

impl VhostKernBackend for WithMemory<'_> {
    type AS = Arc<GuestMemoryMmap>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }

    /// The transport checked the rings when the driver set `DRIVER_OK`; the default here refuses a ring that ends with
    /// the memory.
    fn is_valid(&self, _config: &VringConfigData) -> bool {
        true
    }
}

/// One queue for the kernel.
#[derive(Debug)]
pub struct VhostQueue<'q> {
    /// Ready, and inside of memory.
    pub queue: &'q Queue,
    /// The driver's kick.
    pub kick: &'q EventFd,
    /// The guest's interrupt.
    pub call: &'q EventFd,
}

impl VhostNet {
    /// Takes the descriptor for this process.
    ///
    /// # Errors
    /// It is not `/dev/vhost-net`, or has an owner already.
    pub fn new(fd: OwnedFd) -> Result<Self, VhostError> {
        let mut device = VhostNet { fd, features: 0 };
        let (owned, features) = {
            let backend = device.with_memory(GuestMemoryMmap::new());
            (backend.set_owner(), backend.get_features())
        };
        owned.map_err(|source| VhostError {
            action: "take ownership",
            source,
        })?;
        device.features = features.map_err(|source| VhostError {
            action: "read the features",
            source,
        })?;
        Ok(device)
    }

    /// What the kernel knows.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Lets the kernel move packets between `tap` and the queues, which are the guest's receive and transmit queue.
    ///
    /// # Errors
    /// The kernel refused; then nothing runs.
    pub fn start(
        &self,
        memory: GuestMemoryMmap,
        features: u64,
        queues: &[VhostQueue<'_>],
        tap: &Tap,
    ) -> Result<(), VhostError> {
        let failed = |action| move |source| VhostError { action, source };
        let regions: Vec<_> = memory
            .iter()
            .map(region)
            .collect::<Result<_, _>>()
            .map_err(failed("map memory"))?;
        let backend = self.with_memory(memory);
        backend
            .set_features(features & self.features)
            .map_err(failed("set the features"))?;
        backend
            .set_mem_table(&regions)
            .map_err(failed("set the memory table"))?;
        for (index, VhostQueue { queue, kick, call }) in queues.iter().enumerate() {
            let config = VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: queue.desc_table(),
                used_ring_addr: queue.used_ring(),
                avail_ring_addr: queue.avail_ring(),
                log_addr: None,
            };
            backend
                .set_vring_num(index, queue.size())
                .map_err(failed("set the size of a queue"))?;
            backend
                .set_vring_addr(index, &config)
                .map_err(failed("set the addresses of a queue"))?;
            backend
                .set_vring_base(index, queue.next_avail())
                .map_err(failed("set the start of a queue"))?;
            backend
                .set_vring_call(index, call)
                .map_err(failed("set the interrupt of a queue"))?;
            backend
                .set_vring_kick(index, kick)
                .map_err(failed("set the kick of a queue"))?;
        }
        for index in 0..queues.len() {
            if let Err(e) = self.set_backend(index, tap.as_raw_fd()) {
                self.stop(index);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Takes the first `n_queues` queues back from the kernel; when it returns they are used no more.
    pub fn stop(&self, n_queues: usize) {
        for index in 0..n_queues {
            // Fails only for a queue that does not exist.
            let _ = self.set_backend(index, -1);
        }
    }

    /// Takes one queue back: the next available buffer that the kernel has not taken.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn pause_queue(&self, index: usize) -> Result<u16, VhostError> {
        self.set_backend(index, -1)?;
        let base = self
            .with_memory(GuestMemoryMmap::new())
            .get_vring_base(index)
            .map_err(|source| VhostError {
                action: "read the position",
                source,
            })?;
        // The upper half is for packed rings.
        Ok(u16::try_from(base & 0xffff).expect("masked to 16 bits"))
    }

    fn set_backend(&self, index: usize, fd: RawFd) -> Result<(), VhostError> {
        let index = u32::try_from(index).expect("a network device has two queues");
        let file = vhost_vring_file { index, fd };
        // SAFETY: the kernel reads a vhost_vring_file at the pointer, which lives until after the call.
        let result = unsafe { ioctl_with_ref(&self.fd, VHOST_NET_SET_BACKEND(), &file) };
        if result < 0 {
            let source = vhost::Error::IoctlError(std::io::Error::last_os_error());
            return Err(VhostError {
                action: "set the backend",
                source,
            });
        }
        Ok(())
    }

    fn with_memory(&self, memory: GuestMemoryMmap) -> WithMemory<'_> {
        WithMemory {
            device: self,
            memory: Arc::new(memory),
        }
    }
}

/// A region for the kernel's memory table.
fn region(region: &impl GuestMemoryRegion) -> Result<VhostUserMemoryRegionInfo, vhost::Error> {
    let host = region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(|_| vhost::Error::InvalidGuestMemory)?;
    Ok(VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: host.expose_provenance() as u64,
        mmap_offset: 0,
        mmap_handle: -1,
    })
}
