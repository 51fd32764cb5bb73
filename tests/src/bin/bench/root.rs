//! A root directory in memory that holds just what is measured.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change};

/// Seen by this process and its children only; gone with them.
#[derive(Debug)]
pub(crate) struct Root(&'static Path);

impl Root {
    /// An empty one.
    pub(crate) fn new() -> Result<Self> {
        // The mount point itself: what is mounted on it is seen in this mount namespace only.
        let root = Path::new("/tmp");
        unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace: this needs root")?;
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        mount_change("/", private).context("keep mounts to this process")?;
        mount("eci-bench", root, "tmpfs", MountFlags::empty(), None).context("mount a tmpfs")?;
        Ok(Self(root))
    }

    /// A new file.
    pub(crate) fn create(&self, path: &str) -> Result<File> {
        let path = self.inside(Path::new(path));
        File::create(&path).with_context(|| format!("create {}", path.display()))
    }

    /// Copies a file to a path in here.
    pub(crate) fn add(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.inside(Path::new(to));
        let copy = || {
            fs::create_dir_all(to.parent().unwrap_or(self.0))?;
            fs::copy(from, &to)
        };
        copy()
            .map(drop)
            .with_context(|| format!("copy {} to {}", from.display(), to.display()))
    }

    /// Copies a directory with all that is in it to a path in here.
    pub(crate) fn add_dir(&self, from: &Path, to: &str) -> Result<()> {
        let entries = fs::read_dir(from).with_context(|| format!("list {}", from.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("list {}", from.display()))?;
            let to = format!("{to}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                self.add_dir(&entry.path(), &to)?;
            } else {
                self.add(&entry.path(), &to)?;
            }
        }
        Ok(())
    }

    /// Copies a program, and the libraries that it needs to their own paths.
    pub(crate) fn add_program(&self, from: &Path, to: &str) -> Result<()> {
        self.add(from, to)?;
        for library in libraries(from)? {
            self.add(&library, &library.to_string_lossy())?;
        }
        Ok(())
    }

    /// Makes this the root of this process.
    pub(crate) fn enter(self) -> Result<()> {
        for dir in ["dev", "proc", "sys"] {
            let (from, to) = (Path::new("/").join(dir), self.0.join(dir));
            fs::create_dir_all(&to).with_context(|| format!("create {}", to.display()))?;
            mount_bind_recursive(&from, &to).with_context(|| format!("mount {}", from.display()))?;
        }
        for dir in ["tmp", "var/tmp", "run"] {
            fs::create_dir_all(self.0.join(dir)).with_context(|| format!("create /{dir}"))?;
        }
        std::os::unix::fs::chroot(self.0).context("change the root")?;
        std::env::set_current_dir("/").context("go to the root")
    }

    fn inside(&self, path: &Path) -> PathBuf {
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }
}

/// What the dynamic linker would load.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let is_static = text.contains("statically linked")
        || String::from_utf8_lossy(&output.stderr).contains("not a dynamic executable");
    ensure!(
        output.status.success() || is_static,
        "ldd {} failed",
        program.display()
    );
    ensure!(
        !text.contains("not found"),
        "a library of {} is missing: {text}",
        program.display()
    );
    Ok(parse_libraries(&text))
}

/// Lines like `libc.so.6 => /lib/libc.so.6 (0x...)` and `/lib64/ld.so (0x...)`.
fn parse_libraries(text: &str) -> BTreeSet<PathBuf> {
    text.lines()
        .map(|line| line.rsplit_once("=>").map_or(line, |(_, path)| path))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|path| path.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld.so.2 (0x3)\n";
        let expected = ["/lib/libc.so.6", "/lib64/ld.so.2"].map(PathBuf::from);
        assert_eq!(parse_libraries(text), BTreeSet::from(expected));
        assert!(parse_libraries("\tstatically linked\n").is_empty());
    }
}
