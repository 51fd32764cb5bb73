//! The boot recipe, from a configuration and descriptors to a running VM, top to bottom.

mod ports;
mod virtio;

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::arch::{acpi, boot, cpuid, layout, regs};
use crate::bus::RangeError;
use crate::config::{ConfigError, SliceDisk, VmConfig};
use crate::control::{Event, ExitReason};
use crate::devices::virtio::block::{SliceError, SliceMap};
use crate::devices::virtio::net::{Net, NetError};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{Vsock, VsockHandle};
use crate::kvm::{self, KvmError};
use crate::memory::{self, MemoryError};
use crate::reporter::Reporter;
use crate::resources::Resources;
use crate::vcpu::{ExitCounters, Shared, VcpuEnd, Vcpus};
use crate::vm::{EndSignal, Vm};

/// What every guest kernel is told, before what its owner adds.
///
/// - `loglevel=3`: a line on the serial console costs two VM exits per byte. Errors (level 3) are left out too, because
///   every boot has one, that PCI is off.
/// - `8250.nr_uarts=1`: Linux would probe three ports more.
/// - `pci=off`: the kernel has PCI only because its ACPI needs it.
/// - `tsc=reliable`: no watchdog beside the TSC, which KVM keeps in step.
/// - `panic=-1`: a panic resets the machine at once, and the VM ends. (Told from a reset by the panic port.)
const KERNEL_ARGS: &str = "console=ttyS0 8250.nr_uarts=1 loglevel=3 pci=off tsc=reliable panic=-1";

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
    Boot(#[source] boot::BootError),
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
}

/// Builds the VM and starts its vCPUs. When it ends by itself, `end` is raised.
///
/// # Errors
/// [`BuildError`]; nothing of the VM is left running.
pub fn build(
    config: &VmConfig,
    mut resources: Resources,
    end: &Arc<EndSignal>,
    reporter: &Arc<Reporter>,
) -> Result<Machine, BuildError> {
    config.validate().map_err(BuildError::Config)?;

    let kvm_host = kvm::Host::new(resources.kvm).map_err(BuildError::Kvm)?;
    let create_vm = || {
        kvm_host
            .create_vm(layout::KVM_IDENTITY_MAP, layout::KVM_TSS)
            .map_err(BuildError::Kvm)
    };
    let mut load_guest = || {
        let memory =
            memory::allocate(&layout::ram_ranges(config.memory_mib << 20)).map_err(BuildError::Memory)?;
        let command_line = format!("{KERNEL_ARGS} {}", config.kernel_args);
        let entry = boot::load(
            &memory,
            &mut resources.kernel,
            &mut resources.initrd,
            &command_line,
        )
        .map_err(BuildError::Boot)?;
        Ok((memory, entry))
    };
    // Creating a VM mostly waits for the host kernel, loading the guest mostly copies: both take about as long.
    let (kvm, loaded) = std::thread::scope(|scope| {
        let creating = scope.spawn(create_vm);
        let loaded = load_guest();
        (creating.join().expect("nothing in there panics"), loaded)
    });
    let kvm = kvm?;
    let (memory, entry) = loaded?;
    kvm.set_memory(&memory).map_err(BuildError::Kvm)?;

    let mut slots = virtio::Slots::new(&kvm, &memory);
    let pio = ports::build(resources.console, &kvm, end, &mut slots.stats)?;
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
    let reporter = Arc::clone(reporter);
    let on_guest_connect = move |port, stream: UnixStream| {
        reporter.report(Event::GuestConnected { port }, Some(stream.into()));
    };
    let (device, vsock) =
        Vsock::new(config.cid, Box::new(on_guest_connect)).map_err(host("make the vsock device"))?;
    slots.add("vsock device", Box::new(device))?;
    slots.add("entropy device", Box::new(Rng::new()))?;
    let virtio::Slots {
        bus: mmio,
        placed,
        stats,
        ..
    } = slots;

    let mut generation_id = [0; 16];
    rustix::rand::getrandom(&mut generation_id, rustix::rand::GetRandomFlags::empty())
        .map_err(host("make a VM generation id"))?;
    acpi::write(&memory, config.n_vcpus, &placed, generation_id).map_err(BuildError::Acpi)?;

    let vcpus = build_vcpus(config.n_vcpus, &kvm_host, &kvm, entry).map_err(BuildError::Kvm)?;
    let shared = Arc::new(Shared {
        pio,
        mmio,
        gate: Arc::clone(end.gate()),
        counters: ExitCounters::default(),
    });
    let on_end = on_vcpu_end(end);
    let vcpus = Vcpus::start(vcpus, &shared, &on_end).map_err(host("start the vCPU threads"))?;
    Ok(Machine {
        vm: Vm {
            _kvm: kvm,
            memory,
            vcpus,
            shared,
            stats,
        },
        read_only,
        read_write,
        vsock,
    })
}

/// All vCPUs, the first ready at the kernel's entry, the others waiting for it to start them.
fn build_vcpus(
    n_vcpus: u32,
    kvm_host: &kvm::Host,
    kvm: &kvm::Vm,
    entry: vm_memory::GuestAddress,
) -> Result<Vec<kvm::Vcpu>, KvmError> {
    let vcpus = (0..n_vcpus)
        .map(|id| kvm.create_vcpu(id))
        .collect::<Result<Vec<_>, _>>()?;
    let topology = cpuid::Topology {
        n_vcpus,
        tsc_deadline: kvm_host.has_tsc_deadline(),
        tsc_khz: vcpus.first().map_or(0, kvm::Vcpu::tsc_khz),
    };
    let mut entries = cpuid::build(&kvm_host.supported_cpuid()?, topology);
    for vcpu in &vcpus {
        cpuid::set_vcpu(&mut entries, vcpu.id());
        vcpu.set_cpuid(&entries)?;
        vcpu.set_msrs(&regs::boot_msrs())?;
    }
    if let Some(first) = vcpus.first() {
        first.set_registers(&regs::boot_regs(entry, layout::START_INFO), regs::set_boot_sregs)?;
    }
    Ok(vcpus)
}

fn on_vcpu_end(end: &Arc<EndSignal>) -> Arc<dyn Fn(u32, VcpuEnd) + Send + Sync> {
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
