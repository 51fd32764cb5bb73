//! Network configurations of the Container Network Interface (CNI specification 1.0.0, section 1). Parsing is pure; which file is
//! taken is libcni's rule: the first by name.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

/// Versions whose results are understood.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Largest file.
const MAX_BYTES: u64 = 1 << 20;
/// Most plugins of a network.
const MAX_PLUGINS: usize = 32;

/// What a plugin may be told of a group, where its configuration says that it understands it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// `hostPort`.
    PortMappings,
    /// Limits of bandwidth.
    Bandwidth,
}

impl Capability {
    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::PortMappings => "portMappings",
            Self::Bandwidth => "bandwidth",
        }
    }
}

/// A network: plugins, to be called one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Version that plugins are spoken to in.
    #[serde(rename = "cniVersion")]
    pub version: String,
    /// Configuration of each plugin.
    pub plugins: Vec<Map<String, Value>>,
}

impl Network {
    /// Whether one of its plugins understands that.
    pub fn can(&self, capability: Capability) -> bool {
        self.plugins.iter().any(|plugin| has(plugin, capability))
    }
}

/// Whether a plugin understands that.
pub(super) fn has(plugin: &Map<String, Value>, capability: Capability) -> bool {
    plugin
        .get("capabilities")
        .and_then(|all| all.get(capability.name()))
        == Some(&Value::Bool(true))
}

/// The type of a plugin: the name of its program.
pub(super) fn type_of(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// Reads a configuration: a list of plugins, or a single plugin's.
///
/// # Errors
/// `InvalidArgument`: what is wrong, and what is valid.
pub fn parse(text: &str) -> Result<Network> {
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
    let mut whole: Map<String, Value> = serde_json::from_str(text)
        .map_err(|error| Error::with_source(ErrorKind::InvalidArgument, "parse a JSON object", error))?;
    let text_of = |key: &str| {
        whole
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let (name, version) = (text_of("name"), text_of("cniVersion"));
    if !is_word(&name) {
        return invalid(format!(
            "name is {name:?}: give letters, digits, '.', '_' and '-', a letter or digit first"
        ));
    }
    if !VERSIONS.contains(&version.as_str()) {
        return invalid(format!(
            "cniVersion is {version:?}: give one of {}",
            VERSIONS.join(", ")
        ));
    }
    let plugins: Vec<Map<String, Value>> = match whole.remove("plugins") {
        None => vec![whole],
        Some(list) => serde_json::from_value(list).map_err(|error| {
            Error::with_source(ErrorKind::InvalidArgument, "plugins is no list of objects", error)
        })?,
    };
    if !(1..=MAX_PLUGINS).contains(&plugins.len()) {
        return invalid(format!(
            "plugins has {} items: give 1 to {MAX_PLUGINS}",
            plugins.len()
        ));
    }
    for (index, plugin) in plugins.iter().enumerate() {
        let kind = type_of(plugin);
        if !is_word(kind) {
            return invalid(format!(
                "plugins[{index}].type is {kind:?}: give the name of a plugin's program"
            ));
        }
    }
    Ok(Network {
        name,
        version,
        plugins,
    })
}

/// As the specification has names; such a one leads out of no directory.
fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.len() <= 128
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// The first configuration of a directory by name; `None` where there is none.
///
/// # Errors
/// The directory or that file can't be read; `InvalidArgument` names the file.
pub fn find(dir: &Path) -> Result<Option<(PathBuf, Network)>> {
    let failed = |path: &Path| {
        let what = format!("read {}", path.display());
        move |error| Error::with_source(ErrorKind::Internal, what, error)
    };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(failed(dir))?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed(dir))?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conflist" | "conf" | "json")) {
            paths.push(path);
        }
    }
    paths.sort();
    let Some(path) = paths.into_iter().next() else {
        return Ok(None);
    };
    let length = std::fs::metadata(&path).map_err(failed(&path))?.len();
    if length > MAX_BYTES {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{} has {length} bytes: give at most {MAX_BYTES}", path.display()),
        ));
    }
    let text = std::fs::read_to_string(&path).map_err(failed(&path))?;
    let network = parse(&text).map_err(|error| {
        let what = format!("{} is no CNI configuration", path.display());
        Error::with_source(ErrorKind::InvalidArgument, what, error)
    })?;
    Ok(Some((path, network)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_and_a_single_plugin_are_networks() {
        let list = json!({ "cniVersion": "1.0.0", "name": "n", "plugins": [
            { "type": "bridge", "ipam": { "type": "host-local" } },
            { "type": "portmap", "capabilities": { "portMappings": true, "bandwidth": false } },
        ] });
        let network = parse(&list.to_string()).unwrap();
        assert_eq!((network.name.as_str(), network.plugins.len()), ("n", 2));
        assert!(network.can(Capability::PortMappings) && !network.can(Capability::Bandwidth));
        let single = json!({ "cniVersion": "0.4.0", "name": "s", "type": "ptp" });
        let network = parse(&single.to_string()).unwrap();
        assert_eq!(type_of(&network.plugins[0]), "ptp");
    }

    #[test]
    fn what_can_not_work_is_named() {
        for (text, words) in [
            ("[]", "parse a JSON object"),
            (
                r#"{"cniVersion":"1.0.0","name":"../n","type":"a"}"#,
                "name is \"../n\"",
            ),
            (
                r#"{"cniVersion":"0.1.0","name":"n","type":"a"}"#,
                "cniVersion is \"0.1.0\"",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#,
                "plugins has 0 items",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[1]}"#,
                "plugins is no list",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"},{"type":"../../bin/sh"}]}"#,
                "plugins[1].type is",
            ),
            (r#"{"cniVersion":"1.0.0","name":"n"}"#, "plugins[0].type is \"\""),
        ] {
            let error = parse(text).unwrap_err().chain();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_file_by_name_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        assert!(find(&dir.path().join("none")).unwrap().is_none());
        std::fs::write(dir.path().join("00-readme.txt"), "x").unwrap();
        assert!(find(dir.path()).unwrap().is_none());
        for name in ["20-b.conf", "10-a.conflist"] {
            let text = json!({ "cniVersion": "1.0.0", "name": &name[..2], "type": "ptp" });
            std::fs::write(dir.path().join(name), text.to_string()).unwrap();
        }
        assert_eq!(find(dir.path()).unwrap().unwrap().1.name, "10");
        std::fs::write(dir.path().join("05-broken.conf"), "{").unwrap();
        assert!(find(dir.path()).unwrap_err().chain().contains("05-broken.conf"));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-z./-]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 5, |inner| {
            let key = prop_oneof![
                Just("name".to_owned()),
                Just("cniVersion".to_owned()),
                Just("plugins".to_owned()),
                Just("type".to_owned()),
                Just("capabilities".to_owned()),
                "[a-z]{1,6}",
            ];
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::vec((key, inner), 0..5)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Whatever a file holds: it is refused, or a network whose names can be part of a path, which is read back the same.
        #[test]
        fn every_file_is_a_sound_network_or_refused(mut whole in any_json(), name in "[a-z./]{1,5}", kind in "[a-z./]{1,5}") {
            if let Value::Object(whole) = &mut whole {
                whole.insert("name".into(), name.clone().into());
                whole.insert("cniVersion".into(), "1.0.0".into());
                whole.entry("type").or_insert(kind.into());
            }
            if let Ok(network) = parse(&whole.to_string()) {
                prop_assert_eq!(&network.name, &name);
                let names = network.plugins.iter().map(type_of).chain([network.name.as_str()]);
                for name in names {
                    prop_assert!(!name.is_empty() && !name.contains('/') && !name.starts_with('.'), "{:?}", name);
                }
                let text = serde_json::to_string(&network).unwrap();
                prop_assert_eq!(parse(&text).unwrap(), network);
            }
        }

        #[test]
        fn no_text_panics(text in ".{0,200}") {
            let _ = parse(&text);
        }
    }
}
