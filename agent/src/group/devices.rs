//! The check of volumes that containers have as devices (Kubernetes, `ValidateVolumeDevices`).

use std::collections::HashSet;

use super::{
    spec::{ContainerSpec, GroupSpec, VolumeSource},
    validate::is_plain_path,
    violation::{FieldPath, ViolationKind, Violations},
};

/// What every container has in `/dev`.
const TAKEN: [&str; 15] = [
    "null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm", "mqueue", "fd",
    "stdin", "stdout", "stderr",
];

/// Finds what is wrong with the devices of a container; `path` is the container's.
pub(super) fn check(spec: &GroupSpec, container: &ContainerSpec, path: &FieldPath, found: &mut Violations) {
    let (mut names, mut places) = (HashSet::new(), HashSet::new());
    for (index, device) in container.volume_devices.iter().enumerate() {
        let path = path.field("volumeDevices", "").item(index);
        let name = path.field("name", "");
        let volume = spec.volumes.iter().find(|volume| volume.name == device.name);
        match volume.map(|volume| &volume.source) {
            None => found.invalid(
                name,
                &device.name,
                "no such volume; valid: a volume of the group that is a disk",
            ),
            Some(VolumeSource::Disk(disk)) if disk.read_only => found.add(
                ViolationKind::Unsupported,
                name,
                &device.name,
                "a device can be written to; valid: a disk without readOnly, or volumeMounts",
            ),
            Some(VolumeSource::Disk(_)) if !names.insert(&device.name) => found.invalid(
                name,
                &device.name,
                "the container has this device already; valid: names unique in the container",
            ),
            Some(VolumeSource::Disk(_)) => {}
            Some(
                VolumeSource::EmptyDir { .. }
                | VolumeSource::Files(_)
                | VolumeSource::Nfs(_)
                | VolumeSource::HostPath(_),
            ) => found.invalid(
                name,
                &device.name,
                "not a device; valid: flexVolume of driver alicloud/disk, or volumeMounts",
            ),
        }
        let (field, target) = (path.field("devicePath", ""), device.device_path.as_str());
        let plain = target.trim_end_matches('/');
        let is_mounted = container
            .volume_mounts
            .iter()
            .any(|mount| mount.mount_path.trim_end_matches('/') == plain);
        let is_taken = plain
            .strip_prefix("/dev/")
            .and_then(|below| below.split('/').next())
            .is_some_and(|name| TAKEN.contains(&name));
        if target.is_empty() {
            found.add(ViolationKind::Missing, field, "", "required");
        } else if !target.starts_with('/') || target.ends_with('/') || !is_plain_path(&target[1..]) {
            found.invalid(field, target, "valid: an absolute path of a file, without '..'");
        } else if plain == "/dev" || is_taken {
            found.invalid(field, target, "every container has this; valid: another path");
        } else if is_mounted {
            found.invalid(field, target, "a volume is mounted there; valid: another path");
        } else if !places.insert(plain) {
            found.invalid(
                field,
                target,
                "another device is there; valid: paths unique in the container",
            );
        }
    }
}
