//! A guest that goes on from a snapshot: memory shown from its file, devices where they were, vCPUs in the middle of what
//! they did, and one difference that the guest is told of, its VM generation id.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;

use vm_memory::Bytes;

use super::{BuildError, Chassis, DeviceResources, Ground, host, new_generation_id};
use crate::arch::{layout, regs};
use crate::devices::virtio::mem;
use crate::kvm::{self, VcpuState};
use crate::memory::{MemoryError, image, written};
use crate::snapshot::{MachineState, SnapshotError};

/// Reads a file from its start, wherever its descriptor stands: the position is shared with all other VMMs that were given
/// the same one.
struct FromStart<'f> {
    file: &'f File,
    offset: u64,
}

impl<'f> FromStart<'f> {
    fn of(file: &'f File) -> Self {
        Self { file, offset: 0 }
    }
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

/// The guest has or may have memory plugged.
fn has_plugged(state: &MachineState) -> bool {
    let mut saved = state
        .devices
        .iter()
        .filter_map(|device| device.of_device(mem::DEVICE_TYPE));
    saved.any(mem::is_in_use)
}

impl Ground<'_> {
    /// The machine in front of the next instruction of the snapshot's vCPUs. vCPUs that it did not have wait for the guest
    /// to start them.
    pub(super) fn restore(
        &self,
        state: &File,
        memory: &File,
        written: Option<&File>,
        resources: DeviceResources,
    ) -> Result<(Chassis, Vec<kvm::Vcpu>), BuildError> {
        let (kvm, (state, memory)) = self.create_vm_beside(|| {
            let state = MachineState::read(FromStart::of(state)).map_err(BuildError::Snapshot)?;
            self.check_shape(&state).map_err(BuildError::Snapshot)?;
            let memory_bytes = state.memory_mib << 20;
            let hotplug = layout::hotplug_range(memory_bytes, state.hotplug_mib << 20);
            let ranges: Vec<_> = layout::ram_ranges(memory_bytes)
                .into_iter()
                .chain(hotplug)
                .collect();
            let memory = image::map(&ranges, memory, &state.data).map_err(BuildError::Memory)?;
            if let Some(list) = written
                && let Err(error) = written::populate(&memory, list)
            {
                // Only slower: each page comes when the guest writes to it.
                eprintln!("the list of written pages is of no use: {error}");
            }
            Ok((state, memory))
        })?;
        memory
            .write_slice(&new_generation_id()?, layout::VM_GENERATION_ID)
            .map_err(|source| {
                BuildError::Memory(MemoryError::Image {
                    source: io::Error::other(source),
                })
            })?;
        let n_ram = layout::ram_ranges(state.memory_mib << 20).len();
        let has_hotplug_slot = has_plugged(&state);
        kvm.set_memory(&memory, 0..n_ram + usize::from(has_hotplug_slot))
            .map_err(BuildError::Kvm)?;
        let (vcpus, cpuid) = self.create_vcpus(&kvm).map_err(BuildError::Kvm)?;
        state.check_processor(&cpuid).map_err(BuildError::Snapshot)?;
        // Interrupt controllers first: an interrupt of a device that starts again must find its pin as it was.
        kvm.restore_interrupts(&state.vm).map_err(BuildError::Kvm)?;
        let tsc = state.vcpus.first().map(VcpuState::tsc);
        for (index, vcpu) in vcpus.iter().enumerate() {
            match (state.vcpus.get(index), tsc) {
                (Some(saved), Some(tsc)) => vcpu.restore(saved, tsc),
                // The guest compares TSCs of processors only where it was not told that they are reliable.
                (_, tsc) => vcpu
                    .set_msrs(&regs::boot_msrs())
                    .and_then(|()| tsc.map_or(Ok(()), |tsc| vcpu.set_tsc(tsc))),
            }
            .map_err(BuildError::Kvm)?;
        }
        let devices = self.make_devices(&kvm, &memory, Some(&state.console), resources)?;
        self.check_devices(&state, devices.transports.len())
            .map_err(BuildError::Snapshot)?;
        for (transport, saved) in devices.transports.iter().zip(&state.devices) {
            transport
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .restore(saved)
                .map_err(BuildError::Device)?;
        }
        devices
            .generation_event
            .write(1)
            .map_err(host("announce the new VM generation id"))?;
        kvm.restore_clock(&state.vm).map_err(BuildError::Kvm)?;
        let chassis = Chassis {
            kvm,
            memory,
            devices,
            cpuid,
            has_hotplug_slot,
        };
        Ok((chassis, vcpus))
    }

    fn check_shape(&self, state: &MachineState) -> Result<(), SnapshotError> {
        let config = self.config;
        let check = |what, saved: u64, wanted: u64, fits: bool| {
            fits.then_some(())
                .ok_or(SnapshotError::Shape { what, saved, wanted })
        };
        let equal = |what, saved: u64, wanted: u64| check(what, saved, wanted, saved == wanted);
        equal(
            "possible vCPUs",
            state.n_possible_vcpus.into(),
            config.n_possible_vcpus.into(),
        )?;
        equal("MiB of memory", state.memory_mib, config.memory_mib)?;
        equal("MiB to be plugged", state.hotplug_mib, config.hotplug_mib)?;
        // vCPUs may be added, none taken away.
        let (n_saved, n_wanted) = (state.vcpus.len() as u64, u64::from(config.n_vcpus));
        check("running vCPUs", n_saved, n_wanted, n_saved <= n_wanted)
    }

    fn check_devices(&self, state: &MachineState, n_devices: usize) -> Result<(), SnapshotError> {
        if state.devices.len() == n_devices {
            return Ok(());
        }
        Err(SnapshotError::Shape {
            what: "virtio devices",
            saved: state.devices.len() as u64,
            wanted: n_devices as u64,
        })
    }
}
