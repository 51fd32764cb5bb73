//! What a Pod's environment and volumes refer to: ConfigMaps and Secrets of its manifest, and sizes of its containers.

use k8s_openapi::{
    api::core::v1::{
        ConfigMapEnvSource, ConfigMapKeySelector, Container, EnvFromSource, EnvVarSource,
        ResourceFieldSelector, SecretEnvSource, SecretKeySelector,
    },
    apimachinery::pkg::api::resource::Quantity,
};

use super::{
    container::{self, Sizes},
    objects::{Data, ObjectKind, Objects},
};
use crate::group::{
    quantity,
    spec::{EnvValue, EnvVar, KeyValue, Size},
    violation::{ViolationKind, Violations},
};

/// See the module.
#[derive(Debug)]
pub(super) struct Sources<'a> {
    pub(super) objects: &'a Objects,
    pub(super) namespace: &'a str,
    /// Names and sizes of the containers.
    sizes: Vec<(String, Sizes)>,
    /// What a container without limits has.
    group: Size,
}

/// A reference to a ConfigMap or Secret, or one key of it.
#[derive(Debug)]
pub(super) struct Reference<'a> {
    pub(super) kind: ObjectKind,
    pub(super) name: &'a str,
    pub(super) is_optional: bool,
    /// The field that holds it.
    pub(super) path: &'a str,
}

impl<'a> Sources<'a> {
    /// What containers, whose group is of size `group`, can refer to.
    pub(super) fn new<'c>(
        objects: &'a Objects,
        namespace: &'a str,
        containers: impl IntoIterator<Item = &'c Container>,
        group: Size,
    ) -> Self {
        let sizes = |container: &Container| {
            let resources = container.resources.as_ref();
            // What is wrong is found where the container is converted.
            let read = |resources| container::read_resources(resources, "", &mut Violations::default());
            (container.name.clone(), resources.map(read).unwrap_or_default())
        };
        Self {
            objects,
            namespace,
            sizes: containers.into_iter().map(sizes).collect(),
            group,
        }
    }

    /// The values of a ConfigMap or Secret; one that is missing is noted unless it is optional.
    pub(super) fn data(&self, reference: &Reference<'_>, found: &mut Violations) -> Option<&'a Data> {
        let Reference {
            kind,
            name,
            is_optional,
            path,
        } = reference;
        let data = self.objects.find(*kind, self.namespace, name);
        if data.is_none() && !is_optional {
            found.invalid(
                format!("{path}.name"),
                name,
                format!(
                    "no such {kind} in namespace {}; valid: one that is a document of the same manifest, or optional: true",
                    self.namespace
                ),
            );
        }
        data
    }

    /// A value of a ConfigMap or Secret as text for the environment.
    fn key(&self, reference: &Reference<'_>, key: &str, found: &mut Violations) -> Option<EnvValue> {
        let data = self.data(reference, found)?;
        let Some(value) = data.get(key) else {
            if !reference.is_optional {
                let known: Vec<_> = data.keys().map(String::as_str).collect();
                found.invalid(
                    format!("{}.key", reference.path),
                    key,
                    format!(
                        "{} {:?} has no such key; valid: {}",
                        reference.kind,
                        reference.name,
                        known.join(", ")
                    ),
                );
            }
            return None;
        };
        if std::str::from_utf8(value.bytes()).is_err() || value.bytes().contains(&0) {
            found.invalid(
                format!("{}.key", reference.path),
                key,
                "its value is no text; valid: UTF-8 without NUL bytes, or a volume for the value",
            );
            return None;
        }
        Some(EnvValue::Key(KeyValue {
            is_secret: reference.kind == ObjectKind::Secret,
            object: reference.name.to_owned(),
            key: key.to_owned(),
            value: value.clone(),
        }))
    }

    /// The variables of a container's `envFrom`.
    pub(super) fn env_from(
        &self,
        list: Option<Vec<EnvFromSource>>,
        path: &str,
        found: &mut Violations,
    ) -> Vec<EnvVar> {
        let mut variables = Vec::new();
        for (index, source) in list.unwrap_or_default().into_iter().enumerate() {
            let EnvFromSource {
                config_map_ref,
                prefix,
                secret_ref,
            } = source;
            let path = format!("{path}.envFrom[{index}]");
            let (kind, name, optional, field) = match (config_map_ref, secret_ref) {
                (Some(ConfigMapEnvSource { name, optional }), None) => {
                    (ObjectKind::ConfigMap, name, optional, "configMapRef")
                }
                (None, Some(SecretEnvSource { name, optional })) => {
                    (ObjectKind::Secret, name, optional, "secretRef")
                }
                _ => {
                    found.add(
                        ViolationKind::Missing,
                        path,
                        "",
                        "valid: one of configMapRef and secretRef",
                    );
                    continue;
                }
            };
            let path = format!("{path}.{field}");
            let reference = Reference {
                kind,
                name: &name,
                is_optional: optional == Some(true),
                path: &path,
            };
            let prefix = prefix.unwrap_or_default();
            for key in self.data(&reference, found).into_iter().flat_map(Data::keys) {
                if let Some(value) = self.key(&reference, key, found) {
                    variables.push(EnvVar {
                        name: format!("{prefix}{key}"),
                        value,
                    });
                }
            }
        }
        variables
    }

    /// The value of a variable's `valueFrom`; `None` when it is optional and not there. `container` is the variable's.
    pub(super) fn env_value(
        &self,
        source: EnvVarSource,
        container: &str,
        path: &str,
        found: &mut Violations,
    ) -> Option<EnvValue> {
        let EnvVarSource {
            config_map_key_ref,
            field_ref,
            file_key_ref,
            resource_field_ref,
            secret_key_ref,
        } = source;
        let path = format!("{path}.valueFrom");
        if file_key_ref.is_some() {
            found.add(
                ViolationKind::Unsupported,
                format!("{path}.fileKeyRef"),
                "",
                "not supported; use configMapKeyRef or secretKeyRef",
            );
            return None;
        }
        match (config_map_key_ref, secret_key_ref, field_ref, resource_field_ref) {
            (Some(ConfigMapKeySelector { key, name, optional }), None, None, None) => {
                let (kind, path) = (ObjectKind::ConfigMap, format!("{path}.configMapKeyRef"));
                let is_optional = optional == Some(true);
                self.key(
                    &Reference {
                        kind,
                        name: &name,
                        is_optional,
                        path: &path,
                    },
                    &key,
                    found,
                )
            }
            (None, Some(SecretKeySelector { key, name, optional }), None, None) => {
                let (kind, path) = (ObjectKind::Secret, format!("{path}.secretKeyRef"));
                let is_optional = optional == Some(true);
                self.key(
                    &Reference {
                        kind,
                        name: &name,
                        is_optional,
                        path: &path,
                    },
                    &key,
                    found,
                )
            }
            (None, None, Some(field), None) => Some(EnvValue::Field(field.field_path)),
            (None, None, None, Some(field)) => {
                let path = format!("{path}.resourceFieldRef");
                self.resource(&field, Some(container), &path, found)
                    .map(EnvValue::Literal)
            }
            _ => {
                found.add(
                    ViolationKind::Missing,
                    path,
                    "",
                    "valid: one of configMapKeyRef, fieldRef, resourceFieldRef and secretKeyRef",
                );
                None
            }
        }
    }

    /// A container's size in units of the divisor, rounded up.
    pub(super) fn resource(
        &self,
        field: &ResourceFieldSelector,
        own_name: Option<&str>,
        path: &str,
        found: &mut Violations,
    ) -> Option<String> {
        let ResourceFieldSelector {
            container_name,
            divisor,
            resource,
        } = field;
        let name = container_name
            .as_deref()
            .filter(|name| !name.is_empty())
            .or(own_name);
        let Some(name) = name else {
            found.add(
                ViolationKind::Missing,
                format!("{path}.containerName"),
                "",
                "required in a volume",
            );
            return None;
        };
        let Some((_, sizes)) = self.sizes.iter().find(|(known, _)| known == name) else {
            let known: Vec<_> = self.sizes.iter().map(|(name, _)| name.as_str()).collect();
            let problem = format!("no such container; valid: {}", known.join(", "));
            found.invalid(format!("{path}.containerName"), name, problem);
            return None;
        };
        let cpu = |own: Option<u32>| u64::from(own.unwrap_or(self.group.cpu_milli));
        let memory = |own: Option<u64>| own.unwrap_or(self.group.memory_bytes);
        let (value, is_cpu) = match resource.as_str() {
            "limits.cpu" => (cpu(sizes.limit.cpu_milli), true),
            "limits.memory" => (memory(sizes.limit.memory_bytes), false),
            // A request that is not given is the limit, else nothing is set aside.
            "requests.cpu" => (
                u64::from(sizes.request.cpu_milli.or(sizes.limit.cpu_milli).unwrap_or(0)),
                true,
            ),
            "requests.memory" => (
                sizes
                    .request
                    .memory_bytes
                    .or(sizes.limit.memory_bytes)
                    .unwrap_or(0),
                false,
            ),
            other => {
                found.invalid(
                    format!("{path}.resource"),
                    other,
                    "valid: limits.cpu, limits.memory, requests.cpu, requests.memory",
                );
                return None;
            }
        };
        let text = divisor.as_ref().map_or("0", |Quantity(text)| text.as_str());
        let divisor = if is_cpu {
            quantity::parse_milli(text).map(u64::from)
        } else {
            quantity::parse_units(text)
        };
        match divisor {
            // Not given is 1.
            Ok(0) => Some(value.div_ceil(if is_cpu { 1000 } else { 1 }).to_string()),
            Ok(divisor) => Some(value.div_ceil(divisor).to_string()),
            Err(error) => {
                found.invalid(format!("{path}.divisor"), text, error.to_string());
                None
            }
        }
    }
}
