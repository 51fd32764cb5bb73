//! How the services speak to the driver. Dropping a call's future does not end what it asked for: a caller that hangs
//! up leaves no half-done state.

use std::{path::PathBuf, time::Duration};

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    driver::{self, Action, Driver, Reply},
    resize::Target,
    spec::{ContainerSpec, ExecSpec, SandboxSpec},
    state::SandboxState,
    status::{ProcessStatus, SandboxExit, SandboxStatus},
    steps::HostConfig,
};
use crate::{
    console,
    error::{Error, ErrorKind, Result},
    events::Publisher,
    guest::{ContainerStats, Guest, ProcessEnd, ProcessKey, SandboxStats, VolumeFiles},
    persist::{Bundle, CONSOLE_FILE},
    resource::volumes::VolumeSpec,
};

/// Speaks to one sandbox; cheap to clone. Its errors are the driver's: every method may return `NotFound` for an
/// unknown id, `FailedPrecondition` for the wrong state and `Unavailable` after the end of the VM.
#[derive(Debug, Clone)]
pub struct SandboxHandle {
    actions: mpsc::Sender<Action>,
    status: watch::Receiver<SandboxStatus>,
}

impl SandboxHandle {
    /// Begins a sandbox without a VM.
    pub fn new(bundle: Bundle, host: HostConfig, publisher: Publisher) -> Self {
        let (actions, status) = driver::spawn(bundle, host, publisher);
        Self { actions, status }
    }

    async fn ask<T: Send + 'static>(
        &self,
        action: impl FnOnce(&mut Driver, Reply<T>) + Send + 'static,
    ) -> Result<T> {
        let gone = || Error::new(ErrorKind::Unavailable, "the sandbox's driver has ended");
        let (reply, answer) = oneshot::channel();
        self.actions
            .send(Box::new(move |driver| action(driver, reply)))
            .await
            .map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// For actions that answer at once.
    async fn look<T: Send + 'static>(
        &self,
        action: impl FnOnce(&mut Driver) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.ask(move |driver, reply| drop(reply.send(action(driver))))
            .await
    }

    /// The sandbox as it is now.
    pub fn status(&self) -> SandboxStatus {
        self.status.borrow().clone()
    }

    /// The last lines of the guest's console; empty when there are none.
    pub async fn console_tail(&self) -> String {
        let path = self.look(|driver| Ok(driver.bundle.path(CONSOLE_FILE))).await;
        match path {
            Ok(path) => tokio::task::spawn_blocking(move || console::tail(&path))
                .await
                .unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    /// Waits until the shim is to end.
    pub async fn shutdown_asked(&self) {
        // An error means that the driver has gone, which is as good.
        let _ = self.status.clone().wait_for(|status| status.shutdown).await;
    }

    /// Keeps what the sandbox is to be.
    ///
    /// # Errors
    /// `InvalidArgument` names the wrong field; `AlreadyExists` for a second time, unless a guest stands by.
    pub async fn create(&self, spec: SandboxSpec) -> Result<()> {
        self.look(|driver| driver.create(spec)).await
    }

    /// Has a guest wait for its identity; returns once it does.
    ///
    /// # Errors
    /// With the VMM's reason and the guest's last console lines; the sandbox has ended then.
    pub async fn stand_by(&self) -> Result<()> {
        self.ask(Driver::stand_by).await
    }

    /// Boots the VM; returns once the guest is configured.
    ///
    /// # Errors
    /// With the VMM's reason and the guest's last console lines.
    pub async fn start(&self) -> Result<()> {
        self.ask(Driver::start).await
    }

    /// Ends the VM and returns once it has: `grace` for its processes, zero to kill at once.
    ///
    /// # Errors
    /// Only when the driver is gone.
    pub async fn stop(&self, grace: Duration) -> Result<SandboxExit> {
        self.look(move |driver| {
            driver.stop(grace);
            Ok(())
        })
        .await?;
        self.ended().await
    }

    /// Waits for the end of the sandbox.
    ///
    /// # Errors
    /// Only when the driver is gone.
    pub async fn ended(&self) -> Result<SandboxExit> {
        let mut status = self.status.clone();
        let ended = status.wait_for(|status| status.exit.is_some()).await;
        ended
            .ok()
            .and_then(|status| status.exit.clone())
            .ok_or_else(|| Error::new(ErrorKind::Unavailable, "the sandbox's driver has ended"))
    }

    /// Kills what runs, then ends the shim.
    ///
    /// # Errors
    /// Only when the driver is gone.
    pub async fn shutdown(&self) -> Result<()> {
        self.stop(Duration::ZERO).await?;
        self.look(|driver| {
            driver.shut_shim_down();
            Ok(())
        })
        .await
    }

    /// Ends the shim if it keeps nothing; true when it does.
    ///
    /// # Errors
    /// Only when the driver is gone.
    pub async fn shutdown_if_idle(&self) -> Result<bool> {
        self.look(|driver| {
            let idle = driver.is_idle();
            if idle {
                driver.stop(Duration::ZERO);
                driver.shut_shim_down();
            }
            Ok(idle)
        })
        .await
    }

    /// Whether containers can be created.
    pub fn is_ready(&self) -> bool {
        self.status.borrow().state == SandboxState::Ready
    }

    /// Statistics of the guest.
    ///
    /// # Errors
    /// See the type.
    pub async fn sandbox_stats(&self) -> Result<SandboxStats> {
        self.ask(Driver::sandbox_stats).await
    }

    /// Takes a snapshot of the sandbox, whose containers go on, into an empty directory.
    ///
    /// # Errors
    /// `InvalidArgument` for another kind of directory; else what failed, and the directory then holds no snapshot.
    pub async fn checkpoint(&self, directory: PathBuf) -> Result<()> {
        self.ask(|driver, reply| driver.checkpoint(directory, reply))
            .await
    }

    /// Puts the files of a volume into the guest.
    ///
    /// # Errors
    /// The guest's.
    pub async fn put_files(&self, files: VolumeFiles) -> Result<()> {
        self.ask(|driver, reply| driver.put_files(files, reply)).await
    }

    /// Gives the guest a volume that is a file of its own or on a server, or grows it.
    ///
    /// # Errors
    /// As [`Volumes::attach`](crate::resource::volumes::Volumes::attach).
    pub async fn attach_volume(&self, volume: VolumeSpec) -> Result<()> {
        self.ask(|driver, reply| driver.attach_volume(volume, reply))
            .await
    }

    /// Makes the running sandbox larger or smaller.
    ///
    /// # Errors
    /// See [`resize`](super::resize).
    pub async fn resize(&self, target: Target) -> Result<()> {
        self.ask(move |driver, reply| driver.resize(target, reply)).await
    }

    /// Gives a container other limits.
    ///
    /// # Errors
    /// The guest's.
    pub async fn update_container(&self, container_id: String, resources: Vec<u8>) -> Result<()> {
        self.ask(|driver, reply| driver.update_container(container_id, resources, reply))
            .await
    }

    /// The guest, when containers can be worked with.
    ///
    /// # Errors
    /// `Unavailable` or `FailedPrecondition` when they cannot.
    pub async fn guest(&self) -> Result<Guest> {
        self.look(|driver| driver.ready_vm().map(|vm| vm.guest.clone()))
            .await
    }

    /// Prepares a container; returns the process id tasks show.
    ///
    /// # Errors
    /// `InvalidArgument` names the wrong field.
    pub async fn create_container(&self, spec: ContainerSpec) -> Result<u32> {
        self.ask(|driver, reply| driver.create_container(spec, reply))
            .await
    }

    /// Prepares an exec.
    ///
    /// # Errors
    /// `InvalidArgument` names the wrong field.
    pub async fn create_exec(&self, key: ProcessKey, spec: ExecSpec) -> Result<()> {
        self.ask(|driver, reply| driver.create_exec(key, spec, reply))
            .await
    }

    /// Starts a prepared process.
    ///
    /// # Errors
    /// The guest's: the program is missing or may not be executed.
    pub async fn start_process(&self, key: ProcessKey) -> Result<u32> {
        self.ask(|driver, reply| driver.start_process(key, reply)).await
    }

    /// Waits for the end of a process, its output written.
    ///
    /// # Errors
    /// See the type.
    pub async fn wait_process(&self, key: ProcessKey) -> Result<ProcessEnd> {
        let mut ended = self.look(move |driver| driver.subscribe(&key)).await?;
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| *end);
        end.ok_or_else(|| Error::new(ErrorKind::NotFound, "the process was deleted without an end"))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` also when the process has ended.
    pub async fn signal_process(&self, key: ProcessKey, signal: u32, all: bool) -> Result<()> {
        self.ask(move |driver, reply| driver.signal_process(key, signal, all, reply))
            .await
    }

    /// Removes an ended or never started process, with an empty exec id the container.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs.
    pub async fn delete_process(&self, key: ProcessKey) -> Result<(u32, ProcessEnd)> {
        self.ask(|driver, reply| driver.delete_process(key, reply)).await
    }

    /// Sets the size of a terminal.
    ///
    /// # Errors
    /// `FailedPrecondition` without one.
    pub async fn resize_terminal(&self, key: ProcessKey, rows: u32, columns: u32) -> Result<()> {
        self.ask(move |driver, reply| driver.resize_terminal(key, rows, columns, reply))
            .await
    }

    /// No more input from this side.
    ///
    /// # Errors
    /// See the type.
    pub async fn close_stdin(&self, key: ProcessKey) -> Result<()> {
        self.look(move |driver| driver.close_stdin(&key)).await
    }

    /// Guest process ids of a container.
    ///
    /// # Errors
    /// See the type.
    pub async fn list_processes(&self, container_id: String) -> Result<Vec<u32>> {
        self.ask(|driver, reply| driver.list_processes(container_id, reply))
            .await
    }

    /// Statistics of a container.
    ///
    /// # Errors
    /// See the type.
    pub async fn container_stats(&self, container_id: String) -> Result<ContainerStats> {
        self.ask(|driver, reply| driver.container_stats(container_id, reply))
            .await
    }

    /// A process as it is now.
    ///
    /// # Errors
    /// See the type.
    pub async fn process_status(&self, key: ProcessKey) -> Result<ProcessStatus> {
        self.look(move |driver| driver.process_status(&key)).await
    }
}
