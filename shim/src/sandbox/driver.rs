//! The task that owns a sandbox. Actions come in through a bounded queue and take no time; what takes time runs beside
//! the driver as an operation, and its completion changes the state.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::timeout,
};

use super::{
    container::Container,
    spec::{SandboxSpec, StartKind},
    state::{BadTransition, ProcessEvent, ProcessState, SandboxEvent, SandboxState},
    status::{KILLED_EXIT_STATUS, SandboxExit, SandboxStatus},
    steps::{self, HostConfig, RunningVm, StandBy, StartError},
};
use crate::{
    error::{Error, ErrorKind, Result},
    events::{Publisher, TaskEvent},
    guest::{CallError, Guest, GuestEvent, ProcessEnd, ProcessKey, SandboxStats, VolumeFiles},
    persist::{Bundle, VMM_PID_FILE},
    resource::volumes::VolumeSpec,
    vmm::VmExit,
};

/// Actions that wait for the driver.
const MAX_WAITING_ACTIONS: usize = 64;
/// From a guest's orderly end, or the loss of its connection, to the end of its VM; then it is killed.
pub(super) const VM_EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// The guest is asked for events no more often.
const EVENTS_INTERVAL: Duration = Duration::from_millis(100);

/// The signal that asks a process to end (signal(7)).
const SIGTERM: u32 = 15;

/// Something the driver does at once.
pub(super) type Action = Box<dyn FnOnce(&mut Driver) + Send>;
/// Where an answer goes. The asker may have given up; then the answer goes nowhere.
pub(super) type Reply<T> = oneshot::Sender<Result<T>>;

/// See the module.
#[derive(Debug)]
pub struct Driver {
    pub(super) bundle: Bundle,
    pub(super) publisher: Publisher,
    pub(super) containers: HashMap<String, Container>,
    pub(super) creating: HashSet<String>,
    pub(super) vm: Option<RunningVm>,
    /// A guest that waits for its identity. Dropping it ends it.
    standby: Option<StandBy>,
    /// A snapshot is being taken: nothing new begins.
    pub(super) is_capturing: bool,
    /// The VM is being resized: no snapshot is taken meanwhile.
    pub(super) is_resizing: bool,
    /// What the guest writes to at first was looked at.
    pub(super) has_recorded_pages: bool,
    host: HostConfig,
    pub(super) spec: Option<SandboxSpec>,
    cancel_start: Option<oneshot::Sender<()>>,
    /// The guest API is gone while the VM was alive.
    guest_lost: bool,
    pub(super) status: watch::Sender<SandboxStatus>,
    operations: JoinSet<Action>,
}

/// Begins to drive a sandbox that has no VM yet.
pub(super) fn spawn(
    bundle: Bundle,
    host: HostConfig,
    publisher: Publisher,
) -> (mpsc::Sender<Action>, watch::Receiver<SandboxStatus>) {
    let (actions, waiting) = mpsc::channel(MAX_WAITING_ACTIONS);
    let (status, seen) = watch::channel(SandboxStatus {
        state: SandboxState::Created,
        created_at: SystemTime::now(),
        vmm_pid: None,
        guest_ready_us: None,
        start_us: None,
        start_phases_us: None,
        start_kind: None,
        template_refused: None,
        pause_us: None,
        shape: None,
        exit: None,
        shutdown: false,
    });
    let driver = Driver {
        bundle,
        publisher,
        containers: HashMap::new(),
        creating: HashSet::new(),
        vm: None,
        standby: None,
        is_capturing: false,
        is_resizing: false,
        has_recorded_pages: false,
        host,
        spec: None,
        cancel_start: None,
        guest_lost: false,
        status,
        operations: JoinSet::new(),
    };
    tokio::spawn(driver.run(waiting));
    (actions, seen)
}

/// Wraps a completion.
pub(super) fn complete(action: impl FnOnce(&mut Driver) + Send + 'static) -> Action {
    Box::new(action)
}

/// A refused transition as an error of the request.
pub(super) fn refused(what: impl std::fmt::Display, error: BadTransition) -> Error {
    Error::with_source(ErrorKind::FailedPrecondition, what.to_string(), error)
}

/// How a process ended that died with its VM, now.
pub(super) fn killed() -> ProcessEnd {
    ProcessEnd {
        exit_status: KILLED_EXIT_STATUS,
        exited_at: SystemTime::now(),
    }
}

impl Driver {
    async fn run(mut self, mut waiting: mpsc::Receiver<Action>) {
        loop {
            let action = tokio::select! {
                Some(done) = self.operations.join_next() => match done {
                    Ok(action) => action,
                    Err(error) => {
                        tracing::error!(%error, "an operation panicked");
                        continue;
                    }
                },
                action = waiting.recv() => match action {
                    Some(action) => action,
                    // No handle is left; the VM is killed with its owner.
                    None => return,
                },
            };
            action(&mut self);
        }
    }

    /// Begins an operation.
    pub(super) fn begin(&mut self, operation: impl Future<Output = Action> + Send + 'static) {
        self.operations.spawn(operation);
    }

    pub(super) fn state(&self) -> SandboxState {
        self.status.borrow().state
    }

    pub(super) fn subscribe_status(&self) -> watch::Receiver<SandboxStatus> {
        self.status.subscribe()
    }

    /// The VM, when containers can be worked with.
    pub(super) fn ready_vm(&self) -> Result<&RunningVm> {
        let state = self.state();
        match &self.vm {
            Some(vm) if matches!(state, SandboxState::Ready | SandboxState::Stopping) => Ok(vm),
            _ => {
                let kind = match state {
                    SandboxState::Created | SandboxState::Starting => ErrorKind::FailedPrecondition,
                    _ => ErrorKind::Unavailable,
                };
                Err(Error::new(
                    kind,
                    format!("the sandbox is {}, not ready", state.name()),
                ))
            }
        }
    }

    /// The VMM's process id, as tasks show it.
    pub(super) fn vmm_pid(&self) -> u32 {
        self.status.borrow().vmm_pid.unwrap_or_default()
    }

    fn transition(&mut self, event: SandboxEvent) -> std::result::Result<(), BadTransition> {
        let next = self.state().after(event)?;
        self.status.send_modify(|status| status.state = next);
        Ok(())
    }

    /// Keeps what the sandbox is to be.
    pub(super) fn create(&mut self, spec: SandboxSpec) -> Result<()> {
        if self.state() != SandboxState::Created {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!("create sandbox: it is {}", self.state().name()),
            ));
        }
        let waits = self.standby.is_some() && !spec.is_standby;
        if let Some(waiting) = self.spec.as_ref().filter(|_| waits) {
            spec.continues(waiting)?;
        } else if self.spec.is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                "create sandbox: it was created before",
            ));
        }
        spec.validate()?;
        self.spec = Some(spec);
        Ok(())
    }

    /// Has a guest wait. Answers once it does.
    pub(super) fn stand_by(&mut self, reply: Reply<()>) {
        let Some(spec) = self.spec.clone() else {
            let error = Error::new(
                ErrorKind::FailedPrecondition,
                "stand by: CreateSandbox comes first",
            );
            return drop(reply.send(Err(error)));
        };
        let (cancel, cancelled) = oneshot::channel();
        self.cancel_start = Some(cancel);
        let (bundle, host) = (self.bundle.clone(), self.host.clone());
        self.begin(async move {
            let outcome = steps::stand_by(&spec, &bundle, &host, cancelled).await;
            complete(move |driver| driver.stands_by(outcome, reply))
        });
    }

    fn stands_by(&mut self, outcome: std::result::Result<StandBy, StartError>, reply: Reply<()>) {
        self.cancel_start = None;
        let answer = match outcome {
            // It may have been stopped meanwhile.
            Ok(_) if self.state() != SandboxState::Created => Err(Error::new(
                ErrorKind::Unavailable,
                "the sandbox was stopped while it started",
            )),
            Ok(standby) => {
                self.standby = Some(standby);
                Ok(())
            }
            Err(failed) => Err(self.start_failed(failed)),
        };
        drop(reply.send(answer));
    }

    /// Boots the VM. Answers once the guest is configured.
    pub(super) fn start(&mut self, reply: Reply<()>) {
        let Some(spec) = self.spec.clone() else {
            let error = Error::new(
                ErrorKind::FailedPrecondition,
                "start sandbox: CreateSandbox comes first",
            );
            return drop(reply.send(Err(error)));
        };
        if spec.is_standby {
            let text = "start sandbox: its guest stands by, and CreateSandbox must tell it the rest first";
            return drop(reply.send(Err(Error::new(ErrorKind::FailedPrecondition, text))));
        }
        if let Err(error) = self.transition(SandboxEvent::Start) {
            return drop(reply.send(Err(refused("start sandbox", error))));
        }
        let (cancel, cancelled) = oneshot::channel();
        self.cancel_start = Some(cancel);
        let (bundle, host, begun) = (self.bundle.clone(), self.host.clone(), Instant::now());
        if let StartKind::Capture { directory, .. } = &spec.start {
            let directory = directory.clone();
            return self.begin(async move {
                let outcome = steps::capture(directory, spec, bundle, host, cancelled).await;
                complete(move |driver| driver.captured(outcome, reply))
            });
        }
        if let Some(standby) = self.standby.take() {
            return self.begin(async move {
                let outcome = steps::introduce(standby, &spec, &bundle, &host, cancelled).await;
                complete(move |driver| driver.started(outcome, begun, reply))
            });
        }
        self.begin(async move {
            let outcome = steps::start(spec, bundle, host, cancelled).await;
            complete(move |driver| driver.started(outcome, begun, reply))
        });
    }

    /// The VM became a template and is gone.
    fn captured(&mut self, outcome: std::result::Result<(), StartError>, reply: Reply<()>) {
        self.cancel_start = None;
        let answer = match outcome {
            Ok(()) => {
                self.end("captured", String::new(), 0);
                Ok(())
            }
            Err(failed) => Err(self.start_failed(failed)),
        };
        drop(reply.send(answer));
    }

    fn start_failed(&mut self, StartError { error, exit, .. }: StartError) -> Error {
        tracing::error!(error = error.chain(), "start failed");
        let reason = match exit {
            Some(VmExit::Reported(vmm::control::ExitReason::Killed)) | None => "start_failed",
            Some(exit) => exit.name(),
        };
        self.end(reason, error.chain(), KILLED_EXIT_STATUS);
        error
    }

    fn started(
        &mut self,
        outcome: std::result::Result<RunningVm, StartError>,
        begun: Instant,
        reply: Reply<()>,
    ) {
        self.cancel_start = None;
        let vm = match outcome {
            Ok(vm) => vm,
            Err(failed) => {
                let error = self.start_failed(failed);
                return drop(reply.send(Err(error)));
            }
        };
        self.transition(SandboxEvent::Started)
            .expect("only an ending start leaves Starting, and this is the start");
        let start_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.status.send_modify(|status| {
            status.vmm_pid = vm.vmm.pid();
            status.guest_ready_us = Some(vm.guest_ready_us);
            status.start_us = Some(start_us);
            status.start_phases_us = Some(vm.phases.text());
            status.shape = Some(vm.shape.clone());
            status.start_kind = Some(vm.start_kind);
            status.template_refused.clone_from(&vm.template_refused);
        });
        tracing::info!(vmm_pid = ?vm.vmm.pid(), guest_ready_us = vm.guest_ready_us, start_us, "sandbox is ready");
        let client = vm.client();
        self.vm = Some(vm);
        self.begin(async move {
            let exit = client.exited().await;
            complete(move |driver| driver.vm_exited(&exit))
        });
        self.watch_events(0);
        drop(reply.send(Ok(())));
    }

    /// Begins the end; [`SandboxStatus::state`] tells when it is reached. Without grace everything is killed.
    pub(super) fn stop(&mut self, grace: Duration) {
        match self.state() {
            SandboxState::Created => {
                self.cancel_start = None;
                self.standby = None;
                self.end("killed", String::new(), 0);
            }
            SandboxState::Starting => {
                if let Some(cancel) = self.cancel_start.take() {
                    let _ = cancel.send(());
                }
            }
            SandboxState::Ready => {
                self.transition(SandboxEvent::Stop).expect("Ready can stop");
                self.shut_down(grace);
            }
            SandboxState::Stopping if grace.is_zero() => self.kill_vm(),
            SandboxState::Stopping | SandboxState::Stopped => {}
        }
    }

    fn shut_down(&mut self, grace: Duration) {
        let Some(vm) = self.vm.as_ref().filter(|_| !grace.is_zero()) else {
            return self.kill_vm();
        };
        let (guest, client) = (vm.guest.clone(), vm.client());
        let running: Vec<_> = self
            .containers
            .values_mut()
            .flat_map(Container::processes_mut)
            .filter(|process| process.state() == ProcessState::Running)
            .map(|process| (process.key.clone(), process.subscribe()))
            .collect();
        self.begin(async move {
            let asked = tokio::select! {
                asked = end_orderly(&guest, running, grace) => asked,
                _ = client.exited() => Ok(()),
            };
            if let Err(CallError::Refused(error)) = asked {
                tracing::warn!(error = error.chain(), "the guest refuses to shut down");
            } else {
                // When the guest's answer is lost, the VM most likely ends all the same.
                let _ = timeout(VM_EXIT_TIMEOUT, client.exited()).await;
            }
            complete(Self::kill_vm)
        });
    }

    /// Kills the VM, if there is one; its end is reported as any other.
    pub(super) fn kill_vm(&mut self) {
        if let Some(vm) = &mut self.vm {
            vm.vmm.kill();
        }
    }

    /// The guest API is gone: the VM must end by itself soon, or is killed.
    pub(super) fn lose_guest(&mut self) {
        if let Some(vm) = &self.vm
            && !self.guest_lost
        {
            self.guest_lost = true;
            let client = vm.client();
            self.begin(async move {
                let ended = timeout(VM_EXIT_TIMEOUT, client.exited()).await.is_ok();
                complete(move |driver: &mut Self| {
                    if !ended {
                        tracing::error!("the guest API is gone and the VM runs on: it is killed");
                        driver.kill_vm();
                    }
                })
            });
        }
    }

    fn vm_exited(&mut self, exit: &VmExit) {
        let stopping = self.state() == SandboxState::Stopping;
        let was_killed = matches!(exit, VmExit::Reported(vmm::control::ExitReason::Killed));
        let reason = if self.guest_lost && was_killed && !stopping {
            "guest_lost"
        } else {
            exit.name()
        };
        let orderly = stopping && matches!(reason, "shutdown" | "reset" | "killed");
        self.vm = None;
        self.bundle.remove(VMM_PID_FILE);
        // Those that were started end by their own watches.
        for process in self.containers.values_mut().flat_map(Container::processes_mut) {
            if process.state() == ProcessState::Created {
                process
                    .apply(ProcessEvent::Ended(killed()))
                    .expect("Created can end");
            }
        }
        self.end(
            reason,
            exit.message(),
            if orderly { 0 } else { KILLED_EXIT_STATUS },
        );
    }

    fn end(&mut self, reason: &'static str, message: String, exit_status: u32) {
        if self.transition(SandboxEvent::Ended).is_err() {
            return;
        }
        tracing::info!(reason, message, exit_status, "sandbox has ended");
        let exit = SandboxExit {
            reason,
            message,
            exited_at: SystemTime::now(),
            exit_status,
        };
        self.status.send_modify(|status| {
            status.vmm_pid = None;
            status.exit = Some(exit);
        });
    }

    /// Ends the shim after the sandbox.
    pub(super) fn shut_shim_down(&mut self) {
        self.status.send_modify(|status| status.shutdown = true);
    }

    /// Whether the shim has nothing to keep for a caller that drives it by the Task service alone.
    pub(super) fn is_idle(&self) -> bool {
        let no_vm = matches!(self.state(), SandboxState::Created | SandboxState::Stopped);
        no_vm && self.containers.is_empty() && self.creating.is_empty()
    }

    pub(super) fn sandbox_stats(&mut self, reply: Reply<SandboxStats>) {
        let guest = match self.ready_vm() {
            Ok(vm) => vm.guest.clone(),
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let stats = guest.sandbox_stats().await;
            complete(move |_| drop(reply.send(stats)))
        });
    }

    pub(super) fn put_files(&mut self, files: VolumeFiles, reply: Reply<()>) {
        let guest = match self.ready_vm() {
            Ok(vm) => vm.guest.clone(),
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let put = guest.put_files(&files).await;
            complete(move |_| drop(reply.send(put)))
        });
    }

    pub(super) fn attach_volume(&mut self, volume: VolumeSpec, reply: Reply<()>) {
        let begun = self.ready_vm().and_then(|vm| {
            if self.is_capturing {
                let text = "a snapshot of the sandbox is being taken";
                return Err(Error::new(ErrorKind::FailedPrecondition, text));
            }
            Ok((vm.guest.clone(), vm.client(), Arc::clone(&vm.volumes)))
        });
        let (guest, client, volumes) = match begun {
            Ok(begun) => begun,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let attached = volumes.attach(volume, &guest, &client).await;
            complete(move |_| drop(reply.send(attached)))
        });
    }

    /// Waits for the guest's next events, again and again.
    fn watch_events(&mut self, after: u64) {
        let Some(vm) = &self.vm else { return };
        let (guest, client) = (vm.guest.clone(), vm.client());
        let not_before = tokio::time::Instant::now() + EVENTS_INTERVAL;
        self.begin(async move {
            tokio::select! {
                events = async {
                    tokio::time::sleep_until(not_before).await;
                    guest.events(after).await
                } => complete(move |driver| driver.guest_events(after, events)),
                _ = client.exited() => complete(|_| ()),
            }
        });
    }

    fn guest_events(&mut self, after: u64, events: std::result::Result<Vec<GuestEvent>, CallError>) {
        let events = match events {
            Ok(events) => events,
            Err(CallError::Lost(error)) => {
                tracing::debug!(error = error.chain(), "no more guest events");
                return self.lose_guest();
            }
            Err(CallError::Refused(error)) => {
                return tracing::warn!(error = error.chain(), "the guest gives no events");
            }
        };
        let mut last = after;
        for event in events {
            if event.sequence <= last {
                return tracing::warn!(
                    sequence = event.sequence,
                    last,
                    "guest events run backwards: ignored from now on"
                );
            }
            last = event.sequence;
            if event.oom && self.containers.contains_key(&event.container_id) {
                self.publisher.publish(TaskEvent::Oom {
                    container_id: event.container_id,
                });
            }
        }
        self.watch_events(last);
    }
}

/// Asks processes to end and waits for them as long as `grace` allows, so that their exit codes and last output arrive;
/// then has the guest end the rest and power off.
async fn end_orderly(
    guest: &Guest,
    running: Vec<(ProcessKey, watch::Receiver<Option<ProcessEnd>>)>,
    grace: Duration,
) -> std::result::Result<(), CallError> {
    let deadline = tokio::time::Instant::now() + grace;
    let mut ends = JoinSet::new();
    for (key, mut ended) in running {
        let guest = guest.clone();
        ends.spawn(async move {
            // A refusal means that it has ended by itself.
            let _ = guest.signal_process(&key, SIGTERM, false).await;
            // An error means that it was deleted.
            let _ = ended.wait_for(Option::is_some).await;
        });
    }
    let all = async { while ends.join_next().await.is_some() {} };
    // Those that take longer are killed by the guest.
    let _ = tokio::time::timeout_at(deadline, all).await;
    guest
        .shutdown(deadline.saturating_duration_since(tokio::time::Instant::now()))
        .await
}
