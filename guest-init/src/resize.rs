//! A sandbox that becomes larger or smaller while its containers run. Memory is plugged and unplugged by the kernel, which the
//! machine tells; here are the CPUs, and the limit of a sandbox that is to have less memory than its machine.

use crate::{error::Result, identity::cpus, sandbox::Sandbox, stats};

/// What there is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resized {
    /// CPUs that are online.
    pub n_vcpus: u32,
    /// All memory of the guest.
    pub memory_total_bytes: u64,
}

/// Has so many CPUs online, and limits the memory of all containers together, or not. Blocks.
///
/// # Errors
/// `InvalidArgument` when the machine has fewer CPUs; `FailedPrecondition` when the containers use more than the limit.
pub fn sandbox(sandbox: &Sandbox, n_vcpus: u32, memory_limit_bytes: Option<u64>) -> Result<Resized> {
    // There is nothing to be resized before.
    sandbox.containers()?;
    let n_vcpus = cpus::set_online(n_vcpus)?;
    let limit = memory_limit_bytes.map_or_else(|| "max".to_owned(), |bytes| bytes.to_string());
    sandbox.containers_cgroup().limit_memory(&limit)?;
    Ok(Resized {
        n_vcpus,
        memory_total_bytes: stats::sandbox(&sandbox.scratch())?.memory_total_bytes,
    })
}
