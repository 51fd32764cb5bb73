//! How changed files come into running containers.

use std::sync::Arc;

use super::Driver;
use crate::{
    error::Error,
    group::{
        backoff,
        jobs::{self, Run},
        spec::GroupSpec,
        status::EventKind,
    },
    parts::now_ms,
};

/// How it stands with the files of running containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Files {
    /// They are what the group says.
    Fresh,
    /// They are to be put, not before this time, Unix milliseconds.
    Stale { not_before_ms: u64 },
    /// They are being put.
    BeingPut,
}

impl Files {
    /// They are to be put at once, if they are to be put.
    pub(super) fn of(refreshing: bool) -> Self {
        if refreshing {
            Self::Stale { not_before_ms: 0 }
        } else {
            Self::Fresh
        }
    }

    /// When they may be put.
    pub(super) fn stale_ms(self) -> Option<u64> {
        match self {
            Self::Stale { not_before_ms } => Some(not_before_ms),
            Self::Fresh | Self::BeingPut => None,
        }
    }
}

impl Driver {
    /// The group has changed, and running containers may have files of it.
    pub(super) fn files_changed(&mut self) {
        self.record.refreshing = true;
        self.refresh_failures = 0;
        // Old ones that are being put are waited for, lest they come last.
        if self.files != Files::BeingPut {
            self.files = Files::of(true);
        }
    }

    pub(super) fn refresh(&mut self) {
        let alive = (0..self.containers.len()).filter(|index| self.containers[*index].seen.is_alive());
        let runs: Vec<Run> = alive.filter_map(|index| self.run_of(index)).collect();
        self.jobs.spawn(jobs::refresh(Arc::clone(&self.spec), runs));
    }

    /// All running containers have the files of the group as it was.
    pub(super) fn refreshed(&mut self, of: &Arc<GroupSpec>, result: Result<(), Error>) {
        if self.files != Files::BeingPut {
            return;
        }
        if !Arc::ptr_eq(&self.spec, of) {
            self.files = Files::of(true);
            return;
        }
        match result {
            Ok(()) => self.files_are_fresh(),
            Err(error) => {
                self.refresh_failures = self.refresh_failures.saturating_add(1);
                self.files = Files::Stale {
                    not_before_ms: now_ms() + backoff::delay_ms(self.refresh_failures),
                };
                let message = format!(
                    "The files of running containers are not changed: {}",
                    error.chain()
                );
                self.event(EventKind::Warning, "FailedUpdate", message, None);
            }
        }
    }

    /// No container has old files: they were put, or what begins anew gets the new ones.
    pub(super) fn files_are_fresh(&mut self) {
        self.files = Files::Fresh;
        if std::mem::take(&mut self.record.refreshing) {
            self.tell_updated();
        }
    }
}
