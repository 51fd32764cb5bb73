//! The running VM: what its parts have in common, and what can be done with the whole. Names no device kind.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::EventfdFlags;

use crate::control::ExitReason;
use crate::kvm;
use crate::memory::GuestMemory;
use crate::vcpu::{Gate, Shared, Vcpus};

/// Something that counts; writes its counters under stable names.
pub type StatsSource = Box<dyn Fn(&mut BTreeMap<String, u64>) + Send>;

/// A VM whose vCPUs run.
pub struct Vm {
    /// The guest ends when its last descriptor is closed.
    pub(crate) kvm: kvm::Vm,
    pub(crate) memory: GuestMemory,
    pub(crate) vcpus: Vcpus,
    pub(crate) shared: Arc<Shared>,
    pub(crate) stats: Vec<StatsSource>,
}

/// The VM in KVM.
impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.kvm.as_fd()
    }
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Vm")
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

/// How long a vCPU may take to leave the guest and finish a device access.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

impl Vm {
    /// Stops all vCPUs at an instruction boundary; `false` when one did not stop in time, and then all run on.
    #[must_use]
    pub fn pause(&self) -> bool {
        self.vcpus.pause(PAUSE_DEADLINE)
    }

    /// The vCPUs are stopped, or about to stop.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.shared.gate.is_closed()
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.vcpus.resume();
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// All counters.
    #[must_use]
    pub fn stats(&self) -> BTreeMap<String, u64> {
        let mut counters = BTreeMap::new();
        let exits = &self.shared.counters;
        for (name, counter) in [
            ("vcpu_exits_pio", &exits.pio),
            ("vcpu_exits_mmio", &exits.mmio),
            ("vcpu_exits_interrupted", &exits.interrupted),
        ] {
            counters.insert(
                name.to_owned(),
                counter.load(std::sync::atomic::Ordering::Relaxed),
            );
        }
        counters.insert("vcpus".to_owned(), self.vcpus.count() as u64);
        for source in &self.stats {
            source(&mut counters);
        }
        counters
    }
}

/// Carries the reason of the end from whichever thread sees it first to the one that waits for it.
#[derive(Debug)]
pub struct EndSignal {
    gate: Arc<Gate>,
    reason: Mutex<Option<ExitReason>>,
    event: OwnedFd,
}

impl EndSignal {
    /// Nothing has ended yet. At the end `gate` stops the vCPUs for good.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(gate: Arc<Gate>) -> std::io::Result<Self> {
        Ok(Self {
            gate,
            reason: Mutex::new(None),
            event: rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    /// The VM ends for this reason, unless it has ended already.
    pub fn raise(&self, reason: ExitReason) {
        self.gate.end();
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(reason);
        // Fails only when the counter is full, and then it is readable too.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// What stops the vCPUs.
    #[must_use]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Why the VM ended, if it has.
    #[must_use]
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Readable once there is a reason.
impl AsFd for EndSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let end = EndSignal::new(Arc::default()).unwrap();
        assert_eq!(end.reason(), None);
        end.raise(ExitReason::GuestPanic);
        end.raise(ExitReason::Reset);
        assert_eq!(end.reason(), Some(ExitReason::GuestPanic));
        assert!(end.gate().has_ended());
        assert_eq!(rustix::io::read(&end, &mut [0; 8]).unwrap(), 8);
    }
}
