//! vCPU threads: each runs its vCPU, passes the guest's accesses to the buses, and stops when told.
//!
//! ```text
//!            pause                    all parked
//!  Running ---------> (leaving the guest) ---------> Parked
//!     ^                                                 |
//!     +---------------------- resume -------------------+
//!     |
//!     +--> Ended: the guest ended the machine, or KVM cannot go on; the thread waits for the process to end
//! ```

mod gate;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuExit;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::kvm::{ImmediateExit, KvmError, Tsc, Vcpu, VcpuState};
pub use gate::Gate;

/// A vCPU thread needs little: its deepest call is a device's register access.
const STACK_BYTES: usize = 256 << 10;

/// Why a vCPU runs no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEnd {
    /// A triple fault.
    Reset,
    /// The guest asked KVM for it: power off.
    Shutdown,
    /// The guest crashed and said so.
    Crash,
    /// KVM cannot go on; for people.
    Failed(String),
}

/// How often vCPUs left the guest, by why.
#[derive(Debug, Default)]
pub struct ExitCounters {
    /// Port accesses.
    pub pio: AtomicU64,
    /// Register accesses in memory.
    pub mmio: AtomicU64,
    /// Signals.
    pub interrupted: AtomicU64,
}

/// What all vCPU threads of a VM share.
#[derive(Debug)]
pub struct Shared {
    /// I/O ports.
    pub pio: Bus,
    /// Registers in memory.
    pub mmio: Bus,
    /// Where they stop.
    pub gate: Arc<Gate>,
    /// What they did.
    pub counters: ExitCounters,
}

/// One of them.
#[derive(Debug)]
struct VcpuThread {
    handle: JoinHandle<()>,
    immediate_exit: ImmediateExit,
    /// Locked by the thread unless it is parked.
    vcpu: Arc<Mutex<Vcpu>>,
}

/// What is called, with the number of the vCPU, on the thread of one that cannot go on.
pub type OnEnd = Arc<dyn Fn(u32, VcpuEnd) + Send + Sync>;

/// All vCPU threads of a VM, running.
pub struct Vcpus {
    threads: Vec<VcpuThread>,
    shared: Arc<Shared>,
    on_end: OnEnd,
}

impl std::fmt::Debug for Vcpus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Vcpus")
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl Vcpus {
    /// Starts a thread for each.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(vcpus: Vec<Vcpu>, shared: &Arc<Shared>, on_end: OnEnd) -> io::Result<Self> {
        register_signal_handler(kick_signal(), on_kick)?;
        let mut all = Self {
            threads: Vec::with_capacity(vcpus.len()),
            shared: Arc::clone(shared),
            on_end,
        };
        all.add(vcpus)?;
        Ok(all)
    }

    /// Starts threads for more, whose numbers follow those of the last.
    ///
    /// # Errors
    /// When a thread cannot be started; those before it run.
    pub fn add(&mut self, vcpus: Vec<Vcpu>) -> io::Result<()> {
        for mut vcpu in vcpus {
            let immediate_exit = vcpu.immediate_exit();
            let shared = Arc::clone(&self.shared);
            let on_end = Arc::clone(&self.on_end);
            let id = vcpu.id();
            let vcpu = Arc::new(Mutex::new(vcpu));
            let of_thread = Arc::clone(&vcpu);
            let handle = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    let end = run(&of_thread, &shared);
                    on_end(id, end);
                    // The process ends soon; until then nothing may find this vCPU missing.
                    shared.gate.park_for_ever();
                })?;
            self.threads.push(VcpuThread {
                handle,
                immediate_exit,
                vcpu,
            });
        }
        Ok(())
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// The TSC that all have in common. They must be paused: this waits for the first otherwise.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn tsc(&self) -> Result<Option<Tsc>, KvmError> {
        let first = self.threads.first();
        first.map(|thread| lock(&thread.vcpu).tsc()).transpose()
    }

    /// Stops all vCPUs; when it returns `true`, none is in the guest and no access is half done. Gives up after
    /// `deadline`, and then they run on.
    #[must_use]
    pub fn pause(&self, deadline: Duration) -> bool {
        let gate = &self.shared.gate;
        gate.close();
        for thread in &self.threads {
            thread.immediate_exit.request();
            // Fails only for a thread that is gone, and those never are.
            let _ = thread.handle.kill(kick_signal());
        }
        let all_parked = gate.wait_for_parked(self.threads.len(), deadline);
        if !all_parked {
            gate.open();
        }
        all_parked
    }

    /// Lets them run again.
    pub fn resume(&self) {
        self.shared.gate.open();
    }

    /// The state of all vCPUs, in the order of their numbers. They must be paused: this waits for them otherwise.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn save(&self, known_msrs: &[u32]) -> Result<Vec<VcpuState>, KvmError> {
        self.threads
            .iter()
            .map(|thread| lock(&thread.vcpu).save(known_msrs))
            .collect()
    }
}

fn lock(vcpu: &Mutex<Vcpu>) -> MutexGuard<'_, Vcpu> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Interrupts `KVM_RUN`, and does nothing else.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn run(of_thread: &Mutex<Vcpu>, shared: &Shared) -> VcpuEnd {
    let mut vcpu = lock(of_thread);
    let Shared {
        pio,
        mmio,
        gate,
        counters,
    } = shared;
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&counters.pio);
                for_each_access(data, |data| pio.write(port.into(), data));
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&counters.pio);
                for_each_access_mut(data, |data| pio.read(port.into(), data));
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&counters.mmio);
                mmio.write(address, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&counters.mmio);
                mmio.read(address, data);
            }
            Ok(VcpuExit::Shutdown) => return VcpuEnd::Reset,
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return match kind {
                    kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => VcpuEnd::Shutdown,
                    kvm_bindings::KVM_SYSTEM_EVENT_RESET => VcpuEnd::Reset,
                    kvm_bindings::KVM_SYSTEM_EVENT_CRASH => VcpuEnd::Crash,
                    _ => VcpuEnd::Failed(format!("unknown system event {kind}; {}", vcpu.describe())),
                };
            }
            Ok(VcpuExit::Intr) => vcpu.clear_immediate_exit(),
            Ok(exit) => {
                let exit = format!("{exit:?}");
                return VcpuEnd::Failed(format!("{exit}; {}", vcpu.describe()));
            }
            // EAGAIN: a signal woke a vCPU that the guest has not started yet.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                // Taken back before the gate is looked at: who pauses closes it before setting the flag. A flag that came too
                // late for its pause would else keep the vCPU out of the guest for ever.
                vcpu.clear_immediate_exit();
                count(&counters.interrupted);
            }
            Err(error) => {
                return VcpuEnd::Failed(format!(
                    "KVM_RUN: {}; {}",
                    io::Error::from(error),
                    vcpu.describe()
                ));
            }
        }
        if gate.has_ended() {
            gate.park_for_ever();
        }
        if gate.is_closed() {
            complete_access(&mut vcpu);
            drop(vcpu);
            gate.wait_until_open();
            vcpu = lock(of_thread);
            vcpu.announce_pause();
        }
    }
}

/// Completes the access that the last exit was for.
fn complete_access(vcpu: &mut Vcpu) {
    // With the flag set KVM finishes the access and returns before the next instruction.
    vcpu.immediate_exit().request();
    let _ = vcpu.run();
    vcpu.clear_immediate_exit();
}

/// Calls `access` once for what a plain instruction can transfer, and byte by byte for a string instruction.
fn for_each_access(data: &[u8], mut access: impl FnMut(&[u8])) {
    if data.len() <= 4 {
        access(data);
    } else {
        data.chunks(1).for_each(access);
    }
}

fn for_each_access_mut(data: &mut [u8], mut access: impl FnMut(&mut [u8])) {
    if data.len() <= 4 {
        access(data);
    } else {
        data.chunks_mut(1).for_each(access);
    }
}
