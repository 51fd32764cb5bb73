//! The driver's work with containers and processes.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::SystemTime};

use tokio::sync::watch;

use super::{
    container::{Container, Process},
    driver::{Driver, Reply, complete, killed, refused},
    snapshot::{CapturedContainer, SnapshotRecord},
    spec::{ContainerSpec, ExecSpec, MEMORY_FILE, StartKind, WRITTEN_FILE, check_id},
    state::{ProcessEvent, ProcessState, SandboxState},
    status::{ProcessPhase, ProcessStatus, SandboxStatus},
    steps,
};
use crate::{
    error::{Error, ErrorKind, Result},
    events::TaskEvent,
    guest::{CallError, ContainerStats, Guest, ProcessEnd, ProcessKey},
    resource::{rootfs::ImageSlice, written},
    stdio::copy::{Outputs, Streams},
    vmm::VmmClient,
};

/// Exit status of a process the guest no longer knows.
const UNKNOWN_EXIT_STATUS: u32 = 255;

impl Driver {
    fn container_mut(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("container {id:?}: there is none of this id"),
            )
        })
    }

    fn process_mut(&mut self, key: &ProcessKey) -> Result<&mut Process> {
        self.container_mut(&key.container_id)?
            .process_mut(&key.exec_id)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{key}: there is none of this id")))
    }

    /// The VM, when something new may begin in it.
    pub(super) fn open_vm(&self) -> Result<(Guest, VmmClient)> {
        let vm = self.ready_vm()?;
        if self.state() == SandboxState::Stopping {
            return Err(Error::new(ErrorKind::Unavailable, "the sandbox is stopping"));
        }
        if self.is_capturing {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "a snapshot of the sandbox is being taken",
            ));
        }
        Ok((vm.guest.clone(), vm.client()))
    }

    /// See [`steps::create_container`] and, for a captured one, [`steps::adopt_container`].
    pub(super) fn create_container(&mut self, spec: ContainerSpec, reply: Reply<u32>) {
        let checked = check_id("id", &spec.id)
            .and_then(|()| self.open_vm())
            .and_then(|open| {
                if self.containers.contains_key(&spec.id) || self.creating.contains(&spec.id) {
                    return Err(Error::new(
                        ErrorKind::AlreadyExists,
                        format!("container {:?} exists", spec.id),
                    ));
                }
                Ok(open)
            });
        let (guest, client) = match checked {
            Ok(open) => open,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let (images, captured) = match self.vm.as_ref() {
            Some(vm) => (Arc::clone(&vm.images), vm.captured.get(&spec.id).cloned()),
            None => return,
        };
        let captured = match (spec.is_captured, captured) {
            (true, None) => {
                let text = format!("checkpoint: the sandbox has no captured container {:?}", spec.id);
                return drop(reply.send(Err(Error::new(ErrorKind::NotFound, text))));
            }
            (false, _) if !self.has_thawed() => {
                let text = "the captured containers come first: create and start each";
                return drop(reply.send(Err(Error::new(ErrorKind::FailedPrecondition, text))));
            }
            (true, captured) => captured,
            (false, _) => None,
        };
        self.creating.insert(spec.id.clone());
        self.begin(async move {
            let outcome = match captured {
                Some(captured) => steps::adopt_container(&spec, &captured, &client, &images).await,
                None => steps::create_container(&spec, &guest, &client, &images).await,
            };
            complete(move |driver| driver.container_created(spec, outcome, reply))
        });
    }

    fn container_created(
        &mut self,
        spec: ContainerSpec,
        outcome: Result<(ImageSlice, Streams)>,
        reply: Reply<u32>,
    ) {
        self.creating.remove(&spec.id);
        // The VM may have ended after the guest's answer; its end has passed this container by.
        let outcome = outcome.and_then(|created| self.ready_vm().map(|_| created));
        let (image, streams) = match outcome {
            Ok(created) => created,
            Err(error) => {
                let error = error.context(format!("create container {:?}", spec.id));
                return drop(reply.send(Err(error)));
            }
        };
        let mut init = Process::new(ProcessKey::init(&spec.id), spec.stdio.clone(), streams);
        init.is_captured = spec.is_captured;
        let container = Container {
            bundle: spec.bundle.clone(),
            init,
            execs: HashMap::new(),
            creating: std::collections::HashSet::new(),
            image,
        };
        self.containers.insert(spec.id.clone(), container);
        let pid = self.vmm_pid();
        self.publisher.publish(TaskEvent::Create { spec, pid });
        drop(reply.send(Ok(pid)));
    }

    pub(super) fn create_exec(&mut self, key: ProcessKey, spec: ExecSpec, reply: Reply<()>) {
        let reserved = check_id("exec_id", &key.exec_id)
            .and_then(|()| self.open_vm())
            .and_then(|open| {
                let container = self.container_mut(&key.container_id)?;
                if container.init.state() != ProcessState::Running {
                    let state = container.init.state().name();
                    let text = format!("{key}: the container is {state}, not running");
                    return Err(Error::new(ErrorKind::FailedPrecondition, text));
                }
                if container.execs.contains_key(&key.exec_id)
                    || !container.creating.insert(key.exec_id.clone())
                {
                    return Err(Error::new(ErrorKind::AlreadyExists, format!("{key} exists")));
                }
                Ok(open)
            });
        let (guest, client) = match reserved {
            Ok(open) => open,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let stdio = spec.stdio.clone();
            let outcome = steps::create_exec(&key, spec, &guest, &client).await;
            complete(move |driver: &mut Self| {
                let vm = driver.ready_vm().map(|_| ());
                let added = driver.container_mut(&key.container_id).and_then(|container| {
                    container.creating.remove(&key.exec_id);
                    let streams = outcome?;
                    vm?;
                    container
                        .execs
                        .insert(key.exec_id.clone(), Process::new(key.clone(), stdio, streams));
                    Ok(())
                });
                let added = added.map_err(|error| error.context(format!("create {key}")));
                if added.is_ok() {
                    driver.publisher.publish(TaskEvent::ExecAdded { key });
                }
                drop(reply.send(added));
            })
        });
    }

    pub(super) fn start_process(&mut self, key: ProcessKey, reply: Reply<u32>) {
        let begun = self.open_vm().and_then(|open| {
            let process = self.process_mut(&key)?;
            process
                .apply(ProcessEvent::Start)
                .map_err(|error| refused(format!("start {key}"), error))?;
            Ok(open)
        });
        let (guest, client) = match begun {
            Ok(open) => open,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let is_captured = self.process_mut(&key).is_ok_and(|process| process.is_captured);
        if is_captured && let Some(vm) = &mut self.vm {
            vm.captured.remove(&key.container_id);
        }
        let thaws = is_captured && self.has_thawed();
        self.begin(async move {
            let outcome = match (is_captured, thaws) {
                (false, _) => guest.start_process(&key).await,
                // It runs, but stands still until the last one is started.
                (true, false) => Ok(()),
                (true, true) => guest.thaw().await,
            };
            complete(move |driver| {
                if thaws && outcome.is_err() {
                    driver.kill_vm();
                }
                driver.process_started(key, outcome, guest, client, reply);
            })
        });
    }

    /// No captured container waits for its start.
    fn has_thawed(&self) -> bool {
        self.vm.as_ref().is_none_or(|vm| vm.captured.is_empty())
    }

    /// Takes a snapshot of the VM with all its containers, which go on.
    pub(super) fn checkpoint(&mut self, directory: PathBuf, reply: Reply<()>) {
        let begun = self.open_vm().and_then(|open| {
            if self.is_resizing {
                let text = "the sandbox is being resized";
                return Err(Error::new(ErrorKind::Unavailable, text));
            }
            let record = self.snapshot_record()?;
            let is_directory = directory.is_absolute() && directory.is_dir();
            if !is_directory {
                let text = format!(
                    "path is {}: give the absolute path of an empty directory",
                    directory.display()
                );
                return Err(Error::new(ErrorKind::InvalidArgument, text));
            }
            Ok((open, record))
        });
        let scratch_path = self.spec.as_ref().map(|spec| spec.scratch_path.clone());
        let ((guest, client), record, scratch_path) = match (begun, scratch_path) {
            (Ok((open, record)), Some(path)) => (open, record, path),
            (Err(error), _) => return drop(reply.send(Err(error))),
            (Ok(_), None) => return,
        };
        self.is_capturing = true;
        self.begin(async move {
            let outcome = steps::checkpoint(directory, record, scratch_path, &guest, &client).await;
            complete(move |driver: &mut Self| {
                driver.is_capturing = false;
                let outcome = outcome.map(|pause| {
                    let pause_us = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
                    tracing::info!(pause_us, "snapshot taken");
                    driver
                        .status
                        .send_modify(|status| status.pause_us = Some(pause_us));
                });
                drop(reply.send(outcome.map_err(|error| error.context("take a snapshot"))));
            })
        });
    }

    /// What a clone is to know, while nothing is in between.
    fn snapshot_record(&self) -> Result<SnapshotRecord> {
        let refuse = |why: String| Err(Error::new(ErrorKind::FailedPrecondition, why));
        let vm = self.ready_vm()?;
        if !self.has_thawed() {
            return refuse("the sandbox itself still waits for its captured containers".to_owned());
        }
        if !vm.volumes.is_empty() {
            return refuse(
                "it has volumes that are files of their own or on servers, which are not captured".to_owned(),
            );
        }
        if let Some(id) = self.creating.iter().next() {
            return refuse(format!("container {id:?} is being created"));
        }
        let mut captured = HashMap::new();
        for (id, container) in &self.containers {
            match container.init.state() {
                ProcessState::Running => {
                    let container = CapturedContainer {
                        partition: container.image.slice().partition,
                        terminal: container.init.stdio.terminal,
                    };
                    captured.insert(id.clone(), container);
                }
                ProcessState::Ended(_) => {}
                state => return refuse(format!("container {id:?} is {}", state.name())),
            }
        }
        if captured.is_empty() {
            return refuse("no container runs".to_owned());
        }
        Ok(SnapshotRecord::new(
            vm.shape.clone(),
            vm.scratch_bytes,
            vm.images.captured(),
            captured,
        ))
    }

    /// A process of the group runs: what its guest wrote to up to here, all those made from the same template will.
    fn record_written_pages(&mut self) {
        let Some(StartKind::Template { directory, .. }) = self.spec.as_ref().map(|spec| &spec.start) else {
            return;
        };
        let is_from_template = self.vm.as_ref().is_some_and(|vm| vm.template_refused.is_none());
        if !is_from_template || std::mem::replace(&mut self.has_recorded_pages, true) {
            return;
        }
        let (memory, list) = (directory.join(MEMORY_FILE), directory.join(WRITTEN_FILE));
        let pid = self.vmm_pid();
        // Nobody waits for it, and without it guests are only slower.
        drop(tokio::task::spawn_blocking(move || {
            if let Err(error) = written::record(pid, &memory, &list) {
                tracing::warn!(%error, "no list of the pages that guests of this template write to");
            }
        }));
    }

    fn process_started(
        &mut self,
        key: ProcessKey,
        outcome: Result<()>,
        guest: Guest,
        client: VmmClient,
        reply: Reply<u32>,
    ) {
        let pid = self.vmm_pid();
        let Ok(process) = self.process_mut(&key) else {
            let error = Error::new(ErrorKind::NotFound, format!("{key} was deleted while it started"));
            return drop(reply.send(Err(error)));
        };
        if let Err(error) = outcome {
            let exit_status = match error.kind() {
                ErrorKind::NotFound => 127,
                ErrorKind::PermissionDenied => 126,
                ErrorKind::InvalidArgument | ErrorKind::FailedPrecondition => 128,
                _ => killed().exit_status,
            };
            let end = ProcessEnd {
                exit_status,
                exited_at: SystemTime::now(),
            };
            process
                .apply(ProcessEvent::Ended(end))
                .expect("a starting process can end");
            return drop(reply.send(Err(error.context(format!("start {key}")))));
        }
        process
            .apply(ProcessEvent::Started)
            .expect("nothing but this start leaves Starting");
        let outputs = process.streams.take_outputs();
        self.publisher.publish(TaskEvent::Start {
            key: key.clone(),
            pid,
        });
        drop(reply.send(Ok(pid)));
        self.record_written_pages();
        let sandbox = self.subscribe_status();
        self.begin(watch_end(key, outputs, guest, client, sandbox));
    }

    fn process_ended(&mut self, key: &ProcessKey, end: ProcessEnd, outputs: Outputs) {
        let pid = self.vmm_pid();
        // Published first: who waits for the end may delete at once.
        self.publisher.publish(TaskEvent::Exit {
            key: key.clone(),
            pid,
            end,
        });
        if let Ok(process) = self.process_mut(key) {
            process.stalled = Some(outputs);
            process
                .apply(ProcessEvent::Ended(end))
                .expect("a running process can end");
        }
    }

    pub(super) fn delete_process(&mut self, key: ProcessKey, reply: Reply<(u32, ProcessEnd)>) {
        let guest = self.ready_vm().ok().map(|vm| vm.guest.clone());
        let begun = self.process_mut(&key).and_then(|process| {
            let deleted = process.apply(ProcessEvent::Delete(killed()));
            deleted.map_err(|error| refused(format!("delete {key}"), error))
        });
        if let Err(error) = begun {
            return drop(reply.send(Err(error)));
        }
        self.begin(async move {
            let outcome = match guest {
                Some(guest) => guest.delete_process(&key).await,
                None => Ok(()),
            };
            complete(move |driver| driver.process_deleted(&key, outcome, reply))
        });
    }

    fn process_deleted(&mut self, key: &ProcessKey, outcome: Result<()>, reply: Reply<(u32, ProcessEnd)>) {
        let gone = self.ready_vm().is_err();
        let pid = self.vmm_pid();
        let process = match self.process_mut(key) {
            Ok(process) => process,
            Err(error) => return drop(reply.send(Err(error))),
        };
        match outcome {
            Err(error) if error.kind() != ErrorKind::NotFound && !gone => {
                process
                    .apply(ProcessEvent::DeleteFailed)
                    .expect("it is being deleted");
                drop(reply.send(Err(error.context(format!("delete {key}")))));
            }
            _ => {
                let end = process.state().end().expect("what is being deleted has ended");
                if key.is_init() {
                    self.containers.remove(&key.container_id);
                } else if let Ok(container) = self.container_mut(&key.container_id) {
                    container.execs.remove(&key.exec_id);
                }
                self.publisher.publish(TaskEvent::Delete {
                    key: key.clone(),
                    pid,
                    end,
                });
                drop(reply.send(Ok((pid, end))));
            }
        }
    }

    pub(super) fn signal_process(&mut self, key: ProcessKey, signal: u32, all: bool, reply: Reply<()>) {
        let checked = self.process_mut(&key).and_then(|process| match process.state() {
            // What containerd's clients look for.
            ProcessState::Ended(_) | ProcessState::Deleting(_) => Err(Error::new(
                ErrorKind::NotFound,
                format!("signal {key}: process already finished"),
            )),
            _ => Ok(()),
        });
        let guest = match checked.and_then(|()| self.ready_vm().map(|vm| vm.guest.clone())) {
            Ok(guest) => guest,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let outcome = guest.signal_process(&key, signal, all && key.is_init()).await;
            complete(move |driver: &mut Self| {
                let ended = driver
                    .process_mut(&key)
                    .is_ok_and(|process| process.state().end().is_some());
                let outcome = match outcome {
                    Err(error) if ended => Err(Error::with_source(
                        ErrorKind::NotFound,
                        format!("signal {key}: process already finished"),
                        error,
                    )),
                    other => other.map_err(|error| error.context(format!("signal {key}"))),
                };
                drop(reply.send(outcome));
            })
        });
    }

    pub(super) fn resize_terminal(&mut self, key: ProcessKey, rows: u32, columns: u32, reply: Reply<()>) {
        let checked = self.process_mut(&key).and_then(|process| {
            if process.stdio.terminal {
                Ok(())
            } else {
                Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    format!("resize {key}: it has no terminal"),
                ))
            }
        });
        let guest = match checked.and_then(|()| self.ready_vm().map(|vm| vm.guest.clone())) {
            Ok(guest) => guest,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let outcome = guest.resize_terminal(&key, rows, columns).await;
            complete(move |_| drop(reply.send(outcome)))
        });
    }

    pub(super) fn close_stdin(&mut self, key: &ProcessKey) -> Result<()> {
        self.process_mut(key).map(|process| process.streams.close_stdin())
    }

    pub(super) fn list_processes(&mut self, container_id: String, reply: Reply<Vec<u32>>) {
        let found = self.container_mut(&container_id).map(drop);
        let guest = match found.and_then(|()| self.ready_vm().map(|vm| vm.guest.clone())) {
            Ok(guest) => guest,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let pids = guest.list_processes(&container_id).await;
            complete(move |_| drop(reply.send(pids)))
        });
    }

    pub(super) fn container_stats(&mut self, container_id: String, reply: Reply<ContainerStats>) {
        let found = self.container_mut(&container_id).map(drop);
        let guest = match found.and_then(|()| self.ready_vm().map(|vm| vm.guest.clone())) {
            Ok(guest) => guest,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let stats = guest.container_stats(&container_id).await;
            complete(move |_| drop(reply.send(stats)))
        });
    }

    pub(super) fn process_status(&mut self, key: &ProcessKey) -> Result<ProcessStatus> {
        let pid = self.vmm_pid();
        let bundle = self
            .container_mut(&key.container_id)?
            .bundle
            .to_string_lossy()
            .into_owned();
        let process = self.process_mut(key)?;
        let phase = match process.state() {
            ProcessState::Created | ProcessState::Starting => ProcessPhase::Created,
            ProcessState::Running => ProcessPhase::Running,
            ProcessState::Ended(end) | ProcessState::Deleting(end) => ProcessPhase::Ended(end),
        };
        Ok(ProcessStatus {
            bundle,
            phase,
            stdio: process.stdio.clone(),
            pid,
        })
    }

    pub(super) fn subscribe(&mut self, key: &ProcessKey) -> Result<watch::Receiver<Option<ProcessEnd>>> {
        self.process_mut(key).map(|process| process.subscribe())
    }
}

/// Waits for the end of a process, then for its output.
async fn watch_end(
    key: ProcessKey,
    mut outputs: Outputs,
    guest: Guest,
    client: VmmClient,
    mut sandbox: watch::Receiver<SandboxStatus>,
) -> super::driver::Action {
    let waited = tokio::select! {
        // First what the guest says: it may end with its last word still unread.
        biased;
        waited = guest.wait_process(&key) => waited,
        _ = client.exited() => Err(CallError::Lost(Error::new(ErrorKind::Unavailable, "the VM has ended"))),
    };
    let end = match waited {
        Ok(end) => end,
        Err(CallError::Refused(error)) => {
            tracing::error!(%key, error = error.chain(), "the guest cannot wait for a process it has started");
            ProcessEnd {
                exit_status: UNKNOWN_EXIT_STATUS,
                exited_at: SystemTime::now(),
            }
        }
        Err(CallError::Lost(error)) => {
            tracing::debug!(%key, error = error.chain(), "the process ends with its guest");
            outputs.drain().await;
            return complete(move |driver| {
                driver.lose_guest();
                driver.begin(async move {
                    // Whoever sees the process's end asks why, and the sandbox must know by then.
                    let _ = sandbox.wait_for(|status| status.exit.is_some()).await;
                    complete(move |driver| driver.process_ended(&key, killed(), outputs))
                });
            });
        }
    };
    outputs.drain().await;
    complete(move |driver| driver.process_ended(&key, end, outputs))
}
