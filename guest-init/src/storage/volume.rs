//! Volumes shared by the containers of the sandbox: directories on the scratch slice, or file systems in memory.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use rustix::mount::{MountFlags, mount};

use crate::{
    container::spec,
    error::{Context, Error, Result},
};

/// Mount type of a shared volume.
pub(super) const KIND: &str = protocol::EMPTYDIR_MOUNT_TYPE;
/// Every user of every container may write, as in Kubernetes.
const MODE: u32 = 0o777;

/// A volume as a mount asks for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Volume {
    pub(super) name: String,
    pub(super) in_memory: bool,
    pub(super) size_bytes: Option<u64>,
}

/// Reads a mount of type `emptydir`.
pub(super) fn parse(index: usize, mount: &spec::Mount) -> Result<Volume> {
    let name = &mount.source;
    if name.is_empty() || name.len() > 255 || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(Error::invalid(format!(
            "mounts[{index}].source is {name:?}: give the name of a volume, without \"/\" and not beginning with \".\""
        )));
    }
    let mut volume = Volume {
        name: name.clone(),
        in_memory: false,
        size_bytes: None,
    };
    for option in &mount.options {
        match option.split_once('=') {
            Some(("medium", "memory")) => volume.in_memory = true,
            Some(("medium", "" | "disk")) | None => {}
            Some(("size", text)) => {
                volume.size_bytes = Some(text.parse().map_err(|_| {
                    Error::invalid(format!(
                        "mounts[{index}].options: size is {text:?}: give a number of bytes"
                    ))
                })?);
            }
            Some((name, value)) => {
                return Err(Error::invalid(format!(
                    "mounts[{index}].options: {name}={value} is not known: give medium=memory or size=<bytes>"
                )));
            }
        }
    }
    Ok(volume)
}

/// Makes the directory of a volume on disk, if it is not there.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        result => result.context(|| format!("make {}", path.display()))?,
    }
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))
        .context(|| format!("set the permissions of {}", path.display()))
}

/// Mounts a file system in memory at `path`.
pub(super) fn mount_memory(path: &Path, size_bytes: Option<u64>) -> Result<()> {
    let size = size_bytes.map_or(String::new(), |bytes| format!(",size={bytes}"));
    let options = std::ffi::CString::new(format!("mode={MODE:o}{size}")).expect("digits and letters");
    mount(
        "tmpfs",
        path,
        "tmpfs",
        MountFlags::NODEV | MountFlags::NOSUID,
        options.as_c_str(),
    )
    .context(|| format!("mount tmpfs at {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(source: &str, options: &[&str]) -> Result<Volume> {
        let options = options.iter().map(ToString::to_string).collect();
        parse(
            1,
            &spec::Mount {
                source: source.into(),
                options,
                ..Default::default()
            },
        )
    }

    #[test]
    fn options_choose_the_medium() {
        let parsed = volume("cache", &["ro", "medium=memory", "size=4096"]).unwrap();
        assert_eq!(
            parsed,
            Volume {
                name: "cache".into(),
                in_memory: true,
                size_bytes: Some(4096)
            }
        );
        assert!(!volume("cache", &[]).unwrap().in_memory);
    }

    #[test]
    fn names_stay_in_their_directory() {
        for name in ["", "..", ".hidden", "a/b", "a\0"] {
            assert!(
                volume(name, &[])
                    .unwrap_err()
                    .to_string()
                    .starts_with("mounts[1].source"),
                "{name:?}"
            );
        }
        assert!(volume("a", &["size=big"]).is_err() && volume("a", &["medium=tape"]).is_err());
    }
}
