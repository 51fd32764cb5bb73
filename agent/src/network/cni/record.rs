//! What is kept of each group in a network of CNI: a file each, written before its plugins are first called and again with their
//! answer, before that is used. So whatever kills the agent, what has to be taken back is known, with the configuration and the
//! answer that DEL wants.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{conf::Network, result::Given};
use crate::group::status::GroupId;

/// A group in a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// As it was configured then.
    pub(super) network: Network,
    pub(super) netns: PathBuf,
    pub(super) args: String,
    pub(super) runtime: Map<String, Value>,
    /// What plugins answered; `None`: they may have got any way.
    pub(super) answer: Option<Value>,
    /// What of it the group is given.
    pub(super) given: Option<Given>,
}

/// The directory of all.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
}

impl Records {
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    fn path(&self, id: &GroupId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    pub(super) fn all(&self) -> io::Result<Vec<(GroupId, Record)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let Some(id) = name.strip_suffix(".json").and_then(GroupId::parse) else {
                // Half written: the one it was to replace holds.
                continue;
            };
            let text = fs::read_to_string(&path)?;
            let record = serde_json::from_str(&text)
                .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
            found.push((id, record));
        }
        Ok(found)
    }

    /// It is on disk when this returns.
    pub(super) fn put(&self, id: &GroupId, record: &Record) -> io::Result<()> {
        let path = self.path(id);
        let draft = path.with_extension("draft");
        let mut file = File::create(&draft)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.sync_all()?;
        fs::rename(draft, path)?;
        sync(&self.dir)
    }

    /// It may be gone.
    pub(super) fn remove(&self, id: &GroupId) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync(&self.dir),
        }
    }
}

fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::cni::conf;

    #[test]
    fn records_outlive_their_writer_and_half_written_ones_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().join("cni")).unwrap();
        let id = GroupId::parse("eci-0123456789abcdefghij").unwrap();
        let record = Record {
            network: conf::parse(r#"{"cniVersion":"1.0.0","name":"n","type":"ptp"}"#).unwrap(),
            netns: "/run/x".into(),
            args: String::new(),
            runtime: Map::new(),
            answer: None,
            given: None,
        };
        records.put(&id, &record).unwrap();
        fs::write(dir.path().join("cni/eci-0123456789abcdefghik.draft"), "{").unwrap();
        let records = Records::open(dir.path().join("cni")).unwrap();
        assert_eq!(records.all().unwrap(), [(id.clone(), record)]);
        records.remove(&id).unwrap();
        records.remove(&id).unwrap();
        assert!(records.all().unwrap().is_empty());
    }
}
