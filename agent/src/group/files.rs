//! Volumes made of files: ECI config files, ConfigMaps, Secrets, projected and downward API volumes are one kind here.
//! Plain data and its checks.

use std::{collections::HashSet, fmt, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{
    spec::{Door, GroupSpec, VolumeSource},
    violation::{FieldPath, ViolationKind, Violations},
};

/// Most bytes of one volume's files; what 90 ECI config files of 32 KiB need, in one message to the guest.
pub const MAX_VOLUME_BYTES: usize = 3 << 20;
/// Most bytes of all files and values of a group: they are kept in its record.
pub const MAX_GROUP_BYTES: usize = 8 << 20;
/// Most files of a volume.
pub const MAX_FILES: usize = 1000;
/// Most files of an ECI config file volume.
const MAX_ECI_FILES: usize = 90;
/// Longest ECI config file.
const MAX_ECI_FILE_BYTES: usize = 32 << 10;
/// Longest path in a volume.
const MAX_PATH_BYTES: usize = 1024;

/// Bytes that are never printed: of a config file, or a secret. Clones share them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Content(Arc<[u8]>);

impl Content {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Content {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "<{} bytes>", self.0.len())
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD
            .decode(text)
            .map_err(|_| D::Error::custom("not base64"))?;
        Ok(bytes.into())
    }
}

/// A volume of files, which containers can read only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileVolume {
    /// What to call it when the group is described.
    pub origin: FileOrigin,
    /// Its files, in no particular order, paths unique.
    pub files: Vec<FileItem>,
}

/// What a volume of files was in the words of its door.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileOrigin {
    /// A ConfigMap, by name, or ECI config files, by the name of their volume.
    Config(String),
    /// A Secret, by name.
    Secret(String),
    /// Several sources.
    Projected,
    /// Fields of the group.
    DownwardApi,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileItem {
    /// Relative to the volume.
    pub path: String,
    /// Permissions, 0 to 0777.
    pub mode: u32,
    /// What is in it.
    pub source: FileSource,
}

/// Where a file's content comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileSource {
    /// Given.
    Content(Content),
    /// A field of the group such as `metadata.labels`, read when a container starts.
    Field(String),
}

impl FileVolume {
    /// Leaves the files and takes out what is in them.
    pub(super) fn hide_contents(&mut self) {
        for file in &mut self.files {
            if let FileSource::Content(content) = &mut file.source {
                *content = Content::default();
            }
        }
    }

    fn content_bytes(&self) -> usize {
        let length = |item: &FileItem| match &item.source {
            FileSource::Content(content) => content.bytes().len(),
            FileSource::Field(_) => 0,
        };
        self.files.iter().map(length).sum()
    }
}

/// The value of a file mode as ECI writes it: decimal digits are read as octal, `644` as much as `0644`.
pub fn parse_eci_mode(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777)
}

/// Whether a field can be the content of a file.
fn is_file_field(field: &str) -> bool {
    // What changes while a group runs, or is only known in it, is for the environment (Kubernetes has the same list).
    matches!(field, "metadata.labels" | "metadata.annotations")
        || (field.starts_with("metadata.") && super::validate::is_known_field(field))
}

/// Finds what is wrong with the volumes of files.
pub(super) fn validate(spec: &GroupSpec, root: &FieldPath, found: &mut Violations) {
    let list = root.field("spec.volumes", "Volume");
    let mut group_bytes = 0;
    for (index, volume) in spec.volumes.iter().enumerate() {
        let VolumeSource::Files(files) = &volume.source else {
            continue;
        };
        group_bytes += files.content_bytes();
        validate_volume(spec.door, files, &list.item(index), found);
    }
    if group_bytes > MAX_GROUP_BYTES {
        found.add(
            ViolationKind::TooLong,
            list,
            format!("{group_bytes} bytes"),
            format!("valid: volumes of files with at most {MAX_GROUP_BYTES} bytes in all"),
        );
    }
}

fn validate_volume(door: Door, volume: &FileVolume, path: &FieldPath, found: &mut Violations) {
    let eci = "ConfigFileVolume.ConfigFileToPath";
    let kind = match volume.origin {
        FileOrigin::Config(_) => "configMap",
        FileOrigin::Secret(_) => "secret",
        FileOrigin::Projected => "projected",
        FileOrigin::DownwardApi => "downwardAPI",
    };
    let most = if door == Door::Eci {
        MAX_ECI_FILES
    } else {
        MAX_FILES
    };
    let (count, bytes) = (volume.files.len(), volume.content_bytes());
    if count > most {
        let problem = format!("valid: at most {most}");
        found.add(
            ViolationKind::TooLong,
            path.field(kind, eci),
            format!("{count} files"),
            problem,
        );
    }
    if bytes > MAX_VOLUME_BYTES {
        let problem = format!("valid: at most {MAX_VOLUME_BYTES} bytes in one volume");
        found.add(
            ViolationKind::TooLong,
            path.field(kind, eci),
            format!("{bytes} bytes"),
            problem,
        );
    }
    let mut seen = HashSet::new();
    for (index, file) in volume.files.iter().enumerate() {
        let (item, name) = match door {
            Door::Eci => (path.field(kind, eci).item(index), "Path"),
            Door::Pod => (path.field(kind, eci), "path"),
        };
        let field = || item.field(name, name);
        if !is_file_path(&file.path) {
            found.invalid(
                field(),
                &file.path,
                format!(
                    "valid: a relative path of up to {MAX_PATH_BYTES} characters, without '..' and not beginning with '..'"
                ),
            );
        } else if !seen.insert(file.path.as_str()) {
            found.invalid(field(), &file.path, "another file of the volume has this path");
        }
        if file.mode > 0o777 {
            let problem = "valid: 0 to 0777 (octal)";
            found.invalid(item.field("mode", "Mode"), format!("{:o}", file.mode), problem);
        }
        match &file.source {
            FileSource::Content(content)
                if door == Door::Eci && content.bytes().len() > MAX_ECI_FILE_BYTES =>
            {
                found.add(
                    ViolationKind::TooLong,
                    item.field("content", "Content"),
                    format!("{} bytes", content.bytes().len()),
                    format!("valid: at most {MAX_ECI_FILE_BYTES} bytes"),
                );
            }
            FileSource::Content(_) => {}
            FileSource::Field(field) if is_file_field(field) => {}
            FileSource::Field(field) => found.invalid(
                item.field("fieldRef.fieldPath", "FieldRef.FieldPath"),
                field,
                "valid in a file: metadata.name, metadata.namespace, metadata.uid, metadata.labels, \
                 metadata.labels['KEY'], metadata.annotations, metadata.annotations['KEY']",
            ),
        }
    }
    // A file can't be a directory too.
    for file in &volume.files {
        let mut parent = file.path.as_str();
        while let Some((above, _)) = parent.rsplit_once('/') {
            parent = above;
            if seen.contains(parent) {
                let problem =
                    format!("{parent:?} is a file of the volume; valid: paths that are not below a file");
                found.invalid(path.field(kind, eci).field("path", "Path"), &file.path, problem);
            }
        }
    }
}

fn is_file_path(path: &str) -> bool {
    (1..=MAX_PATH_BYTES).contains(&path.len())
        && !path.starts_with("..")
        && !path.contains('\0')
        && path
            .split('/')
            .all(|part| !matches!(part, "" | "." | "..") && part.len() <= 255)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::spec::{VolumeSpec, testing};

    fn volume(files: &[(&str, u32, usize)]) -> FileVolume {
        let item = |(path, mode, length): &(&str, u32, usize)| FileItem {
            path: (*path).into(),
            mode: *mode,
            source: FileSource::Content(vec![b'x'; *length].into()),
        };
        FileVolume {
            origin: FileOrigin::Config("c".into()),
            files: files.iter().map(item).collect(),
        }
    }

    fn problems(door: Door, volumes: Vec<FileVolume>) -> String {
        let mut group = testing::group("g", 1);
        group.door = door;
        group.volumes = volumes
            .into_iter()
            .enumerate()
            .map(|(index, files)| VolumeSpec {
                name: format!("v{index}"),
                source: VolumeSource::Files(files),
            })
            .collect();
        super::super::validate::validate(&group).to_string()
    }

    #[test]
    fn content_is_not_printed_and_survives_the_store() {
        let content = Content::from(b"hunter2".to_vec());
        assert_eq!(format!("{content:?}"), "<7 bytes>");
        let text = serde_json::to_string(&content).unwrap();
        assert_eq!(serde_json::from_str::<Content>(&text).unwrap(), content);
    }

    #[test]
    fn paths_modes_and_sizes_are_bounded() {
        assert_eq!(
            problems(Door::Pod, vec![volume(&[("a", 0o644, 1), ("d/b", 0o777, 0)])]),
            ""
        );
        for (path, expected) in [
            (
                "/a",
                "spec.volumes[0].configMap.path: \"/a\": valid: a relative path",
            ),
            ("a/../b", "a/../b"),
            ("..data", "..data"),
            ("a//b", "a//b"),
            ("", "configMap.path"),
        ] {
            let text = problems(Door::Pod, vec![volume(&[(path, 0o644, 1)])]);
            assert!(text.contains(expected), "{path:?}: {text}");
        }
        let text = problems(
            Door::Pod,
            vec![volume(&[("a", 0o1777, 1), ("a", 0, 1), ("a/b", 0, 1)])],
        );
        for part in ["1777", "another file of the volume", "\"a/b\": \"a\" is a file"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let most = MAX_VOLUME_BYTES;
        assert_eq!(problems(Door::Pod, vec![volume(&[("a", 0, most)])]), "");
        assert!(problems(Door::Pod, vec![volume(&[("a", 0, most + 1)])]).contains("at most 3145728 bytes"));
        let all = vec![volume(&[("a", 0, most)]); 3];
        assert!(problems(Door::Pod, all).contains("8388608 bytes in all"));
        assert!(problems(Door::Eci, vec![volume(&[("a", 0, 32769)])]).contains("Volume.1.ConfigFileVolume"));
    }

    #[test]
    fn eci_modes_are_octal() {
        let modes = ["644", "0644", "0400", "9", "1777", "-1"].map(parse_eci_mode);
        assert_eq!(modes, [Some(0o644), Some(0o644), Some(0o400), None, None, None]);
    }
}
