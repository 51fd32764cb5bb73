//! Snapshots of running groups, on disk.
//!
//! ```text
//!  <state>/snapshots/<id>/sandbox.json, state, memory, scratch   the shim's (protos/sandbox.proto, Checkpoint)
//!                         snapshot.json                          Snapshot; written last
//!                    <id>.draft/                                 not complete; removed at the agent's start
//! ```
//! They hold all that a group had in memory, keys and passwords too: nobody but the agent's user may read them, and only
//! groups of the same namespace are made from them. A fork's snapshot lives as long as the fork takes.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use serde::{Deserialize, Serialize};

use crate::{
    engine::SnapshotInfo,
    error::{Error, ErrorKind, Result},
    group::{
        spec::GroupSpec,
        status::{ContainerStatus, GroupId},
    },
    random,
    sandbox::sealed::{self, Digests},
};

/// Raised whenever the manifest or what it means changes.
const FORMAT: u32 = 1;
const MANIFEST: &str = "snapshot.json";
const RECORD: &str = "sandbox.json";
const SCRATCH: &str = "scratch";
/// What is sealed.
const FILES: [&str; 4] = [RECORD, "state", "memory", SCRATCH];

/// Identifier of a snapshot: `snap-` and 20 lower-case letters and digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(String);

impl SnapshotId {
    /// Parses an id.
    pub fn parse(text: &str) -> Option<Self> {
        let tail = text.strip_prefix("snap-")?;
        let valid = tail.len() == 20 && tail.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        valid.then(|| Self(text.to_owned()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A snapshot of a group, beside the files of its VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    format: u32,
    /// Identifier.
    pub id: SnapshotId,
    /// When it was taken, Unix milliseconds.
    pub created_at_ms: u64,
    /// Of which group.
    pub group_id: GroupId,
    /// The group as it was wanted.
    pub spec: GroupSpec,
    /// Its containers as they were seen: each runs or has ended for good.
    pub containers: Vec<ContainerStatus>,
    /// How long the containers stood still, microseconds.
    pub pause_us: u64,
    /// Disk space, bytes.
    pub size_bytes: u64,
    /// It goes once those that were made from it run.
    pub is_ephemeral: bool,
    /// Digest of the guest kernel on this host then.
    kernel: String,
    /// Of what was sealed; none when it is ephemeral.
    digests: Digests,
}

impl Snapshot {
    /// What others may know of it.
    pub fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            id: self.id.clone(),
            group_id: self.group_id.clone(),
            name: self.spec.name.clone(),
            namespace: self.spec.namespace.clone(),
            created_at_ms: self.created_at_ms,
            pause_us: self.pause_us,
            size_bytes: self.size_bytes,
        }
    }
}

/// What is known of a group of which a snapshot is being taken.
#[derive(Debug)]
pub struct Taken {
    /// Which group.
    pub group_id: GroupId,
    /// As it was wanted.
    pub spec: GroupSpec,
    /// Its containers.
    pub containers: Vec<ContainerStatus>,
    /// How long they stood still, microseconds.
    pub pause_us: u64,
    /// When, Unix milliseconds.
    pub created_at_ms: u64,
    /// It is for one fork.
    pub is_ephemeral: bool,
}

/// A directory for a snapshot that is not complete. Removed when it is dropped.
#[derive(Debug)]
pub struct Draft {
    id: SnapshotId,
    directory: PathBuf,
    place: PathBuf,
    is_kept: bool,
}

impl Draft {
    /// Where its files are to be made.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = remove_tree(&self.directory)
        {
            tracing::warn!(path = %self.directory.display(), %error, "a snapshot that is not complete stays");
        }
    }
}

/// All snapshots of this host. Clones share them. Calls block.
#[derive(Debug, Clone)]
pub struct Snapshots {
    directory: PathBuf,
    kernel: PathBuf,
    kernel_digest: Arc<OnceLock<String>>,
}

fn failed(what: String) -> impl FnOnce(io::Error) -> Error {
    move |error| {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
            _ => ErrorKind::Internal,
        };
        Error::with_source(kind, what, error)
    }
}

fn refused(id: &SnapshotId, why: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::FailedPrecondition,
        format!("snapshot {id} is refused: {why}"),
    )
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Snapshots {
    /// Makes the directory and removes what is not complete, and what was for forks that are `over`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(directory: PathBuf, kernel: PathBuf, is_over: impl Fn(&SnapshotId) -> bool) -> Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(failed(format!("make {}", directory.display())))?;
        let snapshots = Self {
            directory,
            kernel,
            kernel_digest: Arc::default(),
        };
        for path in snapshots.entries()? {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let is_draft = name.strip_suffix(".draft").and_then(SnapshotId::parse).is_some();
            let is_rest = || {
                let id = SnapshotId::parse(name);
                id.and_then(|id| snapshots.read(&id).ok())
                    .is_some_and(|snapshot| snapshot.is_ephemeral && is_over(&snapshot.id))
            };
            if is_draft || is_rest() {
                remove_tree(&path).map_err(failed(format!("remove {}", path.display())))?;
            }
        }
        Ok(snapshots)
    }

    fn entries(&self) -> Result<Vec<PathBuf>> {
        let listing =
            fs::read_dir(&self.directory).map_err(failed(format!("list {}", self.directory.display())))?;
        Ok(listing.flatten().map(|entry| entry.path()).collect())
    }

    /// Where the files of a snapshot are.
    pub fn directory(&self, id: &SnapshotId) -> PathBuf {
        self.directory.join(id.as_str())
    }

    /// The scratch disk in a snapshot.
    pub fn scratch(&self, id: &SnapshotId) -> PathBuf {
        self.directory(id).join(SCRATCH)
    }

    /// All that can be read, oldest first, without those of forks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn list(&self) -> Result<Vec<Snapshot>> {
        let ids = self
            .entries()?
            .into_iter()
            .filter_map(|path| SnapshotId::parse(path.file_name()?.to_str()?));
        let mut found = Vec::new();
        for id in ids {
            match self.read(&id) {
                Ok(snapshot) if snapshot.is_ephemeral => {}
                Ok(snapshot) => found.push(snapshot),
                Err(error) => tracing::warn!(error = %error.chain(), "a snapshot is passed over"),
            }
        }
        found.sort_by(|a, b| (a.created_at_ms, &a.id).cmp(&(b.created_at_ms, &b.id)));
        Ok(found)
    }

    /// One snapshot.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for one of another format or owner.
    pub fn read(&self, id: &SnapshotId) -> Result<Snapshot> {
        let directory = self.directory(id);
        let metadata = fs::symlink_metadata(&directory).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("no snapshot {id}")),
            _ => failed(format!("look at {}", directory.display()))(error),
        })?;
        let ours = rustix::process::geteuid().as_raw();
        if metadata.uid() != ours || metadata.mode() & 0o077 != 0 || !metadata.is_dir() {
            return Err(refused(
                id,
                format_args!(
                    "it belongs to user {} with mode {:o}: it must be a directory of user {ours} with mode 700",
                    metadata.uid(),
                    metadata.mode() & 0o7777
                ),
            ));
        }
        let path = directory.join(MANIFEST);
        let bytes = fs::read(&path).map_err(failed(format!("read {}", path.display())))?;
        let bad = |error: serde_json::Error| refused(id, format_args!("{MANIFEST} cannot be read: {error}"));
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(bad)?;
        if value["format"] != FORMAT {
            let found = &value["format"];
            return Err(refused(
                id,
                format_args!("it has version {found}, this agent reads version {FORMAT}"),
            ));
        }
        let snapshot: Snapshot = serde_json::from_value(value).map_err(bad)?;
        if snapshot.id != *id {
            return Err(refused(id, format_args!("it says that it is {}", snapshot.id)));
        }
        Ok(snapshot)
    }

    /// Checks that a snapshot is what was taken, and was taken of a guest with this host's kernel.
    ///
    /// # Errors
    /// `FailedPrecondition` with what differs.
    pub fn verify(&self, snapshot: &Snapshot) -> Result<()> {
        if snapshot.kernel != self.kernel_digest()? {
            return Err(refused(
                &snapshot.id,
                "its guest runs another kernel than this host's",
            ));
        }
        if snapshot.is_ephemeral {
            // Written a moment ago, by this agent, for this fork.
            return Ok(());
        }
        sealed::check(&self.directory(&snapshot.id), &FILES, &snapshot.digests)
            .map_err(|why| refused(&snapshot.id, why))
    }

    fn kernel_digest(&self) -> Result<String> {
        if let Some(digest) = self.kernel_digest.get() {
            return Ok(digest.clone());
        }
        let digest =
            sealed::digest_of(&self.kernel).map_err(failed(format!("read {}", self.kernel.display())))?;
        Ok(self.kernel_digest.get_or_init(|| digest).clone())
    }

    /// Begins a snapshot.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn draft(&self) -> Result<Draft> {
        let id = SnapshotId(format!("snap-{}", random::text(20)?));
        let place = self.directory(&id);
        let directory = place.with_extension("draft");
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(failed(format!("make {}", directory.display())))?;
        Ok(Draft {
            id,
            directory,
            place,
            is_kept: false,
        })
    }

    /// Makes a draft, whose files are complete, a snapshot.
    ///
    /// # Errors
    /// Those of the file system; the draft is removed.
    pub fn keep(&self, mut draft: Draft, taken: Taken) -> Result<Snapshot> {
        let Taken {
            group_id,
            spec,
            containers,
            pause_us,
            created_at_ms,
            is_ephemeral,
        } = taken;
        let directory = draft.directory.clone();
        let reading = || failed(format!("read {}", directory.display()));
        let mut size_bytes = 0;
        for name in FILES {
            let metadata = fs::metadata(directory.join(name)).map_err(reading())?;
            size_bytes += metadata.blocks() * 512;
        }
        let digests = if is_ephemeral {
            Digests::new()
        } else {
            sealed::digests(&directory, &FILES).map_err(reading())?
        };
        let snapshot = Snapshot {
            format: FORMAT,
            id: draft.id.clone(),
            created_at_ms,
            group_id,
            spec,
            containers,
            pause_us,
            size_bytes,
            is_ephemeral,
            kernel: self.kernel_digest()?,
            digests,
        };
        let path = directory.join(MANIFEST);
        let text = serde_json::to_vec(&snapshot)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "encode a snapshot", error))?;
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, &text).and_then(|()| file.sync_all()))
            .map_err(failed(format!("write {}", path.display())))?;
        fs::rename(&directory, &draft.place).map_err(failed(format!("keep {}", draft.place.display())))?;
        draft.is_kept = true;
        Ok(snapshot)
    }

    /// Ids of the containers in a draft, as their shim knows them.
    ///
    /// # Errors
    /// The shim's record cannot be read.
    pub fn captured_containers(draft: &Draft) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Record {
            containers: std::collections::BTreeMap<String, serde::de::IgnoredAny>,
        }
        let path = draft.directory.join(RECORD);
        let bytes = fs::read(&path).map_err(failed(format!("read {}", path.display())))?;
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| {
            Error::with_source(ErrorKind::Internal, format!("parse {}", path.display()), error)
        })?;
        Ok(record.containers.into_keys().collect())
    }

    /// Removes a snapshot. Groups that were made from it keep what they have of it.
    ///
    /// # Errors
    /// `NotFound`, and those of the file system.
    pub fn remove(&self, id: &SnapshotId) -> Result<()> {
        let directory = self.directory(id);
        if !directory.exists() {
            return Err(Error::new(ErrorKind::NotFound, format!("no snapshot {id}")));
        }
        // Half a snapshot must not look like one.
        let going = directory.with_extension("draft");
        fs::rename(&directory, &going)
            .and_then(|()| remove_tree(&going))
            .map_err(failed(format!("remove {}", directory.display())))
    }
}

/// Snapshots for the tests of other modules.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::group::{spec::testing, status::GroupStatus};

    /// Of a group `name` with one container.
    pub(crate) fn snapshot(name: &str) -> Snapshot {
        let spec = testing::group(name, 1);
        Snapshot {
            format: FORMAT,
            id: SnapshotId::parse("snap-0000000000000000000a").unwrap(),
            created_at_ms: 1_767_225_600_000,
            group_id: GroupId::parse("eci-0000000000000000000a").unwrap(),
            containers: GroupStatus::new(&spec, 1).containers,
            spec,
            pause_us: 5000,
            size_bytes: 50 << 20,
            is_ephemeral: false,
            kernel: String::new(),
            digests: Digests::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::group::{spec::testing, status::GroupStatus};

    struct Bench {
        dir: tempfile::TempDir,
        snapshots: Snapshots,
    }

    fn open(dir: &Path, is_over: bool) -> Snapshots {
        fs::write(dir.join("kernel"), "kernel").unwrap();
        Snapshots::open(dir.join("snapshots"), dir.join("kernel"), |_| is_over).unwrap()
    }

    fn bench() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = open(dir.path(), true);
        Bench { dir, snapshots }
    }

    impl Bench {
        fn draft(&self) -> Draft {
            let draft = self.snapshots.draft().unwrap();
            for name in FILES {
                fs::write(draft.directory().join(name), name.repeat(100)).unwrap();
            }
            draft
        }

        fn taken(&self, is_ephemeral: bool) -> Snapshot {
            let spec = testing::group("web", 1);
            let taken = Taken {
                group_id: GroupId::parse("eci-0000000000000000000a").unwrap(),
                containers: GroupStatus::new(&spec, 1).containers,
                spec,
                pause_us: 5,
                created_at_ms: 7,
                is_ephemeral,
            };
            self.snapshots.keep(self.draft(), taken).unwrap()
        }

        fn refusal(&self, id: &SnapshotId) -> String {
            let checked = self.snapshots.read(id).and_then(|it| self.snapshots.verify(&it));
            let error = checked.unwrap_err();
            assert_eq!(error.kind, ErrorKind::FailedPrecondition);
            error.message
        }
    }

    #[test]
    fn a_snapshot_is_listed_verified_and_removed() {
        let bench = bench();
        let snapshot = bench.taken(false);
        assert_eq!(bench.snapshots.list().unwrap(), std::slice::from_ref(&snapshot));
        bench.snapshots.verify(&snapshot).unwrap();
        bench.snapshots.remove(&snapshot.id).unwrap();
        assert_eq!(bench.snapshots.list().unwrap(), []);
        for result in [
            bench.snapshots.remove(&snapshot.id),
            bench.snapshots.read(&snapshot.id).map(drop),
        ] {
            assert_eq!(result.unwrap_err().kind, ErrorKind::NotFound);
        }
    }

    #[test]
    fn what_is_not_complete_and_what_was_for_a_fork_goes_at_the_next_start() {
        let bench = bench();
        let kept = bench.taken(false);
        let fork = bench.taken(true);
        let draft = bench.draft();
        let directory = draft.directory().to_owned();
        std::mem::forget(draft);
        assert_eq!(bench.snapshots.list().unwrap(), std::slice::from_ref(&kept));
        // A group is still being made from it.
        open(bench.dir.path(), false).read(&fork.id).unwrap();
        assert!(!directory.exists());
        let again = open(bench.dir.path(), true);
        assert_eq!(again.read(&fork.id).unwrap_err().kind, ErrorKind::NotFound);
        again.verify(&again.read(&kept.id).unwrap()).unwrap();
    }

    #[test]
    fn a_draft_that_is_dropped_leaves_nothing() {
        let bench = bench();
        let directory = bench.draft().directory().to_owned();
        assert!(!directory.exists());
    }

    #[test]
    fn what_is_not_as_it_was_taken_is_refused_with_the_reason() {
        let bench = bench();
        for (file, content, why) in [
            ("memory", &b"memory"[..], "memory is not what was sealed"),
            ("state", b"", "state is not what was sealed"),
            ("scratch", b"x", "scratch is not what was sealed"),
            ("sandbox.json", b"{}", "sandbox.json is not what was sealed"),
            (
                MANIFEST,
                b"{\"format\":2}",
                "it has version 2, this agent reads version 1",
            ),
            (MANIFEST, b"{\"format\":1", "cannot be read"),
        ] {
            let snapshot = bench.taken(false);
            fs::write(bench.snapshots.directory(&snapshot.id).join(file), content).unwrap();
            let refusal = bench.refusal(&snapshot.id);
            assert!(refusal.contains(why), "{file}: {refusal}");
        }
        // One bit.
        let snapshot = bench.taken(false);
        let path = bench.snapshots.directory(&snapshot.id).join("memory");
        let mut bytes = fs::read(&path).unwrap();
        bytes[300] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(bench.refusal(&snapshot.id).contains("memory is not"));
        // Another owner's: others could have read or written it.
        let snapshot = bench.taken(false);
        let directory = bench.snapshots.directory(&snapshot.id);
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(bench.refusal(&snapshot.id).contains("mode 755"));
        // Under another's name.
        let snapshot = bench.taken(false);
        let other = SnapshotId::parse("snap-0000000000000000000a").unwrap();
        fs::rename(
            bench.snapshots.directory(&snapshot.id),
            bench.snapshots.directory(&other),
        )
        .unwrap();
        assert!(bench.refusal(&other).contains("says that it is"));
    }

    #[test]
    fn another_kernel_is_refused() {
        let bench = bench();
        let snapshot = bench.taken(true);
        fs::write(bench.dir.path().join("kernel"), "other").unwrap();
        let again = Snapshots::open(
            bench.dir.path().join("snapshots"),
            bench.dir.path().join("kernel"),
            |_| false,
        )
        .unwrap();
        let refusal = again.verify(&again.read(&snapshot.id).unwrap()).unwrap_err();
        assert!(refusal.message.contains("another kernel"), "{}", refusal.message);
    }
}
