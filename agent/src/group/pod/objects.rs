//! The ConfigMaps and Secrets that come in one manifest with a Pod. There is no API server to ask for others.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Pod, Secret},
};

use crate::group::files::Content;

/// A Pod and what its manifest has beside it.
#[derive(Debug, Clone, Default)]
pub struct Manifest {
    /// The Pod.
    pub pod: Pod,
    /// The rest.
    pub objects: Objects,
}

impl From<Pod> for Manifest {
    fn from(pod: Pod) -> Self {
        Self {
            pod,
            objects: Objects::default(),
        }
    }
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ObjectKind {
    /// Plain configuration.
    ConfigMap,
    /// Not to be shown.
    Secret,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
        })
    }
}

/// A ConfigMap's or Secret's values by key.
pub(super) type Data = BTreeMap<String, Content>;

#[derive(Debug, Clone)]
struct Object {
    kind: ObjectKind,
    namespace: String,
    name: String,
    data: Data,
}

/// The ConfigMaps and Secrets of a manifest.
#[derive(Debug, Clone, Default)]
pub struct Objects(Vec<Object>);

impl Objects {
    /// Adds a ConfigMap.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn add_config_map(&mut self, map: ConfigMap) -> Result<(), String> {
        let mut data = Data::new();
        for (key, text) in map.data.unwrap_or_default() {
            data.insert(key, text.into_bytes().into());
        }
        for (key, ByteString(bytes)) in map.binary_data.unwrap_or_default() {
            if data.insert(key.clone(), bytes.into()).is_some() {
                return Err(format!(
                    "binaryData: {key:?} is a key of data too; valid: keys given once"
                ));
            }
        }
        self.add(
            ObjectKind::ConfigMap,
            map.metadata.namespace,
            map.metadata.name,
            data,
        )
    }

    /// Adds a Secret; `stringData` wins over `data`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn add_secret(&mut self, secret: Secret) -> Result<(), String> {
        let mut data = Data::new();
        for (key, ByteString(bytes)) in secret.data.unwrap_or_default() {
            data.insert(key, bytes.into());
        }
        for (key, text) in secret.string_data.unwrap_or_default() {
            data.insert(key, text.into_bytes().into());
        }
        self.add(
            ObjectKind::Secret,
            secret.metadata.namespace,
            secret.metadata.name,
            data,
        )
    }

    fn add(
        &mut self,
        kind: ObjectKind,
        namespace: Option<String>,
        name: Option<String>,
        data: Data,
    ) -> Result<(), String> {
        const MOST_BYTES: usize = 1 << 20;
        let namespace = namespace
            .filter(|namespace| !namespace.is_empty())
            .unwrap_or_else(|| "default".into());
        let name = name.unwrap_or_default();
        if name.is_empty() {
            return Err("metadata.name: required".into());
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let is_key = |key: &&String| {
            !(1..=253).contains(&key.len()) || !key.bytes().all(plain) || *key == "." || key.starts_with("..")
        };
        if let Some(key) = data.keys().find(is_key) {
            return Err(format!(
                "data: {key:?}: valid keys: 1 to 253 letters, digits, '-', '_' and '.', not beginning with '..'"
            ));
        }
        let bytes: usize = data.values().map(|value| value.bytes().len()).sum();
        if bytes > MOST_BYTES {
            return Err(format!("data: {bytes} bytes; valid: at most {MOST_BYTES}"));
        }
        if self.find(kind, &namespace, &name).is_some() {
            return Err(format!("metadata.name: {name:?}: another {kind} has this name"));
        }
        self.0.push(Object {
            kind,
            namespace,
            name,
            data,
        });
        Ok(())
    }

    /// The values of one.
    pub(super) fn find(&self, kind: ObjectKind, namespace: &str, name: &str) -> Option<&Data> {
        self.0
            .iter()
            .find(|object| object.kind == kind && object.namespace == namespace && object.name == name)
            .map(|object| &object.data)
    }
}
