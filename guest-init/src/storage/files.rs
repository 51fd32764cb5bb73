//! Volumes of files, which the host gives as messages. They are directories in memory, laid out as the kubelet does it
//! (`pkg/volume/util/atomic_writer.go`): names of the volume are links to `..data/...`, and `..data` is a link to the
//! directory that holds the files now. One rename replaces all of them at once.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, symlink},
    path::{Component, Path},
    time::SystemTime,
};

use crate::error::{Context, Error, Result};

/// Mount type of a volume of files.
pub(super) const KIND: &str = protocol::FILES_MOUNT_TYPE;
/// The link to the files that are in force.
const DATA: &str = "..data";
/// The next [`DATA`].
const DATA_NEXT: &str = "..data_tmp";
const DIRECTORY_MODE: u32 = 0o755;

/// A file to put into a volume.
#[derive(Clone, PartialEq, Eq)]
pub struct File {
    /// Relative to the volume.
    pub path: String,
    /// Permissions.
    pub mode: u32,
    /// What is in it; may be secret.
    pub content: Vec<u8>,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} ({:o}, {} bytes)",
            self.path,
            self.mode,
            self.content.len()
        )
    }
}

impl File {
    fn check(&self, index: usize) -> Result<()> {
        let is_plain = !self.path.starts_with("..")
            && !self.path.contains('\0')
            && !self.path.is_empty()
            && Path::new(&self.path)
                .components()
                .all(|part| matches!(part, Component::Normal(_)));
        if !is_plain {
            return Err(Error::invalid(format!(
                "files[{index}].path is {:?}: give a relative path without \"..\", not beginning with \"..\"",
                self.path
            )));
        }
        if self.mode > 0o777 {
            return Err(Error::invalid(format!(
                "files[{index}].mode is {:o}: give 0 to 777",
                self.mode
            )));
        }
        Ok(())
    }
}

/// Makes the volume at `directory` hold `files` and no others. The files get the group `gid`, which can read them then.
pub(super) fn put(directory: &Path, files: &[File], gid: Option<u32>) -> Result<()> {
    let mut names = BTreeSet::new();
    for (index, file) in files.iter().enumerate() {
        file.check(index)?;
        names.insert(file.path.split('/').next().unwrap_or_default());
    }
    make_directory(directory, gid)?;
    if is_current(directory, files, gid) {
        return link_names(directory, &names);
    }
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let fresh = format!("..{}", since_epoch.unwrap_or_default().as_nanos());
    if let Err(error) = write_all(&directory.join(&fresh), files, gid) {
        let _ = fs::remove_dir_all(directory.join(&fresh));
        return Err(error);
    }
    let old = fs::read_link(directory.join(DATA)).ok();
    let next = directory.join(DATA_NEXT);
    let _ = fs::remove_file(&next);
    symlink(&fresh, &next).context(|| format!("make the link {}", next.display()))?;
    let data = directory.join(DATA);
    fs::rename(&next, &data).context(|| format!("replace {}", data.display()))?;
    link_names(directory, &names)?;
    if let Some(old) = old.filter(|old| old.as_os_str() != fresh.as_str()) {
        let old = directory.join(old);
        fs::remove_dir_all(&old).context(|| format!("remove {}", old.display()))?;
    }
    Ok(())
}

/// Makes the links that are missing and removes those that lead nowhere now.
fn link_names(directory: &Path, names: &BTreeSet<&str>) -> Result<()> {
    for name in names {
        let link = directory.join(name);
        match symlink(Path::new(DATA).join(name), &link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::system(format!("make the link {}", link.display()), error));
            }
            _ => {}
        }
    }
    let entries = fs::read_dir(directory).context(|| format!("read {}", directory.display()))?;
    for entry in entries {
        let entry = entry.context(|| format!("read {}", directory.display()))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !names.contains(name.as_ref()) {
            fs::remove_file(entry.path()).context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn write_all(directory: &Path, files: &[File], gid: Option<u32>) -> Result<()> {
    make_directory(directory, gid)?;
    for file in files {
        let path = directory.join(&file.path);
        let mut parent = directory.to_owned();
        for part in Path::new(&file.path)
            .parent()
            .into_iter()
            .flat_map(Path::components)
        {
            parent.push(part);
            make_directory(&parent, gid)?;
        }
        let action = || format!("write {}", path.display());
        let opened = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        let mut opened = opened.context(action)?;
        io::Write::write_all(&mut opened, &file.content).context(action)?;
        give(&path, file_mode(file.mode, gid), gid)?;
    }
    Ok(())
}

/// The group of the sandbox's volumes can read (Kubernetes, `SetVolumeOwnership` of a volume that is read-only).
fn file_mode(mode: u32, gid: Option<u32>) -> u32 {
    if gid.is_some() { mode | 0o440 } else { mode }
}

fn make_directory(path: &Path, gid: Option<u32>) -> Result<()> {
    match fs::DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        result => result.context(|| format!("make {}", path.display()))?,
    }
    give(path, DIRECTORY_MODE, gid)
}

/// Sets owner and permissions whatever the umask.
fn give(path: &Path, mode: u32, gid: Option<u32>) -> Result<()> {
    if let Some(gid) = gid {
        chown(path, None, Some(gid)).context(|| format!("give {} to group {gid}", path.display()))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .context(|| format!("set the permissions of {}", path.display()))
}

/// Whether the volume holds exactly these files already.
fn is_current(directory: &Path, files: &[File], gid: Option<u32>) -> bool {
    fn count(directory: &Path) -> io::Result<usize> {
        let mut files = 0;
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            files += if entry.file_type()?.is_dir() {
                count(&entry.path())?
            } else {
                1
            };
        }
        Ok(files)
    }
    let data = directory.join(DATA);
    let is_same = |file: &File| {
        let path = data.join(&file.path);
        fs::metadata(&path).is_ok_and(|found| found.permissions().mode() & 0o777 == file_mode(file.mode, gid))
            && fs::read(&path).is_ok_and(|content| content == file.content)
    };
    count(&data).is_ok_and(|found| found == files.len()) && files.iter().all(is_same)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, mode: u32, content: &str) -> File {
        File {
            path: path.into(),
            mode,
            content: content.into(),
        }
    }

    fn listing(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn files_are_replaced_all_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("v");
        put(&volume, &[file("a", 0o640, "1"), file("d/b", 0o755, "2")], None).unwrap();
        assert_eq!(fs::read_to_string(volume.join("d/b")).unwrap(), "2");
        assert_eq!(fs::read_link(volume.join("a")).unwrap(), Path::new("..data/a"));
        let mode = fs::metadata(volume.join("a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
        let first = fs::read_link(volume.join(DATA)).unwrap();
        // Somebody who has the old directory open keeps the old file until it closes it.
        let old = fs::File::open(volume.join("a")).unwrap();

        put(&volume, &[file("a", 0o640, "1"), file("d/b", 0o755, "2")], None).unwrap();
        assert_eq!(
            fs::read_link(volume.join(DATA)).unwrap(),
            first,
            "the same again changes nothing"
        );

        put(&volume, &[file("a", 0o640, "new"), file("c", 0o644, "3")], None).unwrap();
        let second = fs::read_link(volume.join(DATA)).unwrap();
        assert_ne!(second, first);
        assert_eq!(listing(&volume), [&second.to_string_lossy(), DATA, "a", "c"]);
        assert_eq!(fs::read_to_string(volume.join("a")).unwrap(), "new");
        assert_eq!(io::read_to_string(old).unwrap(), "1");
    }

    #[test]
    fn a_mode_alone_is_a_change() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("v");
        put(&volume, &[file("a", 0o600, "1")], None).unwrap();
        put(&volume, &[file("a", 0o644, "1")], None).unwrap();
        let mode = fs::metadata(volume.join("a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        assert_eq!(
            (file_mode(0o400, Some(1)), file_mode(0o400, None)),
            (0o440, 0o400)
        );
    }

    #[test]
    fn bad_files_are_named_and_change_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("v");
        put(&volume, &[file("a", 0o600, "1")], None).unwrap();
        for path in ["", "/a", "..", "..data", "a/../../b", "./..", "a\0"] {
            let error = put(&volume, &[file("b", 0, ""), file(path, 0, "")], None).unwrap_err();
            assert!(
                error.to_string().starts_with("files[1].path is"),
                "{path:?}: {error}"
            );
        }
        assert!(put(&volume, &[file("b", 0o1000, "")], None).is_err());
        // A file and a directory of one name.
        assert!(put(&volume, &[file("b", 0, ""), file("b/c", 0, "")], None).is_err());
        assert_eq!(fs::read_to_string(volume.join("a")).unwrap(), "1");
        assert_eq!(listing(&volume).len(), 3);
    }

    #[test]
    fn content_is_not_printed() {
        assert_eq!(
            format!("{:?}", file("a", 0o600, "hunter2")),
            "\"a\" (600, 7 bytes)"
        );
    }
}
