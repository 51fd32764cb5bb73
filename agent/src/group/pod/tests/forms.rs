//! The Pod and the ECI form of a group are one group.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::prelude::*;
use serde_json::json;

use super::group;
use crate::group::{eci, rules::Rules, spec::GroupSpec};

/// A volume and how the container mounts it, in neither form.
#[derive(Debug, Clone)]
struct Volume {
    kind: Kind,
    sub_path: Option<String>,
    read_only: bool,
}

#[derive(Debug, Clone)]
enum Kind {
    EmptyDir {
        memory: bool,
        limit_gib: Option<u8>,
    },
    Files {
        default_mode: u32,
        files: Vec<(Option<u32>, Vec<u8>)>,
    },
    Nfs {
        server: String,
        path: String,
        read_only: Option<bool>,
    },
}

fn volumes() -> impl Strategy<Value = Vec<Volume>> {
    let empty_dir = (any::<bool>(), prop::option::of(1_u8..9))
        .prop_map(|(memory, limit_gib)| Kind::EmptyDir { memory, limit_gib });
    let file = (
        prop::option::of(0_u32..=0o777),
        prop::collection::vec(any::<u8>(), 0..40),
    );
    let files = (0_u32..=0o777, prop::collection::vec(file, 1..5))
        .prop_map(|(default_mode, files)| Kind::Files { default_mode, files });
    let nfs = (
        "[a-z][a-z0-9]{0,5}(\\.[a-z]{1,3})?",
        "/[a-z. ]{0,5}x?(/[a-z]{1,3})?",
        any::<Option<bool>>(),
    )
        .prop_filter("no way up", |(_, path, _)| {
            !path.split('/').any(|part| part == "..")
        })
        .prop_map(|(server, path, read_only)| Kind::Nfs {
            server,
            path,
            read_only,
        });
    let volume = (
        prop_oneof![empty_dir, files, nfs],
        prop::option::of("[a-z]{1,4}(/[a-z.]{1,3}x)?"),
        any::<bool>(),
    )
        .prop_map(|(kind, sub_path, read_only)| Volume {
            kind,
            sub_path,
            read_only,
        });
    prop::collection::vec(volume, 0..6)
}

fn pod(volumes: &[Volume]) -> GroupSpec {
    let (mut kinds, mut mounts, mut documents) = (Vec::new(), Vec::new(), Vec::new());
    for (index, volume) in volumes.iter().enumerate() {
        let name = format!("v{index}");
        let mut mount =
            json!({"name": name, "mountPath": format!("/m{index}"), "readOnly": volume.read_only});
        if let Some(path) = &volume.sub_path {
            mount["subPath"] = json!(path);
        }
        mounts.push(mount);
        kinds.push(match &volume.kind {
            Kind::EmptyDir { memory, limit_gib } => json!({"name": name, "emptyDir": {
                "medium": if *memory { "Memory" } else { "" }, "sizeLimit": limit_gib.map(|gib| format!("{gib}Gi")),
            }}),
            Kind::Files { default_mode, files } => {
                let key = |file: usize| format!("f{file}");
                let data: serde_json::Map<_, _> = files
                    .iter()
                    .enumerate()
                    .map(|(file, (_, bytes))| (key(file), json!(STANDARD.encode(bytes))))
                    .collect();
                documents.push(json!({
                    "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": data,
                }));
                let items = files.iter().enumerate().map(|(file, (mode, _))| {
                    json!({"key": key(file), "path": format!("d/{file}"), "mode": mode})
                });
                json!({"name": name, "configMap": {
                    "name": name, "defaultMode": default_mode, "items": items.collect::<Vec<_>>(),
                }})
            }
            Kind::Nfs {
                server,
                path,
                read_only,
            } => json!({"name": name, "nfs": {"server": server, "path": path, "readOnly": read_only}}),
        });
    }
    documents.push(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"},
        "spec": {"volumes": kinds, "containers": [{"name": "c", "image": "a/b:1", "volumeMounts": mounts}]},
    }));
    let text: Vec<_> = documents.iter().map(ToString::to_string).collect();
    group(&format!("---\n{}\n", text.join("\n---\n"))).unwrap()
}

fn eci(volumes: &[Volume]) -> GroupSpec {
    let (mut kinds, mut mounts) = (Vec::new(), Vec::new());
    for (index, volume) in volumes.iter().enumerate() {
        let name = format!("v{index}");
        mounts.push(json!({
            "Name": name, "MountPath": format!("/m{index}"), "ReadOnly": volume.read_only, "SubPath": volume.sub_path,
        }));
        kinds.push(match &volume.kind {
            Kind::EmptyDir { memory, limit_gib } => {
                json!({"Name": name, "Type": "EmptyDirVolume", "EmptyDirVolume": {
                    "Medium": memory.then_some("Memory"), "SizeLimit": limit_gib,
                }})
            }
            Kind::Files { default_mode, files } => {
                let files = files.iter().enumerate().map(|(file, (mode, bytes))| {
                    json!({"Path": format!("d/{file}"), "Content": STANDARD.encode(bytes),
                        "Mode": mode.map(|mode| format!("{mode:04o}"))})
                });
                json!({"Name": name, "Type": "ConfigFileVolume", "ConfigFileVolume": {
                    "DefaultMode": format!("{default_mode:o}"), "ConfigFileToPath": files.collect::<Vec<_>>(),
                }})
            }
            Kind::Nfs {
                server,
                path,
                read_only,
            } => json!({"Name": name, "Type": "NFSVolume", "NFSVolume": {
                "Server": server, "Path": path, "ReadOnly": read_only,
            }}),
        });
    }
    let request = json!({
        "ContainerGroupName": "web", "Volume": kinds,
        "Container": [{"Name": "c", "Image": "a/b:1", "VolumeMount": mounts}],
    });
    let params = eci::params::Params::from_json(&request).unwrap();
    eci::to_group(&params, &Rules::default()).unwrap()
}

proptest! {
    #[test]
    fn both_forms_of_volumes_are_one(volumes in volumes()) {
        let (mut pod, eci) = (pod(&volumes), eci(&volumes));
        // Which door it was, and what was said there, is all that differs.
        pod.door = eci.door;
        pod.request.clone_from(&eci.request);
        prop_assert_eq!(pod, eci);
    }
}
