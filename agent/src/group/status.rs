//! What is seen of a container group. Plain data, no I/O. Times are Unix milliseconds.

use serde::{Deserialize, Serialize};

use super::{conditions::Condition, spec::GroupSpec, view};
use crate::network::Addresses;

/// Identifier of a container group: `eci-` and 20 lower-case letters and digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupId(String);

impl GroupId {
    /// Parses an id.
    pub fn parse(text: &str) -> Option<Self> {
        let tail = text.strip_prefix("eci-")?;
        let valid = tail.len() == 20 && tail.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        valid.then(|| Self(text.to_owned()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for GroupId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A group: wanted and seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Identifier.
    pub id: GroupId,
    /// What is wanted.
    pub spec: GroupSpec,
    /// What is seen.
    pub status: GroupStatus,
}

/// What is seen of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Where it is in its life.
    pub phase: Phase,
    /// Why, where that is not plain (`ImagePullFailed`, `SandboxDied`...), empty otherwise.
    pub reason: String,
    /// One sentence for the user.
    pub message: String,
    /// When it was accepted.
    pub created_at_ms: u64,
    /// When its sandbox ran.
    pub started_at_ms: Option<u64>,
    /// When it reached `Succeeded` or `Failed`.
    pub finished_at_ms: Option<u64>,
    /// IPv4 address of the group.
    pub ip: Option<String>,
    /// IPv6 address of the group.
    #[serde(default)]
    pub ip6: Option<String>,
    /// Init containers and sidecars have had their turn.
    #[serde(default)]
    pub initialized: bool,
    /// What holds, and since when.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// One per container of the spec, same order.
    pub containers: Vec<ContainerStatus>,
    /// The last 50.
    pub events: Vec<Event>,
}

impl GroupStatus {
    /// Says which addresses it has.
    pub fn show_addresses(&mut self, addresses: Option<Addresses>) {
        self.ip = addresses.map(|addresses| addresses.v4.to_string());
        self.ip6 = addresses.and_then(|addresses| Some(addresses.v6?.to_string()));
    }

    /// Its addresses, the IPv4 one first.
    pub fn ips(&self) -> impl Iterator<Item = &str> {
        self.ip.iter().chain(&self.ip6).map(String::as_str)
    }

    /// A group just accepted.
    pub fn new(spec: &GroupSpec, created_at_ms: u64) -> Self {
        let reason = view::first_wait(spec);
        let container = |name: &String| ContainerStatus {
            name: name.clone(),
            state: ContainerState::Waiting {
                reason: reason.to_owned(),
                message: String::new(),
            },
            previous: None,
            restart_count: 0,
            started: false,
            ready: false,
            image_digest: None,
            container_id: None,
        };
        Self {
            phase: Phase::Scheduling,
            reason: String::new(),
            message: String::new(),
            created_at_ms,
            started_at_ms: None,
            finished_at_ms: None,
            ip: None,
            ip6: None,
            initialized: false,
            conditions: Vec::new(),
            containers: spec.containers.iter().map(|spec| container(&spec.name)).collect(),
            events: Vec::new(),
        }
    }
}

/// Where a group is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Accepted, nothing started.
    Scheduling,
    /// Images are pulled, the sandbox starts.
    Pending,
    /// At least one container runs or will be restarted.
    Running,
    /// All containers ended with 0 and none is restarted.
    Succeeded,
    /// All containers ended, one at least badly, and none is restarted; or the group could not be started, or its time is
    /// over.
    Failed,
    /// All containers are ended, to begin anew.
    Restarting,
    /// What an update of the group changes is ended, to begin anew.
    Updating,
    /// Being deleted.
    Terminating,
}

/// What is seen of a container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Name in the spec.
    pub name: String,
    /// Now.
    pub state: ContainerState,
    /// Before the last restart.
    pub previous: Option<ContainerState>,
    /// Number of restarts.
    pub restart_count: u32,
    /// It runs, and its startup probe has passed, if it has one.
    #[serde(default)]
    pub started: bool,
    /// Passed its probes (without probes: it runs); an init container: ended well.
    pub ready: bool,
    /// Digest of the image it runs, `sha256:...`.
    pub image_digest: Option<String>,
    /// Identifier of this run in the sandbox.
    pub container_id: Option<String>,
}

/// State of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Not running yet or waiting for a restart.
    Waiting {
        /// `ContainerCreating`, `ImagePullBackOff`, `CrashLoopBackOff`, ...
        reason: String,
        /// For the user.
        message: String,
    },
    /// Runs.
    Running {
        /// Since.
        started_at_ms: u64,
    },
    /// Ended.
    Terminated {
        /// Exit code, or 128 + signal.
        exit_code: i32,
        /// Signal, where one ended it.
        signal: Option<i32>,
        /// `Completed`, `Error`, `OOMKilled`, `SandboxDied`, `StartError`.
        reason: String,
        /// For the user.
        message: String,
        /// Start.
        started_at_ms: u64,
        /// End.
        finished_at_ms: u64,
    },
}

/// Something that happened to a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// `Normal` or `Warning`.
    pub kind: EventKind,
    /// `Pulling`, `Pulled`, `Created`, `Started`, `Killing`, `BackOff`, `Failed`...
    pub reason: String,
    /// For the user.
    pub message: String,
    /// Container it is about, if any.
    pub container: Option<String>,
    /// How often.
    pub count: u32,
    /// First time.
    pub first_ms: u64,
    /// Last time.
    pub last_ms: u64,
}

/// Severity of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// Expected.
    Normal,
    /// Worth a look.
    Warning,
}
