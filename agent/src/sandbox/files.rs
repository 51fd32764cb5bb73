//! Volumes of files as messages to the guest.

use std::collections::BTreeMap;

use protocol::guest::{File, PutFilesRequest};

use super::oci::{GroupFacts, field};
use crate::{
    error::{Error, ErrorKind, Result},
    group::{
        files::FileSource,
        spec::{ContainerSpec, GroupSpec, VolumeSource},
    },
};

/// The volumes of files that a container mounts, with their content as it is now.
///
/// # Errors
/// `InvalidArgument` names a field of the group that is not known.
pub fn of_container(
    group: &GroupSpec,
    container: &ContainerSpec,
    facts: &GroupFacts,
) -> Result<Vec<PutFilesRequest>> {
    let is_mounted = |name: &str| container.volume_mounts.iter().any(|mount| mount.name == name);
    let mut requests = Vec::new();
    for volume in &group.volumes {
        let VolumeSource::Files(files) = &volume.source else {
            continue;
        };
        if !is_mounted(&volume.name) {
            continue;
        }
        let file = |item: &crate::group::files::FileItem| {
            let content = match &item.source {
                FileSource::Content(content) => content.bytes().to_vec(),
                FileSource::Field(path) => text(group, path, facts)
                    .ok_or_else(|| {
                        let message = format!("volume {}: field path {path:?} is not known", volume.name);
                        Error::new(ErrorKind::InvalidArgument, message)
                    })?
                    .into_bytes(),
            };
            Ok(File {
                path: item.path.clone(),
                mode: item.mode,
                content,
                ..File::default()
            })
        };
        requests.push(PutFilesRequest {
            volume: volume.name.clone(),
            gid: group.fs_group,
            files: files.files.iter().map(file).collect::<Result<_>>()?,
            ..PutFilesRequest::default()
        });
    }
    Ok(requests)
}

/// A field as the text of a file: maps as sorted lines `key="value"` (Kubernetes, pkg/fieldpath `FormatMap`).
fn text(group: &GroupSpec, path: &str, facts: &GroupFacts) -> Option<String> {
    match path {
        "metadata.labels" => Some(lines(&group.labels)),
        "metadata.annotations" => Some(lines(&group.annotations)),
        _ => field(group, path, facts),
    }
}

fn lines(map: &BTreeMap<String, String>) -> String {
    let line = |(key, value): (&String, &String)| format!("{key}={}", quoted(value));
    map.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// As Go's `strconv.Quote` does it.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\x07' => quoted.push_str("\\a"),
            '\x08' => quoted.push_str("\\b"),
            '\x0b' => quoted.push_str("\\v"),
            '\x0c' => quoted.push_str("\\f"),
            c if u32::from(c) < 0x20 || c == '\x7f' => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{
        files::{FileItem, FileOrigin, FileVolume},
        spec::{VolumeMount, VolumeSpec, testing},
    };

    #[test]
    fn only_mounted_volumes_are_put_with_fields_read() {
        let mut group = testing::group("g", 2);
        group.labels = BTreeMap::from([("b".into(), "2\"x\n".into()), ("a".into(), "1".into())]);
        let item = |path: &str, source| FileItem {
            path: path.into(),
            mode: 0o400,
            source,
        };
        group.volumes = vec![VolumeSpec {
            name: "v".into(),
            source: VolumeSource::Files(FileVolume {
                origin: FileOrigin::Projected,
                files: vec![
                    item("labels", FileSource::Field("metadata.labels".into())),
                    item("name", FileSource::Field("metadata.name".into())),
                    item("raw", FileSource::Content(vec![0, 255].into())),
                ],
            }),
        }];
        group.containers[1].volume_mounts = vec![VolumeMount {
            name: "v".into(),
            mount_path: "/v".into(),
            sub_path: None,
            is_sub_path_expr: false,
            read_only: false,
        }];
        let facts = GroupFacts {
            group_id: "eci-1".into(),
            ips: vec!["10.0.0.2".into()],
            node_name: "n".into(),
            host_ips: vec!["10.0.0.1".into()],
            hostname: "g".into(),
        };
        assert!(
            of_container(&group, &group.containers[0], &facts)
                .unwrap()
                .is_empty()
        );
        let requests = of_container(&group, &group.containers[1], &facts).unwrap();
        let files: Vec<_> = requests[0]
            .files
            .iter()
            .map(|file| file.content.as_slice())
            .collect();
        assert_eq!(files, [&b"a=\"1\"\nb=\"2\\\"x\\n\""[..], b"g", &[0, 255]]);
        assert_eq!(
            (requests[0].volume.as_str(), requests[0].files[0].mode),
            ("v", 0o400)
        );
    }
}
