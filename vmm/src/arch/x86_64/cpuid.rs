//! What the guest sees of its CPUs: KVM's supported CPUID, less what a guest must not have, with our topology: one
//! socket, a core per vCPU, no hyperthreads. APIC ids are vCPU numbers.
//!
//! Leaf numbers and bits: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const FEATURES: u32 = 0x1;
const INTEL_CACHES: u32 = 0x4;
const PERFORMANCE_COUNTERS: u32 = 0xa;
const EXTENDED_TOPOLOGY: u32 = 0xb;
const EXTENDED_TOPOLOGY_V2: u32 = 0x1f;
const KVM_SIGNATURE: u32 = 0x4000_0000;
/// TSC and APIC timer frequency; a VMware invention that other hypervisors took over.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_CORES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_EXTENDED_TOPOLOGY: u32 = 0x8000_0026;

const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const AMD_ECX_SVM: u32 = 1 << 2;

/// The frequency that KVM gives the local APIC timer (its bus runs at 1 ns).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What all vCPUs of a VM have in common.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// vCPUs.
    pub n_vcpus: u32,
    /// KVM's local APIC has the TSC deadline timer.
    pub tsc_deadline: bool,
    /// TSC frequency; 0 when KVM does not tell.
    pub tsc_khz: u32,
}

/// Makes the CPUID of vCPU 0 from what KVM supports; [`set_vcpu`] then makes another's from it.
#[must_use]
pub fn build(supported: &[kvm_cpuid_entry2], topology: Topology) -> Vec<kvm_cpuid_entry2> {
    let Topology {
        n_vcpus,
        tsc_deadline,
        tsc_khz,
    } = topology;
    let mut entries = Vec::with_capacity(supported.len() + 4);
    for entry in supported {
        let mut entry = *entry;
        match entry.function {
            // Made below.
            EXTENDED_TOPOLOGY | HYPERVISOR_TIMING => continue,
            // Newer forms of what is said elsewhere.
            EXTENDED_TOPOLOGY_V2 | AMD_EXTENDED_TOPOLOGY => continue,
            FEATURES => {
                entry.ecx = (entry.ecx | ECX_HYPERVISOR) & !ECX_VMX;
                if tsc_deadline {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
                // Bits 23 to 16: addressable ids in the socket.
                entry.ebx = (entry.ebx & 0x0000_ffff) | (n_vcpus.next_power_of_two() << 16);
                entry.edx = if n_vcpus > 1 {
                    entry.edx | EDX_HTT
                } else {
                    entry.edx & !EDX_HTT
                };
            }
            INTEL_CACHES if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 {
                    n_vcpus.next_power_of_two() - 1
                } else {
                    0
                };
                entry.eax =
                    (entry.eax & 0x3fff) | (sharing << 14) | ((n_vcpus.next_power_of_two() - 1) << 26);
            }
            // The VM has none.
            PERFORMANCE_COUNTERS => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            KVM_SIGNATURE if tsc_khz != 0 => entry.eax = HYPERVISOR_TIMING,
            AMD_FEATURES => entry.ecx &= !AMD_ECX_SVM,
            AMD_CORES => {
                entry.ecx = (n_vcpus - 1) | (n_vcpus.next_power_of_two().trailing_zeros() << 12);
            }
            AMD_CACHES if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { n_vcpus - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
            }
            _ => {}
        }
        entries.push(entry);
    }
    // Subleaf 0: threads of a core (one); 1: cores of the socket. ECX holds the subleaf and the level's type.
    let core_bits = n_vcpus.next_power_of_two().trailing_zeros();
    for (index, shift, n_logical, kind) in [(0, 0, 1, 1 << 8), (1, core_bits, n_vcpus, 2 << 8)] {
        entries.push(kvm_cpuid_entry2 {
            function: EXTENDED_TOPOLOGY,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: n_logical,
            ecx: index | kind,
            ..Default::default()
        });
    }
    if tsc_khz != 0 {
        let timing = kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        };
        entries.push(timing);
    }
    set_vcpu(&mut entries, 0);
    entries
}

/// Writes a vCPU's number wherever CPUID has it.
pub fn set_vcpu(entries: &mut [kvm_cpuid_entry2], vcpu: u32) {
    for entry in entries {
        match entry.function {
            FEATURES => entry.ebx = (entry.ebx & 0x00ff_ffff) | (vcpu << 24),
            EXTENDED_TOPOLOGY => entry.edx = vcpu,
            // Extended APIC id; core id with one thread each; one node.
            AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (vcpu, vcpu & 0xff, 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let found: Vec<_> = entries
            .iter()
            .filter(|e| e.function == function && e.index == index)
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        [found[0].eax, found[0].ebx, found[0].ecx, found[0].edx]
    }

    const SUPPORTED: [(u32, [u32; 4]); 8] = [
        (FEATURES, [0x6f1, 0xff20_0800, !ECX_TSC_DEADLINE, 0x0fff_ffff]),
        (INTEL_CACHES, [0xffff_c163, 7, 7, 7]),
        (PERFORMANCE_COUNTERS, [0x0730_0802, 1, 2, 3]),
        (EXTENDED_TOPOLOGY, [0, 0, 0, 9]),
        (EXTENDED_TOPOLOGY_V2, [0, 0, 0, 9]),
        (KVM_SIGNATURE, [0x4000_0001, 1, 2, 3]),
        (AMD_FEATURES, [0, 0, 0xff, 0]),
        (AMD_TOPOLOGY, [9, 9, 9, 0]),
    ];

    fn built(n_vcpus: u32, tsc_khz: u32) -> Vec<kvm_cpuid_entry2> {
        let supported: Vec<_> = SUPPORTED
            .iter()
            .map(|(function, registers)| entry(*function, 0, *registers))
            .collect();
        build(
            &supported,
            Topology {
                n_vcpus,
                tsc_deadline: true,
                tsc_khz,
            },
        )
    }

    #[test]
    fn nested_virtualisation_and_counters_are_hidden() {
        let entries = built(1, 0);
        let [_, _, ecx, _] = find(&entries, FEATURES, 0);
        assert_eq!(
            ecx & (ECX_VMX | ECX_HYPERVISOR | ECX_TSC_DEADLINE),
            ECX_HYPERVISOR | ECX_TSC_DEADLINE
        );
        assert_eq!(find(&entries, AMD_FEATURES, 0)[2], 0xff & !AMD_ECX_SVM);
        assert_eq!(find(&entries, PERFORMANCE_COUNTERS, 0), [0; 4]);
    }

    #[test]
    fn topology_is_a_socket_of_single_threaded_cores() {
        let mut entries = built(6, 0);
        set_vcpu(&mut entries, 5);
        let [_, ebx, _, edx] = find(&entries, FEATURES, 0);
        assert_eq!((ebx >> 24, (ebx >> 16) & 0xff, edx & EDX_HTT), (5, 8, EDX_HTT));
        assert_eq!(find(&entries, EXTENDED_TOPOLOGY, 0), [0, 1, 0x100, 5]);
        assert_eq!(find(&entries, EXTENDED_TOPOLOGY, 1), [3, 6, 0x201, 5]);
        assert_eq!(find(&entries, AMD_TOPOLOGY, 0)[..3], [5, 5, 0]);
        // Level 3 cache shared by all, eight ids of cores.
        assert_eq!(find(&entries, INTEL_CACHES, 0)[0], 0x163 | (7 << 14) | (7 << 26));
        assert!(entries.iter().all(|entry| entry.function != EXTENDED_TOPOLOGY_V2));
    }

    #[test]
    fn frequency_is_told_when_known() {
        assert_eq!(
            find(&built(1, 2_500_000), HYPERVISOR_TIMING, 0),
            [2_500_000, APIC_BUS_KHZ, 0, 0]
        );
        assert_eq!(find(&built(1, 2_500_000), KVM_SIGNATURE, 0)[0], HYPERVISOR_TIMING);
        assert_eq!(find(&built(1, 0), KVM_SIGNATURE, 0)[0], 0x4000_0001);
    }
}
