//! Pod manifests, as short as a test can say them.

use serde_json::{Value, json};

/// A Pod being written.
#[derive(Debug, Clone)]
pub struct Pod {
    name: String,
    manifest: Value,
}

impl Pod {
    /// A Pod without containers, that is not restarted and ends within a second.
    pub fn new(name: &str) -> Self {
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name },
            "spec": { "restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [] },
        });
        Self {
            name: name.to_owned(),
            manifest,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a container that runs a shell script.
    #[must_use]
    pub fn container(self, name: &str, image: &str, script: &str) -> Self {
        self.container_with(name, image, script, json!({}))
    }

    /// Adds a container that runs a shell script, with further fields.
    #[must_use]
    pub fn container_with(self, name: &str, image: &str, script: &str, fields: Value) -> Self {
        self.in_list("containers", name, image, script, fields)
    }

    /// Adds an init container that runs a shell script, with further fields.
    #[must_use]
    pub fn init_container(self, name: &str, image: &str, script: &str, fields: Value) -> Self {
        self.in_list("initContainers", name, image, script, fields)
    }

    /// Sets a field of the specification.
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.manifest["spec"][field] = value;
        self
    }

    fn in_list(mut self, list: &str, name: &str, image: &str, script: &str, fields: Value) -> Self {
        let mut container = json!({
            "name": name,
            "image": image,
            "command": ["/bin/sh", "-c", script],
            "resources": { "limits": { "cpu": "250m", "memory": "128Mi" } },
        });
        if let (Some(container), Value::Object(fields)) = (container.as_object_mut(), fields) {
            container.extend(fields);
        }
        let containers = &mut self.manifest["spec"][list];
        if containers.is_null() {
            *containers = json!([]);
        }
        if let Some(containers) = containers.as_array_mut() {
            containers.push(container);
        }
        self
    }

    /// Adds fields to the `spec` of the Pod.
    #[must_use]
    pub fn spec(mut self, fields: Value) -> Self {
        if let (Some(spec), Value::Object(fields)) = (self.manifest["spec"].as_object_mut(), fields) {
            spec.extend(fields);
        }
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.manifest["metadata"]["labels"][key] = value.into();
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.manifest["metadata"]["annotations"][key] = value.into();
        self
    }

    /// The manifest as JSON, which is YAML too.
    pub fn manifest(&self) -> String {
        self.manifest.to_string()
    }
}
