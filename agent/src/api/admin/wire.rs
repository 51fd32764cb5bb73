//! What the local socket speaks besides the engine's own types: JSON, one object a line where it is a stream.

use serde::{Deserialize, Serialize};

use crate::{
    engine::PullStatus,
    error::{Error, ErrorKind},
    group::{spec::ImagePullPolicy, status::GroupId},
};

/// Reply to a creation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// The group's id.
    pub id: GroupId,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
}

/// Reply to an update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Updated {
    /// The group's id.
    pub id: GroupId,
    /// It was something else before.
    pub changed: bool,
}

/// Groups that go on from a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clones {
    /// The groups, which start now.
    pub groups: Vec<Created>,
    /// With a fork: how long the parent's containers stood still, microseconds.
    pub pause_us: Option<u64>,
}

/// Reply to every request that fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind, as in `ErrorKind`.
    pub kind: String,
    /// For the user; one line for each mistake of a request.
    pub message: String,
}

impl Failure {
    /// What a user is told of an engine error: causes too, this door is root's.
    pub fn of(error: &Error) -> Self {
        Self {
            kind: format!("{:?}", error.kind),
            message: error.chain(),
        }
    }

    /// Whether it says that something does not exist.
    pub fn is_not_found(&self) -> bool {
        self.kind == format!("{:?}", ErrorKind::NotFound)
    }
}

/// A wish to pull an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pull {
    /// Image reference.
    pub reference: String,
    /// When to ask the registry.
    #[serde(default = "always")]
    pub policy: ImagePullPolicy,
    /// Login.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login: Option<Login>,
}

fn always() -> ImagePullPolicy {
    ImagePullPolicy::Always
}

/// A registry login.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// User.
    pub username: String,
    /// Password.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Login")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// One line of a pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullLine {
    /// Progress.
    Status(PullStatus),
    /// It failed; the last line.
    Failure(Failure),
}

/// Reply to a version request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Of the agent.
    pub version: String,
}
