//! How a running group becomes another one.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Driver, Live};
use crate::{
    error::{Error, ErrorKind, Result},
    group::{
        network::wants_ipv6,
        plan::ContainerSeen,
        resize::Resizing,
        spec::{ContainerSpec, GroupSpec},
        status::{ContainerState, EventKind, GroupStatus, Phase},
        update::{self, Reach},
        view,
    },
    parts::now_ms,
    store::ContainerRecord,
};

impl Driver {
    /// How far the update reaches that is under way.
    pub(super) fn reach(&self) -> Option<Reach> {
        let update = self.record.update.as_ref()?;
        match update::reach(&self.spec, update) {
            // The sandbox can't be resized to that.
            Reach::Sizes if self.record.resizing.is_none() => Some(Reach::Sandbox),
            reach => Some(reach),
        }
    }

    /// Whether a container ends for an update, and its end is of no further consequence.
    pub(super) fn is_leaving(&self, index: usize) -> bool {
        matches!(self.reach(), Some(Reach::Containers(leaving)) if leaving.contains(&index))
    }

    pub(super) async fn update(
        &mut self,
        base: &GroupSpec,
        spec: GroupSpec,
        accepted: oneshot::Sender<Result<()>>,
    ) {
        if let Err(error) = self.check_update(base) {
            // The caller may have left.
            let _ = accepted.send(Err(error));
            return;
        }
        let reach = update::reach(&self.spec, &spec);
        let message = match &reach {
            Reach::Containers(leaving) if leaving.is_empty() => "No container is restarted".to_owned(),
            Reach::Containers(leaving) => {
                let names: Vec<_> = leaving
                    .iter()
                    .map(|index| self.spec.containers[*index].name.as_str())
                    .collect();
                format!("What changes is ended: {}", names.join(", "))
            }
            Reach::Sizes => "Sizes are changed while the containers run".to_owned(),
            Reach::Group => "All containers are ended and started again".to_owned(),
            Reach::Sandbox => "All containers are ended and started again in a new sandbox".to_owned(),
        };
        self.event(EventKind::Normal, "Updating", message, None);
        match reach {
            Reach::Containers(_) => {}
            Reach::Sizes => self.record.resizing = Some(Resizing::Forth),
            Reach::Group | Reach::Sandbox => self.record.restarting = Some(now_ms()),
        }
        self.record.update = Some(spec);
        self.save().await;
        let _ = accepted.send(Ok(()));
    }

    fn check_update(&self, base: &GroupSpec) -> Result<()> {
        let refuse = |text: String| Err(Error::new(ErrorKind::FailedPrecondition, text));
        let phase = self.record.group.status.phase;
        if !matches!(phase, Phase::Pending | Phase::Running) || self.record.restores.is_some() {
            return refuse(format!(
                "container group {} is {phase:?}: only a pending or running group can be updated",
                self.id
            ));
        }
        if self.record.group.spec != *base {
            return refuse(format!(
                "container group {} was updated meanwhile: look at what it is now, and try again",
                self.id
            ));
        }
        Ok(())
    }

    /// What the update changes has ended: the new group is the group, and what is new or changed in it begins.
    pub(super) fn apply(&mut self) {
        if self.record.resizing.is_some() {
            return self.settle_resize();
        }
        let leaving = match self.reach() {
            Some(Reach::Containers(leaving)) => leaving,
            _ => return,
        };
        let names = leaving
            .iter()
            .map(|index| self.spec.containers[*index].name.clone());
        let changed: Vec<String> = names.collect();
        self.record.ending_since_ms = None;
        self.take_update();
        for name in changed {
            let Some(index) = self.index_of(&name) else {
                continue;
            };
            let kept = &mut self.record.containers[index];
            (kept.done, kept.failures, kept.not_before_ms) = (false, 0, 0);
            self.containers[index] = Live::idle();
            let wait = self.wait_reason();
            let status = &mut self.record.group.status.containers[index];
            if matches!(status.state, ContainerState::Terminated { .. }) {
                status.previous = Some(status.state.clone());
            }
            view::waiting(status, wait, String::new());
        }
        let runs = self.containers.iter().any(|container| container.seen.is_alive());
        if runs && update::has_files(&self.spec) {
            // Told once they are put.
            self.files_changed();
        } else {
            self.tell_updated();
        }
    }

    pub(super) fn tell_updated(&mut self) {
        self.event(
            EventKind::Normal,
            "Updated",
            "The group is updated".to_owned(),
            None,
        );
        // There may be probes now where there were none.
        self.follow_containers();
    }

    /// Puts the new group in the place of the old one, if there is an update. Containers keep what is known of them by
    /// their names.
    pub(super) fn take_update(&mut self) -> bool {
        let Some(spec) = self.record.update.take() else {
            return false;
        };
        // Where nothing changes a running guest keeps what it has, whatever this host would give a new one.
        if wants_ipv6(&spec) != wants_ipv6(&self.spec) {
            let addresses = |ip| self.parts.network.addresses(ip, wants_ipv6(&spec));
            self.record.ip6 = self.record.ip.and_then(|ip| addresses(ip).v6);
        }
        let fresh = GroupStatus::new(&spec, now_ms());
        let mut old: Vec<_> = std::mem::take(&mut self.containers)
            .into_iter()
            .map(Some)
            .collect();
        let mut statuses = std::mem::take(&mut self.record.group.status.containers);
        let mut records = std::mem::take(&mut self.record.containers);
        for (container, status) in spec.containers.iter().zip(fresh.containers) {
            let before = self.index_of(&container.name);
            let (live, status, record) = match before.and_then(|index| Some((index, old[index].take()?))) {
                Some((index, live)) => (
                    live.with_image_of(&self.spec.containers[index], container),
                    std::mem::replace(&mut statuses[index], status),
                    std::mem::take(&mut records[index]),
                ),
                None => (Live::idle(), status, ContainerRecord::default()),
            };
            self.containers.push(live);
            self.record.group.status.containers.push(status);
            self.record.containers.push(record);
        }
        for (index, gone) in old.into_iter().enumerate() {
            if gone.is_some() {
                let logs = self.parts.log_dir(&self.id, &self.spec.containers[index].name);
                // Logs that can't be removed go with the group.
                drop(tokio::task::spawn_blocking(move || std::fs::remove_dir_all(logs)));
            }
        }
        self.record.group.spec = spec.clone();
        self.spec = Arc::new(spec);
        let initialized = self.record.group.status.initialized;
        for status in &mut self.record.group.status.containers {
            if initialized && matches!(status.state, ContainerState::Waiting { .. }) {
                view::initialized(status);
            }
        }
        true
    }
}

impl Live {
    /// What waits with its image here waits for another one, if it is to have another one.
    fn with_image_of(mut self, old: &ContainerSpec, new: &ContainerSpec) -> Self {
        if old.image != new.image && self.seen == ContainerSeen::Pulled {
            (self.image, self.seen) = (None, ContainerSeen::Idle { not_before_ms: 0 });
        }
        self
    }

    /// Nothing of it has begun.
    fn idle() -> Self {
        Self {
            seen: ContainerSeen::Idle { not_before_ms: 0 },
            image: None,
            starting: None,
            killing: None,
            is_unhealthy: false,
        }
    }
}
