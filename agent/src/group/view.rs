//! How a group's status is told: phases and states, as the kubelet words them. Pure.

use super::{
    conditions,
    lifecycle::Role,
    spec::{ContainerSpec, GroupSpec},
    status::{ContainerState, ContainerStatus, GroupStatus, Phase},
};

/// The sandbox ended by itself.
pub(super) const SANDBOX_DIED: &str = "SandboxDied";
/// The sandbox does not start.
pub(super) const SANDBOX_FAILED: &str = "SandboxStartFailed";
/// The group does not go on from its snapshot.
pub(super) const RESTORE_FAILED: &str = "RestoreFailed";
/// The container is being made.
pub(crate) const CREATING: &str = "ContainerCreating";
/// The container waits for those whose turn is before it.
pub(crate) const INITIALIZING: &str = "PodInitializing";
/// The group's time is over.
pub(super) const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
/// An init container ended badly and is not run again.
pub(super) const INIT_FAILED: &str = "InitContainerFailed";
/// A container's volumes can't be mounted, and are tried again.
pub(super) const MOUNT_FAILED: &str = "FailedMount";
/// An image can't be pulled.
const PULL_FAILED: &str = "ImagePullFailed";
/// A container waits until its image may be asked for again.
pub(super) const PULL_BACK_OFF: &str = "ImagePullBackOff";

/// Why the containers of a group wait at first.
pub(super) fn first_wait(spec: &GroupSpec) -> &'static str {
    if spec
        .containers
        .iter()
        .any(|container| container.lifecycle.role.takes_turns())
    {
        INITIALIZING
    } else {
        CREATING
    }
}

/// The container waits.
pub(super) fn waiting(status: &mut ContainerStatus, reason: &str, message: String) {
    (status.started, status.ready) = (false, false);
    status.state = ContainerState::Waiting {
        reason: reason.to_owned(),
        message,
    };
}

/// Its image is here: a wait for the image is over.
pub(super) fn pulled(status: &mut ContainerStatus, reason: &str) {
    if matches!(status.state, ContainerState::Waiting { .. }) {
        waiting(status, reason, String::new());
    }
}

/// Those before it have had their turn.
pub(super) fn initialized(status: &mut ContainerStatus) {
    if matches!(&status.state, ContainerState::Waiting { reason, .. } if reason == INITIALIZING) {
        waiting(status, CREATING, String::new());
    }
}

/// Why the group fails with an init container.
pub(super) fn init_failure(status: &ContainerStatus) -> String {
    let how = match &status.state {
        ContainerState::Terminated {
            exit_code,
            reason,
            message,
            ..
        } if message.is_empty() => format!("ended with exit code {exit_code} ({reason})"),
        ContainerState::Terminated {
            exit_code,
            reason,
            message,
            ..
        } => format!("ended with exit code {exit_code} ({reason}: {message})"),
        _ => "did not end".to_owned(),
    };
    format!("Init container {} {how}", status.name)
}

/// The container runs.
pub(super) fn running(status: &mut ContainerStatus, spec: &ContainerSpec, started_at_ms: u64) {
    let lifecycle = &spec.lifecycle;
    let started = lifecycle.starts_at_once();
    health(status, spec, started, started && lifecycle.readiness.is_none());
    status.state = ContainerState::Running { started_at_ms };
}

/// How the running container is.
pub(super) fn health(status: &mut ContainerStatus, spec: &ContainerSpec, started: bool, ready: bool) {
    status.started = started;
    // What only runs to its end does not serve.
    status.ready = ready && spec.lifecycle.role != Role::Init;
}

/// The container has ended.
pub(super) fn terminated(
    status: &mut ContainerStatus,
    exit_code: i32,
    signal: Option<i32>,
    reason: &str,
    message: String,
    at_ms: u64,
) {
    let started_at_ms = started_at(status).unwrap_or(at_ms);
    (status.started, status.ready) = (false, false);
    status.state = ContainerState::Terminated {
        exit_code,
        signal,
        reason: reason.to_owned(),
        message,
        started_at_ms,
        finished_at_ms: at_ms,
    };
}

/// Since when the container runs.
pub(super) fn started_at(status: &ContainerStatus) -> Option<u64> {
    match status.state {
        ContainerState::Running { started_at_ms } => Some(started_at_ms),
        _ => None,
    }
}

/// Where a group is as a whole.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Situation {
    pub(super) deleting: bool,
    pub(super) restarting: bool,
    pub(super) updating: bool,
    /// Nothing runs any more, and nothing will.
    pub(super) over: bool,
    /// It has failed, whatever its containers did.
    pub(super) failed: bool,
}

/// Derives phase, reason, message and conditions of the group from its containers.
pub(super) fn settle(status: &mut GroupStatus, spec: &GroupSpec, situation: Situation, now_ms: u64) {
    let phase = phase(status, spec, situation);
    if matches!(phase, Phase::Succeeded | Phase::Failed) {
        status.finished_at_ms.get_or_insert(now_ms);
    }
    status.phase = phase;
    if !situation.failed {
        explain(status, spec);
    }
    conditions::update(status, spec, now_ms);
}

/// The containers that do the group's work.
fn apps<'a>(status: &'a GroupStatus, spec: &'a GroupSpec) -> impl Iterator<Item = &'a ContainerStatus> {
    let pairs = spec.containers.iter().zip(&status.containers);
    pairs
        .filter(|(spec, _)| spec.lifecycle.role == Role::App)
        .map(|(_, status)| status)
}

fn explain(status: &mut GroupStatus, spec: &GroupSpec) {
    let setback = status
        .containers
        .iter()
        .find_map(|container| match &container.state {
            ContainerState::Waiting { reason, message } => match reason.as_str() {
                PULL_BACK_OFF => Some((PULL_FAILED, message.clone())),
                MOUNT_FAILED => Some((MOUNT_FAILED, message.clone())),
                _ => None,
            },
            _ => None,
        });
    match setback {
        Some((reason, message)) => {
            reason.clone_into(&mut status.reason);
            status.message = message;
        }
        None => {
            let all_run =
                apps(status, spec).all(|container| matches!(container.state, ContainerState::Running { .. }));
            if [PULL_FAILED, MOUNT_FAILED].contains(&status.reason.as_str()) || all_run {
                status.reason.clear();
                status.message.clear();
            }
        }
    }
}

fn phase(status: &GroupStatus, spec: &GroupSpec, situation: Situation) -> Phase {
    if situation.deleting {
        return Phase::Terminating;
    }
    if situation.updating && !situation.over {
        return Phase::Updating;
    }
    if situation.restarting {
        return Phase::Restarting;
    }
    if situation.over {
        let well = |container: &ContainerStatus| {
            matches!(container.state, ContainerState::Terminated { exit_code: 0, .. })
        };
        return if !situation.failed && apps(status, spec).all(well) {
            Phase::Succeeded
        } else {
            Phase::Failed
        };
    }
    let never_ran = |container: &ContainerStatus| {
        container.previous.is_none() && matches!(container.state, ContainerState::Waiting { .. })
    };
    if !apps(status, spec).any(never_ran) {
        Phase::Running
    } else if status.events.is_empty() {
        Phase::Scheduling
    } else {
        Phase::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{spec::testing, status::EventKind};

    fn ended(exit_code: i32) -> ContainerState {
        ContainerState::Terminated {
            exit_code,
            signal: None,
            reason: String::new(),
            message: String::new(),
            started_at_ms: 1,
            finished_at_ms: 2,
        }
    }

    const OVER: Situation = Situation {
        over: true,
        deleting: false,
        restarting: false,
        updating: false,
        failed: false,
    };

    #[test]
    fn phases() {
        let mut spec = testing::group("g", 4);
        spec.containers[2].lifecycle.role = Role::Init;
        spec.containers[3].lifecycle.role = Role::Sidecar;
        let mut status = GroupStatus::new(&spec, 1);
        let check = |status: &mut GroupStatus, situation: Situation, expected| {
            settle(status, &spec, situation, 7);
            assert_eq!(status.phase, expected);
        };
        let on = Situation::default();
        check(&mut status, on, Phase::Scheduling);
        let events = &mut status.events;
        super::super::events::push(events, 1, EventKind::Normal, "Pulling", String::new(), None);
        check(&mut status, on, Phase::Pending);
        // The work has not begun before the containers that do it run.
        status.containers[2].state = ended(0);
        running(&mut status.containers[3], &spec.containers[3], 5);
        check(&mut status, on, Phase::Pending);
        running(&mut status.containers[0], &spec.containers[0], 5);
        check(&mut status, on, Phase::Pending);
        running(&mut status.containers[1], &spec.containers[1], 5);
        check(&mut status, on, Phase::Running);
        let restarting = Situation {
            restarting: true,
            ..on
        };
        check(&mut status, restarting, Phase::Restarting);
        let updating = Situation {
            updating: true,
            ..restarting
        };
        check(&mut status, updating, Phase::Updating);
        status.containers[0].state = ended(0);
        status.containers[1].state = ended(0);
        // How a sidecar ended does not count.
        status.containers[3].state = ended(137);
        check(&mut status, OVER, Phase::Succeeded);
        assert_eq!(status.finished_at_ms, Some(7));
        status.containers[1].state = ended(3);
        check(&mut status, OVER, Phase::Failed);
        let deleting = Situation {
            deleting: true,
            ..OVER
        };
        check(&mut status, deleting, Phase::Terminating);
        status.containers[1].state = ended(0);
        check(&mut status, Situation { failed: true, ..OVER }, Phase::Failed);
    }

    #[test]
    fn a_failed_pull_or_mount_is_the_groups_reason_until_it_is_over() {
        let spec = testing::group("g", 1);
        let mut status = GroupStatus::new(&spec, 1);
        waiting(&mut status.containers[0], PULL_BACK_OFF, "no such image".into());
        settle(&mut status, &spec, Situation::default(), 1);
        assert_eq!(
            (status.reason.as_str(), status.message.as_str()),
            ("ImagePullFailed", "no such image")
        );
        pulled(&mut status.containers[0], CREATING);
        settle(&mut status, &spec, Situation::default(), 1);
        assert_eq!(status.reason, "");
        waiting(&mut status.containers[0], MOUNT_FAILED, "no such server".into());
        settle(&mut status, &spec, Situation::default(), 1);
        assert_eq!(
            (status.reason.as_str(), status.message.as_str()),
            ("FailedMount", "no such server")
        );
        running(&mut status.containers[0], &spec.containers[0], 2);
        settle(&mut status, &spec, Situation::default(), 2);
        assert_eq!(status.reason, "");
    }
}
