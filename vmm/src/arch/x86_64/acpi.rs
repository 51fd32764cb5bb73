//! The least of ACPI that Linux needs (ACPI 6.5, hardware-reduced): processors and interrupt controller (MADT), power
//! off and reset (FADT), devices (DSDT): serial port, virtio, VM generation id with the event device that announces a
//! new one, and the panic port.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::irq::Gsi;
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"ECIVMM";
const OEM_TABLE_ID: [u8; 8] = *b"ECIMICRO";
const OEM_REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH`: no VGA, no CMOS clock; and by its other bits no keyboard controller, so Linux probes none.
const BOOT_ARCH_NO_VGA_NO_RTC: u16 = (1 << 2) | (1 << 5);

/// Where one virtio device answers.
#[derive(Debug, Clone, Copy)]
pub struct VirtioMmio {
    /// First register.
    pub base: u64,
    /// Length of the registers.
    pub length: u64,
    /// Its interrupt.
    pub gsi: Gsi,
}

/// Why the tables were not written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// Too many devices for the space.
    #[error("The ACPI tables of {length} bytes do not fit below 1 MiB")]
    TooLarge {
        /// Their length.
        length: usize,
    },
    /// Guest memory does not hold them.
    #[error("Failed to write the ACPI tables into guest memory")]
    Write {
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Writes all tables to [`layout::ACPI_TABLES`], and the generation id.
///
/// # Errors
/// [`AcpiError`].
pub fn write(
    memory: &GuestMemory,
    n_vcpus: u32,
    devices: &[VirtioMmio],
    generation_id: [u8; 16],
) -> Result<(), AcpiError> {
    let tables = tables(n_vcpus, devices);
    let room = layout::HIGH_RAM_START.0 - layout::ACPI_TABLES.0;
    if tables.len() as u64 > room {
        return Err(AcpiError::TooLarge { length: tables.len() });
    }
    let write = |bytes: &[u8], address| {
        memory
            .write_slice(bytes, address)
            .map_err(|source| AcpiError::Write { source })
    };
    write(&tables, layout::ACPI_TABLES)?;
    write(&generation_id, layout::VM_GENERATION_ID)
}

/// All tables, as they stand from [`layout::ACPI_TABLES`] on: the RSDP, then the others at multiples of 16.
fn tables(n_vcpus: u32, devices: &[VirtioMmio]) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut append = |table: &dyn Aml| {
        let address = layout::ACPI_TABLES.0 + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes);
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = append(&dsdt(devices));
    let fadt = append(&fadt(dsdt));
    let madt = append(&madt(n_vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&xsdt);
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address.into(),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA_NO_RTC.into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_PORT + 1);
    fadt.finalize()
}

fn madt(n_vcpus: u32) -> MADT {
    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    for vcpu in 0..n_vcpus {
        let id = u8::try_from(vcpu).expect("the configuration allows at most 64 vCPUs");
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt
}

fn dsdt(devices: &[VirtioMmio]) -> Sdt {
    let mut aml = Vec::new();
    // Ports and lengths are small; each device is `Device (name) { _HID, _UID, _CRS, ... }`.
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                    &interrupt(layout::SERIAL_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    for (index, device) in devices.iter().enumerate() {
        append_virtio(&mut aml, index, device);
    }
    append_generation_id(&mut aml, layout::VM_GENERATION_ID);
    aml::Device::new(
        "_SB_.PEVT".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            // Present, enabled, shown, working.
            &aml::Name::new("_STA".into(), &0xf_u8),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::IO::new(
                    layout::PANIC_PORT,
                    layout::PANIC_PORT,
                    1,
                    1,
                )]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&layout::SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// An edge-triggered, active-high interrupt of this device alone.
fn interrupt(gsi: Gsi) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi.0)
}

fn append_virtio(aml: &mut Vec<u8>, index: usize, device: &VirtioMmio) {
    let base = u32::try_from(device.base).expect("the device window is below 4 GiB");
    let length = u32::try_from(device.length).expect("the device window is below 4 GiB");
    aml::Device::new(
        format!("_SB_.V{index:03}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            // Cache coherent.
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, base, length),
                    &interrupt(device.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The generation id (Microsoft, "Virtual Machine Generation ID"), and the generic event device (ACPI 6.5, 5.6.9)
/// whose only interrupt says that it changed.
fn append_generation_id(aml: &mut Vec<u8>, address: GuestAddress) {
    let low = u32::try_from(address.0).expect("the generation id is below 1 MiB");
    aml::Device::new(
        "_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMGENCTR"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &aml::ZERO])),
        ],
    )
    .to_aml_bytes(aml);
    aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&interrupt(layout::EVENT_DEVICE_GSI)]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::Notify::new(&aml::Path::new("\\_SB_.VGEN"), &0x80_u8)],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(n: u32) -> Vec<VirtioMmio> {
        (0..n)
            .map(|index| VirtioMmio {
                base: layout::VIRTIO_MMIO_START + u64::from(index) * 0x1000,
                length: 0x1000,
                gsi: Gsi(16 + index),
            })
            .collect()
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The table at a guest address, checked: signature, length, checksum.
    fn table<'t>(bytes: &'t [u8], address: u64, signature: &[u8; 4]) -> &'t [u8] {
        let start = usize::try_from(address - layout::ACPI_TABLES.0).unwrap();
        let length = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap());
        let table = &bytes[start..start + usize::try_from(length).unwrap()];
        assert_eq!(&table[..4], signature);
        assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        table
    }

    #[test]
    fn tables_are_found_from_the_rsdp_and_their_checksums_hold() {
        let bytes = tables(64, &devices(8));
        assert_eq!(&bytes[..8], b"RSD PTR ");
        let xsdt = table(&bytes, u64_at(&bytes, 24), b"XSDT");
        let fadt = table(&bytes, u64_at(xsdt, 36), b"FACP");
        table(&bytes, u64_at(fadt, 140), b"DSDT");
        let madt = table(&bytes, u64_at(xsdt, 44), b"APIC");
        assert_eq!(madt.len(), 44 + 12 + 64 * 8);
    }

    #[test]
    fn the_largest_machine_fits() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&memory, 64, &devices(8), [9; 16]).unwrap();
        let mut id = [0; 16];
        memory.read_slice(&mut id, layout::VM_GENERATION_ID).unwrap();
        assert_eq!(id, [9; 16]);
    }
}
