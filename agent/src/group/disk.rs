//! Disk volumes: which disk, and what becomes of it. Plain data and how it is read, the same for both doors.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{quantity, violation::ViolationKind};

/// The driver of a FlexVolume that is a disk.
pub const FLEX_DRIVER: &str = "alicloud/disk";
/// Sizes of a disk, GiB (ECI, ResizeContainerGroupVolume).
pub const SIZES_GIB: std::ops::RangeInclusive<u32> = 20..=32768;
/// Options that choose hardware this host does not have; they change nothing.
const WITHOUT_EFFECT: [&str; 2] = ["performanceLevel", "volumeType"];

/// Names a disk of this host: `d-` and 1 to 40 lower-case letters and digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskId(String);

impl DiskId {
    /// Reads one.
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("d-")?;
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        ((1..=40).contains(&rest.len()) && rest.bytes().all(plain)).then(|| Self(text.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl From<DiskId> for String {
    fn from(id: DiskId) -> Self {
        id.0
    }
}

impl TryFrom<String> for DiskId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is no disk's id"))
    }
}

/// A disk as a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskVolume {
    /// Which; a new one gets its id when the group is accepted.
    pub id: Option<DiskId>,
    /// It is made for the group, so large.
    pub new_gib: Option<u32>,
    /// It goes with the group.
    pub delete_with_group: bool,
    /// No container writes to it.
    pub read_only: bool,
    /// It was asked for as a FlexVolume.
    pub is_flex: bool,
}

/// What a request says about a disk, in its own words: the names of fields are those of [`Words`].
#[derive(Debug, Default)]
pub(super) struct Said<'a> {
    pub(super) id: Option<&'a str>,
    pub(super) size: Option<&'a str>,
    pub(super) file_system: Option<&'a str>,
    pub(super) delete: Option<&'a str>,
}

/// Names of the fields.
#[derive(Debug)]
pub(super) struct Words {
    pub(super) id: &'static str,
    pub(super) size: &'static str,
    pub(super) file_system: &'static str,
    pub(super) delete: &'static str,
}

/// Reads a disk. `note` takes what is wrong: kind, field, value, problem.
pub(super) fn read(
    said: &Said<'_>,
    words: &Words,
    mut note: impl FnMut(ViolationKind, &str, &str, &str),
) -> DiskVolume {
    let id = said.id.and_then(|text| {
        let id = DiskId::parse(text);
        if id.is_none() {
            let valid = "valid: the id of a disk of this host, d- and up to 40 lower-case letters and digits";
            note(ViolationKind::Invalid, words.id, text, valid);
        }
        id
    });
    let new_gib = said.size.and_then(|text| {
        let gib = parse_gib(text).filter(|gib| SIZES_GIB.contains(gib));
        if gib.is_none() {
            let valid = "valid: 20 to 32768 GiB, as 20 or 20Gi";
            note(ViolationKind::Invalid, words.size, text, valid);
        }
        gib
    });
    match (said.id, said.size) {
        (None, None) => {
            let valid = format!("required: the id of a disk, or {} for a new one", words.size);
            note(ViolationKind::Missing, words.id, "", &valid);
        }
        (Some(_), Some(size)) => {
            let valid = format!(
                "an existing disk has its size; valid: one of {} and {}",
                words.id, words.size
            );
            note(ViolationKind::Invalid, words.size, size, &valid);
        }
        _ => {}
    }
    if let Some(other) = said.file_system.filter(|name| *name != "ext4") {
        note(
            ViolationKind::Unsupported,
            words.file_system,
            other,
            "not a file system of this host's guests; valid: ext4",
        );
    }
    let delete_with_group = match said.delete {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            note(
                ViolationKind::Invalid,
                words.delete,
                other,
                "valid: true or false",
            );
            false
        }
    };
    DiskVolume {
        id,
        new_gib,
        delete_with_group,
        read_only: false,
        is_flex: false,
    }
}

/// Reads the options of a FlexVolume that is a disk. `note` is told the option as the field.
pub(super) fn read_flex(
    options: &BTreeMap<String, String>,
    file_system: Option<&str>,
    mut note: impl FnMut(ViolationKind, &str, &str, &str),
) -> DiskVolume {
    let words = Words {
        id: "volumeId",
        size: "volumeSize",
        file_system: "fsType",
        delete: "deleteWithInstance",
    };
    let get = |name: &str| {
        options
            .get(name)
            .map(String::as_str)
            .filter(|text| !text.is_empty())
    };
    for (name, value) in options {
        match name.as_str() {
            "volumeId" | "volumeSize" | "deleteWithInstance" => {}
            "encrypted" if value == "false" => {}
            "encrypted" | "kmsKeyId" => note(
                ViolationKind::Unsupported,
                name,
                value,
                "not supported; encrypt the host's disk",
            ),
            name if WITHOUT_EFFECT.contains(&name) => {}
            name => note(
                ViolationKind::Invalid,
                name,
                value,
                "no such option; valid: volumeId, volumeSize, deleteWithInstance, performanceLevel, volumeType",
            ),
        }
    }
    let said = Said {
        id: get("volumeId"),
        size: get("volumeSize"),
        file_system,
        delete: get("deleteWithInstance"),
    };
    DiskVolume {
        is_flex: true,
        ..read(&said, &words, note)
    }
}

/// The options of a FlexVolume that means this disk.
pub fn flex_options(disk: &DiskVolume) -> BTreeMap<String, String> {
    let size = disk.new_gib.map(|gib| ("volumeSize", gib.to_string()));
    let id = disk.id.as_ref().map(|id| ("volumeId", id.to_string()));
    let delete = Some(("deleteWithInstance", disk.delete_with_group.to_string()));
    let options = [id, size, delete].into_iter().flatten();
    options.map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A number of GiB, or a quantity that is one.
fn parse_gib(text: &str) -> Option<u32> {
    if let Ok(gib) = text.parse() {
        return Some(gib);
    }
    let bytes = quantity::parse_units(text).ok()?;
    u32::try_from(bytes >> 30)
        .ok()
        .filter(|gib| u64::from(*gib) << 30 == bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flex(options: &[(&str, &str)], file_system: Option<&str>) -> (DiskVolume, Vec<String>) {
        let options = options
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()));
        let mut notes = Vec::new();
        let disk = read_flex(&options.collect(), file_system, |_, field, value, problem| {
            notes.push(format!("{field}={value}: {problem}"));
        });
        (disk, notes)
    }

    #[test]
    fn a_disk_is_an_existing_or_a_new_one() {
        let (disk, notes) = flex(
            &[("volumeId", "d-a1"), ("deleteWithInstance", "true")],
            Some("ext4"),
        );
        assert!(
            notes.is_empty() && disk.delete_with_group && disk.is_flex,
            "{notes:?}"
        );
        assert_eq!((disk.id, disk.new_gib), (DiskId::parse("d-a1"), None));
        for size in ["100", "100Gi"] {
            let (disk, notes) = flex(&[("volumeSize", size), ("performanceLevel", "PL1")], None);
            assert!(notes.is_empty() && !disk.delete_with_group, "{notes:?}");
            assert_eq!((disk.id, disk.new_gib), (None, Some(100)));
        }
    }

    #[test]
    fn all_that_is_wrong_is_noted() {
        let (_, notes) = flex(
            &[
                ("volumeId", "../d"),
                ("volumeSize", "19"),
                ("deleteWithInstance", "yes"),
                ("encrypted", "true"),
                ("size", "1"),
            ],
            Some("xfs"),
        );
        let text = notes.join("\n");
        for part in [
            "volumeId=../d: valid: the id",
            "volumeSize=19: valid: 20 to 32768",
            "one of volumeId and volumeSize",
            "deleteWithInstance=yes: valid: true or false",
            "encrypted=true: not supported",
            "size=1: no such option",
            "fsType=xfs: not a file system of this host's guests; valid: ext4",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(flex(&[], None).1[0].contains("volumeId=: required"));
        assert_eq!(
            ["20.5Gi", "1Ti", "x", "-1"].map(parse_gib),
            [None, Some(1024), None, None]
        );
    }

    #[test]
    fn ids_are_names_of_files() {
        for bad in ["d-", "d-A", "d-a/b", "d-..", "e-a", "d-a.b"] {
            assert_eq!(DiskId::parse(bad), None, "{bad}");
        }
        assert!(serde_json::from_str::<DiskId>("\"d-/\"").is_err());
    }
}
