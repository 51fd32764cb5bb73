//! A guest that boots: kernel, initramfs, ACPI tables, registers at the kernel's entry.

use std::fs::File;

use super::{BuildError, Chassis, DeviceResources, Ground, new_generation_id};
use crate::arch::{acpi, boot, layout, regs};
use crate::kvm;
use crate::memory;

/// What every guest kernel is told, before what its owner adds.
///
/// - `loglevel=3`: a line on the serial console costs two VM exits per byte. Errors (level 3) are left out too, because
///   every boot has one, that PCI is off.
/// - `8250.nr_uarts=1`: Linux would probe three ports more.
/// - `pci=off`: the kernel has PCI only because its ACPI needs it.
/// - `tsc=reliable`: no watchdog beside the TSC, which KVM keeps in step.
/// - `panic=-1`: a panic resets the machine at once, and the VM ends. (Told from a reset by the panic port.)
const KERNEL_ARGS: &str = "console=ttyS0 8250.nr_uarts=1 loglevel=3 pci=off tsc=reliable panic=-1";

/// With memory to be plugged.
///
/// - `memhp_default_state=online`: it is used at once; there is no user space that would have to agree.
/// - `memory_hotplug.online_policy=auto-movable`: as long as there is enough for the kernel, it is used for what can be
///   moved out of the way when it is to be unplugged again.
const HOTPLUG_ARGS: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

impl Ground<'_> {
    /// The machine in front of the first instruction of its kernel.
    pub(super) fn boot(
        &self,
        mut kernel: File,
        mut initrd: File,
        resources: DeviceResources,
    ) -> Result<(Chassis, Vec<kvm::Vcpu>), BuildError> {
        let config = self.config;
        // Loading the guest mostly copies, and takes about as long as making the VM.
        let (kvm, (memory, entry)) = self.create_vm_beside(|| {
            let memory_bytes = config.memory_mib << 20;
            let hotplug = layout::hotplug_range(memory_bytes, config.hotplug_mib << 20);
            let ranges: Vec<_> = layout::ram_ranges(memory_bytes)
                .into_iter()
                .chain(hotplug)
                .collect();
            let memory = memory::allocate(&ranges).map_err(BuildError::Memory)?;
            let mut command_line = format!("{KERNEL_ARGS} {}", config.kernel_args);
            if config.n_vcpus < config.n_possible_vcpus {
                // The others cannot answer yet.
                command_line += &format!(" maxcpus={}", config.n_vcpus);
            }
            if hotplug.is_some() {
                command_line += &format!(" {HOTPLUG_ARGS}");
            }
            let entry = boot::load(&memory, memory_bytes, &mut kernel, &mut initrd, &command_line)
                .map_err(BuildError::Boot)?;
            Ok((memory, entry))
        })?;
        kvm.set_memory(&memory, 0..layout::ram_ranges(config.memory_mib << 20).len())
            .map_err(BuildError::Kvm)?;
        let devices = self.make_devices(&kvm, &memory, None, resources)?;
        acpi::write(
            &memory,
            config.n_possible_vcpus,
            &devices.placed,
            new_generation_id()?,
        )
        .map_err(BuildError::Acpi)?;
        let (vcpus, cpuid) = self.create_vcpus(&kvm).map_err(BuildError::Kvm)?;
        for vcpu in &vcpus {
            vcpu.set_msrs(&regs::boot_msrs()).map_err(BuildError::Kvm)?;
        }
        if let Some(first) = vcpus.first() {
            // The others wait for the kernel to start them.
            first
                .set_registers(&regs::boot_regs(entry, layout::START_INFO), regs::set_boot_sregs)
                .map_err(BuildError::Kvm)?;
        }
        let chassis = Chassis {
            kvm,
            memory,
            devices,
            cpuid,
            has_hotplug_slot: false,
        };
        Ok((chassis, vcpus))
    }
}
