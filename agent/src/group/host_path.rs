//! Volumes that are paths of the "host". The host of a group's containers is its own virtual machine: `/dev`, `/proc` and `/sys`
//! are the guest's, everything else is a directory tree of the group's own, empty at first, on its scratch disk. Nothing of the
//! real host is in it.

use serde::{Deserialize, Serialize};

use super::{
    validate::is_plain_path,
    violation::{FieldPath, ViolationKind, Violations},
};

/// Kinds by their names in Kubernetes; none is the first.
const KINDS: [(&str, HostPathKind); 8] = [
    ("", HostPathKind::Any),
    ("DirectoryOrCreate", HostPathKind::DirectoryOrCreate),
    ("Directory", HostPathKind::Directory),
    ("FileOrCreate", HostPathKind::FileOrCreate),
    ("File", HostPathKind::File),
    ("Socket", HostPathKind::Socket),
    ("CharDevice", HostPathKind::CharDevice),
    ("BlockDevice", HostPathKind::BlockDevice),
];

/// A path of the guest (Kubernetes, HostPathVolumeSource; ECI, HostPathVolume).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPathVolume {
    /// Absolute.
    pub path: String,
    /// What has to be there.
    pub kind: HostPathKind,
}

/// What has to be at a path before it is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostPathKind {
    /// Anything; a directory is made when there is nothing.
    Any,
    /// A directory, made when there is nothing.
    DirectoryOrCreate,
    /// A directory.
    Directory,
    /// A file, made when there is nothing.
    FileOrCreate,
    /// A file.
    File,
    /// A Unix socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl HostPathKind {
    /// Its name in Kubernetes.
    pub fn name(self) -> &'static str {
        KINDS
            .iter()
            .find(|(_, kind)| *kind == self)
            .map_or("", |(name, _)| name)
    }

    /// The kind of this name; else the names there are.
    pub(super) fn parse(name: &str) -> Result<Self, String> {
        let found = KINDS.iter().find(|(known, _)| *known == name);
        found.map(|(_, kind)| *kind).ok_or_else(|| {
            let names: Vec<_> = KINDS[1..].iter().map(|(name, _)| *name).collect();
            format!("valid: {}", names.join(", "))
        })
    }
}

impl HostPathVolume {
    /// Finds what is wrong; `at` is the volume's.
    pub(super) fn check(&self, at: &FieldPath, found: &mut Violations) {
        let field = at.field("hostPath.path", "HostPathVolume.Path");
        if self.path.is_empty() {
            found.add(ViolationKind::Missing, field, "", "required");
        } else if !self.path.starts_with('/') || !is_plain_path(&self.path) {
            found.invalid(field, &self.path, "valid: an absolute path without '..'");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::spec::Door;

    #[test]
    fn kinds_have_the_names_of_kubernetes() {
        for (name, kind) in KINDS {
            assert_eq!((HostPathKind::parse(name), kind.name()), (Ok(kind), name));
        }
        let error = HostPathKind::parse("directory").unwrap_err();
        assert!(
            error.starts_with("valid: DirectoryOrCreate, Directory,"),
            "{error}"
        );
    }

    #[test]
    fn paths_are_absolute_and_lead_nowhere_else() {
        for (path, is_good) in [
            ("/a/b", true),
            ("/", true),
            ("", false),
            ("a", false),
            ("/a/../b", false),
        ] {
            let volume = HostPathVolume {
                path: path.into(),
                kind: HostPathKind::Any,
            };
            let mut found = Violations::default();
            volume.check(
                &FieldPath::new(Door::Pod).field("spec.volumes", "").item(0),
                &mut found,
            );
            assert_eq!(found.0.is_empty(), is_good, "{path}: {found}");
        }
    }
}
