//! ECI volumes that are more than a directory.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::params::Reader;
use crate::group::{
    files::{self, FileItem, FileOrigin, FileSource, FileVolume},
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
