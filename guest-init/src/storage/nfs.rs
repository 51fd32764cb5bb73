//! Volumes on NFS servers. They stay mounted as long as the sandbox lives, whichever containers come and go.
//!
//! A server that is gone holds whoever asks it for as long as it likes, and the guest init has one thread for everything. So
//! each call that may reach a server is made in a thread of its own and waited for with a deadline; how many such threads
//! there are is bounded. Mounts are `hard`, as a kubelet's are: a program that uses a volume whose server is gone waits for it,
//! and can be killed.

use std::{
    collections::HashMap,
    ffi::CString,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch},
    time::timeout,
};

use super::{subpath, volume::check_name};
use crate::{
    container::spec,
    error::{Context, Error, ErrorKind, Result},
};

/// Mount type of a volume on a server.
pub(super) const KIND: &str = protocol::NFS_MOUNT_TYPE;
/// For a server to answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// For what was written to reach the servers before the guest ends.
const FLUSH_DEADLINE: Duration = Duration::from_secs(3);
/// For the ends of the connections after that.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(1);
/// Most threads that wait for servers.
const MAX_WAITING: usize = 32;
/// What tells this guest from others for a server. By itself it would be the host name and the time of the kernel's start, which
/// groups of one name made from one template have in common: each would take the others' locks and open files away.
const IDENTIFIER: &str = "/sys/fs/nfs/net/nfs_client/identifier";
/// The newest first, as `mount.nfs` does it. Older ones need the server's port mapper and lock daemons.
const VERSIONS: [&str; 3] = ["4.2", "4.1", "4.0"];
/// The defaults of nfs(5), said for whoever looks at `/proc/mounts`. Ids are numbers: there is no one who could map names.
const OPTIONS: &str = "hard,proto=tcp,timeo=600,retrans=2,sec=sys";

/// A directory that a server exports; checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    address: IpAddr,
    server: String,
    path: String,
    read_only: bool,
}

impl Export {
    /// Checks the parts of an export.
    ///
    /// # Errors
    /// `InvalidArgument` names the field.
    pub fn parse(address: &str, server: String, path: String, read_only: bool) -> Result<Self> {
        let address = address
            .parse()
            .map_err(|_| Error::invalid(format!("nfs.address is {address:?}: give an IP address")))?;
        if server.is_empty() || server.contains(['/', '\0']) {
            return Err(Error::invalid(format!(
                "nfs.server is {server:?}: give the name of the server"
            )));
        }
        if !path.starts_with('/') || path.contains('\0') {
            return Err(Error::invalid(format!(
                "nfs.path is {path:?}: give an absolute path"
            )));
        }
        Ok(Self {
            address,
            server,
            path,
            read_only,
        })
    }

    /// Whether it is the same directory, wherever its server is now.
    fn is_same(&self, other: &Self) -> bool {
        (&self.server, &self.path) == (&other.server, &other.path)
    }

    /// For messages.
    fn name(&self) -> String {
        let Self { server, path, .. } = self;
        if *server == self.address.to_string() {
            format!("{server}:{path}")
        } else {
            format!("{server}:{path} (server {})", self.address)
        }
    }

    /// Mounts it, in the newest version that both sides have. Waits for the server.
    fn mount(&self, target: &Path) -> rustix::io::Result<()> {
        let host = match self.address {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        };
        let source = CString::new(format!("{host}:{}", self.path)).map_err(|_| Errno::INVAL)?;
        let mut last = Errno::PROTONOSUPPORT;
        for version in VERSIONS {
            let options = format!("vers={version},addr={},{OPTIONS}", self.address);
            let options = CString::new(options).map_err(|_| Errno::INVAL)?;
            match mount(
                source.as_c_str(),
                target,
                c"nfs4",
                MountFlags::NODEV,
                options.as_c_str(),
            ) {
                Err(errno @ (Errno::PROTONOSUPPORT | Errno::INVAL)) => last = errno,
                result => return result,
            }
        }
        Err(last)
    }
}

/// A volume to mount.
#[derive(Debug)]
pub struct NfsVolume {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub export: Export,
}

/// The volumes of the sandbox that are on servers. Clones share them.
#[derive(Debug, Clone)]
pub struct NfsVolumes {
    directory: PathBuf,
    volumes: Arc<Mutex<HashMap<String, Volume>>>,
    n_parts: Arc<AtomicU64>,
    waiting: Arc<Semaphore>,
}

#[derive(Debug)]
struct Volume {
    export: Export,
    directory: PathBuf,
    /// `None` as long as it is tried.
    mounted: watch::Receiver<Option<rustix::io::Result<()>>>,
}

impl Volume {
    fn has_failed(&self) -> bool {
        matches!(*self.mounted.borrow(), Some(Err(_)))
    }
}

/// A part of a volume, held by a mount of its own until this is dropped.
#[derive(Debug)]
struct Part(Option<PathBuf>);

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            release(&path);
        }
    }
}

/// Lets go of a mount without waiting for its server.
fn release(path: &Path) {
    if let Err(error) = unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        crate::log::error(&format!("unmount {}: {error}", path.display()));
    }
    remove_mount_point(path);
}

/// Removes what a mount was on, if it is empty.
pub(super) fn remove_mount_point(path: &Path) {
    let _ = fs::remove_dir(path).or_else(|_| match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() && found.len() == 0 => fs::remove_file(path),
        _ => Ok(()),
    });
}

/// The parts of volumes on servers that one container mounts: what its mounts' `subpath` names.
#[derive(Debug, Default)]
pub struct Parts(HashMap<usize, Part>);

impl Parts {
    /// Where the part for the mount at `index` is held; the caller has to unmount it.
    pub(super) fn take(&mut self, index: usize) -> Option<PathBuf> {
        self.0.remove(&index)?.0.take()
    }
}

impl NfsVolumes {
    /// None yet; they will be mounted below `directory`.
    pub(super) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            volumes: Arc::default(),
            n_parts: Arc::default(),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Volume>> {
        self.volumes.lock().expect("no panic while held")
    }

    /// Mounts a volume, or waits for the attempt that is being made already. One that is mounted stays as it is. `client` is
    /// what servers know the guest by; no other guest may have it.
    ///
    /// # Errors
    /// `FailedPrecondition` when the name is another directory's; `DeadlineExceeded` when the server does not answer in time:
    /// the attempt goes on then. Else what the server or the kernel answered.
    pub async fn attach(&self, wanted: NfsVolume, client: &str) -> Result<()> {
        let mut progress = self.begin(&wanted, client)?;
        let action = format!("mount NFS volume {:?} from {}", wanted.name, wanted.export.name());
        let ended = timeout(DEADLINE, progress.wait_for(Option::is_some)).await;
        match ended.map(|ended| ended.map(|mounted| *mounted)) {
            Ok(Ok(Some(Ok(())))) => Ok(()),
            Ok(Ok(Some(Err(Errno::PROTONOSUPPORT)))) => Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!("{action}: the server does not speak NFS version 4"),
            )),
            Ok(Ok(Some(Err(errno)))) => Err(Error::system(action, errno)),
            Ok(Ok(None) | Err(_)) => Err(Error::new(
                ErrorKind::Internal,
                format!("{action}: the attempt ended without a result"),
            )),
            Err(_) => Err(self.late(&action)),
        }
    }

    fn late(&self, action: &str) -> Error {
        let text = format!(
            "{action}: the server did not answer within {} s",
            DEADLINE.as_secs()
        );
        Error::new(ErrorKind::DeadlineExceeded, text)
    }

    /// Begins to mount a volume, unless that has begun or is done.
    fn begin(
        &self,
        wanted: &NfsVolume,
        client: &str,
    ) -> Result<watch::Receiver<Option<rustix::io::Result<()>>>> {
        check_name("volume", &wanted.name)?;
        let mut volumes = self.all();
        match volumes.get(&wanted.name) {
            Some(volume) if volume.has_failed() => {}
            Some(volume) if volume.export.is_same(&wanted.export) => return Ok(volume.mounted.clone()),
            Some(volume) => {
                let text = format!("volume {:?} is {} already", wanted.name, volume.export.name());
                return Err(Error::new(ErrorKind::FailedPrecondition, text));
            }
            None if volumes.len() >= protocol::MAX_ATTACHED_VOLUMES => {
                let text = format!(
                    "the sandbox has {} volumes on servers",
                    protocol::MAX_ATTACHED_VOLUMES
                );
                return Err(Error::new(ErrorKind::ResourceExhausted, text));
            }
            None => {}
        }
        identify(client)?;
        let directory = self.directory.join("volumes").join(&wanted.name);
        fs::create_dir_all(&directory).context(|| format!("make {}", directory.display()))?;
        let (sender, mounted) = watch::channel(None);
        let (export, target) = (wanted.export.clone(), directory.clone());
        self.spawn(move || {
            sender.send_replace(Some(export.mount(&target)));
        })?;
        volumes.insert(
            wanted.name.clone(),
            Volume {
                export: wanted.export.clone(),
                directory,
                mounted: mounted.clone(),
            },
        );
        Ok(mounted)
    }

    /// Does work that may wait for a server.
    fn spawn(&self, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let Ok(permit): std::result::Result<OwnedSemaphorePermit, _> =
            Arc::clone(&self.waiting).try_acquire_owned()
        else {
            let text = format!("{MAX_WAITING} calls wait for NFS servers already");
            return Err(Error::new(ErrorKind::ResourceExhausted, text));
        };
        let name = "nfs".to_owned();
        let started = thread::Builder::new().name(name).spawn(move || {
            work();
            drop(permit);
        });
        started
            .map(drop)
            .context(|| "start a thread that waits for an NFS server")
    }

    fn mounted(&self, index: usize, mount: &spec::Mount) -> Result<(Export, PathBuf)> {
        let volumes = self.all();
        let found = volumes
            .get(&mount.source)
            .filter(|volume| matches!(*volume.mounted.borrow(), Some(Ok(()))));
        found
            .map(|volume| (volume.export.clone(), volume.directory.clone()))
            .ok_or_else(|| {
                let text = format!(
                    "mounts[{index}].source is {:?}: no such volume is mounted from a server",
                    mount.source
                );
                Error::new(ErrorKind::FailedPrecondition, text)
            })
    }

    /// The directory of the volume that a mount names. No server is asked.
    pub(super) fn find(&self, index: usize, mount: &spec::Mount) -> Result<PathBuf> {
        self.mounted(index, mount).map(|(_, directory)| directory)
    }

    /// Finds or makes the parts of volumes that these mounts name, and holds them.
    ///
    /// # Errors
    /// As [`subpath::pin`]; `DeadlineExceeded` when a server does not answer in time.
    pub async fn parts(&self, mounts: &[spec::Mount]) -> Result<Parts> {
        let mut parts = Parts::default();
        for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| mount.kind == KIND) {
            let mut options = mount.options.iter();
            let Some(below) = options.find_map(|option| option.strip_prefix("subpath=")) else {
                continue;
            };
            let (export, volume) = self.mounted(index, mount)?;
            let number = self.n_parts.fetch_add(1, Ordering::Relaxed);
            let target = self.directory.join("parts").join(number.to_string());
            let (below, field) = (below.to_owned(), format!("mounts[{index}].options: subpath"));
            let action = format!("find {below:?} in {}", export.name());
            let (sender, receiver) = oneshot::channel();
            self.spawn(move || {
                let pinned = subpath::pin(&field, &volume, &below, &target, !export.read_only);
                // When nobody waits any more, the part is let go of.
                let _ = sender.send(pinned.map(|()| Part(Some(target))));
            })?;
            match timeout(DEADLINE, receiver).await {
                Ok(Ok(part)) => parts.0.insert(index, part?),
                Ok(Err(_)) => return Err(Error::new(ErrorKind::Internal, action)),
                Err(_) => return Err(self.late(&action)),
            };
        }
        Ok(parts)
    }

    /// Sends what was written to the servers, and unmounts all. A server that does not answer soon loses it.
    pub async fn unmount_all(&self) {
        let volumes: Vec<_> = self.all().drain().collect();
        let mut flushes = Vec::new();
        for (name, volume) in volumes {
            if !matches!(*volume.mounted.borrow(), Some(Ok(()))) {
                continue;
            }
            let (sender, flushed) = oneshot::channel();
            let directory = volume.directory.clone();
            let started = self.spawn(move || {
                // When nobody waits any more, it was too late.
                let _ = sender.send(flush(&directory));
            });
            if let Err(error) = started {
                crate::log::failure("flush an NFS volume", &error);
            }
            flushes.push((name, volume, flushed));
        }
        let until = tokio::time::Instant::now() + FLUSH_DEADLINE;
        let mut ends = Vec::new();
        for (name, volume, flushed) in flushes {
            let is_clean = match tokio::time::timeout_at(until, flushed).await {
                Ok(Ok(Ok(()))) => true,
                Ok(Ok(Err(error))) => {
                    crate::log::error(&format!("flush NFS volume {name:?}: {error}"));
                    false
                }
                Ok(Err(_)) | Err(_) => {
                    let server = volume.export.name();
                    crate::log::error(&format!(
                        "NFS volume {name:?}: {server} does not answer: what it was not told yet is lost"
                    ));
                    false
                }
            };
            let flags = if is_clean {
                UnmountFlags::NOFOLLOW
            } else {
                UnmountFlags::NOFOLLOW | UnmountFlags::FORCE | UnmountFlags::DETACH
            };
            let (sender, ended) = oneshot::channel();
            let started = self.spawn(move || {
                if let Err(error) = unmount(&volume.directory, flags) {
                    crate::log::error(&format!("unmount {}: {error}", volume.directory.display()));
                }
                let _ = sender.send(());
            });
            match started {
                Ok(()) => ends.push(ended),
                Err(error) => crate::log::failure("unmount an NFS volume", &error),
            }
        }
        let until = tokio::time::Instant::now() + UNMOUNT_DEADLINE;
        for ended in ends {
            let _ = tokio::time::timeout_at(until, ended).await;
        }
    }
}

/// Has the kernel tell servers that this guest is `client`.
fn identify(client: &str) -> Result<()> {
    let action = || format!("write {IDENTIFIER}");
    // Each write waits for a grace period of RCU.
    if fs::read_to_string(IDENTIFIER).context(action)?.trim_end() == client {
        return Ok(());
    }
    fs::write(IDENTIFIER, client).context(action)
}

fn flush(directory: &Path) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::syncfs(rustix::fs::open(directory, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn export(server: &str, path: &str) -> Result<Export> {
        Export::parse("10.0.0.1", server.into(), path.into(), false)
    }

    fn volume(name: &str, path: &str) -> NfsVolume {
        NfsVolume {
            name: name.into(),
            export: export("nas", path).unwrap(),
        }
    }

    #[test]
    fn exports_are_checked_and_told() {
        for (server, path, field) in [
            ("", "/a", "nfs.server"),
            ("a/b", "/a", "nfs.server"),
            ("nas", "a", "nfs.path"),
            ("nas", "", "nfs.path"),
            ("nas", "/a\0", "nfs.path"),
        ] {
            let error = export(server, path).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
        let error = Export::parse("nas", "nas".into(), "/".into(), false).unwrap_err();
        assert!(error.to_string().starts_with("nfs.address"), "{error}");
        assert_eq!(export("nas", "/a").unwrap().name(), "nas:/a (server 10.0.0.1)");
        assert_eq!(export("10.0.0.1", "/a").unwrap().name(), "10.0.0.1:/a");
        let elsewhere = Export::parse("10.0.0.2", "nas".into(), "/a".into(), true).unwrap();
        assert!(elsewhere.is_same(&export("nas", "/a").unwrap()));
        assert!(!elsewhere.is_same(&export("nas", "/b").unwrap()));
    }

    fn volumes(directory: &Path) -> NfsVolumes {
        NfsVolumes::new(directory.to_owned())
    }

    /// A volume whose attempt goes on until the sender says how it ends.
    fn pending(volumes: &NfsVolumes, wanted: &NfsVolume) -> watch::Sender<Option<rustix::io::Result<()>>> {
        let (sender, mounted) = watch::channel(None);
        let attempt = Volume {
            export: wanted.export.clone(),
            directory: volumes.directory.join("volumes").join(&wanted.name),
            mounted,
        };
        volumes.all().insert(wanted.name.clone(), attempt);
        sender
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_named_and_the_next_call_waits_for_the_same_attempt() {
        let directory = tempfile::tempdir().unwrap();
        let volumes = volumes(directory.path());
        let attempt = pending(&volumes, &volume("v", "/a"));
        let begun = tokio::time::Instant::now();
        let error = volumes.attach(volume("v", "/a"), "id").await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
        assert!(begun.elapsed() < Duration::from_secs(31), "{:?}", begun.elapsed());
        let text = error.to_string();
        for part in ["\"v\"", "nas:/a (server 10.0.0.1)", "30 s"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let mount = spec::Mount {
            source: "v".into(),
            ..Default::default()
        };
        assert_eq!(
            volumes.find(3, &mount).unwrap_err().kind,
            ErrorKind::FailedPrecondition
        );
        let other = volumes.attach(volume("v", "/b"), "id").await.unwrap_err();
        assert_eq!(other.kind, ErrorKind::FailedPrecondition);
        attempt.send_replace(Some(Ok(())));
        volumes.attach(volume("v", "/a"), "id").await.unwrap();
        assert!(volumes.find(3, &mount).unwrap().ends_with("volumes/v"));
    }

    #[tokio::test]
    async fn what_the_server_answers_is_told_and_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let volumes = volumes(directory.path());
        let attempt = pending(&volumes, &volume("v", "/a"));
        attempt.send_replace(Some(Err(Errno::ACCESS)));
        assert!(volumes.all()["v"].has_failed());
        let attempt = pending(&volumes, &volume("v", "/a"));
        let ends = tokio::spawn({
            let volumes = volumes.clone();
            async move { volumes.attach(volume("v", "/a"), "id").await.unwrap_err() }
        });
        tokio::task::yield_now().await;
        attempt.send_replace(Some(Err(Errno::PROTONOSUPPORT)));
        let error = ends.await.unwrap();
        assert!(
            error.to_string().contains("does not speak NFS version 4"),
            "{error}"
        );
    }

    #[test]
    fn threads_that_wait_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let volumes = volumes(directory.path());
        let mut ends = Vec::new();
        for _ in 0..MAX_WAITING {
            let (end, wait) = mpsc::channel::<()>();
            volumes
                .spawn(move || {
                    let _ = wait.recv();
                })
                .unwrap();
            ends.push(end);
        }
        let error = volumes.spawn(|| ()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::ResourceExhausted);
    }
}
