//! Durable state: one redb file. A write is on disk when the call returns; a process killed at any moment leaves either
//! the old or the new state. Calls block on the disk.

mod moments;

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::Arc,
};

pub use moments::{HALT_VARIABLE, Moments};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, ErrorKind, Result},
    group::{
        disk::DiskId,
        spec::GroupSpec,
        status::{Group, GroupId},
    },
    network::Addresses,
    snapshots::SnapshotId,
};

/// Version of the records; a store of another version is refused.
const SCHEMA: u64 = 1;
/// How long an idempotency token is remembered.
const TOKEN_LIFE_MS: u64 = 24 * 3600 * 1000;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const GROUPS: TableDefinition<&str, &[u8]> = TableDefinition::new("groups");
const TOKENS: TableDefinition<&str, &[u8]> = TableDefinition::new("tokens");
/// Disks that were made, and when, Unix milliseconds.
const DISKS: TableDefinition<&str, u64> = TableDefinition::new("disks");

/// All that is kept of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Wanted and seen.
    pub group: Group,
    /// Its address; leased as long as the record exists.
    pub ip: Option<Ipv4Addr>,
    /// Its IPv6 address, where it has one: it is bound to the other.
    #[serde(default)]
    pub ip6: Option<Ipv6Addr>,
    /// Its end is wanted, with so many seconds of grace.
    pub deleting: Option<u64>,
    /// Its sandbox was started and not stopped.
    pub sandbox_running: bool,
    /// All its containers are to begin anew, asked for at this time, Unix milliseconds.
    #[serde(default)]
    pub restarting: Option<u64>,
    /// What the group is to be, once what the update changes has ended.
    #[serde(default)]
    pub update: Option<GroupSpec>,
    /// The files of running containers are not known to be what the group says.
    #[serde(default)]
    pub refreshing: bool,
    /// The update changes sizes only, and is carried out while the containers run.
    #[serde(default)]
    pub resizing: Option<crate::group::resize::Resizing>,
    /// It has failed as a whole, whatever its containers do.
    #[serde(default)]
    pub failed: bool,
    /// When its containers began to be ended, Unix milliseconds: their grace counts from here.
    #[serde(default)]
    pub ending_since_ms: Option<u64>,
    /// The last event of the guest that was taken in; `None` for a clone before it has told what it was captured with.
    #[serde(default = "no_news")]
    pub news_after: Option<u64>,
    /// It goes on from this snapshot, and does not run yet.
    #[serde(default)]
    pub restores: Option<SnapshotId>,
    /// One per container, same order.
    pub containers: Vec<ContainerRecord>,
}

impl Record {
    /// All its addresses.
    pub fn addresses(&self) -> Option<Addresses> {
        Some(Addresses {
            v4: self.ip?,
            v6: self.ip6,
        })
    }
}

/// The guest has told nothing yet.
#[allow(clippy::unnecessary_wraps, reason = "the default of an optional field")]
fn no_news() -> Option<u64> {
    Some(0)
}

/// What is kept of a container beside its status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Starts so far: the number of the next run.
    pub runs: u32,
    /// Ends or failed pulls in a row that count for the back-off.
    pub failures: u32,
    /// Not tried again before, Unix milliseconds.
    pub not_before_ms: u64,
    /// It ended for good.
    pub done: bool,
    /// The next run is not begun but goes on, in a sandbox made from a snapshot.
    #[serde(default)]
    pub is_captured: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Token {
    group: GroupId,
    at_ms: u64,
}

/// The store.
#[derive(Debug, Clone)]
pub struct Store {
    db: Arc<Database>,
    moments: Arc<Moments>,
}

fn failed<E: Into<redb::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::with_source(ErrorKind::Internal, what, error.into())
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| Error::with_source(ErrorKind::Internal, "encode a record", error))
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        Error::with_source(
            ErrorKind::Internal,
            "the store has a record that can't be read",
            error,
        )
    })
}

impl Store {
    /// Opens the store, making it when it is not there.
    ///
    /// # Errors
    /// `FailedPrecondition` when another process has it open or its schema is not ours; `Internal` for the rest.
    pub fn open(path: &Path) -> Result<Self> {
        let db = Database::create(path).map_err(|error| {
            let kind = match error {
                redb::DatabaseError::DatabaseAlreadyOpen => ErrorKind::FailedPrecondition,
                _ => ErrorKind::Internal,
            };
            Error::with_source(
                kind,
                format!("open store {}: does another eci-agent run?", path.display()),
                error,
            )
        })?;
        let write = db.begin_write().map_err(failed("begin a write"))?;
        {
            let mut meta = write.open_table(META).map_err(failed("open table meta"))?;
            let schema = meta
                .get("schema")
                .map_err(failed("read the schema"))?
                .map(|value| value.value());
            match schema {
                None => {
                    meta.insert("schema", SCHEMA)
                        .map_err(failed("write the schema"))?;
                }
                Some(SCHEMA) => {}
                Some(other) => {
                    return Err(Error::new(
                        ErrorKind::FailedPrecondition,
                        format!(
                            "store {} has schema {other}, this agent knows {SCHEMA}: use the agent that wrote it",
                            path.display()
                        ),
                    ));
                }
            }
            write.open_table(GROUPS).map_err(failed("open table groups"))?;
            write.open_table(TOKENS).map_err(failed("open table tokens"))?;
            write.open_table(DISKS).map_err(failed("open table disks"))?;
        }
        write.commit().map_err(failed("commit"))?;
        Ok(Self {
            db: Arc::new(db),
            moments: Arc::default(),
        })
    }

    /// The same store, whose writes count as these moments.
    #[must_use]
    pub fn counting(self, moments: Moments) -> Self {
        Self {
            moments: Arc::new(moments),
            ..self
        }
    }

    /// Every write about groups ends here.
    fn commit(&self, write: WriteTransaction, what: fmt::Arguments<'_>) -> Result<()> {
        self.moments.pass("before", what);
        write.commit().map_err(failed("commit"))?;
        self.moments.pass("after", what);
        Ok(())
    }

    /// All groups.
    ///
    /// # Errors
    /// `Internal`.
    pub fn records(&self) -> Result<Vec<Record>> {
        let read = self.db.begin_read().map_err(failed("begin a read"))?;
        let table = read.open_table(GROUPS).map_err(failed("open table groups"))?;
        let mut records = Vec::new();
        for entry in table.iter().map_err(failed("read groups"))? {
            let (_, value) = entry.map_err(failed("read groups"))?;
            records.push(decode(value.value())?);
        }
        Ok(records)
    }

    /// Writes a group.
    ///
    /// # Errors
    /// `Internal`; then the old state is still there.
    pub fn put(&self, record: &Record) -> Result<()> {
        self.put_with_token(record, None, 0)
    }

    /// Writes a group and the token it was made with, both or neither.
    ///
    /// # Errors
    /// `Internal`; then the old state is still there.
    pub fn put_with_token(&self, record: &Record, token: Option<&str>, now_ms: u64) -> Result<()> {
        let write = self.db.begin_write().map_err(failed("begin a write"))?;
        {
            let mut table = write.open_table(GROUPS).map_err(failed("open table groups"))?;
            let bytes = encode(record)?;
            table
                .insert(record.group.id.as_str(), bytes.as_slice())
                .map_err(failed("write a group"))?;
            if let Some(token) = token {
                let mut tokens = write.open_table(TOKENS).map_err(failed("open table tokens"))?;
                let expired = |bytes: &[u8]| {
                    decode::<Token>(bytes).map_or(true, |token| token.at_ms + TOKEN_LIFE_MS < now_ms)
                };
                tokens
                    .retain(|_, bytes| !expired(bytes))
                    .map_err(failed("drop old tokens"))?;
                let value = encode(&Token {
                    group: record.group.id.clone(),
                    at_ms: now_ms,
                })?;
                tokens
                    .insert(token, value.as_slice())
                    .map_err(failed("write a token"))?;
            }
        }
        let (id, phase) = (&record.group.id, record.group.status.phase);
        self.commit(write, format_args!("{id} is {phase:?}"))
    }

    /// Forgets a group. Its token is remembered.
    ///
    /// # Errors
    /// `Internal`.
    pub fn remove(&self, id: &GroupId) -> Result<()> {
        let write = self.db.begin_write().map_err(failed("begin a write"))?;
        {
            let mut table = write.open_table(GROUPS).map_err(failed("open table groups"))?;
            table.remove(id.as_str()).map_err(failed("remove a group"))?;
        }
        self.commit(write, format_args!("{id} is forgotten"))
    }

    /// When a disk was made, Unix milliseconds, if that was noted.
    ///
    /// # Errors
    /// `Internal`.
    pub fn disk_made(&self, id: &DiskId) -> Result<Option<u64>> {
        let read = self.db.begin_read().map_err(failed("begin a read"))?;
        let table = read.open_table(DISKS).map_err(failed("open table disks"))?;
        let made = table.get(id.as_str()).map_err(failed("read a disk"))?;
        Ok(made.map(|made| made.value()))
    }

    /// Notes that a disk was made; it will not be made again.
    ///
    /// # Errors
    /// `Internal`.
    pub fn note_disk(&self, id: &DiskId, now_ms: u64) -> Result<()> {
        let write = self.db.begin_write().map_err(failed("begin a write"))?;
        {
            let mut table = write.open_table(DISKS).map_err(failed("open table disks"))?;
            table.insert(id.as_str(), now_ms).map_err(failed("note a disk"))?;
        }
        write.commit().map_err(failed("commit"))
    }

    /// Forgets a disk that was removed.
    ///
    /// # Errors
    /// `Internal`.
    pub fn forget_disk(&self, id: &DiskId) -> Result<()> {
        let write = self.db.begin_write().map_err(failed("begin a write"))?;
        {
            let mut table = write.open_table(DISKS).map_err(failed("open table disks"))?;
            table.remove(id.as_str()).map_err(failed("forget a disk"))?;
        }
        write.commit().map_err(failed("commit"))
    }

    /// The group made with this token.
    ///
    /// # Errors
    /// `Internal`.
    pub fn token(&self, token: &str, now_ms: u64) -> Result<Option<GroupId>> {
        let read = self.db.begin_read().map_err(failed("begin a read"))?;
        let table = read.open_table(TOKENS).map_err(failed("open table tokens"))?;
        let Some(value) = table.get(token).map_err(failed("read a token"))? else {
            return Ok(None);
        };
        let token: Token = decode(value.value())?;
        Ok((token.at_ms + TOKEN_LIFE_MS >= now_ms).then_some(token.group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{spec::testing, status};

    fn record(id: &str) -> Record {
        let spec = testing::group("g", 2);
        Record {
            group: Group {
                id: GroupId::parse(id).unwrap(),
                status: status::GroupStatus::new(&spec, 1),
                spec,
            },
            ip: Some(Ipv4Addr::new(10, 89, 0, 2)),
            ip6: None,
            deleting: None,
            sandbox_running: false,
            restarting: None,
            update: None,
            refreshing: false,
            resizing: None,
            failed: false,
            ending_since_ms: None,
            news_after: Some(0),
            restores: None,
            containers: vec![ContainerRecord::default(); 2],
        }
    }

    #[test]
    fn what_was_written_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        let (a, b) = (
            record("eci-0000000000000000000a"),
            record("eci-0000000000000000000b"),
        );
        {
            let store = Store::open(&path).unwrap();
            store.put_with_token(&a, Some("t"), 10).unwrap();
            store.put(&b).unwrap();
            store.remove(&b.group.id).unwrap();
        }
        let store = Store::open(&path).unwrap();
        assert_eq!(store.records().unwrap(), std::slice::from_ref(&a));
        assert_eq!(store.token("t", 10).unwrap(), Some(a.group.id));
        assert_eq!(store.token("t", 11 + TOKEN_LIFE_MS).unwrap(), None);
        assert_eq!(store.token("u", 10).unwrap(), None);
    }

    #[test]
    fn a_copy_taken_at_any_moment_opens() {
        // What a killed process leaves is what is in the file at that moment.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        let store = Store::open(&path).unwrap();
        let mut a = record("eci-0000000000000000000a");
        for count in 0..5 {
            a.containers[0].runs = count;
            store.put(&a).unwrap();
            let copy = dir.path().join(format!("copy-{count}"));
            std::fs::copy(&path, &copy).unwrap();
            assert_eq!(Store::open(&copy).unwrap().records().unwrap(), [a.clone()]);
        }
    }

    #[test]
    fn a_second_opener_and_another_schema_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        let store = Store::open(&path).unwrap();
        assert_eq!(
            Store::open(&path).unwrap_err().kind,
            ErrorKind::FailedPrecondition
        );
        let write = store.db.begin_write().unwrap();
        write.open_table(META).unwrap().insert("schema", 99).unwrap();
        write.commit().unwrap();
        drop(store);
        assert!(Store::open(&path).unwrap_err().message.contains("99"));
    }
}
