//! Mounts of a specification as steps. Pure.

use std::ffi::CString;

use crate::{
    container::{
        program::{InRoot, Step},
        spec,
    },
    error::{Error, Result},
    sys::mount::MountAttributes,
};

/// File systems of the kernel's that a container can have, beside `bind` and the storage kinds of `crate::storage`.
const KINDS: &[&str] = &[
    "cgroup", "cgroup2", "devpts", "mqueue", "proc", "sysfs", "tmpfs", "virtiofs",
];

/// The mounts every container has, each where the specification has nothing at the same place:
/// destination, type, source, options.
const DEFAULTS: &[(&str, &str, &str, &[&str])] = &[
    ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
    (
        "/dev",
        "tmpfs",
        "tmpfs",
        &["nosuid", "strictatime", "mode=755", "size=65536k"],
    ),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        &[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ],
    ),
    ("/dev/shm", "bind", "/dev/shm", &["nosuid", "noexec", "nodev"]),
    ("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
    ("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    (
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &["nosuid", "noexec", "nodev", "relatime", "ro"],
    ),
];

/// Puts the default mounts among those of the specification: the places every container has come first, in their
/// order, so that none covers another.
#[must_use]
pub fn with_defaults(mounts: &[spec::Mount]) -> Vec<spec::Mount> {
    let is_at = |mount: &spec::Mount, place: &str| mount.destination.trim_end_matches('/') == place;
    let mut all = Vec::with_capacity(DEFAULTS.len() + mounts.len());
    for (destination, kind, source, options) in DEFAULTS {
        let mut given = mounts.iter().filter(|mount| is_at(mount, destination)).peekable();
        if given.peek().is_some() {
            all.extend(given.cloned());
        } else {
            all.push(spec::Mount {
                destination: (*destination).into(),
                kind: (*kind).into(),
                source: (*source).into(),
                options: options.iter().map(ToString::to_string).collect(),
            });
        }
    }
    let is_default = |mount: &&spec::Mount| DEFAULTS.iter().any(|(place, ..)| is_at(mount, place));
    all.extend(mounts.iter().filter(|mount| !is_default(mount)).cloned());
    all
}

/// Options split into what belongs to the mount and what to the file system.
#[derive(Debug, Default)]
struct Options {
    attributes: MountAttributes,
    bind: Option<bool>,
    parameters: Vec<String>,
}

fn parse_options(options: &[String]) -> Options {
    let mut parsed = Options::default();
    for option in options {
        let (set, clear) = match option.as_str() {
            "ro" => (libc::MOUNT_ATTR_RDONLY, 0),
            "rw" => (0, libc::MOUNT_ATTR_RDONLY),
            "nosuid" => (libc::MOUNT_ATTR_NOSUID, 0),
            "suid" => (0, libc::MOUNT_ATTR_NOSUID),
            "nodev" => (libc::MOUNT_ATTR_NODEV, 0),
            "noexec" => (libc::MOUNT_ATTR_NOEXEC, 0),
            "exec" => (0, libc::MOUNT_ATTR_NOEXEC),
            "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, 0),
            "diratime" => (0, libc::MOUNT_ATTR_NODIRATIME),
            "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
            // The access time choices are one field: it is cleared when one of them is set.
            "noatime" => (libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME),
            "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, libc::MOUNT_ATTR__ATIME),
            // The kernel's default, and what only the host can mean.
            "relatime" | "atime" | "defaults" | "dev" | "remount" => continue,
            "bind" => {
                parsed.bind = Some(false);
                continue;
            }
            "rbind" => {
                parsed.bind = Some(true);
                continue;
            }
            // Nothing mounted in one container is ever seen in another: all are private.
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" | "unbindable"
            | "runbindable" => {
                continue;
            }
            other => {
                parsed.parameters.push(other.to_owned());
                continue;
            }
        };
        let attributes = &mut parsed.attributes;
        attributes.set = (attributes.set & !clear) | set;
        attributes.clear = (attributes.clear & !set) | clear;
    }
    // Only bind mounts of the default devices open device nodes: the slice disks hold every container's data.
    parsed.attributes.set |= libc::MOUNT_ATTR_NODEV;
    parsed
}

/// The step that makes `mount`; `index` is its place in the specification, for messages.
///
/// # Errors
/// `InvalidArgument` names the field.
pub fn step(index: usize, mount: &spec::Mount) -> Result<Step> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    let target = InRoot::parse(&mount.destination).ok_or_else(|| {
        Error::invalid(format!(
            "{} is {:?}: give an absolute path without \"..\"",
            field("destination"),
            mount.destination
        ))
    })?;
    let c_string = |name: &str, text: &str| {
        CString::new(text).map_err(|_| Error::invalid(format!("{} has a NUL byte", field(name))))
    };
    let options = parse_options(&mount.options);
    let recursive = options
        .bind
        .unwrap_or(mount.kind == "bind")
        .then_some(options.bind.unwrap_or(true));
    if mount.kind == "bind" || options.bind.is_some() {
        if !mount.source.starts_with('/') {
            return Err(Error::invalid(format!(
                "{} is {:?}: give an absolute path",
                field("source"),
                mount.source
            )));
        }
        if let Some(unknown) = options.parameters.first() {
            return Err(Error::invalid(format!(
                "{}: {unknown:?} has no meaning for a bind mount",
                field("options")
            )));
        }
        return Ok(Step::Bind {
            source: c_string("source", &mount.source)?,
            target,
            recursive: recursive.unwrap_or(true),
            attributes: options.attributes,
        });
    }
    if !KINDS.contains(&mount.kind.as_str()) {
        return Err(Error::invalid(format!(
            "{} is {:?}: give bind, emptydir, slice or one of {}",
            field("type"),
            mount.kind,
            KINDS.join(", ")
        )));
    }
    let kind = if mount.kind == "cgroup" {
        "cgroup2"
    } else {
        &mount.kind
    };
    let mut attributes = options.attributes;
    if kind == "devpts" {
        attributes.set &= !libc::MOUNT_ATTR_NODEV;
    }
    let mut parameters = Vec::new();
    if !mount.source.is_empty() {
        parameters.push((c"source".to_owned(), Some(c_string("source", &mount.source)?)));
    }
    for parameter in &options.parameters {
        let (key, value) = match parameter.split_once('=') {
            Some((key, value)) => (key, Some(c_string("options", value)?)),
            None => (parameter.as_str(), None),
        };
        parameters.push((c_string("options", key)?, value));
    }
    Ok(Step::Mount {
        target,
        kind: c_string("type", kind)?,
        parameters,
        attributes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(destination: &str, kind: &str, options: &[&str]) -> spec::Mount {
        spec::Mount {
            destination: destination.into(),
            kind: kind.into(),
            source: "/src".into(),
            options: options.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn a_given_mount_takes_the_place_of_the_default() {
        let all = with_defaults(&[
            mount("/data", "bind", &[]),
            mount("/dev/", "tmpfs", &["mode=700"]),
        ]);
        let places: Vec<_> = all.iter().map(|mount| mount.destination.as_str()).collect();
        assert_eq!(
            places,
            [
                "/proc",
                "/dev/",
                "/dev/pts",
                "/dev/shm",
                "/dev/mqueue",
                "/sys",
                "/sys/fs/cgroup",
                "/data"
            ]
        );
        assert_eq!(all[1].options, ["mode=700"]);
    }

    #[test]
    fn options_become_attributes_and_parameters() {
        let Step::Mount {
            parameters,
            attributes,
            ..
        } = step(
            0,
            &mount(
                "/x",
                "tmpfs",
                &["ro", "rw", "nosuid", "noatime", "size=1k", "rprivate", "huge"],
            ),
        )
        .unwrap()
        else {
            panic!("a file system mount")
        };
        assert_eq!(
            attributes.set,
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOATIME
        );
        assert_eq!(
            attributes.clear,
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR__ATIME
        );
        let parameters: Vec<_> = parameters
            .iter()
            .map(|(key, value)| (key.to_str().unwrap(), value.is_some()))
            .collect();
        assert_eq!(parameters, [("source", true), ("size", true), ("huge", false)]);
    }

    #[test]
    fn bad_mounts_are_named() {
        let message = |mount: spec::Mount| step(3, &mount).unwrap_err().to_string();
        assert!(message(mount("/a/../b", "bind", &[])).starts_with("mounts[3].destination is \"/a/../b\""));
        assert!(message(mount("/a", "nfs", &[])).starts_with("mounts[3].type is \"nfs\""));
        assert!(message(mount("/a", "bind", &["size=3"])).contains("\"size=3\" has no meaning"));
    }

    #[test]
    fn device_nodes_work_on_devpts_only() {
        for (kind, nodev) in [("tmpfs", true), ("devpts", false), ("proc", true)] {
            let Step::Mount { attributes, .. } = step(0, &mount("/x", kind, &["dev"])).unwrap() else {
                panic!()
            };
            assert_eq!(attributes.set & libc::MOUNT_ATTR_NODEV != 0, nodev, "{kind}");
        }
    }
}
