//! The recipes, from a configuration and descriptors to a running VM: [`build`] is the beginning and the end of both;
//! between them a guest boots (`boot.rs`) or goes on from a snapshot (`restore.rs`), which `save.rs` has taken. `grow.rs` makes
//! it larger while it runs.

mod boot;
mod grow;
mod ports;
mod restore;
mod save;
mod virtio;

pub use grow::GrowError;
pub use save::{SaveError, begin_save};

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_cpuid_entry2;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::{acpi, boot as arch_boot, cpuid, layout};
use crate::bus::{Bus, RangeError};
use crate::config::{ConfigError, MIN_MEMORY_MIB, SliceDisk, VmConfig};
use crate::control::{Event, ExitReason};
use crate::devices::legacy::{Console, ConsoleState};
use crate::devices::virtio::balloon::{Balloon, BalloonHandle};
use crate::devices::virtio::block::{SliceError, SliceMap};
use crate::devices::virtio::mem::{Mem, MemHandle};
use crate::devices::virtio::net::{Net, NetError};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::transport::{MmioTransport, RestoreError};
use crate::devices::virtio::vsock::{Vsock, VsockHandle};
use crate::kvm::{self, KvmError};
use crate::memory::{GuestMemory, MemoryError};
use crate::reporter::Reporter;
use crate::resources::{OriginFiles, Resources};
use crate::snapshot::SnapshotError;
use crate::vcpu::{ExitCounters, OnEnd, Shared, VcpuEnd, Vcpus};
use crate::vm::{EndSignal, StatsSource, Vm};

/// Why a VM was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration is wrong.
    #[error("The VM's configuration is invalid")]
    Config(#[source] ConfigError),
    /// KVM refused something.
    #[error("Failed to set up the VM in KVM")]
    Kvm(#[source] KvmError),
    /// There is not enough memory.
    #[error("Failed to allocate guest memory")]
    Memory(#[source] MemoryError),
    /// Kernel or initramfs.
    #[error("Failed to load the guest")]
    Boot(#[source] arch_boot::BootError),
    /// The snapshot does not fit; the guest could be booted instead.
    #[error("The snapshot was refused")]
    Snapshot(#[source] SnapshotError),
    /// A device of the snapshot does not fit.
    #[error("The snapshot was refused")]
    Device(#[source] RestoreError),
    /// The ACPI tables.
    #[error("Failed to describe the machine to the guest")]
    Acpi(#[source] acpi::AcpiError),
    /// Two devices at one address.
    #[error("Failed to place the {device}")]
    Place {
        /// The device.
        device: &'static str,
        /// The cause.
        #[source]
        source: RangeError,
    },
    /// More devices than interrupts.
    #[error("There is no interrupt left for the {device}")]
    NoInterrupt {
        /// The device.
        device: &'static str,
    },
    /// Extents that cannot be mapped.
    #[error("Failed to map the extents of a slice disk")]
    Extents(#[source] SliceError),
    /// The tap or vhost-net.
    #[error("Failed to make the network device")]
    Net(#[source] NetError),
    /// An operating system resource.
    #[error("Failed to {operation}")]
    Host {
        /// What was tried, as verb and object.
        operation: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

impl BuildError {
    /// The snapshot is at fault: the guest could be booted.
    #[must_use]
    pub fn refuses_snapshot(&self) -> bool {
        matches!(
            self,
            BuildError::Snapshot(_)
                | BuildError::Device(_)
                | BuildError::Memory(
                    MemoryError::Image { .. }
                        | MemoryError::ImageLength { .. }
                        | MemoryError::ImageRange { .. }
                )
        )
    }
}

/// For `map_err`: names what was asked of the operating system.
fn host<E: Into<std::io::Error>>(operation: &'static str) -> impl FnOnce(E) -> BuildError {
    move |source| BuildError::Host {
        operation,
        source: source.into(),
    }
}

/// A running VM and what its owner's commands reach.
#[derive(Debug)]
pub struct Machine {
    /// vCPUs and memory.
    pub vm: Vm,
    /// What is mapped on `vda`.
    pub read_only: SliceMap,
    /// What is mapped on `vdb`.
    pub read_write: SliceMap,
    /// The guest's sockets.
    pub vsock: VsockHandle,
    /// Memory the guest gives up.
    pub balloon: BalloonHandle,
    /// Memory that can be plugged; `None` when there is none.
    mem: Option<MemHandle>,
    /// KVM was shown the region of memory that can be plugged.
    has_hotplug_slot: bool,
    /// What a snapshot needs to know besides.
    saved: save::Sources,
}

impl Machine {
    /// Has devices of this type (virtio 1.2, section 5) look at what their owner wants.
    pub fn wake(&self, device_type: u32) {
        self.saved.all_transports(|transport| {
            if transport.device_type() == device_type {
                transport.wake();
            }
            true
        });
    }

    /// Stops the guest at an instruction boundary and the devices between two requests; `false` when a vCPU did not stop in
    /// time or a device was lost, and then all run on.
    #[must_use]
    pub fn pause(&self) -> bool {
        if !self.vm.pause() {
            return false;
        }
        let all_paused = self.saved.all_transports(MmioTransport::pause);
        if !all_paused {
            self.resume();
        }
        all_paused
    }

    /// Lets both go on.
    pub fn resume(&self) {
        self.saved.all_transports(|transport| {
            transport.resume();
            true
        });
        self.vm.resume();
    }
}

/// What both recipes begin with.
struct Ground<'g> {
    config: &'g VmConfig,
    kvm_host: &'g kvm::Host,
    end: &'g Arc<EndSignal>,
    reporter: &'g Arc<Reporter>,
}

/// The descriptors that devices take.
struct DeviceResources {
    console: std::fs::File,
    tap: Option<std::os::fd::OwnedFd>,
    vhost_net: Option<std::os::fd::OwnedFd>,
    read_only: Vec<std::os::fd::OwnedFd>,
    read_write: Vec<std::os::fd::OwnedFd>,
}

/// A machine without vCPUs.
struct Chassis {
    kvm: kvm::Vm,
    memory: GuestMemory,
    devices: Devices,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// As in [`Machine`].
    has_hotplug_slot: bool,
}

/// Builds the VM and starts its vCPUs. When it ends by itself, `end` is raised.
///
/// # Errors
/// [`BuildError`]; nothing of the VM is left running.
pub fn build(
    config: &VmConfig,
    resources: Resources,
    end: &Arc<EndSignal>,
    reporter: &Arc<Reporter>,
) -> Result<Machine, BuildError> {
    config.validate().map_err(BuildError::Config)?;
    let Resources {
        kvm,
        origin,
        console,
        tap,
        vhost_net,
        read_only,
        read_write,
    } = resources;
    let kvm_host = kvm::Host::new(kvm).map_err(BuildError::Kvm)?;
    let ground = Ground {
        config,
        kvm_host: &kvm_host,
        end,
        reporter,
    };
    let for_devices = DeviceResources {
        console,
        tap,
        vhost_net,
        read_only,
        read_write,
    };
    let (chassis, vcpus) = match origin {
        OriginFiles::Boot { kernel, initrd } => ground.boot(kernel, initrd, for_devices)?,
        OriginFiles::Snapshot {
            state,
            memory,
            written,
        } => ground.restore(&state, &memory, written.as_ref(), for_devices)?,
    };
    let Chassis {
        kvm,
        memory,
        devices,
        cpuid,
        has_hotplug_slot,
    } = chassis;
    let shared = Arc::new(Shared {
        pio: devices.pio,
        mmio: devices.mmio,
        gate: Arc::clone(end.gate()),
        counters: ExitCounters::default(),
    });
    let vcpus = Vcpus::start(vcpus, &shared, on_vcpu_end(end)).map_err(host("start the vCPU threads"))?;
    Ok(Machine {
        vm: Vm {
            kvm,
            memory,
            vcpus,
            shared,
            stats: devices.stats,
        },
        read_only: devices.read_only,
        read_write: devices.read_write,
        vsock: devices.vsock,
        balloon: devices.balloon,
        mem: devices.mem,
        has_hotplug_slot,
        saved: save::Sources {
            kvm_host,
            config: config.clone(),
            cpuid,
            console: devices.console,
            transports: devices.transports,
        },
    })
}

/// All devices of a machine, on their buses.
struct Devices {
    pio: Bus,
    mmio: Bus,
    placed: Vec<acpi::VirtioMmio>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    console: Arc<Mutex<Console>>,
    /// Announces a new VM generation id when written to.
    generation_event: EventFd,
    stats: Vec<StatsSource>,
    read_only: SliceMap,
    read_write: SliceMap,
    vsock: VsockHandle,
    balloon: BalloonHandle,
    mem: Option<MemHandle>,
}

impl Ground<'_> {
    /// Makes an empty KVM VM while this thread does something else: creating one mostly waits for the host kernel.
    fn create_vm_beside<T>(
        &self,
        meanwhile: impl FnOnce() -> Result<T, BuildError>,
    ) -> Result<(kvm::Vm, T), BuildError> {
        let create_vm = || {
            self.kvm_host
                .create_vm(layout::KVM_IDENTITY_MAP, layout::KVM_TSS)
                .map_err(BuildError::Kvm)
        };
        let (kvm, done) = std::thread::scope(|scope| {
            let creating = scope.spawn(create_vm);
            let done = meanwhile();
            (creating.join().expect("nothing in there panics"), done)
        });
        Ok((kvm?, done?))
    }

    /// Makes the devices, in the fixed order of their slots. A snapshot's have `saved` as their console's state.
    fn make_devices(
        &self,
        kvm: &kvm::Vm,
        memory: &GuestMemory,
        saved: Option<&ConsoleState>,
        resources: DeviceResources,
    ) -> Result<Devices, BuildError> {
        let config = self.config;
        let mut slots = virtio::Slots::new(kvm, memory);
        let (pio, console) = ports::build(resources.console, saved, kvm, self.end, &mut slots.stats)?;
        let uring = config.io_uring;
        let read_only = slots.add_disk(
            SliceDisk::ReadOnly,
            uring,
            &config.read_only_extents,
            resources.read_only,
        )?;
        let read_write = slots.add_disk(
            SliceDisk::ReadWrite,
            uring,
            &config.read_write_extents,
            resources.read_write,
        )?;
        if let (Some(net), Some(tap)) = (&config.net, resources.tap) {
            let net = Net::new(net, tap, resources.vhost_net).map_err(BuildError::Net)?;
            slots.add("network device", Box::new(net))?;
        }
        let reporter = Arc::clone(self.reporter);
        let on_guest_connect = move |port, stream: UnixStream| {
            reporter.report(Event::GuestConnected { port }, Some(stream.into()));
        };
        let (device, vsock) =
            Vsock::new(config.cid, Box::new(on_guest_connect)).map_err(host("make the vsock device"))?;
        slots.add("vsock device", Box::new(device))?;
        slots.add("entropy device", Box::new(Rng::new()))?;
        let (device, balloon) =
            Balloon::new(config.memory_mib - MIN_MEMORY_MIB).map_err(host("make the balloon"))?;
        slots.add("balloon", Box::new(device))?;
        let mem = match layout::hotplug_range(config.memory_mib << 20, config.hotplug_mib << 20) {
            Some((address, length)) => {
                let (device, mem) = Mem::new(address, length);
                slots.add("memory device", Box::new(device))?;
                Some(mem)
            }
            None => None,
        };
        let generation_event =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make the generation event"))?;
        kvm.connect_interrupt(&generation_event, layout::EVENT_DEVICE_GSI)
            .map_err(BuildError::Kvm)?;
        let virtio::Slots {
            bus: mmio,
            placed,
            transports,
            stats,
            ..
        } = slots;
        Ok(Devices {
            pio,
            mmio,
            placed,
            transports,
            console,
            generation_event,
            stats,
            read_only,
            read_write,
            vsock,
            balloon,
            mem,
        })
    }

    /// vCPUs with their CPUID, as KVM makes them, and the CPUID of the first.
    fn create_vcpus(&self, kvm: &kvm::Vm) -> Result<(Vec<kvm::Vcpu>, Vec<kvm_cpuid_entry2>), KvmError> {
        let vcpus = (0..self.config.n_vcpus)
            .map(|id| kvm.create_vcpu(id))
            .collect::<Result<Vec<_>, _>>()?;
        let topology = cpuid::Topology {
            n_vcpus: self.config.n_possible_vcpus,
            tsc_deadline: self.kvm_host.has_tsc_deadline(),
            tsc_khz: vcpus.first().map_or(0, kvm::Vcpu::tsc_khz),
        };
        let mut entries = cpuid::build(&self.kvm_host.supported_cpuid()?, topology);
        let of_first = entries.clone();
        for vcpu in &vcpus {
            cpuid::set_vcpu(&mut entries, vcpu.id());
            vcpu.set_cpuid(&entries)?;
        }
        Ok((vcpus, of_first))
    }
}

/// A new VM generation id (Microsoft, "Virtual Machine Generation ID").
fn new_generation_id() -> Result<[u8; 16], BuildError> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(host("make a VM generation id"))?;
    Ok(id)
}

fn on_vcpu_end(end: &Arc<EndSignal>) -> OnEnd {
    let end = Arc::clone(end);
    Arc::new(move |vcpu, how| {
        end.raise(match how {
            VcpuEnd::Reset => ExitReason::Reset,
            VcpuEnd::Shutdown => ExitReason::Shutdown,
            VcpuEnd::Crash => ExitReason::GuestPanic,
            VcpuEnd::Failed(message) => ExitReason::KvmError { vcpu, message },
        });
    })
}
