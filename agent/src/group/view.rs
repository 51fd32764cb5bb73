//! How a group's status is told: phases and states, as the kubelet words them. Pure.

use super::status::{ContainerState, ContainerStatus, GroupStatus, Phase};

/// The sandbox ended by itself.
pub(super) const SANDBOX_DIED: &str = "SandboxDied";
/// The sandbox does not start.
pub(super) const SANDBOX_FAILED: &str = "SandboxStartFailed";
/// The group does not go on from its snapshot.
pub(super) const RESTORE_FAILED: &str = "RestoreFailed";
/// The container is being made.
pub(crate) const CREATING: &str = "ContainerCreating";
/// An image can't be pulled.
const PULL_FAILED: &str = "ImagePullFailed";

/// The container waits.
pub(super) fn waiting(status: &mut ContainerStatus, reason: &str, message: String) {
    status.ready = false;
    status.state = ContainerState::Waiting {
        reason: reason.to_owned(),
        message,
    };
}

/// Its image is here: a wait for the image is over.
pub(super) fn creating(status: &mut ContainerStatus) {
    if matches!(status.state, ContainerState::Waiting { .. }) {
        waiting(status, CREATING, String::new());
    }
}

/// The container runs.
pub(super) fn running(status: &mut ContainerStatus, started_at_ms: u64) {
    status.ready = true;
    status.state = ContainerState::Running { started_at_ms };
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
    status.ready = false;
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

/// Derives phase, reason and message of the group from its containers.
pub(super) fn settle(status: &mut GroupStatus, deleting: bool, all_done: bool, now_ms: u64) {
    let phase = phase(status, deleting, all_done);
    if matches!(phase, Phase::Succeeded | Phase::Failed) {
        status.finished_at_ms.get_or_insert(now_ms);
    }
    status.phase = phase;
    let pull = status
        .containers
        .iter()
        .find_map(|container| match &container.state {
            ContainerState::Waiting { reason, message } if reason == "ImagePullBackOff" => {
                Some(message.clone())
            }
            _ => None,
        });
    match pull {
        Some(message) => {
            PULL_FAILED.clone_into(&mut status.reason);
            status.message = message;
        }
        None => {
            let all_run = status
                .containers
                .iter()
                .all(|container| matches!(container.state, ContainerState::Running { .. }));
            if status.reason == PULL_FAILED || all_run {
                status.reason.clear();
                status.message.clear();
            }
        }
    }
}

fn phase(status: &GroupStatus, deleting: bool, all_done: bool) -> Phase {
    if deleting {
        return Phase::Terminating;
    }
    if all_done {
        let well = |container: &ContainerStatus| {
            matches!(container.state, ContainerState::Terminated { exit_code: 0, .. })
        };
        return if status.containers.iter().all(well) {
            Phase::Succeeded
        } else {
            Phase::Failed
        };
    }
    let never_ran = |container: &ContainerStatus| {
        container.previous.is_none() && matches!(container.state, ContainerState::Waiting { .. })
    };
    if !status.containers.iter().any(never_ran) {
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
    use crate::group::spec::testing;

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

    #[test]
    fn phases() {
        let mut status = GroupStatus::new(&testing::group("g", 2), 1);
        let check = |status: &mut GroupStatus, deleting, all_done, expected| {
            settle(status, deleting, all_done, 7);
            assert_eq!(status.phase, expected);
        };
        check(&mut status, false, false, Phase::Scheduling);
        super::super::events::push(
            &mut status.events,
            1,
            crate::group::status::EventKind::Normal,
            "Pulling",
            String::new(),
            None,
        );
        check(&mut status, false, false, Phase::Pending);
        running(&mut status.containers[0], 5);
        check(&mut status, false, false, Phase::Pending);
        running(&mut status.containers[1], 5);
        check(&mut status, false, false, Phase::Running);
        status.containers[0].state = ended(0);
        status.containers[1].state = ended(0);
        check(&mut status, false, true, Phase::Succeeded);
        assert_eq!(status.finished_at_ms, Some(7));
        status.containers[1].state = ended(3);
        check(&mut status, false, true, Phase::Failed);
        check(&mut status, true, true, Phase::Terminating);
    }

    #[test]
    fn a_failed_pull_is_the_groups_reason_until_it_is_over() {
        let mut status = GroupStatus::new(&testing::group("g", 1), 1);
        waiting(
            &mut status.containers[0],
            "ImagePullBackOff",
            "no such image".into(),
        );
        settle(&mut status, false, false, 1);
        assert_eq!(
            (status.reason.as_str(), status.message.as_str()),
            ("ImagePullFailed", "no such image")
        );
        creating(&mut status.containers[0]);
        settle(&mut status, false, false, 1);
        assert_eq!(status.reason, "");
    }
}
