//! What requests are held against: the sizes that exist, and what the operator allows.

use serde::{Deserialize, Serialize};

use super::{size::SizeTable, sysctls};
use crate::config::ConfigError;

/// The rules of one host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules {
    /// Sizes of groups.
    pub sizes: SizeTable,
    /// What is refused elsewhere and allowed here.
    pub allow: Allow,
}

/// What groups may have that they may not have by default. None of it reaches the host: all is inside of the group's own
/// virtual machine, and weakens only what keeps the containers of one group apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Allow {
    /// `privileged`, ECI `SecurityContextPrivileged`: all capabilities, all devices of the guest, no filter of system calls,
    /// nothing of `/proc` and `/sys` hidden or read-only.
    pub privileged: bool,
    /// `hostPath`, ECI `HostPathVolume`: paths of the guest, see [`super::host_path`].
    pub host_path: bool,
    /// `hostNetwork`: the guest's network, which a group's containers have anyway, and the guest's host name.
    pub host_network: bool,
    /// `hostPID`: the guest's processes, its init and its kernel's threads among them.
    pub host_pid: bool,
    /// Sysctls beside the safe ones, as names or with a `*` at the end (kubelet, `allowedUnsafeSysctls`). The kernel is the
    /// group's own, so names that belong to no namespace may be among them: `net.*`, `vm.max_map_count`.
    pub unsafe_sysctls: Vec<String>,
}

impl Allow {
    /// Whether all of it makes sense.
    ///
    /// # Errors
    /// The first field that does not.
    pub fn check(&self) -> Result<(), ConfigError> {
        match self
            .unsafe_sysctls
            .iter()
            .find(|pattern| !sysctls::is_pattern(pattern))
        {
            Some(pattern) => Err(ConfigError::Field {
                field: "allow.unsafe_sysctls",
                value: pattern.clone(),
                valid: "give names such as net.core.somaxconn, or beginnings of names such as net.*",
            }),
            None => Ok(()),
        }
    }
}
