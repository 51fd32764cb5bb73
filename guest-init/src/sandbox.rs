//! The sandbox: everything the guest API acts on, without its messages.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::{Instant, timeout_at};

use crate::{
    boot,
    container::{Container, cgroup::Hierarchy, plan::sysctl_path, process::State, spec},
    error::{Context, Error, ErrorKind, Result},
    events::Events,
    network::{self, Interface},
    reaper::Reaper,
    storage::{Disks, Slice, Storage},
};

/// Most containers of a sandbox.
const MAX_CONTAINERS: usize = 64;
/// How long killed processes may take to go.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Where the sandbox finds and keeps things.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its own directory, in memory.
    pub directory: PathBuf,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// The slice disks.
    pub disks: Disks,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            directory: "/run/eci".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            disks: Disks::default(),
        }
    }
}

/// What the host gives the sandbox once.
#[derive(Debug, Default)]
pub struct Identity {
    /// Host name.
    pub hostname: String,
    /// Network interfaces.
    pub interfaces: Vec<Interface>,
    /// `resolv.conf`: name servers, search domains, options.
    pub nameservers: Vec<String>,
    /// See above.
    pub searches: Vec<String>,
    /// See above.
    pub dns_options: Vec<String>,
    /// Lines of `/etc/hosts`: address and names.
    pub host_aliases: Vec<(String, Vec<String>)>,
    /// Nanoseconds since the Unix epoch; 0 leaves the clock.
    pub wall_clock_ns: u64,
    /// For the kernel's random pool.
    pub entropy: Vec<u8>,
    /// The writable slice.
    pub scratch: Option<Slice>,
    /// Kernel parameters.
    pub sysctls: HashMap<String, String>,
}

/// The sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// OOM kills.
    pub events: Arc<Events>,
    reaper: Reaper,
    hierarchy: Hierarchy,
    etc: PathBuf,
    ready_us: u64,
    is_configured: Mutex<bool>,
    storage: Mutex<Storage>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
}

impl Sandbox {
    /// An empty sandbox. Takes over all children of this process.
    ///
    /// # Errors
    /// When cgroups or directories cannot be made.
    pub fn start(config: Config) -> Result<Arc<Self>> {
        let hierarchy = Hierarchy::prepare(&config.cgroup_root)?;
        let storage = Storage::prepare(&config.directory, config.disks)?;
        let etc = config.directory.join("etc");
        fs::create_dir_all(&etc).context(|| format!("make {}", etc.display()))?;
        for name in ["hosts", "hostname", "resolv.conf"] {
            fs::write(etc.join(name), "").context(|| format!("write {name}"))?;
        }
        Ok(Arc::new(Self {
            events: Events::start()?,
            reaper: Reaper::start().context(|| "start reaping")?,
            hierarchy,
            etc,
            ready_us: boot::clock::uptime_us(),
            is_configured: Mutex::new(false),
            storage: Mutex::new(storage),
            containers: Mutex::default(),
        }))
    }

    /// Gives the sandbox its identity; returns when it was ready, in microseconds after the kernel's start.
    ///
    /// # Errors
    /// `AlreadyExists` the second time; else what went wrong first.
    pub fn configure(&self, identity: Identity) -> Result<u64> {
        let mut is_configured = self.is_configured.lock().expect("no panic while held");
        if *is_configured {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                "the sandbox is configured already",
            ));
        }
        // First what makes this guest unlike others born from the same template.
        if !identity.entropy.is_empty() {
            boot::entropy::add(&identity.entropy).context(|| "add entropy")?;
        }
        if identity.wall_clock_ns != 0 {
            boot::clock::set(identity.wall_clock_ns)
                .context(|| format!("set the clock to {}", identity.wall_clock_ns))?;
        }
        if !identity.hostname.is_empty() {
            rustix::system::sethostname(identity.hostname.as_bytes())
                .context(|| format!("set the host name {:?}", identity.hostname))?;
        }
        for (name, value) in &identity.sysctls {
            let path = sysctl_path(name)?;
            let path = Path::new(path.to_str().expect("sysctl_path gives ASCII"));
            fs::write(path, value).context(|| format!("write {value:?} to {}", path.display()))?;
        }
        network::configure(&identity.interfaces)?;
        self.write_etc(&identity)?;
        if let Some(scratch) = identity.scratch {
            self.storage
                .lock()
                .expect("no panic while held")
                .mount_scratch(scratch)?;
        }
        *is_configured = true;
        Ok(self.ready_us)
    }

    fn write_etc(&self, identity: &Identity) -> Result<()> {
        for (name, text) in [
            ("hosts", hosts(identity)),
            ("hostname", format!("{}\n", identity.hostname)),
            ("resolv.conf", resolv_conf(identity)),
        ] {
            fs::write(self.etc.join(name), text).context(|| format!("write /etc/{name}"))?;
        }
        Ok(())
    }

    /// Prepares a container. On error nothing of it is left.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument` for the specification, `ResourceExhausted`.
    pub fn create_container(&self, id: &str, image: Slice, mut spec: spec::Spec) -> Result<()> {
        if !is_id(id) {
            return Err(Error::invalid(format!(
                "container_id is {id:?}: give 1 to 128 letters, digits, \"_\", \"-\" and \".\", first a letter or digit"
            )));
        }
        let mut containers = self.containers.lock().expect("no panic while held");
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
        let mut storage = self.storage.lock().expect("no panic while held");
        let rootfs = storage.create_rootfs(id, image, &mut spec.mounts)?;
        let cgroup = match self.hierarchy.create(id, &spec.linux.resources) {
            Ok(cgroup) => cgroup,
            Err(error) => {
                undo(storage.remove_rootfs(&rootfs));
                discard(&storage, id);
                return Err(error);
            }
        };
        match Container::new(id, spec, rootfs, cgroup, &self.etc) {
            Ok(container) => {
                let container = Arc::new(container);
                self.events.watch(&container);
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

    /// Finds a container.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let containers = self.containers.lock().expect("no panic while held");
        containers
            .get(id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("there is no container {id:?}")))
    }

    /// Starts a process of a container. Must not be cancelled.
    ///
    /// # Errors
    /// As [`Container::start`].
    pub async fn start_process(&self, id: &str, exec_id: &str) -> Result<u32> {
        self.container(id)?.start(exec_id, &self.reaper).await
    }

    /// Removes a container whose init does not run: its processes, cgroup and root file system. Must not be cancelled.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs.
    pub async fn delete_container(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.delete_processes()?;
        self.containers.lock().expect("no panic while held").remove(id);
        self.events.forget(&container);
        self.empty(&container, Instant::now() + KILL_DEADLINE).await?;
        container.cgroup.remove()?;
        let storage = &mut *self.storage.lock().expect("no panic while held");
        storage.remove_rootfs(&container.rootfs)?;
        discard(storage, id);
        Ok(())
    }

    /// Kills what is left in the container's cgroup and waits until it has gone.
    async fn empty(&self, container: &Container, deadline: Instant) -> Result<()> {
        container.cgroup.kill()?;
        let mut reaped = self.reaper.reaped();
        while !container.cgroup.processes()?.is_empty() {
            if timeout_at(deadline, reaped.changed()).await.is_err() {
                return Err(Error::system(
                    format!(
                        "end the processes {:?} of container {:?}",
                        container.cgroup.processes()?,
                        container.id
                    ),
                    std::io::Error::from_raw_os_error(libc::EBUSY),
                ));
            }
        }
        Ok(())
    }

    /// Ends all containers: `SIGTERM`, after `grace` `SIGKILL`; then unmounts the scratch slice.
    pub async fn shut_down(&self, grace: Duration) {
        let containers: Vec<_> = self
            .containers
            .lock()
            .expect("no panic while held")
            .values()
            .cloned()
            .collect();
        let deadline = Instant::now() + grace;
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
            undo(self.empty(container, Instant::now() + KILL_DEADLINE).await);
        }
        let mut storage = self.storage.lock().expect("no panic while held");
        for container in &containers {
            undo(storage.remove_rootfs(&container.rootfs));
        }
        undo(storage.unmount_scratch());
    }

    /// Where the scratch slice is mounted.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.storage.lock().expect("no panic while held").scratch()
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
                undo(fs::remove_dir_all(&rubbish).context(|| format!("remove {}", rubbish.display())));
            });
        }
        Err(error) => crate::log::failure("clean up", &error),
    }
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

fn hosts(identity: &Identity) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let address = identity
        .interfaces
        .iter()
        .flat_map(|interface| &interface.addresses)
        .next();
    if let (Some((address, _)), false) = (address, identity.hostname.is_empty()) {
        let _ = writeln!(text, "{address}\t{}", identity.hostname);
    }
    for (address, names) in &identity.host_aliases {
        let _ = writeln!(text, "{address}\t{}", names.join(" "));
    }
    text
}

fn resolv_conf(identity: &Identity) -> String {
    let mut text = String::new();
    for server in &identity.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (keyword, words) in [("search", &identity.searches), ("options", &identity.dns_options)] {
        if !words.is_empty() {
            let _ = writeln!(text, "{keyword} {}", words.join(" "));
        }
    }
    text
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

    #[test]
    fn files_in_etc_say_what_the_host_said() {
        let identity = Identity {
            hostname: "web-0".into(),
            interfaces: vec![Interface {
                name: "eth0".into(),
                mac: [0; 6],
                addresses: vec![("10.0.0.2".parse().unwrap(), 24)],
                gateways: Vec::new(),
                mtu: 0,
            }],
            nameservers: vec!["10.0.0.10".into()],
            searches: vec!["a.local".into(), "local".into()],
            dns_options: vec!["ndots:5".into()],
            host_aliases: vec![("10.0.0.9".into(), vec!["db".into(), "db.local".into()])],
            ..Default::default()
        };
        assert!(hosts(&identity).ends_with("10.0.0.2\tweb-0\n10.0.0.9\tdb db.local\n"));
        assert_eq!(
            resolv_conf(&identity),
            "nameserver 10.0.0.10\nsearch a.local local\noptions ndots:5\n"
        );
    }
}
