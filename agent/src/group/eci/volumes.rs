//! ECI volumes that are more than a directory.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use serde_json::Value;

use super::params::Reader;
use crate::group::{
    disk::{self, Said, Words},
    files::{self, FileItem, FileOrigin, FileSource, FileVolume},
    host_path::{HostPathKind, HostPathVolume},
    nfs::NfsVolume,
    spec::{VolumeSource, VolumeSpec},
    violation::ViolationKind,
};

const DEFAULT_MODE: u32 = 0o644;

/// A volume of type `ConfigFileVolume`.
pub(super) fn config_files(reader: &Reader<'_>) -> VolumeSpec {
    let name = reader.required("Name");
    let volume = reader.object("ConfigFileVolume");
    let default_mode = mode(&volume, "DefaultMode").unwrap_or(DEFAULT_MODE);
    let files: Vec<_> = volume
        .list("ConfigFileToPath")
        .iter()
        .map(|item| FileItem {
            path: item.required("Path"),
            mode: mode(item, "Mode").unwrap_or(default_mode),
            source: FileSource::Content(content(item).into()),
        })
        .collect();
    if files.is_empty() {
        let problem = "required; valid: 1 to 90 files with Path and Content";
        volume.note(ViolationKind::Missing, "ConfigFileToPath", "", problem);
    }
    let origin = FileOrigin::Config(name.clone());
    VolumeSpec {
        name,
        source: VolumeSource::Files(FileVolume { origin, files }),
    }
}

/// A volume of type `HostPathVolume`.
pub(super) fn host_path(reader: &Reader<'_>) -> VolumeSpec {
    let volume = reader.object("HostPathVolume");
    let kind = HostPathKind::parse(volume.word("Type").unwrap_or_default()).unwrap_or_else(|valid| {
        let given = volume.word("Type").unwrap_or_default();
        volume.note(ViolationKind::Invalid, "Type", given, &valid);
        HostPathKind::Any
    });
    VolumeSpec {
        name: reader.required("Name"),
        source: VolumeSource::HostPath(HostPathVolume {
            path: volume.required("Path"),
            kind,
        }),
    }
}

/// A volume of type `DiskVolume`.
pub(super) fn disk(reader: &Reader<'_>) -> VolumeSpec {
    let name = reader.required("Name");
    let volume = reader.object("DiskVolume");
    let said = Said {
        id: volume.word("DiskId"),
        size: volume.word("DiskSize"),
        file_system: volume.word("FsType"),
        delete: None,
    };
    let words = Words {
        id: "DiskId",
        size: "DiskSize",
        file_system: "FsType",
        delete: "",
    };
    let disk = disk::read(&said, &words, |kind, field, value, problem| {
        volume.note(kind, field, value, problem);
    });
    VolumeSpec {
        name,
        source: VolumeSource::Disk(disk),
    }
}

/// A volume of type `NFSVolume`.
pub(super) fn nfs(reader: &Reader<'_>) -> VolumeSpec {
    let name = reader.required("Name");
    let volume = reader.object("NFSVolume");
    VolumeSpec {
        name,
        source: VolumeSource::Nfs(NfsVolume {
            server: volume.word("Server").unwrap_or_default().to_owned(),
            path: volume.word("Path").unwrap_or_default().to_owned(),
            read_only: volume.flag("ReadOnly").unwrap_or(false),
        }),
    }
}

/// A volume of type `FlexVolume`.
pub(super) fn flex(reader: &Reader<'_>) -> VolumeSpec {
    let name = reader.required("Name");
    let volume = reader.object("FlexVolume");
    let driver = volume.required("Driver");
    if !driver.is_empty() && driver != disk::FLEX_DRIVER {
        let valid =
            "not supported; valid: alicloud/disk, or a volume of Type NFSVolume instead of alicloud/nas";
        volume.note(ViolationKind::Unsupported, "Driver", &driver, valid);
    }
    let text = volume.required("Options");
    let options = options(&text).unwrap_or_else(|| {
        if !text.is_empty() {
            let valid = "valid: a JSON object of texts, numbers, true and false";
            volume.note(ViolationKind::Invalid, "Options", &text, valid);
        }
        BTreeMap::new()
    });
    let disk = disk::read_flex(&options, volume.word("FsType"), |kind, field, value, problem| {
        if field == "fsType" {
            volume.note(kind, "FsType", value, problem);
        } else if !options.is_empty() {
            volume.note(
                kind,
                "Options",
                &format!("{field}={value}"),
                &format!("{field}: {problem}"),
            );
        }
    });
    VolumeSpec {
        name,
        source: VolumeSource::Disk(disk),
    }
}

/// Options as JSON text.
fn options(text: &str) -> Option<BTreeMap<String, String>> {
    let object: serde_json::Map<String, Value> = serde_json::from_str(text).ok()?;
    let plain = |(name, value)| match value {
        Value::String(text) => Some((name, text)),
        Value::Number(number) => Some((name, number.to_string())),
        Value::Bool(flag) => Some((name, flag.to_string())),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    };
    object.into_iter().map(plain).collect()
}

fn mode(reader: &Reader<'_>, field: &str) -> Option<u32> {
    let text = reader.word(field)?;
    let mode = files::parse_eci_mode(text);
    if mode.is_none() {
        let problem = "valid: four octal digits, 0000 to 0777";
        reader.note(ViolationKind::Invalid, field, text, problem);
    }
    mode
}

/// An empty file has no content.
fn content(reader: &Reader<'_>) -> Vec<u8> {
    let text = reader.text("Content").unwrap_or_default();
    // Line breaks, as many encoders make them.
    let plain: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    STANDARD.decode(plain).unwrap_or_else(|_| {
        // It may be a secret, so it is not repeated.
        reader.note(
            ViolationKind::Invalid,
            "Content",
            "",
            "not base64; valid: base64 with padding",
        );
        Vec::new()
    })
}
