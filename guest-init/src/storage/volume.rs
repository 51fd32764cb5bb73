//! Volumes shared by the containers of the sandbox: directories on the scratch slice, or file systems in memory.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
};

use rustix::mount::{MountFlags, mount};

use crate::{
    container::spec,
    error::{Context, Error, Result},
};

/// Mount type of a shared volume.
pub(super) const KIND: &str = protocol::EMPTYDIR_MOUNT_TYPE;
/// Every user of every container may write, as in Kubernetes.
const MODE: u32 = 0o777;
/// What is made in a directory gets the directory's group (`inode(7)`).
pub(super) const SET_GROUP: u32 = 0o2000;

/// A volume as a mount asks for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Volume {
    pub(super) name: String,
    pub(super) in_memory: bool,
    pub(super) size_bytes: Option<u64>,
    /// Group that owns it.
    pub(super) gid: Option<u32>,
}

/// Checks the name of a volume, which becomes a file's; `field` is its name in messages.
pub(super) fn check_name(field: &str, name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 255 || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(Error::invalid(format!(
            "{field} is {name:?}: give the name of a volume, without \"/\" and not beginning with \".\""
        )));
    }
    Ok(())
}

/// Reads a mount of type `emptydir`.
pub(super) fn parse(index: usize, mount: &spec::Mount) -> Result<Volume> {
    let name = &mount.source;
    check_name(&format!("mounts[{index}].source"), name)?;
    let mut volume = Volume {
        name: name.clone(),
        in_memory: false,
        size_bytes: None,
        gid: None,
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
            Some(("gid", text)) => {
                volume.gid = Some(text.parse().map_err(|_| {
                    Error::invalid(format!("mounts[{index}].options: gid is {text:?}: give a number"))
                })?);
            }
            // Looked up when the volume is there.
            Some(("subpath", _)) => {}
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
pub(super) fn make_directory(path: &Path, gid: Option<u32>) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        result => result.context(|| format!("make {}", path.display()))?,
    }
    // What is made in it gets its group.
    let mode = if let Some(gid) = gid {
        chown(path, None, Some(gid)).context(|| format!("give {} to group {gid}", path.display()))?;
        MODE | SET_GROUP
    } else {
        MODE
    };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .context(|| format!("set the permissions of {}", path.display()))
}

/// Mounts a file system in memory at `path`.
pub(super) fn mount_memory(path: &Path, volume: &Volume) -> Result<()> {
    let size = volume
        .size_bytes
        .map_or(String::new(), |bytes| format!(",size={bytes}"));
    let (mode, gid) = volume.gid.map_or((MODE, String::new()), |gid| {
        (MODE | SET_GROUP, format!(",gid={gid}"))
    });
    let options = std::ffi::CString::new(format!("mode={mode:o}{size}{gid}")).expect("digits and letters");
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
        let parsed = volume(
            "cache",
            &["ro", "medium=memory", "size=4096", "gid=7", "subpath=a"],
        )
        .unwrap();
        assert_eq!(
            parsed,
            Volume {
                name: "cache".into(),
                in_memory: true,
                size_bytes: Some(4096),
                gid: Some(7),
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
