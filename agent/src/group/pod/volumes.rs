//! One volume of a Pod.

use k8s_openapi::{
    api::core::v1::{
        ConfigMapProjection, ConfigMapVolumeSource, DownwardAPIProjection, DownwardAPIVolumeFile,
        DownwardAPIVolumeSource, EmptyDirVolumeSource, FlexVolumeSource, HostPathVolumeSource, KeyToPath,
        NFSVolumeSource, ProjectedVolumeSource, SecretProjection, SecretVolumeSource, Volume,
    },
    apimachinery::pkg::api::resource::Quantity,
};

use super::{
    objects::{Data, ObjectKind},
    sources::{Reference, Sources},
};
use crate::group::{
    disk::{self, DiskVolume},
    files::{FileItem, FileOrigin, FileSource, FileVolume},
    host_path::{HostPathKind, HostPathVolume},
    nfs::NfsVolume,
    quantity,
    rules::Allow,
    spec::{VolumeSource, VolumeSpec},
    violation::{ViolationKind, Violations},
};

const DEFAULT_MODE: i32 = 0o644;
const VALID: &str =
    "emptyDir, configMap, secret, projected, downwardAPI, nfs, or flexVolume of driver alicloud/disk";

/// Converts the volume at `index`.
pub(super) fn convert(
    volume: Volume,
    index: usize,
    sources: &Sources<'_>,
    allow: &Allow,
    found: &mut Violations,
) -> VolumeSpec {
    let path = format!("spec.volumes[{index}]");
    // The kinds are two dozen optional fields; as JSON they are the keys beside the name.
    let value = serde_json::to_value(&volume).unwrap_or_default();
    let kinds: Vec<_> = value
        .as_object()
        .into_iter()
        .flat_map(|object| object.keys())
        .filter(|key| *key != "name")
        .collect();
    for kind in &kinds {
        let (violation, instead) = match kind.as_str() {
            "emptyDir" | "configMap" | "secret" | "projected" | "downwardAPI" | "nfs" | "flexVolume" => {
                continue;
            }
            "hostPath" if allow.host_path => continue,
            "hostPath" => (
                ViolationKind::Restricted,
                "not supported: use emptyDir, or bring the files in the image".to_owned(),
            ),
            "persistentVolumeClaim" | "csi" | "ephemeral" => (
                ViolationKind::Unsupported,
                "not supported: there is no API server to bind a claim; use nfs, or flexVolume with driver alicloud/disk \
                 and options volumeId or volumeSize"
                    .to_owned(),
            ),
            "image" => (
                ViolationKind::Unsupported,
                format!("not supported yet; valid: {VALID}"),
            ),
            _ => (
                ViolationKind::Unsupported,
                format!("not supported; valid: {VALID}"),
            ),
        };
        found.add(violation, format!("{path}.{kind}"), "", instead);
    }
    match kinds.len() {
        0 => found.add(
            ViolationKind::Missing,
            &path,
            &volume.name,
            format!("the volume has no kind; valid: {VALID}"),
        ),
        1 => {}
        _ => found.invalid(&path, &volume.name, "the volume has several kinds; valid: one"),
    }
    if let Some(flex) = volume.flex_volume {
        return VolumeSpec {
            name: volume.name,
            source: VolumeSource::Disk(flex_volume(flex, &format!("{path}.flexVolume"), found)),
        };
    }
    if let Some(HostPathVolumeSource { path: host, type_ }) = volume.host_path {
        let given = type_.unwrap_or_default();
        let kind = HostPathKind::parse(&given).unwrap_or_else(|valid| {
            found.invalid(format!("{path}.hostPath.type"), given, valid);
            HostPathKind::Any
        });
        return VolumeSpec {
            name: volume.name,
            source: VolumeSource::HostPath(HostPathVolume { path: host, kind }),
        };
    }
    if let Some(NFSVolumeSource {
        path,
        read_only,
        server,
    }) = volume.nfs
    {
        return VolumeSpec {
            name: volume.name,
            source: VolumeSource::Nfs(NfsVolume {
                server,
                path,
                read_only: read_only == Some(true),
            }),
        };
    }
    let mut files = Files {
        sources,
        found,
        files: Vec::new(),
    };
    let (origin, is_files) = if let Some(map) = volume.config_map {
        let ConfigMapVolumeSource {
            default_mode,
            items,
            name,
            optional,
        } = map;
        let path = format!("{path}.configMap");
        let mode = files.mode(default_mode, DEFAULT_MODE, &format!("{path}.defaultMode"));
        files.object(ObjectKind::ConfigMap, &name, optional, items, mode, &path);
        (FileOrigin::Config(name), true)
    } else if let Some(secret) = volume.secret {
        let SecretVolumeSource {
            default_mode,
            items,
            optional,
            secret_name,
        } = secret;
        let (path, name) = (format!("{path}.secret"), secret_name.unwrap_or_default());
        let mode = files.mode(default_mode, DEFAULT_MODE, &format!("{path}.defaultMode"));
        files.object(ObjectKind::Secret, &name, optional, items, mode, &path);
        (FileOrigin::Secret(name), true)
    } else if let Some(fields) = volume.downward_api {
        let DownwardAPIVolumeSource { default_mode, items } = fields;
        let path = format!("{path}.downwardAPI");
        let mode = files.mode(default_mode, DEFAULT_MODE, &format!("{path}.defaultMode"));
        files.fields(items, mode, &path);
        (FileOrigin::DownwardApi, true)
    } else if let Some(projected) = volume.projected {
        files.projected(projected, &format!("{path}.projected"));
        (FileOrigin::Projected, true)
    } else {
        (FileOrigin::Projected, false)
    };
    let source = if is_files {
        VolumeSource::Files(FileVolume {
            origin,
            files: files.files,
        })
    } else {
        empty_dir(volume.empty_dir.unwrap_or_default(), &path, found)
    };
    VolumeSpec {
        name: volume.name,
        source,
    }
}

fn flex_volume(flex: FlexVolumeSource, path: &str, found: &mut Violations) -> DiskVolume {
    let FlexVolumeSource {
        driver,
        fs_type,
        options,
        read_only,
        secret_ref,
    } = flex;
    if driver != disk::FLEX_DRIVER {
        let valid = "not supported; valid: alicloud/disk, or a volume nfs instead of alicloud/nas";
        found.add(
            ViolationKind::Unsupported,
            format!("{path}.driver"),
            &driver,
            valid,
        );
    }
    if secret_ref.is_some() {
        let valid = "not supported: a disk needs no secret";
        found.add(ViolationKind::Unsupported, format!("{path}.secretRef"), "", valid);
    }
    let note = |kind, field: &str, value: &str, problem: &str| {
        let below = if field == "fsType" { "" } else { ".options" };
        found.add(kind, format!("{path}{below}.{field}"), value, problem);
    };
    DiskVolume {
        read_only: read_only == Some(true),
        ..disk::read_flex(
            &options.unwrap_or_default(),
            fs_type.as_deref().filter(|name| !name.is_empty()),
            note,
        )
    }
}

fn empty_dir(empty_dir: EmptyDirVolumeSource, path: &str, found: &mut Violations) -> VolumeSource {
    let EmptyDirVolumeSource { medium, size_limit } = empty_dir;
    let mut memory = false;
    match medium.as_deref() {
        None | Some("") => {}
        Some("Memory") => memory = true,
        Some(other) => found.invalid(
            format!("{path}.emptyDir.medium"),
            other,
            "valid: Memory, or nothing for the disk",
        ),
    }
    let size_limit_bytes = size_limit.and_then(|Quantity(text)| {
        quantity::parse_units(&text)
            .map_err(|error| {
                found.invalid(format!("{path}.emptyDir.sizeLimit"), text, error.to_string());
            })
            .ok()
    });
    VolumeSource::EmptyDir {
        memory,
        size_limit_bytes,
    }
}

/// The files of one volume, collected.
struct Files<'a, 's> {
    sources: &'a Sources<'s>,
    found: &'a mut Violations,
    files: Vec<FileItem>,
}

impl Files<'_, '_> {
    fn mode(&mut self, mode: Option<i32>, default: i32, path: &str) -> u32 {
        let mode = mode.unwrap_or(default);
        u32::try_from(mode)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .unwrap_or_else(|| {
                self.found
                    .invalid(path, mode, "valid: 0 to 0777 (octal), 511 in decimal");
                0
            })
    }

    /// Adds a file; of two with one path the later counts, as in Kubernetes.
    fn push(&mut self, file: FileItem) {
        self.files.retain(|known| known.path != file.path);
        self.files.push(file);
    }

    fn object(
        &mut self,
        kind: ObjectKind,
        name: &str,
        optional: Option<bool>,
        items: Option<Vec<KeyToPath>>,
        default_mode: u32,
        path: &str,
    ) {
        let is_optional = optional == Some(true);
        let reference = Reference {
            kind,
            name,
            is_optional,
            path,
        };
        let Some(data) = self.sources.data(&reference, self.found) else {
            return;
        };
        let Some(items) = items.filter(|items| !items.is_empty()) else {
            for (key, content) in data {
                let source = FileSource::Content(content.clone());
                self.push(FileItem {
                    path: key.clone(),
                    mode: default_mode,
                    source,
                });
            }
            return;
        };
        for (index, item) in items.into_iter().enumerate() {
            let path = format!("{path}.items[{index}]");
            self.item(kind, data, item, is_optional, default_mode, &path);
        }
    }

    fn item(
        &mut self,
        kind: ObjectKind,
        data: &Data,
        item: KeyToPath,
        is_optional: bool,
        default_mode: u32,
        field: &str,
    ) {
        let KeyToPath { key, mode, path } = item;
        let mode = match mode {
            Some(mode) => self.mode(Some(mode), 0, &format!("{field}.mode")),
            None => default_mode,
        };
        match data.get(&key) {
            Some(content) => {
                let source = FileSource::Content(content.clone());
                self.push(FileItem { path, mode, source });
            }
            None if is_optional => {}
            None => {
                let known: Vec<_> = data.keys().map(String::as_str).collect();
                let problem = format!("the {kind} has no such key; valid: {}", known.join(", "));
                self.found.invalid(format!("{field}.key"), key, problem);
            }
        }
    }

    fn fields(&mut self, items: Option<Vec<DownwardAPIVolumeFile>>, default_mode: u32, path: &str) {
        for (index, item) in items.unwrap_or_default().into_iter().enumerate() {
            let field = format!("{path}.items[{index}]");
            let DownwardAPIVolumeFile {
                field_ref,
                mode,
                path,
                resource_field_ref,
            } = item;
            let mode = match mode {
                Some(mode) => self.mode(Some(mode), 0, &format!("{field}.mode")),
                None => default_mode,
            };
            let source = match (field_ref, resource_field_ref) {
                (Some(field_ref), None) => FileSource::Field(field_ref.field_path),
                (None, Some(resource)) => {
                    let field = format!("{field}.resourceFieldRef");
                    let Some(text) = self.sources.resource(&resource, None, &field, self.found) else {
                        continue;
                    };
                    FileSource::Content(text.into_bytes().into())
                }
                _ => {
                    let problem = "valid: one of fieldRef and resourceFieldRef";
                    self.found.add(ViolationKind::Missing, field, "", problem);
                    continue;
                }
            };
            self.push(FileItem { path, mode, source });
        }
    }

    fn projected(&mut self, projected: ProjectedVolumeSource, path: &str) {
        let ProjectedVolumeSource {
            default_mode,
            sources,
        } = projected;
        let mode = self.mode(default_mode, DEFAULT_MODE, &format!("{path}.defaultMode"));
        for (index, source) in sources.unwrap_or_default().into_iter().enumerate() {
            let path = format!("{path}.sources[{index}]");
            for (refused, kind) in [
                (source.service_account_token.is_some(), "serviceAccountToken"),
                (source.cluster_trust_bundle.is_some(), "clusterTrustBundle"),
                (source.pod_certificate.is_some(), "podCertificate"),
            ] {
                if refused {
                    self.found.add(
                        ViolationKind::Unsupported,
                        format!("{path}.{kind}"),
                        "",
                        "not supported: there is no API server to get it from; use a secret",
                    );
                }
            }
            if let Some(ConfigMapProjection {
                items,
                name,
                optional,
            }) = source.config_map
            {
                let path = format!("{path}.configMap");
                self.object(ObjectKind::ConfigMap, &name, optional, items, mode, &path);
            }
            if let Some(SecretProjection {
                items,
                name,
                optional,
            }) = source.secret
            {
                let path = format!("{path}.secret");
                self.object(ObjectKind::Secret, &name, optional, items, mode, &path);
            }
            if let Some(DownwardAPIProjection { items }) = source.downward_api {
                self.fields(items, mode, &format!("{path}.downwardAPI"));
            }
        }
    }
}
