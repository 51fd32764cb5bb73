//! Pod text, YAML or JSON, with mistakes placed by line, column and field.

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, de::DeserializeOwned};

use super::place::{self, Step};

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
    /// Not exactly one document.
    #[error("holds {count} documents; valid: one Pod")]
    Documents {
        /// How many.
        count: usize,
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
    /// Fields a Pod does not have.
    #[error("{}: no such field in a Pod (is it misspelt, or indented wrongly?)", .fields.join(", "))]
    UnknownFields {
        /// Their paths, with lines.
        fields: Vec<String>,
    },
}

/// Parses the text of one Pod, YAML or JSON.
///
/// # Errors
/// What is wrong and where.
pub fn parse_manifest(text: &str) -> Result<Pod, ManifestError> {
    if text.trim_start().starts_with('{') {
        let syntax = |error: serde_json::Error| ManifestError::Syntax {
            format: "JSON",
            problem: error.to_string(),
        };
        let value: serde_json::Value = serde_json::from_str(text).map_err(syntax)?;
        check_kind(|field| value.get(field)?.as_str().map(str::to_owned))?;
        let line = |steps: &[Step]| {
            let error = place::error_at(&mut serde_json::Deserializer::from_str(text), steps);
            error.map(|error| error.line())
        };
        return typed(&mut serde_json::Deserializer::from_str(text), line);
    }
    let syntax = |error: serde_yaml_ng::Error| ManifestError::Syntax {
        format: "YAML",
        problem: error.to_string(),
    };
    let mut documents = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let value = serde_yaml_ng::Value::deserialize(document).map_err(syntax)?;
        documents.push(value);
    }
    // A trailing or leading `---` makes an empty document.
    let positions: Vec<_> = (0..documents.len())
        .filter(|index| !documents[*index].is_null())
        .collect();
    let [position] = positions[..] else {
        return Err(ManifestError::Documents {
            count: positions.len(),
        });
    };
    let document = &documents[position];
    if !document.is_mapping() {
        return Err(ManifestError::Syntax {
            format: "YAML",
            problem: "the document is not a mapping; valid: a Pod with apiVersion, kind, metadata and spec"
                .into(),
        });
    }
    check_kind(|field| document.get(field)?.as_str().map(str::to_owned))?;
    let document = || serde_yaml_ng::Deserializer::from_str(text).nth(position);
    let line = |steps: &[Step]| {
        let error = place::error_at(document()?, steps)?;
        error.location().map(|location| location.line())
    };
    typed(document().ok_or(ManifestError::Documents { count: 0 })?, line)
}

fn check_kind(read: impl Fn(&str) -> Option<String>) -> Result<(), ManifestError> {
    for (field, valid) in [("apiVersion", "v1"), ("kind", "Pod")] {
        let value = read(field).unwrap_or_default();
        if value != valid {
            return Err(ManifestError::Kind { field, value, valid });
        }
    }
    Ok(())
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
