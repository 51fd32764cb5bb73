//! Admission: what the host has against what groups were promised. Pure.

use crate::{
    config::{CapacityConfig, SandboxConfig},
    error::{Error, ErrorKind, Result},
    group::spec::Size,
};

const MIB: u64 = 1 << 20;

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostCapacity {
    /// CPUs.
    pub n_cpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
}

/// What a group of this size takes of the host.
pub fn footprint(size: Size, sandbox: &SandboxConfig) -> Size {
    let overhead_mib = u64::from(sandbox.guest_overhead_mib) + u64::from(sandbox.host_overhead_mib);
    Size {
        cpu_milli: size.cpu_milli,
        memory_bytes: size.memory_bytes.saturating_add(overhead_mib * MIB),
    }
}

/// Says whether one more group fits beside the given ones.
///
/// # Errors
/// `ResourceExhausted` with what is asked, free and in all.
pub fn admit(
    host: HostCapacity,
    capacity: &CapacityConfig,
    sandbox: &SandboxConfig,
    running: &[Size],
    wanted: Size,
) -> Result<()> {
    let exhausted = |message: String| Err(Error::new(ErrorKind::ResourceExhausted, message));
    if running.len() >= capacity.max_groups {
        return exhausted(format!(
            "this host has {} container groups, its limit is {} (capacity.max_groups)",
            running.len(),
            capacity.max_groups
        ));
    }
    let wanted = footprint(wanted, sandbox);
    let used: Vec<Size> = running.iter().map(|size| footprint(*size, sandbox)).collect();
    let memory = overcommitted(
        host.memory_bytes
            .saturating_sub(capacity.reserved_memory_mib.saturating_mul(MIB)),
        capacity.memory_overcommit,
    );
    let memory_used: u64 = used
        .iter()
        .fold(0, |sum, size| sum.saturating_add(size.memory_bytes));
    let memory_free = memory.saturating_sub(memory_used);
    if wanted.memory_bytes > memory_free {
        return exhausted(format!(
            "the group needs {} MiB of memory (overhead included), {} of {} MiB are free on this host",
            wanted.memory_bytes.div_ceil(MIB),
            memory_free / MIB,
            memory / MIB
        ));
    }
    let cpu = f64::from(host.n_cpus) * 1000.0 * capacity.cpu_overcommit;
    let cpu_used: f64 = used.iter().map(|size| f64::from(size.cpu_milli)).sum();
    if cpu_used + f64::from(wanted.cpu_milli) > cpu {
        return exhausted(format!(
            "the group needs {:.2} vCPU, {:.2} of {:.2} are free on this host ({} CPUs, overcommitted {} times: \
             capacity.cpu_overcommit)",
            f64::from(wanted.cpu_milli) / 1000.0,
            (cpu - cpu_used).max(0.0) / 1000.0,
            cpu / 1000.0,
            host.n_cpus,
            capacity.cpu_overcommit
        ));
    }
    Ok(())
}

/// What may be promised of so many bytes.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "memory is far below 2^52 bytes, and the cast of a float saturates"
)]
fn overcommitted(bytes: u64, factor: f64) -> u64 {
    (bytes as f64 * factor) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostCapacity = HostCapacity {
        n_cpus: 2,
        memory_bytes: 4096 * MIB,
    };

    fn size(cpu_milli: u32, mib: u64) -> Size {
        Size {
            cpu_milli,
            memory_bytes: mib * MIB,
        }
    }

    fn check(running: &[Size], wanted: Size) -> Result<()> {
        let capacity = CapacityConfig {
            cpu_overcommit: 2.0,
            memory_overcommit: 1.0,
            reserved_memory_mib: 96,
            max_groups: 3,
        };
        let sandbox = SandboxConfig {
            guest_overhead_mib: 50,
            host_overhead_mib: 50,
            ..SandboxConfig::default()
        };
        admit(HOST, &capacity, &sandbox, running, wanted)
    }

    #[test]
    fn exact_fits_are_admitted_and_one_more_is_not() {
        assert!(check(&[], size(4000, 3900)).is_ok());
        assert!(
            check(&[], size(4001, 100))
                .unwrap_err()
                .message
                .contains("4.00 vCPU")
        );
        let error = check(&[size(1000, 1900)], size(1000, 1901)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::ResourceExhausted);
        assert!(
            error.message.contains("2001 MiB") && error.message.contains("2000 of 4000"),
            "{error}"
        );
        assert!(
            check(&[size(1, 1); 3], size(1, 1))
                .unwrap_err()
                .message
                .contains("max_groups")
        );
    }

    #[test]
    fn memory_is_oversold_only_as_configured() {
        let check = |memory_overcommit| {
            let capacity = CapacityConfig {
                memory_overcommit,
                reserved_memory_mib: 96,
                ..CapacityConfig::default()
            };
            admit(HOST, &capacity, &SandboxConfig::default(), &[], size(1000, 5000))
        };
        assert!(check(1.0).unwrap_err().message.contains("of 4000 MiB"));
        assert!(check(1.5).is_ok());
    }

    #[test]
    fn absurd_sizes_do_not_overflow() {
        let huge = Size {
            cpu_milli: u32::MAX,
            memory_bytes: u64::MAX,
        };
        assert!(check(&[huge, huge], huge).is_err());
    }
}
