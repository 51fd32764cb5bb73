//! The text of a Pod and of the ConfigMaps and Secrets it refers to, YAML or JSON, with mistakes placed by line, column
//! and field.

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    objects::Manifest,
    place::{self, Step},
    yaml_types,
};

/// Why text is no Pod.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not YAML or JSON.
    #[error("not valid {format}: {problem}")]
    Syntax {
        /// `YAML` or `JSON`.
        format: &'static str,
        /// The parser's words, with line and column.
        problem: String,
    },
    /// Not exactly one Pod.
    #[error("holds {count} Pods; valid: one Pod, with the ConfigMaps and Secrets it refers to")]
    Pods {
        /// How many.
        count: usize,
    },
    /// A ConfigMap or Secret that can't be used.
    #[error("document {position}: {problem}")]
    Object {
        /// Counted from 1.
        position: usize,
        /// What is wrong.
        problem: String,
    },
    /// Something other than a Pod.
    #[error("{field}: {value:?}: valid: {valid}")]
    Kind {
        /// `apiVersion` or `kind`.
        field: &'static str,
        /// What is there.
        value: String,
        /// What should be.
        valid: &'static str,
    },
    /// A field of the wrong type, or a required one missing.
    #[error("{field}: {problem}")]
    Field {
        /// Path of the field.
        field: String,
        /// The parser's words, with line and column.
        problem: String,
    },
    /// Fields that such a document does not have.
    #[error("{}: no such field (is it misspelt, or indented wrongly?)", .fields.join(", "))]
    UnknownFields {
        /// Their paths, with lines.
        fields: Vec<String>,
    },
}

/// What a document is.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Pod,
    ConfigMap,
    Secret,
}

/// Parses the text of one Pod, YAML or JSON; in YAML with ConfigMaps and Secrets as further documents.
///
/// # Errors
/// What is wrong and where.
pub fn parse_manifest(text: &str) -> Result<Manifest, ManifestError> {
    if text.trim_start().starts_with('{') && !text.contains("\n---") {
        let syntax = |error: serde_json::Error| ManifestError::Syntax {
            format: "JSON",
            problem: error.to_string(),
        };
        let value: serde_json::Value = serde_json::from_str(text).map_err(syntax)?;
        if !matches!(
            kind_of(|field| value.get(field)?.as_str().map(str::to_owned))?,
            Kind::Pod
        ) {
            return Err(ManifestError::Pods { count: 0 });
        }
        let line = |steps: &[Step]| {
            let error = place::error_at(&mut serde_json::Deserializer::from_str(text), steps);
            error.map(|error| error.line())
        };
        let pod: Pod = typed(&mut serde_json::Deserializer::from_str(text), line)?;
        return Ok(pod.into());
    }
    let syntax = |error: serde_yaml_ng::Error| ManifestError::Syntax {
        format: "YAML",
        problem: error.to_string(),
    };
    let mut manifest = Manifest::default();
    let mut pods = 0;
    for (position, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let value = serde_yaml_ng::Value::deserialize(document).map_err(syntax)?;
        // A trailing or leading `---` makes an empty document.
        if value.is_null() {
            continue;
        }
        if !value.is_mapping() {
            return Err(ManifestError::Syntax {
                format: "YAML",
                problem:
                    "the document is not a mapping; valid: a Pod with apiVersion, kind, metadata and spec"
                        .into(),
            });
        }
        let added = match kind_of(|field| value.get(field)?.as_str().map(str::to_owned))? {
            Kind::Pod => {
                pods += 1;
                manifest.pod = yaml(text, position, value)?;
                Ok(())
            }
            Kind::ConfigMap => manifest
                .objects
                .add_config_map(yaml::<ConfigMap>(text, position, value)?),
            Kind::Secret => manifest
                .objects
                .add_secret(yaml::<Secret>(text, position, value)?),
        };
        added.map_err(|problem| ManifestError::Object {
            position: position + 1,
            problem,
        })?;
    }
    if pods == 1 {
        Ok(manifest)
    } else {
        Err(ManifestError::Pods { count: pods })
    }
}

/// The YAML document at `position`, which is `value` where it has no place.
fn yaml<T: DeserializeOwned>(
    text: &str,
    position: usize,
    value: serde_yaml_ng::Value,
) -> Result<T, ManifestError> {
    let document = || serde_yaml_ng::Deserializer::from_str(text).nth(position);
    let line = |steps: &[Step]| {
        let error = place::error_at(document()?, steps)?;
        error.location().map(|location| location.line())
    };
    let typed = typed(document().ok_or(ManifestError::Pods { count: 0 })?, line)?;
    yaml_types::check::<T>(value).map_err(|wrong| {
        let field = place::text(&wrong.steps);
        let problem = match line(&wrong.steps) {
            Some(line) => format!("{} at line {line}", wrong.problem),
            None => wrong.problem,
        };
        ManifestError::Field { field, problem }
    })?;
    Ok(typed)
}

fn kind_of(read: impl Fn(&str) -> Option<String>) -> Result<Kind, ManifestError> {
    let version = read("apiVersion").unwrap_or_default();
    if version != "v1" {
        return Err(ManifestError::Kind {
            field: "apiVersion",
            value: version,
            valid: "v1",
        });
    }
    match read("kind").unwrap_or_default().as_str() {
        "Pod" => Ok(Kind::Pod),
        "ConfigMap" => Ok(Kind::ConfigMap),
        "Secret" => Ok(Kind::Secret),
        other => Err(ManifestError::Kind {
            field: "kind",
            value: other.to_owned(),
            valid: "Pod, and beside it ConfigMap and Secret",
        }),
    }
}

/// Reads a value that may have no fields but those of its type. `line` tells where a field stands.
fn typed<'de, T, D>(deserializer: D, line: impl Fn(&[Step]) -> Option<usize>) -> Result<T, ManifestError>
where
    T: DeserializeOwned,
    D: serde::Deserializer<'de>,
    D::Error: std::fmt::Display,
{
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let result = {
        let tracked = serde_path_to_error::Deserializer::new(deserializer, &mut track);
        let mut note = |path: serde_ignored::Path<'_>| unknown.push(place::steps(&path));
        T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note))
    };
    let value = result.map_err(|error| ManifestError::Field {
        field: track.path().to_string(),
        problem: error.to_string(),
    })?;
    if unknown.is_empty() {
        return Ok(value);
    }
    let fields = unknown.iter().map(|steps| {
        let field = place::text(steps);
        line(steps).map_or(field.clone(), |line| format!("{field} (line {line})"))
    });
    Err(ManifestError::UnknownFields {
        fields: fields.collect(),
    })
}
