//! Pods as people write them, in `suite/*.yaml`: accepted, or refused with exactly these fields. Where a Kubernetes API
//! server and kubelet would take what is refused here, the shape says why it differs.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_yaml_ng::{Mapping, Value};

use super::*;
use crate::group::rules::Allow;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    shape: String,
    #[serde(default)]
    metadata: Option<Value>,
    spec: Value,
    /// Fields with mistakes; none: accepted.
    #[serde(default)]
    refused: BTreeSet<String>,
    /// What the operator allows.
    #[serde(default)]
    allow: Allow,
    /// Why it is refused although Kubernetes takes it.
    #[serde(default)]
    differs: Option<String>,
}

impl Shape {
    fn manifest(&self) -> String {
        let named = || Value::Mapping(Mapping::from_iter([("name".into(), "shape".into())]));
        let pod = Mapping::from_iter([
            ("apiVersion".into(), "v1".into()),
            ("kind".into(), "Pod".into()),
            ("metadata".into(), self.metadata.clone().unwrap_or_else(named)),
            ("spec".into(), self.spec.clone()),
        ]);
        serde_yaml_ng::to_string(&pod).unwrap()
    }

    /// The fields with mistakes, and all that is said about them.
    fn found(&self) -> (BTreeSet<String>, String) {
        let pod = match parse_manifest(&self.manifest()) {
            Ok(pod) => pod,
            Err(error) => {
                let fields = match &error {
                    ManifestError::Field { field, .. } => BTreeSet::from([field.clone()]),
                    ManifestError::UnknownFields { fields } => {
                        let path = |field: &String| field.split(' ').next().unwrap_or_default().to_owned();
                        fields.iter().map(path).collect()
                    }
                    _ => BTreeSet::new(),
                };
                return (fields, error.to_string());
            }
        };
        let rules = Rules {
            allow: self.allow.clone(),
            ..Rules::default()
        };
        match to_group(pod, &rules) {
            Ok(_) => (BTreeSet::new(), String::new()),
            Err(found) => {
                let fields = found.0.iter().map(|violation| violation.field.clone());
                (fields.collect(), found.to_string())
            }
        }
    }
}

#[test]
fn pods_are_taken_and_refused_as_by_kubernetes_but_for_what_is_listed() {
    let files = [
        include_str!("suite/containers.yaml"),
        include_str!("suite/group.yaml"),
        include_str!("suite/lifecycle.yaml"),
    ];
    let shapes: Vec<Shape> = files
        .iter()
        .flat_map(|text| serde_yaml_ng::from_str::<Vec<Shape>>(text).unwrap())
        .collect();
    assert!(shapes.len() >= 60, "only {} shapes", shapes.len());
    let names: BTreeSet<&str> = shapes.iter().map(|shape| shape.shape.as_str()).collect();
    assert_eq!(names.len(), shapes.len(), "two shapes have one name");
    let mut wrong = Vec::new();
    for shape in &shapes {
        assert!(
            shape.differs.is_none() || !shape.refused.is_empty(),
            "{}: it differs by nothing",
            shape.shape
        );
        let (fields, said) = shape.found();
        if fields != shape.refused || fields.is_empty() != said.is_empty() {
            wrong.push(format!(
                "{}: expected {:?}, found {fields:?}:\n{said}",
                shape.shape, shape.refused
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
