//! The conditions of a group, as Kubernetes names them, and since when each is as it is. Pure.

use serde::{Deserialize, Serialize};

use super::{
    lifecycle::Role,
    spec::{ContainerSpec, GroupSpec},
    status::{ContainerState, ContainerStatus, GroupStatus, Phase},
};

/// What may hold of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionKind {
    /// It has its place on this host.
    PodScheduled,
    /// Its sandbox runs, or has run to the end.
    PodReadyToStartContainers,
    /// Init containers and sidecars have had their turn.
    Initialized,
    /// All containers are ready.
    ContainersReady,
    /// The group serves.
    Ready,
}

impl ConditionKind {
    /// Its name in Kubernetes and ECI.
    pub fn name(self) -> &'static str {
        match self {
            Self::PodScheduled => "PodScheduled",
            Self::PodReadyToStartContainers => "PodReadyToStartContainers",
            Self::Initialized => "Initialized",
            Self::ContainersReady => "ContainersReady",
            Self::Ready => "Ready",
        }
    }
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Which.
    pub kind: ConditionKind,
    /// Whether it holds.
    pub holds: bool,
    /// Why not, in one word; empty when it holds.
    pub reason: String,
    /// Why not, for the user.
    pub message: String,
    /// Since when it holds, or does not; Unix milliseconds.
    pub since_ms: u64,
}

/// Brings the conditions up to date with the rest of the status.
pub fn update(status: &mut GroupStatus, spec: &GroupSpec, now_ms: u64) {
    let ready = ready(status, spec);
    let wanted = [
        (
            ConditionKind::PodScheduled,
            status.phase != Phase::Scheduling,
            none(),
        ),
        (
            ConditionKind::PodReadyToStartContainers,
            status.started_at_ms.is_some(),
            none(),
        ),
        (
            ConditionKind::Initialized,
            status.initialized,
            uninitialized(status, spec),
        ),
        (ConditionKind::ContainersReady, ready, unready(status, spec)),
        (ConditionKind::Ready, ready, unready(status, spec)),
    ];
    let before = std::mem::take(&mut status.conditions);
    status.conditions = wanted
        .into_iter()
        .map(|(kind, holds, (reason, message))| {
            let same = before
                .iter()
                .find(|condition| condition.kind == kind && condition.holds == holds);
            Condition {
                kind,
                holds,
                reason: if holds { String::new() } else { reason.to_owned() },
                message: if holds { String::new() } else { message },
                since_ms: same.map_or(now_ms, |condition| condition.since_ms),
            }
        })
        .collect();
}

fn none() -> (&'static str, String) {
    ("", String::new())
}

fn pairs<'a>(
    status: &'a GroupStatus,
    spec: &'a GroupSpec,
) -> impl Iterator<Item = (&'a ContainerSpec, &'a ContainerStatus)> {
    spec.containers.iter().zip(&status.containers)
}

fn ready(status: &GroupStatus, spec: &GroupSpec) -> bool {
    let serves = |(spec, status): (&ContainerSpec, &ContainerStatus)| {
        spec.lifecycle.role == Role::Init || status.ready
    };
    status.phase == Phase::Running && pairs(status, spec).all(serves)
}

fn unready(status: &GroupStatus, spec: &GroupSpec) -> (&'static str, String) {
    match status.phase {
        Phase::Succeeded => ("PodCompleted", String::new()),
        Phase::Failed => ("PodFailed", status.message.clone()),
        _ => {
            let names = pairs(status, spec)
                .filter(|(spec, status)| spec.lifecycle.role != Role::Init && !status.ready)
                .map(|(spec, _)| spec.name.as_str());
            let names: Vec<_> = names.collect();
            (
                "ContainersNotReady",
                format!("containers with unready status: [{}]", names.join(" ")),
            )
        }
    }
}

fn uninitialized(status: &GroupStatus, spec: &GroupSpec) -> (&'static str, String) {
    let complete = |spec: &ContainerSpec, status: &ContainerStatus| match spec.lifecycle.role {
        Role::App => true,
        Role::Init => matches!(status.state, ContainerState::Terminated { exit_code: 0, .. }),
        Role::Sidecar => status.started,
    };
    let names: Vec<_> = pairs(status, spec)
        .filter(|(spec, status)| !complete(spec, status))
        .map(|(spec, _)| spec.name.as_str())
        .collect();
    (
        "ContainersNotInitialized",
        format!("containers with incomplete status: [{}]", names.join(" ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{spec::testing, view};

    fn holds(status: &GroupStatus, kind: ConditionKind) -> (bool, u64) {
        let condition = status.conditions.iter().find(|condition| condition.kind == kind);
        condition
            .map(|condition| (condition.holds, condition.since_ms))
            .unwrap()
    }

    #[test]
    fn times_change_with_the_condition_only() {
        let mut spec = testing::group("g", 2);
        spec.containers[1].lifecycle.role = Role::Init;
        let mut status = GroupStatus::new(&spec, 1);
        update(&mut status, &spec, 5);
        assert_eq!(holds(&status, ConditionKind::PodScheduled), (false, 5));
        assert_eq!(holds(&status, ConditionKind::Initialized), (false, 5));
        let initialized = &status.conditions[2];
        assert_eq!(initialized.message, "containers with incomplete status: [c1]");
        status.phase = Phase::Running;
        status.initialized = true;
        view::running(&mut status.containers[0], &spec.containers[0], 6);
        update(&mut status, &spec, 7);
        update(&mut status, &spec, 8);
        // The init container need not be ready.
        assert_eq!(holds(&status, ConditionKind::Ready), (true, 7));
        assert_eq!(holds(&status, ConditionKind::Initialized), (true, 7));
        status.containers[0].ready = false;
        update(&mut status, &spec, 9);
        assert_eq!(holds(&status, ConditionKind::ContainersReady), (false, 9));
        assert_eq!(
            status.conditions[4].message,
            "containers with unready status: [c0]"
        );
        assert_eq!(holds(&status, ConditionKind::Initialized), (true, 7));
    }
}
