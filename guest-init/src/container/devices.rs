//! The guest's devices, for a container from which none is kept.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use rustix::fs::{major, minor};

use super::spec::{Device, DeviceRule, Spec};
use crate::error::{Context, Result};

/// Below `/dev`, what a container has of its own.
const OWN: [&str; 4] = ["console", "mqueue", "pts", "shm"];

/// Gives all devices to a specification that allows all.
///
/// # Errors
/// When `/dev` cannot be read.
pub fn give_all(spec: &mut Spec) -> Result<()> {
    let allows_all = |rule: &DeviceRule| {
        rule.allow
            && matches!(rule.kind.as_str(), "" | "a")
            && rule.major.is_none_or(|major| major < 0)
            && rule.minor.is_none_or(|minor| minor < 0)
    };
    // The last one counts.
    if spec.linux.resources.devices.last().is_some_and(allows_all) {
        let mut found = Vec::new();
        collect(Path::new("/dev"), &mut found)?;
        let given = &mut spec.linux.devices;
        found.retain(|device| given.iter().all(|other| other.path != device.path));
        given.extend(found);
    }
    Ok(())
}

fn collect(directory: &Path, found: &mut Vec<Device>) -> Result<()> {
    let action = || format!("read {}", directory.display());
    for entry in fs::read_dir(directory).context(action)? {
        let entry = entry.context(action)?;
        let (name, path) = (entry.file_name(), entry.path());
        if OWN.iter().any(|own| *own == name) && directory == Path::new("/dev") {
            continue;
        }
        // Neither links nor what has gone meanwhile.
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let kind = metadata.file_type();
        if kind.is_dir() {
            collect(&path, found)?;
        } else if kind.is_char_device() || kind.is_block_device() {
            found.push(Device {
                path: path.to_string_lossy().into_owned(),
                kind: if kind.is_block_device() { "b" } else { "c" }.to_owned(),
                major: major(metadata.rdev()),
                minor: minor(metadata.rdev()),
                file_mode: Some(metadata.mode()),
                uid: metadata.uid(),
                gid: metadata.gid(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(rules: &str) -> Vec<String> {
        let text = format!(
            r#"{{"linux":{{"devices":[{{"path":"/dev/zero","type":"c","major":9,"minor":9}}],"resources":{{"devices":{rules}}}}}}}"#
        );
        let mut spec: Spec = serde_json::from_str(&text).unwrap();
        give_all(&mut spec).unwrap();
        assert_eq!((spec.linux.devices[0].major, spec.linux.devices[0].minor), (9, 9));
        spec.linux.devices.into_iter().map(|device| device.path).collect()
    }

    #[test]
    fn who_may_use_all_devices_has_them() {
        let all = given(r#"[{"allow":false},{"allow":true,"access":"rwm"}]"#);
        assert!(
            all.contains(&"/dev/null".to_owned()) && !all.contains(&"/dev/console".to_owned()),
            "{all:?}"
        );
        assert!(all.iter().all(|path| !path.starts_with("/dev/pts/")), "{all:?}");
        assert_eq!(all.iter().filter(|path| *path == "/dev/zero").count(), 1);
        for rules in [
            "[]",
            r#"[{"allow":true},{"allow":false,"access":"rwm"}]"#,
            r#"[{"allow":true,"type":"c","major":1}]"#,
        ] {
            assert_eq!(given(rules), ["/dev/zero"], "{rules}");
        }
    }
}
