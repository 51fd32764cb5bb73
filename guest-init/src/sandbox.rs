//! The sandbox: everything the guest API acts on, without its messages.
//!
//! It has no containers until it has an identity: they come into being as the last step of [`Sandbox::configure`].

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use crate::{
    boot,
    care::Address,
    container::cgroup::{Cgroup, Hierarchy},
    containers::{Containers, Resources},
    error::{Context, Error, ErrorKind, Result},
    events::Events,
    identity::{GenerationWatch, Handshake, Identity, Ids, Origin},
    reaper::Reaper,
    storage::{Disks, Storage},
};

/// The first address of the first interface.
fn address(identity: &Identity) -> Option<IpAddr> {
    let interface = identity.interfaces.first()?;
    interface.addresses.first().map(|(address, _)| *address)
}

/// Where the sandbox finds and keeps things.
#[derive(Debug)]
pub struct Config {
    /// Its own directory, in memory.
    pub directory: PathBuf,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// The slice disks.
    pub disks: Disks,
    /// Changes of the VM's generation.
    pub generation: GenerationWatch,
}

impl Config {
    /// As it is in a guest.
    ///
    /// # Errors
    /// As [`GenerationWatch::of_kernel`].
    pub fn of_guest() -> Result<Self> {
        Ok(Self {
            directory: "/run/eci".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            disks: Disks::default(),
            generation: GenerationWatch::of_kernel()?,
        })
    }
}

/// The sandbox.
#[derive(Debug)]
pub struct Sandbox {
    resources: Resources,
    ready_us: u64,
    /// One at a time; it waits for the kernel while it is held, hence no lock of `std`.
    handshake: tokio::sync::Mutex<Handshake>,
    configured: OnceLock<Configured>,
}

#[derive(Debug)]
struct Configured {
    containers: Containers,
    /// The sandbox's, which containers may have as theirs.
    hostname: Mutex<String>,
}

impl Sandbox {
    /// A sandbox without an identity. Takes over all children of this process.
    ///
    /// # Errors
    /// When cgroups or directories cannot be made, or what the handshake needs cannot be opened.
    pub fn start(config: Config) -> Result<Arc<Self>> {
        let hierarchy = Hierarchy::prepare(&config.cgroup_root)?;
        let storage = Storage::prepare(&config.directory, config.disks)?;
        let identity_files = config.directory.join("etc");
        let handshake = Handshake::prepare(&identity_files, config.generation)?;
        Ok(Arc::new(Self {
            resources: Resources {
                hierarchy,
                storage: Arc::new(Mutex::new(storage)),
                identity_files,
                reaper: Reaper::start().context(|| "start reaping")?,
                events: Events::start()?,
                address: Address::default(),
            },
            ready_us: boot::clock::uptime_us(),
            handshake: tokio::sync::Mutex::new(handshake),
            configured: OnceLock::new(),
        }))
    }

    /// The cgroup of all containers.
    #[must_use]
    pub fn containers_cgroup(&self) -> Cgroup {
        self.resources.hierarchy.all()
    }

    /// When it was ready, in microseconds after the kernel's start.
    #[must_use]
    pub fn ready_us(&self) -> u64 {
        self.ready_us
    }

    /// OOM kills.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.resources.events
    }

    /// The containers.
    ///
    /// # Errors
    /// `FailedPrecondition` before the sandbox has an identity.
    pub fn containers(&self) -> Result<&Containers> {
        self.configured().map(|configured| &configured.containers)
    }

    fn configured(&self) -> Result<&Configured> {
        self.configured
            .get()
            .ok_or_else(|| Error::precondition("the sandbox is not configured yet"))
    }

    /// Gives the sandbox its identity. Must not be cancelled.
    ///
    /// # Errors
    /// `AlreadyExists` the second time; else what went wrong first.
    pub async fn configure(&self, identity: Identity) -> Result<Ids> {
        let mut handshake = self.handshake.lock().await;
        if self.configured.get().is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                "the sandbox is configured already",
            ));
        }
        let ids = handshake.perform(&identity).await?;
        self.resources.address.set(address(&identity));
        if let Some(scratch) = identity.scratch {
            let mut storage = self.resources.storage.lock().expect("no panic while held");
            storage.mount_scratch(scratch)?;
        }
        self.configured.get_or_init(|| Configured {
            containers: Containers::new(self.resources.clone()),
            hostname: Mutex::new(identity.hostname),
        });
        Ok(ids)
    }

    /// Stops all containers, so that the VM can be captured. Must not be cancelled.
    ///
    /// # Errors
    /// As [`Containers::freeze`].
    pub async fn freeze(&self) -> Result<()> {
        let mut handshake = self.handshake.lock().await;
        self.containers()?.freeze().await?;
        handshake.expect_clone()
    }

    /// Gives the sandbox of a clone, whose containers are frozen, an identity of its own. Must not be cancelled.
    ///
    /// # Errors
    /// `InvalidArgument` for an identity that is not a clone's, `FailedPrecondition` when nothing is frozen, else as
    /// [`Sandbox::configure`].
    pub async fn adopt(&self, identity: Identity) -> Result<Ids> {
        if identity.origin != Origin::Cloned {
            return Err(Error::invalid(
                "is_clone is not set: only a clone can be given another identity",
            ));
        }
        if identity.scratch.is_some() {
            return Err(Error::invalid("scratch is set: a clone has its parent's"));
        }
        let configured = self.configured()?;
        let mut handshake = self.handshake.lock().await;
        if !configured.containers.are_frozen() {
            return Err(Error::precondition("the containers are not frozen"));
        }
        let ids = handshake.perform(&identity).await?;
        self.resources.address.set(address(&identity));
        let mut hostname = configured.hostname.lock().expect("no panic while held");
        configured.containers.adopt(&hostname, &identity.hostname)?;
        if !identity.hostname.is_empty() {
            *hostname = identity.hostname;
        }
        Ok(ids)
    }

    /// Ends all containers, then unmounts the volumes on servers, the scratch slice and the attached volumes.
    pub async fn shut_down(&self, grace: Duration) {
        if let Ok(containers) = self.containers() {
            containers.shut_down(grace).await;
        }
        let nfs = self.storage().nfs();
        nfs.unmount_all().await;
        let mut storage = self.storage();
        if let Err(error) = storage.unmount_all() {
            crate::log::failure("unmount the scratch slice", &error);
        }
    }

    fn storage(&self) -> MutexGuard<'_, Storage> {
        self.resources.storage.lock().expect("no panic while held")
    }

    /// Where the scratch slice is mounted.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.storage().scratch()
    }
}
