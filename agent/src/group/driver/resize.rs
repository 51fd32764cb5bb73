//! How a running group becomes larger or smaller.

use std::sync::Arc;

use super::Driver;
use crate::{
    group::{
        jobs::{Resize, Resized, container_id},
        plan::{ContainerSeen, ResizeSeen, SandboxSeen},
        resize::{RESIZE_FAILED, Resizing},
        size,
        status::EventKind,
    },
    parts::now_ms,
};

impl Driver {
    /// The resize as the plan sees it.
    pub(super) fn resize_seen(&self) -> Option<ResizeSeen> {
        self.record.resizing.as_ref().map(|_| match self.is_resizing {
            true => ResizeSeen::UnderWay,
            false => ResizeSeen::Wanted,
        })
    }

    /// Begins the work of the resize, or of taking it back.
    pub(super) fn resize(&mut self) {
        let (Some(connection), Some(update)) = (self.connection.clone(), self.record.update.clone()) else {
            return;
        };
        let (mut from, mut to) = (Arc::clone(&self.spec), Arc::new(update));
        if matches!(self.record.resizing, Some(Resizing::Back { .. })) {
            std::mem::swap(&mut from, &mut to);
        }
        let running = self.containers.iter().enumerate().map(|(index, container)| {
            let run = self.record.containers[index].runs.checked_sub(1)?;
            let runs = matches!(container.seen, ContainerSeen::Running { .. });
            runs.then(|| container_id(&self.spec.containers[index].name, run))
        });
        let resize = Resize {
            parts: Arc::clone(&self.parts),
            group_id: self.id.clone(),
            from,
            to,
            running: running.collect(),
            connection,
        };
        self.jobs.spawn(resize.run(self.generation));
    }

    pub(super) fn resized(&mut self, generation: u32, resized: Resized) {
        if generation != self.generation || self.sandbox != SandboxSeen::Running {
            // The sandbox is gone, and with it what was to be resized.
            return;
        }
        let Some(resizing) = self.record.resizing.clone() else {
            return;
        };
        tracing::info!(group_id = %self.id, ?resizing, ?resized, "resize");
        match (resizing, resized) {
            // Its end has its own outcome.
            (_, Resized::Lost) => return,
            (Resizing::Forth, Resized::Done) => self.settle_resize(),
            (Resizing::Forth, Resized::Impossible(why)) => {
                self.record.resizing = None;
                self.record.restarting = Some(now_ms());
                let message = format!("All containers are ended and started again in a new sandbox: {why}");
                self.event(EventKind::Normal, "Updating", message, None);
            }
            (Resizing::Forth, Resized::Failed(why)) => {
                self.record.resizing = Some(Resizing::Back { why });
            }
            (Resizing::Back { why }, Resized::Done) => self.keep_size(&why),
            (Resizing::Back { why }, Resized::Impossible(again) | Resized::Failed(again)) => {
                self.keep_size(&format!(
                    "{why}; what was changed for it was not changed back: {again}"
                ));
            }
        }
        self.is_resizing = false;
    }

    /// The group is, or will be when it has a sandbox again, what it is to be; or stays what it was.
    pub(super) fn settle_resize(&mut self) {
        match self.record.resizing.take() {
            Some(Resizing::Forth) => {
                let before = self.spec.size;
                self.take_update();
                if self.spec.size != before {
                    let message = format!("From {} to {}", size::text(before), size::text(self.spec.size));
                    self.event(EventKind::Normal, "Resized", message, None);
                }
                self.tell_updated();
            }
            Some(Resizing::Back { why }) => self.keep_size(&why),
            None => {}
        }
    }

    fn keep_size(&mut self, why: &str) {
        (self.record.resizing, self.record.update) = (None, None);
        let message = format!("The group keeps its size, {}: {why}", size::text(self.spec.size));
        self.event(EventKind::Warning, RESIZE_FAILED, message, None);
    }
}
