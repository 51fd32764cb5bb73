//! How groups begin in order, begin anew, and end.

use std::time::Duration;

use tokio::sync::oneshot;

use super::Driver;
use crate::{
    error::{Error, ErrorKind, Result},
    group::{
        lifecycle::Role,
        plan::{self, ContainerSeen, End, Seen},
        status::{EventKind, Phase},
        update::Reach,
        view::{self, Situation},
    },
    parts::now_ms,
};

impl Driver {
    pub(super) fn seen(&self) -> Seen {
        let record = &self.record;
        let deadline_ms = self.spec.active_deadline_seconds.map(|seconds| {
            record
                .group
                .status
                .created_at_ms
                .saturating_add(seconds.saturating_mul(1000))
        });
        let containers = self.spec.containers.iter().zip(&self.containers);
        Seen {
            now_ms: now_ms(),
            deleting: record.deleting.is_some(),
            releasing: self.releasing,
            restarting: record.restarting.is_some(),
            renewing: self.reach() == Some(Reach::Sandbox),
            leaving: match self.reach() {
                Some(Reach::Containers(leaving)) => Some(leaving),
                _ => None,
            },
            stale_files_ms: self.files.stale_ms(),
            resizing: self.resize_seen(),
            failed: record.failed,
            deadline_ms,
            initialized: record.group.status.initialized,
            sandbox: self.sandbox,
            containers: containers
                .map(|(spec, container)| (spec.lifecycle.role, container.seen))
                .collect(),
        }
    }

    /// Nothing that ends is started again.
    pub(super) fn is_ending(&self) -> bool {
        plan::end(&self.seen()).is_some()
    }

    /// Its containers end because somebody wants it, or its time is over.
    pub(super) fn is_stopped(&self) -> bool {
        self.record.deleting.is_some() || self.record.restarting.is_some() || self.record.failed
    }

    pub(super) fn situation(&self) -> Situation {
        let seen = self.seen();
        let end = plan::end(&seen);
        let alive = seen.containers.iter().any(|(_, container)| container.is_alive());
        Situation {
            deleting: seen.deleting,
            restarting: seen.restarting,
            // What can't be put at once is tried again, and can be changed meanwhile.
            updating: self.record.update.is_some() || (self.record.refreshing && self.refresh_failures == 0),
            over: !alive && matches!(end, Some(End::Failed | End::Complete)),
            failed: end == Some(End::Failed),
        }
    }

    /// How long containers may still take to end: the time of the group counts for all of them.
    pub(super) fn grace(&self) -> Duration {
        let whole = self
            .record
            .deleting
            .unwrap_or(self.spec.termination_grace_period_seconds);
        let since = self.record.ending_since_ms.unwrap_or_else(now_ms);
        let until = since.saturating_add(whole.saturating_mul(1000));
        Duration::from_millis(until.saturating_sub(now_ms()))
    }

    /// Notes that the group's work may begin.
    pub(super) fn note_initialized(&mut self) {
        let initialized = plan::has_initialized(&self.seen().containers);
        let status = &mut self.record.group.status;
        if status.initialized || !initialized {
            return;
        }
        status.initialized = true;
        for (status, spec) in status.containers.iter_mut().zip(&self.spec.containers) {
            if spec.lifecycle.role == Role::App {
                view::initialized(status);
            }
        }
    }

    /// Why a container whose image is here still waits.
    pub(super) fn wait_reason(&self) -> &'static str {
        if self.record.group.status.initialized {
            view::CREATING
        } else {
            view::first_wait(&self.spec)
        }
    }

    /// The sandbox is a new one, if any work is left: what init containers did in the old one is lost with it.
    pub(super) fn initialize_again(&mut self) {
        if self.is_ending() {
            return;
        }
        self.record.group.status.initialized = false;
        for index in 0..self.containers.len() {
            if self.spec.containers[index].lifecycle.role == Role::Init {
                self.begin_anew(index);
            }
        }
    }

    /// What has ended is started again, at once.
    pub(super) fn begin_anew(&mut self, index: usize) {
        if !self.containers[index].seen.is_done() {
            return;
        }
        self.containers[index].seen = ContainerSeen::Idle { not_before_ms: 0 };
        let kept = &mut self.record.containers[index];
        (kept.done, kept.failures, kept.not_before_ms) = (false, 0, 0);
        let reason = view::first_wait(&self.spec);
        let status = &mut self.record.group.status.containers[index];
        status.previous = Some(status.state.clone());
        view::waiting(status, reason, String::new());
    }

    /// An init container ended badly and is not run again: the group cannot go on.
    pub(super) fn init_failed(&mut self, index: usize) {
        let status = &mut self.record.group.status;
        view::INIT_FAILED.clone_into(&mut status.reason);
        status.message = view::init_failure(&status.containers[index]);
        tracing::info!(group_id = %self.id, why = status.message, "a group fails");
    }

    /// The time of the group is over.
    pub(super) fn expire(&mut self) {
        self.record.failed = true;
        let seconds = self.spec.active_deadline_seconds.unwrap_or_default();
        let message = format!("The group was active for longer than its deadline of {seconds} s");
        let status = &mut self.record.group.status;
        view::DEADLINE_EXCEEDED.clone_into(&mut status.reason);
        status.message.clone_from(&message);
        self.event(EventKind::Normal, view::DEADLINE_EXCEEDED, message, None);
        self.abort_start();
    }

    pub(super) async fn restart(&mut self, accepted: oneshot::Sender<Result<()>>) {
        let phase = self.record.group.status.phase;
        let may = matches!(phase, Phase::Scheduling | Phase::Pending | Phase::Running)
            && self.record.restores.is_none();
        if !may && phase != Phase::Restarting {
            let error = Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "container group {} is {phase:?}: only a pending or running group can be restarted",
                    self.id
                ),
            );
            // The caller may have left.
            let _ = accepted.send(Err(error));
            return;
        }
        if self.record.restarting.is_none() {
            self.record.restarting = Some(now_ms());
            let message = "All containers are ended and started again".to_owned();
            self.event(EventKind::Normal, "Restarting", message, None);
        }
        self.save().await;
        let _ = accepted.send(Ok(()));
    }

    /// All containers have ended and begin anew.
    pub(super) fn reset(&mut self) {
        let is_update = self.take_update();
        self.files_are_fresh();
        self.record.restarting = None;
        self.record.ending_since_ms = None;
        self.record.group.status.initialized = false;
        for index in 0..self.containers.len() {
            self.begin_anew(index);
        }
        if is_update {
            self.tell_updated();
        }
    }
}
