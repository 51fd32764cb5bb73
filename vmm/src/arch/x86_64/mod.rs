//! x86-64: the address space, CPUID, registers, ACPI tables, and booting an ELF kernel through its PVH entry.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod regs;
