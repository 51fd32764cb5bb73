//! Types of YAML values as Kubernetes takes them. A YAML parser that is asked for a text gives one for `5` and `true` too;
//! Kubernetes makes JSON of the document first, and refuses them. What it takes all the same is brought to the form of the
//! JSON here: quantities that are numbers, keys that are none of texts, and texts that are left out.

use serde::de::DeserializeOwned;
use serde_path_to_error::{Deserializer, Segment, Track};
use serde_yaml_ng::Value;

use super::place::Step;

/// Maps of quantities, by the field they are in.
const QUANTITIES: [&str; 4] = ["limits", "requests", "overhead", "capacity"];
/// Fields that are quantities.
const QUANTITY: [&str; 2] = ["sizeLimit", "divisor"];
/// Maps of texts, in which one that is left out is empty.
const TEXTS: [&str; 5] = ["labels", "annotations", "data", "stringData", "options"];

/// A value of the wrong type.
#[derive(Debug)]
pub(super) struct Wrong {
    /// Where.
    pub(super) steps: Vec<Step>,
    /// What it is, and what is expected.
    pub(super) problem: String,
}

/// Checks the types in a document that was read as a `T` already.
///
/// # Errors
/// The first value of a wrong type.
pub(super) fn check<T: DeserializeOwned>(mut document: Value) -> Result<(), Wrong> {
    bring_to_json(&mut document, "");
    let mut track = Track::new();
    let read = T::deserialize(Deserializer::new(document, &mut track));
    read.map(drop).map_err(|error| Wrong {
        steps: track.path().iter().filter_map(step).collect(),
        problem: error.to_string(),
    })
}

fn step(segment: &Segment) -> Option<Step> {
    match segment {
        Segment::Seq { index } => Some(Step::Index(*index)),
        Segment::Map { key } => Some(Step::Key(key.clone())),
        Segment::Enum { .. } | Segment::Unknown => None,
    }
}

/// `field` is where the value stands.
fn bring_to_json(value: &mut Value, field: &str) {
    match value {
        Value::Mapping(map) => {
            for (key, mut below) in std::mem::take(map) {
                let key = match key {
                    Value::Number(number) => number.to_string(),
                    Value::Bool(flag) => flag.to_string(),
                    Value::String(text) => text,
                    // Not of JSON: its own type is the mistake.
                    other => {
                        map.insert(other, below);
                        continue;
                    }
                };
                match &below {
                    Value::Number(number)
                        if QUANTITIES.contains(&field) || QUANTITY.contains(&key.as_str()) =>
                    {
                        below = Value::String(number.to_string());
                    }
                    Value::Null if TEXTS.contains(&field) => below = Value::String(String::new()),
                    _ => bring_to_json(&mut below, &key),
                }
                map.insert(Value::String(key), below);
            }
        }
        Value::Sequence(items) => {
            for item in items {
                bring_to_json(item, field);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::super::place;
    use super::*;

    fn wrong(spec: &str) -> String {
        let document = serde_yaml_ng::from_str(&format!("{{apiVersion: v1, kind: Pod, {spec}}}")).unwrap();
        match check::<Pod>(document) {
            Ok(()) => String::new(),
            Err(wrong) => format!("{}: {}", place::text(&wrong.steps), wrong.problem),
        }
    }

    #[test]
    fn only_what_kubernetes_takes_for_a_text_is_one() {
        for good in [
            "metadata: {labels: {80: '1', a: }, annotations: {true: x}}",
            "spec: {containers: [{name: c, env: [{name: A, value: '5'}, {name: B, value: }, {name: C}]}]}",
            "spec: {containers: [{name: c, resources: {limits: {cpu: 1, memory: 1.5, x/y: 2}, requests: {cpu: 0.5}}}]}",
            "spec: {containers: [{name: c, livenessProbe: {httpGet: {port: 80}}}], volumes: [{name: v, emptyDir: {sizeLimit: 5}}]}",
            "spec: {containers: [{name: c, env: [{name: A, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1}}}]}]}",
        ] {
            assert_eq!(wrong(good), "", "{good}");
        }
        for (bad, field) in [
            (
                "spec: {containers: [{name: c, env: [{value: 5}]}]}",
                "spec.containers[0].env[0].value: ",
            ),
            ("spec: {containers: [{name: 5}]}", "spec.containers[0].name: "),
            (
                "spec: {containers: [{name: c, command: [sleep, 10]}]}",
                "spec.containers[0].command[1]: ",
            ),
            (
                "spec: {containers: [{name: c, image: true}]}",
                "spec.containers[0].image: ",
            ),
            ("metadata: {labels: {version: 1.0}}", "metadata.labels.version: "),
            (
                "spec: {volumes: [{name: v, nfs: {server: 10, path: /}}]}",
                "spec.volumes[0].nfs.server: ",
            ),
        ] {
            let wrong = wrong(bad);
            assert!(
                wrong.starts_with(field) && wrong.contains("expected a string"),
                "{bad}: {wrong}"
            );
        }
    }
}
