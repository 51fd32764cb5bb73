//! The containers of the sandbox, and what they have in common. They exist only in a sandbox with an identity.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::{Instant, timeout_at};

use crate::{
    care::{self, Address, Carer, Health, Lifecycle},
    container::{
        Container, cgroup::Hierarchy, devices, freezer::Freezer, pause::Pause, process::State, spec,
        stdio::Hold,
    },
    error::{Context, Error, ErrorKind, Result},
    events::Events,
    reaper::Reaper,
    storage::{AttachedVolume, File, NfsVolume, Parts, Slice, Storage},
};

/// Most containers of a sandbox.
const MAX_CONTAINERS: usize = 64;
/// How long killed processes may take to go.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// The containers of a sandbox.
#[derive(Debug)]
pub struct Containers {
    resources: Resources,
    freezer: Freezer,
    hold: Hold,
    carer: Carer,
    pause: Pause,
    by_id: Mutex<HashMap<String, Arc<Container>>>,
}

/// What containers are made of and looked after with.
#[derive(Debug, Clone)]
pub struct Resources {
    /// Cgroups.
    pub hierarchy: Hierarchy,
    /// Root file systems and volumes.
    pub storage: Arc<Mutex<Storage>>,
    /// Files of the sandbox's identity.
    pub identity_files: PathBuf,
    /// Ends of processes.
    pub reaper: Reaper,
    /// OOM kills.
    pub events: Arc<Events>,
    /// The sandbox's own.
    pub address: Address,
}

impl Containers {
    /// None yet.
    #[must_use]
    pub fn new(resources: Resources) -> Self {
        let hold = Hold::default();
        Self {
            freezer: resources.hierarchy.freezer(),
            carer: Carer {
                events: Arc::clone(&resources.events),
                reaper: resources.reaper.clone(),
                hold: hold.clone(),
                address: resources.address.clone(),
            },
            hold,
            pause: Pause::default(),
            by_id: Mutex::default(),
            resources,
        }
    }

    fn storage(&self) -> MutexGuard<'_, Storage> {
        self.resources.storage.lock().expect("no panic while held")
    }

    /// All of them, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Container>> {
        let containers = self.by_id.lock().expect("no panic while held");
        containers.values().cloned().collect()
    }

    /// Prepares a container. On error nothing of it is left.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument` for the specification, `ResourceExhausted`; `DeadlineExceeded` when the server of a
    /// volume does not answer.
    pub async fn create(
        &self,
        id: &str,
        image: Slice,
        mut spec: spec::Spec,
        lifecycle: Lifecycle,
    ) -> Result<()> {
        devices::give_all(&mut spec)?;
        self.storage().give_devices(&mut spec)?;
        let nfs = self.storage().nfs();
        let parts = nfs.parts(&spec.mounts).await?;
        self.make(id, image, spec, lifecycle, parts)
    }

    fn make(
        &self,
        id: &str,
        image: Slice,
        mut spec: spec::Spec,
        lifecycle: Lifecycle,
        parts: Parts,
    ) -> Result<()> {
        if !is_id(id) {
            return Err(Error::invalid(format!(
                "container_id is {id:?}: give 1 to 128 letters, digits, \"_\", \"-\" and \".\", first a letter or digit"
            )));
        }
        let mut containers = self.by_id.lock().expect("no panic while held");
        if containers.contains_key(id) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("container {id:?} exists"),
            ));
        }
        if containers.len() >= MAX_CONTAINERS {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                format!("the sandbox has {MAX_CONTAINERS} containers"),
            ));
        }
        let mut storage = self.storage();
        let rootfs = match storage.create_rootfs(id, image, &mut spec.mounts, parts) {
            Ok(rootfs) => rootfs,
            Err(error) => {
                // It may have been mounted: what was says that it must not be mounted again.
                if storage.has_layer(id) {
                    discard(&storage, id);
                }
                return Err(error);
            }
        };
        let cgroup = match self.resources.hierarchy.create(id, &spec.linux.resources) {
            Ok(cgroup) => cgroup,
            Err(error) => {
                undo(storage.remove_rootfs(&rootfs));
                discard(&storage, id);
                return Err(error);
            }
        };
        match Container::new(
            id,
            spec,
            rootfs,
            cgroup,
            lifecycle,
            &self.resources.identity_files,
        ) {
            Ok(container) => {
                let container = Arc::new(container);
                self.resources.events.watch(&container);
                containers.insert(id.to_owned(), container);
                Ok(())
            }
            Err(failed) => {
                let (error, rootfs, cgroup) = *failed;
                undo(cgroup.remove());
                undo(storage.remove_rootfs(&rootfs));
                discard(&storage, id);
                Err(error)
            }
        }
    }

    /// Makes a volume of files hold these.
    ///
    /// # Errors
    /// As [`Storage::put_files`].
    pub fn put_files(&self, volume: &str, files: &[File], gid: Option<u32>) -> Result<()> {
        self.storage().put_files(volume, files, gid)
    }

    /// Mounts a volume that has a slice of its own, or grows it.
    ///
    /// # Errors
    /// As [`Storage::attach`].
    pub fn attach(&self, volume: AttachedVolume) -> Result<()> {
        self.storage().attach(volume)
    }

    /// Mounts a volume from a server.
    ///
    /// # Errors
    /// As [`NfsVolumes::attach`](crate::storage::NfsVolumes::attach).
    pub async fn attach_nfs(&self, volume: NfsVolume) -> Result<()> {
        let generation = self.resources.identity_files.join("generation");
        let client = fs::read_to_string(&generation).context(|| format!("read {}", generation.display()))?;
        let nfs = self.storage().nfs();
        nfs.attach(volume, client.trim_end()).await
    }

    /// Finds a container.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        let containers = self.by_id.lock().expect("no panic while held");
        containers
            .get(id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("there is no container {id:?}")))
    }

    /// Starts a process of a container. Must not be cancelled.
    ///
    /// # Errors
    /// As [`Container::start`]; `FailedPrecondition` while the containers are frozen.
    pub async fn start_process(&self, id: &str, exec_id: &str) -> Result<u32> {
        if self.hold.is_on() {
            return Err(Error::precondition("the sandbox is frozen"));
        }
        let container = self.get(id)?;
        let pid = container
            .start(exec_id, &self.resources.reaper, &self.hold, &self.pause)
            .await?;
        if exec_id.is_empty() {
            self.carer.begin(&container);
        }
        Ok(pid)
    }

    /// Begins to end a container: see [`care::stop`].
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it does not run.
    pub fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        let container = self.get(id)?;
        container.process("")?.running()?;
        care::stop::begin(&self.carer, &container, grace);
        Ok(())
    }

    /// How the containers are that are looked after and run.
    #[must_use]
    pub fn health(&self) -> Vec<(String, Health)> {
        self.all()
            .into_iter()
            .filter(|container| container.care.wanted.needs_care())
            .filter(|container| {
                container
                    .process("")
                    .is_ok_and(|init| matches!(init.state(), State::Running { .. }))
            })
            .map(|container| (container.id.clone(), container.care.health()))
            .collect()
    }

    /// Removes a container whose init does not run: its processes, cgroup and root file system. Must not be cancelled.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs.
    pub async fn delete(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        container.delete_processes()?;
        self.by_id.lock().expect("no panic while held").remove(id);
        self.resources.events.forget(&container);
        empty(&container, Instant::now() + KILL_DEADLINE).await?;
        container.cgroup.remove()?;
        let mut storage = self.storage();
        storage.remove_rootfs(&container.rootfs)?;
        discard(&storage, id);
        Ok(())
    }

    /// Stops all processes and holds all streams: the VM can be captured then.
    ///
    /// # Errors
    /// `DeadlineExceeded` when some do not stand still; all run again then.
    pub async fn freeze(&self) -> Result<()> {
        self.hold.set(true);
        let result = self.freezer.freeze().await;
        if result.is_err() {
            self.hold.set(false);
        }
        result
    }

    /// Whether [`Containers::freeze`] was called last, and not [`Containers::thaw`].
    #[must_use]
    pub fn are_frozen(&self) -> bool {
        self.hold.is_on()
    }

    /// This is a clone whose sandbox was called `old` and is now `new`: the host has none of the streams any more, and
    /// containers that were called as the sandbox are so again.
    ///
    /// # Errors
    /// When a host name cannot be set.
    pub fn adopt(&self, old: &str, new: &str) -> Result<()> {
        for container in self.all() {
            container.lose_streams();
            if !new.is_empty() {
                container.rename(old, new)?;
            }
        }
        Ok(())
    }

    /// Lets all processes run again; output nobody takes is dropped.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn thaw(&self) -> Result<()> {
        self.hold.set(false);
        for container in self.all() {
            container.give_up_streams();
        }
        self.freezer.thaw()
    }

    /// Ends all containers: `SIGTERM`, after `grace` `SIGKILL`.
    pub async fn shut_down(&self, grace: Duration) {
        let containers = self.all();
        let deadline = Instant::now() + grace;
        // Who stands still hears no SIGTERM.
        undo(self.thaw());
        for container in &containers {
            // Not started, or ended already: nothing to tell.
            let _ = container.signal_all(libc::SIGTERM);
        }
        for container in &containers {
            if let Ok(init) = container.process("")
                && matches!(init.state(), State::Running { .. })
            {
                let _ = timeout_at(deadline, init.wait()).await;
            }
        }
        for container in &containers {
            undo(empty(container, Instant::now() + KILL_DEADLINE).await);
        }
        let mut storage = self.storage();
        for container in &containers {
            undo(storage.remove_rootfs(&container.rootfs));
        }
    }
}

/// Kills what is left in the container's cgroup and waits until it has gone.
async fn empty(container: &Container, deadline: Instant) -> Result<()> {
    match timeout_at(deadline, container.cgroup.clear()).await {
        Ok(cleared) => cleared,
        Err(_) => Err(Error::system(
            format!(
                "end the processes {:?} of container {:?}",
                container.cgroup.processes()?,
                container.id
            ),
            std::io::Error::from_raw_os_error(libc::EBUSY),
        )),
    }
}

/// Logs a step of undoing that failed: the error that made it necessary is the one to report.
fn undo(result: Result<()>) {
    if let Err(error) = result {
        crate::log::failure("clean up", &error);
    }
}

/// Removes a writable layer, which can take long, beside other work.
fn discard(storage: &Storage, id: &str) {
    match storage.discard(id) {
        Ok(rubbish) => {
            tokio::task::spawn_blocking(move || {
                undo(remove_tree(&rubbish));
            });
        }
        Err(error) => crate::log::failure("clean up", &error),
    }
}

fn remove_tree(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).context(|| format!("remove {}", path.display()))
}

/// Ids become names of directories and cgroups.
fn is_id(id: &str) -> bool {
    id.len() <= 128
        && id
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_file_names() {
        for id in ["a", "C-1_2.3", &"x".repeat(128)] {
            assert!(is_id(id), "{id}");
        }
        for id in ["", ".", "..", "-a", "a/b", "a b", "\u{e9}", &"x".repeat(129)] {
            assert!(!is_id(id), "{id}");
        }
    }
}
