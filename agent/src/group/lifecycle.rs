//! How a container lives in its group: its turn, its probes and hooks. Plain data, no I/O.

mod check;

use serde::{Deserialize, Serialize};

pub(super) use self::check::check;
use super::spec::RestartPolicy;

/// Where a container leaves its last message unless it says so.
pub const TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lifecycle {
    /// Its part.
    pub role: Role,
    /// Until it has passed once, the others rest.
    pub startup: Option<Probe>,
    /// Failing it ends the container.
    pub liveness: Option<Probe>,
    /// The container is ready while it passes.
    pub readiness: Option<Probe>,
    /// Runs beside the container at its start.
    pub post_start: Option<Handler>,
    /// Runs before the container is told to end.
    pub pre_stop: Option<Handler>,
    /// Where it leaves its last message.
    pub termination_message_path: String,
    /// Without a message of its own, the end of the log of a container that ended badly is it.
    pub falls_back_to_logs: bool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            role: Role::default(),
            startup: None,
            liveness: None,
            readiness: None,
            post_start: None,
            pre_stop: None,
            termination_message_path: TERMINATION_MESSAGE_PATH.to_owned(),
            falls_back_to_logs: false,
        }
    }
}

impl Lifecycle {
    /// The guest has something to tell about it while it runs.
    pub fn is_followed(&self) -> bool {
        self.startup.is_some()
            || self.liveness.is_some()
            || self.readiness.is_some()
            || self.post_start.is_some()
            || self.pre_stop.is_some()
    }

    /// It has started as soon as it runs.
    pub fn starts_at_once(&self) -> bool {
        self.startup.is_none() && self.post_start.is_none()
    }
}

/// A probe. Times are seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What is done.
    pub handler: Handler,
    /// After the container's start.
    pub initial_delay_seconds: u32,
    /// From one to the next, 1 or more.
    pub period_seconds: u32,
    /// For each, 1 or more.
    pub timeout_seconds: u32,
    /// So many in a row, to pass after it failed; 1 or more.
    pub success_threshold: u32,
    /// So many in a row, to fail after it passed; 1 or more.
    pub failure_threshold: u32,
    /// Instead of the group's, when failing it ends the container; 1 or more.
    pub grace_seconds: Option<u64>,
}

/// What a probe or hook does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Handler {
    /// A command in the container.
    Exec {
        /// Program and arguments.
        command: Vec<String>,
    },
    /// An HTTP request.
    HttpGet {
        /// By TLS, with a server whose certificate is not verified.
        #[serde(default)]
        is_https: bool,
        /// An IP address instead of the group's own.
        host: Option<String>,
        /// Port.
        port: u16,
        /// Path and query.
        path: String,
        /// Further fields.
        headers: Vec<(String, String)>,
    },
    /// A connection.
    TcpSocket {
        /// An IP address instead of the group's own.
        host: Option<String>,
        /// Port.
        port: u16,
    },
    /// A call of `grpc.health.v1.Health/Check`.
    Grpc {
        /// Port.
        port: u16,
        /// Which service; empty: the server itself.
        service: String,
    },
    /// Nothing, for a while.
    Sleep {
        /// How long.
        seconds: u32,
    },
}
