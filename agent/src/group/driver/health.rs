//! What the guest tells of the containers it looks after.

use std::time::Duration;

use super::Driver;
use crate::{
    error::Result,
    group::{
        jobs,
        plan::{ContainerSeen, SandboxSeen},
        status::EventKind,
        view,
    },
    sandbox::lifecycle::{Cause, News, NewsKind},
};

impl Driver {
    /// Follows the containers, if there is one with probes or hooks, and they are not followed already.
    pub(super) fn follow_containers(&mut self) {
        self.follow_after(jobs::NEWS_INTERVAL);
    }

    fn follow_after(&mut self, delay: Duration) {
        let is_followed = self
            .spec
            .containers
            .iter()
            .any(|spec| spec.lifecycle.is_followed());
        let is_asked = self.following == Some(self.generation);
        if let Some(connection) = self.connection.clone().filter(|_| is_followed && !is_asked) {
            self.following = Some(self.generation);
            let after = self.record.news_after.unwrap_or(0);
            self.jobs
                .spawn(jobs::follow(self.generation, connection, after, delay));
        }
    }

    pub(super) fn take_in_news(&mut self, generation: u32, news: Result<News>) {
        if self.following == Some(generation) {
            self.following = None;
        }
        if generation != self.generation || self.sandbox != SandboxSeen::Running {
            return;
        }
        let news = match news {
            Ok(news) => news,
            // Mostly the sandbox ends, which has its own outcome.
            Err(error) => {
                tracing::debug!(group_id = %self.id, error = %error.chain(), "no news of containers");
                return self.follow_after(jobs::NEWS_RETRY);
            }
        };
        // What a clone's guest tells first is its parent's story.
        let is_history = self.record.news_after.is_none();
        self.record.news_after = Some(news.last);
        if !is_history {
            for (id, kind) in news.events {
                if let Some(index) = self.index_of_run(&id) {
                    self.container_news(index, kind);
                }
            }
        }
        self.health = news
            .health
            .into_iter()
            .map(|(id, started, ready)| (id, (started, ready)))
            .collect();
        for index in 0..self.containers.len() {
            self.apply_health(index);
        }
        self.follow_containers();
    }

    /// The container whose present run has this id.
    fn index_of_run(&self, id: &str) -> Option<usize> {
        let containers = &self.record.group.status.containers;
        containers
            .iter()
            .position(|status| status.container_id.as_deref() == Some(id))
    }

    fn container_news(&mut self, index: usize, kind: NewsKind) {
        let name = self.spec.containers[index].name.clone();
        let (severity, reason, message) = match kind {
            NewsKind::Unhealthy(message) => (EventKind::Warning, "Unhealthy", message),
            NewsKind::Killing(cause) => {
                let what = match cause {
                    Cause::Liveness => "failed liveness probe",
                    Cause::Startup => "failed startup probe",
                    Cause::PostStart => "failed its postStart hook",
                };
                (
                    EventKind::Normal,
                    "Killing",
                    format!("Container {name} {what} and is ended"),
                )
            }
            NewsKind::PostStartFailed(why) => (
                EventKind::Warning,
                "FailedPostStartHook",
                format!("PostStartHook failed: {why}"),
            ),
            NewsKind::PreStopFailed(why) => (
                EventKind::Warning,
                "FailedPreStopHook",
                format!("PreStopHook failed: {why}"),
            ),
        };
        self.event(severity, reason, message, Some(index));
    }

    /// Brings a running container up to what the guest told last.
    pub(super) fn apply_health(&mut self, index: usize) {
        let status = &mut self.record.group.status.containers[index];
        let known = status.container_id.as_ref().and_then(|id| self.health.get(id));
        let Some((started, ready)) = known.copied() else {
            return;
        };
        match &mut self.containers[index].seen {
            ContainerSeen::Running { has_started } => *has_started = started,
            ContainerSeen::Killing => {}
            _ => return,
        }
        view::health(status, &self.spec.containers[index], started, ready);
    }
}
