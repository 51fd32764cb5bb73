//! One task owns one group: it plans, begins jobs, takes in their outcomes, and writes down and publishes each state.

mod ending;
mod health;
mod refresh;
mod resize;
mod update;

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, JoinSet},
};

use self::refresh::Files;
use super::{
    backoff,
    images::LocalImage,
    jobs::{self, Outcome, Run, Writers, container_id},
    lifecycle::Role,
    plan::{self, Action, ContainerSeen, SandboxSeen},
    resize::larger,
    spec::{GroupSpec, ImagePullPolicy, Size},
    status::{ContainerState, EventKind, Group, GroupId, Phase},
    view,
};
use crate::{
    error::{Error, ErrorKind, Result},
    network::Addresses,
    parts::{HostParts, now_ms},
    sandbox::client::{SandboxConnection, TaskState},
    snapshots::SnapshotId,
    store::Record,
};

/// Requests that wait for a driver.
const QUEUE: usize = 16;
/// Between attempts to clear a sandbox away, or to write to a store that fails.
const RETRY_MS: u64 = 10_000;

/// What readers see of a group.
#[derive(Debug, Clone)]
pub struct Published {
    /// Wanted and seen.
    pub group: Group,
    /// The running sandbox.
    pub connection: Option<SandboxConnection>,
    /// It goes on from this snapshot and does not run yet.
    pub restores: Option<SnapshotId>,
    /// What it is to be once its update is done.
    pub update: Option<Arc<GroupSpec>>,
}

impl Published {
    /// What the host keeps for it; `None` when it has ended.
    pub fn reserved(&self) -> Option<Size> {
        let has_ended = matches!(self.group.status.phase, Phase::Succeeded | Phase::Failed);
        let now = self.group.spec.size;
        let next = self.update.as_ref().map_or(now, |spec| spec.size);
        (!has_ended).then(|| larger(now, next))
    }
}

/// What a driver is asked.
#[derive(Debug)]
enum Command {
    Delete {
        grace_seconds: Option<u64>,
        accepted: oneshot::Sender<()>,
    },
    Restart {
        accepted: oneshot::Sender<Result<()>>,
    },
    Update {
        base: Box<GroupSpec>,
        spec: Box<GroupSpec>,
        accepted: oneshot::Sender<Result<()>>,
    },
}

/// The way to a group's driver. Clones lead to the same one.
#[derive(Debug, Clone)]
pub struct GroupHandle {
    commands: mpsc::Sender<Command>,
    published: watch::Receiver<Arc<Published>>,
}

impl GroupHandle {
    /// The group now.
    pub fn now(&self) -> Arc<Published> {
        Arc::clone(&self.published.borrow())
    }

    /// Follows the group; the channel ends with it.
    pub fn follow(&self) -> watch::Receiver<Arc<Published>> {
        self.published.clone()
    }

    /// Asks for the end; returns when the wish is durable. `false` when the group is gone already.
    pub async fn delete(&self, grace_seconds: Option<u64>) -> bool {
        let (accepted, answer) = oneshot::channel();
        let command = Command::Delete {
            grace_seconds,
            accepted,
        };
        self.commands.send(command).await.is_ok() && answer.await.is_ok()
    }
}

impl GroupHandle {
    /// Asks for all containers to begin anew; returns when the wish is durable.
    ///
    /// # Errors
    /// `NotFound` when the group is gone, `FailedPrecondition` when it is neither `Pending` nor `Running`.
    pub async fn restart(&self) -> Result<()> {
        self.ask(|accepted| Command::Restart { accepted }).await
    }

    /// Asks for the group to become what `spec` says, if it still is what `base` says; returns when the wish is durable.
    ///
    /// # Errors
    /// `NotFound` when the group is gone, `FailedPrecondition` when it is another by now, or neither `Pending` nor
    /// `Running`.
    pub async fn update(&self, base: GroupSpec, spec: GroupSpec) -> Result<()> {
        let (base, spec) = (Box::new(base), Box::new(spec));
        self.ask(|accepted| Command::Update { base, spec, accepted })
            .await
    }

    async fn ask(&self, command: impl FnOnce(oneshot::Sender<Result<()>>) -> Command) -> Result<()> {
        let (accepted, answer) = oneshot::channel();
        let gone = || Error::new(ErrorKind::NotFound, "the container group is gone");
        self.commands.send(command(accepted)).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }
}

/// A container while its driver lives.
#[derive(Debug)]
struct Live {
    seen: ContainerSeen,
    image: Option<Arc<LocalImage>>,
    /// It is being started.
    starting: Option<AbortHandle>,
    /// It is being told to end.
    killing: Option<AbortHandle>,
    /// The run that has just ended was ended by the guest itself.
    is_unhealthy: bool,
}

impl Live {
    /// What is under way about its run is of no use any more.
    fn cease(&mut self) {
        for job in [self.starting.take(), self.killing.take()].into_iter().flatten() {
            job.abort();
        }
    }
}

/// The owner of one group.
#[derive(Debug)]
pub struct Driver {
    parts: Arc<HostParts>,
    id: GroupId,
    spec: Arc<GroupSpec>,
    record: Record,
    saved: Option<Record>,
    sandbox: SandboxSeen,
    /// Counts sandboxes, so that the end of an old one is not taken for the end of the next.
    generation: u32,
    sandbox_failures: u32,
    connection: Option<SandboxConnection>,
    containers: Vec<Live>,
    /// What the guest told last of running containers: started, ready. By the id of their run.
    health: HashMap<String, (bool, bool)>,
    /// The sandbox, by its count, whose guest is being asked for news.
    following: Option<u32>,
    releasing: bool,
    files: Files,
    /// How often they could not be put.
    refresh_failures: u32,
    /// The work of a resize is being done, in this sandbox.
    is_resizing: bool,
    jobs: JoinSet<Outcome>,
    writers: Writers,
    starting: Option<AbortHandle>,
    /// Whether the group is to end.
    ends: watch::Sender<bool>,
    commands: mpsc::Receiver<Command>,
    published: watch::Sender<Arc<Published>>,
}

impl Driver {
    /// A driver for a group in the store; [`Self::run`] drives it.
    pub fn new(parts: Arc<HostParts>, record: Record) -> (Self, GroupHandle) {
        let (command_sender, commands) = mpsc::channel(QUEUE);
        let first = Arc::new(Published {
            group: record.group.clone(),
            connection: None,
            restores: record.restores.clone(),
            update: record.update.clone().map(Arc::new),
        });
        let (published, receiver) = watch::channel(first);
        let containers = record
            .containers
            .iter()
            .zip(&record.group.status.containers)
            .map(|(container, status)| Live {
                seen: if container.done {
                    ContainerSeen::Done {
                        well: matches!(status.state, ContainerState::Terminated { exit_code: 0, .. }),
                    }
                } else {
                    ContainerSeen::Idle {
                        not_before_ms: container.not_before_ms,
                    }
                },
                image: None,
                starting: None,
                killing: None,
                is_unhealthy: false,
            })
            .collect();
        let driver = Self {
            id: record.group.id.clone(),
            files: Files::of(record.refreshing),
            refresh_failures: 0,
            spec: Arc::new(record.group.spec.clone()),
            saved: Some(record.clone()),
            record,
            parts,
            sandbox: SandboxSeen::Absent { not_before_ms: 0 },
            generation: 0,
            sandbox_failures: 0,
            connection: None,
            containers,
            health: HashMap::new(),
            following: None,
            releasing: false,
            is_resizing: false,
            jobs: JoinSet::new(),
            writers: Writers::new(),
            starting: None,
            ends: watch::Sender::new(false),
            commands,
            published,
        };
        let handle = GroupHandle {
            commands: command_sender,
            published: receiver,
        };
        (driver, handle)
    }

    /// Finds out what became of the group while no agent ran: its sandbox is adopted, or its death noted.
    pub async fn recover(&mut self) {
        let bundle = self.parts.bundle(&self.id);
        if !self.record.sandbox_running {
            if bundle.dir().exists() {
                self.sandbox = SandboxSeen::Dead { not_before_ms: 0 };
            }
            return;
        }
        match self.parts.shim.find(self.id.as_str(), &bundle).await {
            Ok(connection) => self.adopt(connection).await,
            Err(error) => {
                let why = format!(
                    "it was found dead when the agent started: {} {}",
                    error.chain(),
                    bundle.last_words()
                );
                self.sandbox_died(&why);
            }
        }
    }

    async fn adopt(&mut self, connection: SandboxConnection) {
        if self.record.restores.is_some() {
            // Whether its containers were let go is not known.
            self.connection = Some(connection);
            return self.restore_failed("the agent ended while the group was restored");
        }
        tracing::info!(group_id = %self.id, "sandbox adopted");
        self.connection = Some(connection.clone());
        self.sandbox = SandboxSeen::Running;
        self.watch_sandbox(&connection);
        self.follow_containers();
        for index in 0..self.containers.len() {
            let Some(run) = self.record.containers[index].runs.checked_sub(1) else {
                continue;
            };
            if self.containers[index].seen.is_done() {
                continue;
            }
            let id = container_id(&self.spec.containers[index].name, run);
            match connection.state(&id).await {
                Ok(TaskState::Running | TaskState::Stopped) => {
                    self.containers[index].image = self.lease(index).await;
                    let status = &mut self.record.group.status.containers[index];
                    if !matches!(status.state, ContainerState::Running { .. }) {
                        view::running(status, &self.spec.containers[index], now_ms());
                    }
                    // An agent that knew nothing of this may have written the status.
                    status.started |= self.spec.containers[index].lifecycle.starts_at_once();
                    let has_started = status.started;
                    self.containers[index].seen = ContainerSeen::Running { has_started };
                    if let Some(run) = self.run_of(index) {
                        self.jobs.spawn(run.watch());
                    }
                }
                Ok(TaskState::Created) => {
                    if let Err(error) = connection.delete(&id, "").await {
                        tracing::warn!(group_id = %self.id, error = %error.chain(), "a half made container stays");
                    }
                }
                // It was not created yet, or has ended and was removed: the plan goes on from there.
                Err(error) => {
                    tracing::debug!(group_id = %self.id, error = %error.chain(), "container not found");
                }
            }
        }
    }

    /// Keeps the image of a container that runs already.
    async fn lease(&self, index: usize) -> Option<Arc<LocalImage>> {
        let image = &self.spec.containers[index].image;
        match self
            .parts
            .images
            .pull(image, ImagePullPolicy::Never, &[], None)
            .await
        {
            Ok(image) => Some(Arc::new(image)),
            Err(error) => {
                tracing::warn!(group_id = %self.id, error = %error.chain(), "the image of a running container is gone");
                None
            }
        }
    }

    /// Drives the group until it is gone, or nobody can reach it any more. The sending end of its state is handed back, so
    /// that the caller decides when followers learn of the end.
    pub async fn run(mut self) -> watch::Sender<Arc<Published>> {
        loop {
            self.note_initialized();
            let seen = self.seen();
            let (ends, actions) = (plan::end(&seen).is_some(), plan::plan(&seen));
            self.ends
                .send_if_modified(|before| std::mem::replace(before, ends) != ends);
            for action in &actions {
                self.mark(*action);
            }
            self.save().await;
            // Done with being marked: they open the way for others.
            if actions
                .iter()
                .any(|action| matches!(action, Action::Expire | Action::Reset | Action::Apply))
            {
                continue;
            }
            let mut wake_ms = None;
            for action in actions {
                match action {
                    Action::WakeAt(at) => wake_ms = Some(wake_ms.map_or(at, |wake: u64| wake.min(at))),
                    action => self.begin(action),
                }
            }
            let wake = async {
                match wake_ms {
                    Some(at) => {
                        tokio::time::sleep(Duration::from_millis(at.saturating_sub(now_ms()).max(1))).await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return self.published,
                },
                Some(outcome) = self.jobs.join_next() => match outcome {
                    Ok(Outcome::Released(Ok(()))) => return self.published,
                    Ok(outcome) => self.take_in(outcome),
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => tracing::error!(group_id = %self.id, %error, "a job of a group ended badly"),
                },
                () = wake => {}
            }
        }
    }

    async fn command(&mut self, command: Command) {
        let (grace_seconds, accepted) = match command {
            Command::Delete {
                grace_seconds,
                accepted,
            } => (grace_seconds, accepted),
            Command::Restart { accepted } => return self.restart(accepted).await,
            Command::Update { base, spec, accepted } => return self.update(&base, *spec, accepted).await,
        };
        let grace = grace_seconds.unwrap_or(self.spec.termination_grace_period_seconds);
        let shorter = self.record.deleting.is_none_or(|before| grace < before);
        let again = self.record.deleting.is_some() && shorter;
        if self.record.deleting.is_none() && self.record.update.is_some() {
            // What had ended for the update did so in a time of its own.
            self.record.ending_since_ms = None;
        }
        if shorter {
            self.record.deleting = Some(grace);
        }
        self.save().await;
        // The caller may have left.
        let _ = accepted.send(());
        if again {
            for index in 0..self.containers.len() {
                if self.containers[index].seen == ContainerSeen::Killing {
                    self.kill(index);
                }
            }
        }
        self.abort_start();
    }

    fn abort_start(&mut self) {
        if let Some(starting) = self.starting.take() {
            starting.abort();
            if self.sandbox == SandboxSeen::Starting {
                self.sandbox = SandboxSeen::Dead { not_before_ms: 0 };
            }
        }
    }

    /// Notes that an action is about to be begun: this state is durable before it is.
    fn mark(&mut self, action: Action) {
        match action {
            Action::StartSandbox => self.sandbox = SandboxSeen::Starting,
            Action::StopSandbox => {
                self.sandbox = SandboxSeen::Stopping;
                self.is_resizing = false;
                self.record.sandbox_running = false;
                self.files_are_fresh();
            }
            Action::Pull(index) => {
                self.containers[index].seen = ContainerSeen::Pulling;
                let image = &self.spec.containers[index].image;
                let message = format!("Pulling image \"{image}\"");
                self.event(EventKind::Normal, "Pulling", message, Some(index));
            }
            Action::Start(index) => {
                self.containers[index].seen = ContainerSeen::Starting;
                let kept = &mut self.record.containers[index];
                let run = kept.runs;
                kept.runs += 1;
                let status = &mut self.record.group.status.containers[index];
                status.restart_count = run;
                status.container_id = Some(container_id(&self.spec.containers[index].name, run));
                view::waiting(status, view::CREATING, String::new());
            }
            Action::Kill(index) => {
                self.record.ending_since_ms.get_or_insert(now_ms());
                self.containers[index].seen = ContainerSeen::Killing;
                let name = &self.spec.containers[index].name;
                let message = format!("Stopping container {name}");
                self.event(EventKind::Normal, "Killing", message, Some(index));
            }
            Action::Expire => self.expire(),
            Action::Reset => self.reset(),
            Action::Apply => self.apply(),
            Action::Refresh => self.files = Files::BeingPut,
            Action::Resize => self.is_resizing = true,
            Action::Release => self.releasing = true,
            Action::WakeAt(_) => {}
        }
    }

    fn begin(&mut self, action: Action) {
        let (parts, id, spec, ip) = (
            Arc::clone(&self.parts),
            self.id.clone(),
            Arc::clone(&self.spec),
            self.record.addresses(),
        );
        match action {
            Action::StartSandbox => {
                let restores = self.record.restores.clone();
                self.starting = Some(
                    self.jobs
                        .spawn(jobs::start_sandbox(parts, id, spec, ip, restores)),
                );
            }
            Action::StopSandbox => {
                let connection = self.connection.take();
                let writers = self.writers.clone();
                self.jobs
                    .spawn(jobs::stop_sandbox(parts, id, ip, connection, writers));
            }
            Action::Pull(index) => {
                let is_captured = self.record.containers[index].is_captured;
                self.jobs.spawn(jobs::pull(parts, spec, index, is_captured));
            }
            Action::Start(index) => {
                if let (Some(run), Some(image)) = (self.run_of(index), self.containers[index].image.clone()) {
                    self.containers[index].starting = Some(self.jobs.spawn(run.start(image)));
                }
            }
            Action::Kill(index) => self.kill(index),
            Action::Refresh => self.refresh(),
            Action::Resize => self.resize(),
            Action::Release => {
                self.jobs.spawn(jobs::release(parts, id, spec, ip));
            }
            Action::Expire | Action::Reset | Action::Apply | Action::WakeAt(_) => {}
        }
    }

    /// Has a container end within the grace that is left. A job that was about it with more grace goes on in vain.
    fn kill(&mut self, index: usize) {
        let grace = self.grace();
        if let Some(run) = self.run_of(index) {
            self.containers[index].killing = Some(self.jobs.spawn(run.kill(grace)));
        }
    }

    /// Where the container of this name is now.
    fn index_of(&self, name: &str) -> Option<usize> {
        self.spec.containers.iter().position(|spec| spec.name == name)
    }

    /// The last begun run of a container, while there is a sandbox.
    fn run_of(&self, index: usize) -> Option<Run> {
        Some(Run {
            parts: Arc::clone(&self.parts),
            group_id: self.id.clone(),
            spec: Arc::clone(&self.spec),
            index,
            run: self.record.containers[index].runs.checked_sub(1)?,
            ip: self.addresses(),
            connection: self.connection.clone()?,
            is_captured: self.record.containers[index].is_captured,
            writers: self.writers.clone(),
            ends: self.ends.subscribe(),
        })
    }

    fn take_in(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::SandboxStarted(result) => self.sandbox_started(result),
            Outcome::SandboxStopped(result) => self.sandbox_stopped(result),
            Outcome::SandboxEnded(generation, why) => {
                if generation == self.generation && self.sandbox == SandboxSeen::Running {
                    self.sandbox_died(&why);
                }
            }
            Outcome::Pulled(name, image, result) => {
                if let Some(index) = self.index_of(&name) {
                    self.pulled(index, &image, result);
                }
            }
            Outcome::Started(name, run, result) => {
                if let Some(index) = self.current(&name, run, |seen| seen == ContainerSeen::Starting) {
                    self.started(index, result);
                }
            }
            Outcome::NotMounted(name, run, error) => {
                if let Some(index) = self.current(&name, run, |seen| seen == ContainerSeen::Starting) {
                    self.not_mounted(index, &error);
                }
            }
            Outcome::Ended(name, run, result) => {
                let runs = |seen| matches!(seen, ContainerSeen::Running { .. } | ContainerSeen::Killing);
                if let Some(index) = self.current(&name, run, runs) {
                    match result {
                        Ok(ended) => self.ended(index, ended),
                        // The end of its sandbox, which has its own outcome with the reason.
                        Err(error) => {
                            tracing::debug!(group_id = %self.id, error = %error.chain(), "wait ended");
                        }
                    }
                }
            }
            Outcome::Killed(name, run) => {
                if let Some(index) = self.current(&name, run, |seen| seen == ContainerSeen::Killing) {
                    // How it ended was not found out; the sandbox's end is the end of it in any case.
                    let message = "It was told to end, and its end was not seen".to_owned();
                    self.finish(index, 137, None, "Error", message, now_ms());
                }
            }
            Outcome::Refreshed(spec, result) => self.refreshed(&spec, result),
            Outcome::Resized(generation, resized) => self.resized(generation, resized),
            Outcome::News(generation, news) => self.take_in_news(generation, news),
            Outcome::Released(result) => {
                if let Err(error) = result {
                    tracing::error!(group_id = %self.id, error = %error.chain(), "a group was not released");
                    self.releasing = false;
                    self.sandbox = SandboxSeen::Dead {
                        not_before_ms: now_ms() + RETRY_MS,
                    };
                }
            }
        }
    }

    /// Where the container is whose last begun run is this one, if it is in such a state.
    fn current(&self, name: &str, run: u32, state: impl FnOnce(ContainerSeen) -> bool) -> Option<usize> {
        let index = self.index_of(name)?;
        (self.record.containers[index].runs == run + 1 && state(self.containers[index].seen)).then_some(index)
    }

    fn watch_sandbox(&mut self, connection: &SandboxConnection) {
        self.generation += 1;
        self.jobs.spawn(jobs::watch_sandbox(
            Arc::clone(&self.parts),
            self.id.clone(),
            self.generation,
            connection.clone(),
        ));
    }

    fn sandbox_started(&mut self, result: Result<SandboxConnection>) {
        self.starting = None;
        if self.sandbox != SandboxSeen::Starting {
            return;
        }
        match result {
            Ok(connection) => {
                self.watch_sandbox(&connection);
                self.connection = Some(connection);
                self.health.clear();
                // The guest of a clone tells its parent's story first.
                self.record.news_after = self.record.restores.is_none().then_some(0);
                self.follow_containers();
                self.sandbox = SandboxSeen::Running;
                self.sandbox_failures = 0;
                self.record.sandbox_running = true;
                let status = &mut self.record.group.status;
                status.started_at_ms.get_or_insert(now_ms());
                if status.reason == view::SANDBOX_FAILED {
                    status.reason.clear();
                    status.message.clear();
                }
            }
            Err(error) => {
                if self.record.restores.is_some() {
                    return self.restore_failed(&error.chain());
                }
                let words = self.parts.bundle(&self.id).last_words();
                let mut message = format!("The sandbox did not start: {}", error.chain());
                if !words.is_empty() {
                    message = format!("{message} ({words})");
                }
                self.sandbox_failures = self.sandbox_failures.saturating_add(1);
                self.event(
                    EventKind::Warning,
                    "FailedCreatePodSandBox",
                    message.clone(),
                    None,
                );
                let status = &mut self.record.group.status;
                view::SANDBOX_FAILED.clone_into(&mut status.reason);
                status.message = message;
                self.sandbox = SandboxSeen::Dead { not_before_ms: 0 };
            }
        }
    }

    fn sandbox_stopped(&mut self, result: Result<()>) {
        self.sandbox = match result {
            Ok(()) => SandboxSeen::Absent {
                not_before_ms: now_ms() + backoff::delay_ms(self.sandbox_failures),
            },
            Err(error) => {
                let message = format!("The sandbox was not cleared away: {}", error.chain());
                self.event(EventKind::Warning, "FailedKillPod", message, None);
                SandboxSeen::Dead {
                    not_before_ms: now_ms() + RETRY_MS,
                }
            }
        };
    }

    /// The group cannot go on from its snapshot: what was in its memory is lost, so it does not begin anew either.
    fn restore_failed(&mut self, why: &str) {
        tracing::warn!(group_id = %self.id, why, "a group was not restored");
        self.record.restores = None;
        self.sandbox = SandboxSeen::Dead { not_before_ms: 0 };
        self.record.sandbox_running = false;
        let message = format!("The group does not go on from its snapshot: {why}");
        self.event(EventKind::Warning, view::RESTORE_FAILED, message.clone(), None);
        for index in 0..self.containers.len() {
            if !self.containers[index].seen.is_done() {
                self.containers[index].cease();
                self.record.containers[index].is_captured = false;
                self.record.containers[index].done = true;
                self.containers[index].seen = ContainerSeen::Done { well: false };
                let status = &mut self.record.group.status.containers[index];
                view::terminated(status, 137, None, view::RESTORE_FAILED, message.clone(), now_ms());
            }
        }
        let status = &mut self.record.group.status;
        view::RESTORE_FAILED.clone_into(&mut status.reason);
        status.message = message;
    }

    /// The sandbox ended with all that ran in it.
    fn sandbox_died(&mut self, why: &str) {
        if self.record.restores.is_some() {
            return self.restore_failed(why);
        }
        tracing::warn!(group_id = %self.id, why, "sandbox died");
        self.files_are_fresh();
        self.sandbox = SandboxSeen::Dead { not_before_ms: 0 };
        self.record.sandbox_running = false;
        self.is_resizing = false;
        let message = format!("The sandbox died: {why}");
        self.event(EventKind::Warning, view::SANDBOX_DIED, message.clone(), None);
        if !self.record.failed {
            let status = &mut self.record.group.status;
            view::SANDBOX_DIED.clone_into(&mut status.reason);
            status.message.clone_from(&message);
        }
        for index in 0..self.containers.len() {
            let recorded = matches!(
                self.record.group.status.containers[index].state,
                ContainerState::Running { .. }
            );
            match self.containers[index].seen {
                seen if seen.is_alive() => {}
                ContainerSeen::Idle { .. } if recorded => {}
                _ => continue,
            }
            self.finish(index, 137, None, view::SANDBOX_DIED, message.clone(), now_ms());
        }
        self.initialize_again();
    }

    fn pulled(&mut self, index: usize, image: &str, result: Result<LocalImage>) {
        if self.containers[index].seen != ContainerSeen::Pulling {
            return;
        }
        if self.spec.containers[index].image != image {
            // It is to be another one by now.
            self.containers[index].seen = ContainerSeen::Idle { not_before_ms: 0 };
            return;
        }
        match result {
            Ok(local) => {
                let wait = self.wait_reason();
                let message = if local.was_present {
                    format!("Container image \"{image}\" already present on machine")
                } else {
                    format!("Successfully pulled image \"{image}\"")
                };
                let status = &mut self.record.group.status;
                status.containers[index].image_digest = Some(local.digest.clone());
                view::pulled(&mut status.containers[index], wait);
                self.event(EventKind::Normal, "Pulled", message, Some(index));
                self.containers[index].image = Some(Arc::new(local));
                self.containers[index].seen = ContainerSeen::Pulled;
            }
            Err(error) => {
                let kept = &mut self.record.containers[index];
                kept.failures = kept.failures.saturating_add(1);
                let delay_ms = backoff::delay_ms(kept.failures);
                kept.not_before_ms = now_ms() + delay_ms;
                self.containers[index].seen = ContainerSeen::Idle {
                    not_before_ms: kept.not_before_ms,
                };
                let message = format!("Failed to pull image \"{image}\": {}", error.chain());
                self.event(EventKind::Warning, "Failed", message.clone(), Some(index));
                let again = format!("Back-off pulling image \"{image}\"");
                self.event(EventKind::Normal, "BackOff", again, Some(index));
                let status = &mut self.record.group.status.containers[index];
                view::waiting(status, view::PULL_BACK_OFF, message);
            }
        }
    }

    fn started(&mut self, index: usize, result: Result<u64>) {
        let name = self.spec.containers[index].name.clone();
        match result {
            Ok(at_ms) => {
                if std::mem::take(&mut self.record.containers[index].is_captured) {
                    let message = format!("Container {name} goes on from a snapshot");
                    self.event(EventKind::Normal, "Restored", message, Some(index));
                    if !self
                        .record
                        .containers
                        .iter()
                        .any(|container| container.is_captured)
                    {
                        self.record.restores = None;
                    }
                } else {
                    let message = format!("Created container {name}");
                    self.event(EventKind::Normal, "Created", message, Some(index));
                    let message = format!("Started container {name}");
                    self.event(EventKind::Normal, "Started", message, Some(index));
                }
                let status = &mut self.record.group.status;
                let status = &mut status.containers[index];
                view::running(status, &self.spec.containers[index], at_ms);
                self.containers[index].seen = ContainerSeen::Running {
                    has_started: status.started,
                };
                self.apply_health(index);
                if let Some(run) = self.run_of(index) {
                    self.jobs.spawn(run.watch());
                }
            }
            Err(error) if self.record.containers[index].is_captured => {
                self.restore_failed(&error.chain());
            }
            Err(error) => {
                let message = error.chain();
                let text = format!("Error starting container {name}: {message}");
                self.event(EventKind::Warning, "Failed", text, Some(index));
                self.finish(index, 128, None, "StartError", message, now_ms());
            }
        }
    }

    /// Its volumes are tried again, whatever the restart policy: it never ran.
    fn not_mounted(&mut self, index: usize, error: &Error) {
        let kept = &mut self.record.containers[index];
        kept.runs = kept.runs.saturating_sub(1);
        kept.failures = kept.failures.saturating_add(1);
        kept.not_before_ms = now_ms() + backoff::delay_ms(kept.failures);
        self.containers[index].seen = ContainerSeen::Idle {
            not_before_ms: kept.not_before_ms,
        };
        if self.is_ending() {
            return;
        }
        let message = error.chain();
        self.event(
            EventKind::Warning,
            view::MOUNT_FAILED,
            message.clone(),
            Some(index),
        );
        let status = &mut self.record.group.status.containers[index];
        view::waiting(status, view::MOUNT_FAILED, message);
    }

    fn ended(&mut self, index: usize, ended: jobs::Ended) {
        let signal = (129..=192).contains(&ended.status).then(|| ended.status - 128);
        let (reason, own) = match (ended.end.oom_killed, ended.status) {
            (true, _) => ("OOMKilled", "The container exceeded its memory limit"),
            (false, 0) => ("Completed", ""),
            (false, _) => ("Error", ""),
        };
        let message = if ended.end.message.is_empty() {
            own.to_owned()
        } else {
            ended.end.message
        };
        // What was ended for being unhealthy has failed, whatever it says itself.
        self.containers[index].is_unhealthy = ended.end.cause.is_some();
        self.finish(index, ended.status, signal, reason, message, ended.at_ms);
    }

    /// Notes the end of a run and decides about the next.
    fn finish(
        &mut self,
        index: usize,
        exit_code: i32,
        signal: Option<i32>,
        reason: &str,
        message: String,
        at_ms: u64,
    ) {
        self.containers[index].cease();
        let status = &mut self.record.group.status.containers[index];
        let started_at_ms = view::started_at(status).unwrap_or(at_ms);
        view::terminated(status, exit_code, signal, reason, message, at_ms);
        let role = self.spec.containers[index].lifecycle.role;
        let policy = role.restart_policy(self.spec.restart_policy);
        let is_unhealthy = std::mem::take(&mut self.containers[index].is_unhealthy);
        let counted = if is_unhealthy { exit_code.max(1) } else { exit_code };
        if self.is_leaving(index) {
            // It is the update that decides what comes next.
            let well = exit_code == 0;
            self.containers[index].seen = ContainerSeen::Done { well };
            return;
        }
        if self.is_ending() || !backoff::restarts(policy, counted) {
            let well = exit_code == 0;
            self.containers[index].seen = ContainerSeen::Done { well };
            self.record.containers[index].done = true;
            let status = &mut self.record.group.status.containers[index];
            status.ready = role == Role::Init && well;
            if role == Role::Init && !well && !self.is_stopped() && reason != view::SANDBOX_DIED {
                self.init_failed(index);
            }
            return;
        }
        let status = &mut self.record.group.status.containers[index];
        let kept = &mut self.record.containers[index];
        let failures = backoff::failures_before(kept.failures, at_ms.saturating_sub(started_at_ms));
        let delay_ms = backoff::delay_ms(failures);
        kept.failures = failures.saturating_add(1);
        kept.not_before_ms = now_ms() + delay_ms;
        self.containers[index].seen = ContainerSeen::Idle {
            not_before_ms: kept.not_before_ms,
        };
        status.previous = Some(status.state.clone());
        if delay_ms > 0 {
            let name = &self.spec.containers[index].name;
            let text = format!("back-off {}s restarting failed container {name}", delay_ms / 1000);
            view::waiting(status, "CrashLoopBackOff", text);
            let message = format!("Back-off restarting failed container {name}");
            self.event(EventKind::Warning, "BackOff", message, Some(index));
        }
    }

    fn event(&mut self, kind: EventKind, reason: &str, message: String, container: Option<usize>) {
        let name = container.map(|index| self.spec.containers[index].name.as_str());
        let events = &mut self.record.group.status.events;
        super::events::push(events, now_ms(), kind, reason, message, name);
    }

    /// Its own addresses, or those that CNI plugins gave its sandbox.
    fn addresses(&self) -> Option<Addresses> {
        let given = || self.parts.network.given(&self.id);
        self.record.addresses().or_else(given)
    }

    /// Writes the state down, then shows it.
    async fn save(&mut self) {
        let situation = self.situation();
        self.record.group.status.show_addresses(self.addresses());
        view::settle(&mut self.record.group.status, &self.spec, situation, now_ms());
        while self.saved.as_ref() != Some(&self.record) {
            let (store, record) = (self.parts.store.clone(), self.record.clone());
            let written = tokio::task::spawn_blocking(move || store.put(&record)).await;
            match written {
                Ok(Ok(())) => self.saved = Some(self.record.clone()),
                Ok(Err(error)) => {
                    tracing::error!(group_id = %self.id, error = %error.chain(), "the store does not take a state");
                    tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
                }
                Err(error) => {
                    tracing::error!(group_id = %self.id, %error, "a write to the store ended badly");
                    tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
                }
            }
        }
        let connection = self
            .connection
            .clone()
            .filter(|_| self.sandbox == SandboxSeen::Running);
        self.published.send_if_modified(|published| {
            let changed = published.group != self.record.group
                || published.restores != self.record.restores
                || published.update.as_deref() != self.record.update.as_ref()
                || published.connection.is_some() != connection.is_some();
            if changed {
                *published = Arc::new(Published {
                    group: self.record.group.clone(),
                    restores: self.record.restores.clone(),
                    update: self.record.update.clone().map(Arc::new),
                    connection,
                });
            }
            changed
        });
    }
}
