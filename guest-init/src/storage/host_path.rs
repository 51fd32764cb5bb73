//! Paths of the guest that containers mount. `/dev`, `/proc` and `/sys` are the guest's own; everything else is a tree on the
//! scratch slice, empty at first, which takes the place of a host's file system. Containers write to it, so what is in it is found
//! as a part of a volume is: see [`super::subpath`].

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

use super::subpath;
use crate::{
    container::spec,
    error::{Context, Error, ErrorKind, Result},
};

/// Mount type of such a path.
pub(super) const KIND: &str = protocol::HOST_PATH_MOUNT_TYPE;
/// What is the guest's own.
const OWN: [&str; 3] = ["/dev", "/proc", "/sys"];

/// What a mount asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Anything,
    Made(FileType),
    There(FileType),
}

/// What was found.
#[derive(Debug)]
pub(super) enum Found {
    /// The guest's own, with what is mounted below it.
    Own(PathBuf),
    /// In the tree; to be held by a mount.
    InTree(OwnedFd),
}

/// Finds, or makes, what a mount of type [`KIND`] asks for; `tree` is the directory of all else.
pub(super) fn find(index: usize, mount: &spec::Mount, tree: &Path) -> Result<Found> {
    let field = format!("mounts[{index}].source");
    let path = mount.source.as_str();
    let is_plain = path.starts_with('/') && path.split('/').all(|part| part != "..") && !path.contains('\0');
    if !is_plain {
        return Err(Error::invalid(format!(
            "{field} is {path:?}: give an absolute path without \"..\""
        )));
    }
    let wanted = wanted(index, mount)?;
    let below = path.split('/').filter(|part| !part.is_empty() && *part != ".");
    let below = below.collect::<Vec<_>>().join("/");
    let is_own = OWN.iter().any(|own| Path::new("/").join(&below).starts_with(own));
    if is_own {
        let path = Path::new("/").join(&below);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let found = openat(CWD, &path, flags, Mode::empty());
        check(
            path.to_string_lossy().as_ref(),
            &found.context(|| format!("open {}", path.display()))?,
            wanted,
        )?;
        return Ok(Found::Own(path));
    }
    let make_directory = matches!(wanted, Wanted::Anything | Wanted::Made(FileType::Directory));
    let below = if below.is_empty() { "." } else { &below };
    let found = match subpath::find(&field, tree, below, make_directory) {
        Err(error) if error.kind == ErrorKind::NotFound && wanted == Wanted::Made(FileType::RegularFile) => {
            make_file(&field, tree, below)?
        }
        result => result?,
    };
    check(path, &found, wanted)?;
    Ok(Found::InTree(found))
}

/// An empty file; the directory it is in has to be there (kubelet, `FileOrCreate`).
fn make_file(field: &str, tree: &Path, below: &str) -> Result<OwnedFd> {
    let (parent, name) = below.rsplit_once('/').unwrap_or((".", below));
    let parent = subpath::find(field, tree, parent, false)?;
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(&parent, name, flags, Mode::from_raw_mode(0o644)).context(|| format!("make {below:?}"))?;
    subpath::find(field, tree, below, false)
}

fn wanted(index: usize, mount: &spec::Mount) -> Result<Wanted> {
    let mut options = mount.options.iter();
    let name = options.find_map(|option| option.strip_prefix("type="));
    Ok(match name.unwrap_or_default() {
        "" => Wanted::Anything,
        "DirectoryOrCreate" => Wanted::Made(FileType::Directory),
        "Directory" => Wanted::There(FileType::Directory),
        "FileOrCreate" => Wanted::Made(FileType::RegularFile),
        "File" => Wanted::There(FileType::RegularFile),
        "Socket" => Wanted::There(FileType::Socket),
        "CharDevice" => Wanted::There(FileType::CharacterDevice),
        "BlockDevice" => Wanted::There(FileType::BlockDevice),
        other => {
            return Err(Error::invalid(format!(
                "mounts[{index}].options: type is {other:?}: give a type of hostPath, such as DirectoryOrCreate"
            )));
        }
    })
}

fn check(path: &str, found: &OwnedFd, wanted: Wanted) -> Result<()> {
    let (Wanted::Made(kind) | Wanted::There(kind)) = wanted else {
        return Ok(());
    };
    let stat = fstat(found).context(|| format!("look at {path}"))?;
    if FileType::from_raw_mode(stat.st_mode) == kind {
        return Ok(());
    }
    let name = match kind {
        FileType::Directory => "directory",
        FileType::Socket => "socket file",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        _ => "file",
    };
    // The kubelet's words.
    Err(Error::precondition(format!(
        "hostPath type check failed: {path} is not a {name}"
    )))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn found(tree: &Path, path: &str, kind: &str) -> std::result::Result<Found, String> {
        let mount = spec::Mount {
            source: path.into(),
            options: vec!["rw".into(), format!("type={kind}")],
            ..spec::Mount::default()
        };
        find(3, &mount, tree).map_err(|error| error.to_string())
    }

    #[test]
    fn what_may_be_made_is_made_and_all_else_has_to_be_there() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path();
        for (path, kind) in [
            ("/a/b", "DirectoryOrCreate"),
            ("/c", ""),
            ("/a/f", "FileOrCreate"),
            ("/", "Directory"),
        ] {
            assert!(matches!(found(tree, path, kind), Ok(Found::InTree(_))), "{path}");
        }
        assert!(tree.join("a/b").is_dir() && tree.join("c").is_dir() && tree.join("a/f").is_file());
        fs::write(tree.join("a/f"), "kept").unwrap();
        found(tree, "/a/f", "FileOrCreate").unwrap();
        assert_eq!(fs::read_to_string(tree.join("a/f")).unwrap(), "kept");
        for (path, kind, said) in [
            (
                "/a/f",
                "Directory",
                "hostPath type check failed: /a/f is not a directory",
            ),
            (
                "/a",
                "FileOrCreate",
                "hostPath type check failed: /a is not a file",
            ),
            ("/a/b", "Socket", "is not a socket file"),
            ("/none", "Directory", "no such file or directory"),
            ("/none/f", "FileOrCreate", "no such file or directory"),
            ("/a/../b", "", "give an absolute path"),
            ("a", "", "give an absolute path"),
            ("/a", "Folder", "type is \"Folder\""),
        ] {
            let error = found(tree, path, kind).unwrap_err();
            assert!(error.contains(said), "{path}: {error}");
        }
        assert!(!tree.join("none").exists());
    }

    #[test]
    fn devices_and_the_kernels_files_are_the_guests_own() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", directory.path().join("out")).unwrap();
        for (path, kind) in [
            ("/dev/null", "CharDevice"),
            ("/proc", "Directory"),
            ("//sys/./class", ""),
        ] {
            assert!(
                matches!(found(directory.path(), path, kind), Ok(Found::Own(_))),
                "{path}"
            );
        }
        assert!(
            found(directory.path(), "/dev/null", "BlockDevice")
                .unwrap_err()
                .ends_with("/dev/null is not a block device")
        );
        assert!(
            found(directory.path(), "/out/passwd", "")
                .unwrap_err()
                .contains("leads out")
        );
        assert!(matches!(
            found(directory.path(), "/device", ""),
            Ok(Found::InTree(_))
        ));
    }
}
