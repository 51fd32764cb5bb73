//! How a container lives in its group: its turn, its probes and hooks. Plain data, no I/O.

use serde::{Deserialize, Serialize};

use super::spec::RestartPolicy;

/// The part of a container in the life of its group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Does the group's work: the group ends with the last of them.
    #[default]
    App,
    /// Runs to its end, one after the other, before all others.
    Init,
    /// An init container that is restarted always: the next one begins when it has started, and it ends after the others.
    Sidecar,
}

impl Role {
    /// Started in order, before the group's work begins.
    pub fn takes_turns(self) -> bool {
        self != Self::App
    }

    /// What happens when such a container of a group with this policy ends.
    pub fn restart_policy(self, of_group: RestartPolicy) -> RestartPolicy {
        match (self, of_group) {
            (Self::App, policy) => policy,
            (Self::Sidecar, _) => RestartPolicy::Always,
            (Self::Init, RestartPolicy::Never) => RestartPolicy::Never,
            (Self::Init, _) => RestartPolicy::OnFailure,
        }
    }
}

/// How a container lives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lifecycle {
    /// Its part.
    pub role: Role,
}
