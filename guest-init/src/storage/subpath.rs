//! A file or directory in a volume, found without following a symbolic link out of it. Containers write to volumes and
//! may change them meanwhile, so what was found is held by a mount of its own: that can't be exchanged any more.

use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Component, Path},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, open, openat, openat2},
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::error::{Context, Error, ErrorKind, Result};

const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

/// Mounts what is at `below` in `volume` at `target`, which is made. When nothing is there and `make` is set, a directory
/// with the permissions of the volume is made. `field` is the path's name in messages.
pub(super) fn pin(field: &str, volume: &Path, below: &str, target: &Path, make: bool) -> Result<()> {
    let found = find(field, volume, below, make)?;
    let kind = FileType::from_raw_mode(fstat(&found).context(|| format!("look at {below:?}"))?.st_mode);
    if !matches!(kind, FileType::Directory | FileType::RegularFile) {
        return Err(Error::invalid(format!(
            "{field} is {below:?}: that is neither a file nor a directory"
        )));
    }
    hold(&found, target)
}

/// Mounts what was found at `target`, which is made.
pub(super) fn hold(found: &OwnedFd, target: &Path) -> Result<()> {
    let action = || format!("make {}", target.display());
    let kind = FileType::from_raw_mode(fstat(found).context(action)?.st_mode);
    if kind == FileType::Directory {
        fs::create_dir_all(target).context(action)?;
    } else {
        let parent = target.parent().unwrap_or(target);
        fs::create_dir_all(parent).context(action)?;
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.open(target).context(action)?;
    }
    let source = format!("/proc/self/fd/{}", found.as_raw_fd());
    mount(source, target, "", MountFlags::BIND, None)
        .context(|| format!("mount a part of a volume at {}", target.display()))
}

/// Finds what is at `below` in `volume`; makes directories there when nothing is and `make` is set.
pub(super) fn find(field: &str, volume: &Path, below: &str, make: bool) -> Result<OwnedFd> {
    let is_plain = !below.is_empty()
        && Path::new(below)
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        && !below.starts_with('/');
    if !is_plain {
        return Err(Error::invalid(format!(
            "{field} is {below:?}: give a relative path without \"..\""
        )));
    }
    let refused = |errno: Errno| match errno {
        Errno::XDEV | Errno::LOOP => Error::invalid(format!(
            "{field} is {below:?}: a symbolic link there leads out of the volume"
        )),
        Errno::NOENT => Error::new(
            ErrorKind::NotFound,
            format!("{field} is {below:?}: the volume has no such file or directory"),
        ),
        errno => Error::system(format!("open {below:?} of {}", volume.display()), errno),
    };
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(volume, directory, Mode::empty()).context(|| format!("open {}", volume.display()))?;
    match openat2(
        &root,
        below,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        INSIDE,
    ) {
        Err(Errno::NOENT) if make => {}
        result => return result.map_err(refused),
    }
    let mode = Mode::from_raw_mode(
        fstat(&root)
            .context(|| format!("look at {}", volume.display()))?
            .st_mode
            & 0o7777,
    );
    let mut parent = openat(&root, ".", directory, Mode::empty()).map_err(refused)?;
    let mut path = std::path::PathBuf::new();
    for part in Path::new(below).components() {
        path.push(part);
        parent = match openat2(&root, &path, directory, Mode::empty(), INSIDE) {
            Err(Errno::NOENT) => {
                match mkdirat(&parent, part.as_os_str(), mode) {
                    // A link that leads nowhere, or somebody was faster; the next call tells.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(refused(errno)),
                }
                let made = openat(
                    &parent,
                    part.as_os_str(),
                    directory | OFlags::NOFOLLOW,
                    Mode::empty(),
                )
                .map_err(|errno| match errno {
                    Errno::NOTDIR => refused(Errno::LOOP),
                    errno => refused(errno),
                })?;
                // Whatever the umask.
                let name = format!("/proc/self/fd/{}", made.as_raw_fd());
                rustix::fs::chmodat(CWD, name, mode, rustix::fs::AtFlags::empty())
                    .context(|| format!("set the permissions of {}", path.display()))?;
                made
            }
            result => result.map_err(refused)?,
        };
    }
    Ok(parent)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn message(volume: &Path, below: &str) -> String {
        find("subpath", volume, below, true).unwrap_err().to_string()
    }

    fn is_at(found: &OwnedFd, path: &Path) -> bool {
        use std::os::unix::fs::MetadataExt;
        let (found, there) = (fstat(found).unwrap(), fs::metadata(path).unwrap());
        (found.st_dev, found.st_ino) == (there.dev(), there.ino())
    }

    #[test]
    fn what_is_missing_is_made_with_the_permissions_of_the_volume() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("v");
        fs::create_dir(&volume).unwrap();
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o2777)).unwrap();
        let found = find("subpath", &volume, "a/b", true).unwrap();
        assert!(is_at(&found, &volume.join("a/b")));
        let mode = fs::metadata(volume.join("a/b")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o2777);
        fs::write(volume.join("a/file"), "x").unwrap();
        assert!(is_at(
            &find("subpath", &volume, "a/file", false).unwrap(),
            &volume.join("a/file")
        ));
        let missing = find("subpath", &volume, "c", false).unwrap_err().to_string();
        assert!(missing.contains("no such file"), "{missing}");
        assert!(!volume.join("c").exists());
    }

    #[test]
    fn links_do_not_lead_out_of_the_volume() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("v");
        let outside = directory.path().join("outside");
        fs::create_dir_all(volume.join("inside")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "x").unwrap();
        symlink(&outside, volume.join("absolute")).unwrap();
        symlink("../outside", volume.join("relative")).unwrap();
        symlink("absolute", volume.join("twice")).unwrap();
        symlink("../missing", volume.join("dangling")).unwrap();
        symlink("nowhere", volume.join("nowhere")).unwrap();
        symlink("/proc/self/root", volume.join("magic")).unwrap();
        for below in [
            "absolute",
            "absolute/secret",
            "relative",
            "relative/new/deep",
            "twice/new",
            "dangling",
            "dangling/a",
            "nowhere",
            "nowhere/a",
            "magic/etc",
        ] {
            let message = message(&volume, below);
            assert!(message.contains("leads out of the volume"), "{below}: {message}");
        }
        for below in ["..", "inside/../../outside", "/outside", ""] {
            assert!(
                message(&volume, below).contains("give a relative path"),
                "{below}"
            );
        }
        assert_eq!(
            fs::read_dir(&outside).unwrap().count(),
            1,
            "nothing was made outside"
        );
        assert!(!directory.path().join("missing").exists());
        // One that stays inside is followed, as the files of a Secret need it.
        symlink("inside", volume.join("good")).unwrap();
        assert!(is_at(
            &find("subpath", &volume, "good/new", true).unwrap(),
            &volume.join("inside/new")
        ));
    }
}
