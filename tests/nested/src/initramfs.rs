//! The L1 host's first root: this program as `/init`, its settings, and the modules that reach the real root.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::place::Kernel;

/// Modules needed before the machine's root is mounted; `tools/setup` made sure that they are not compressed.
const EARLY_MODULES: [&str; 5] = ["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console"];

/// What PID 1 of the L1 host has to know; `/settings.json` in the initramfs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Module files in the initramfs, in loading order.
    pub(crate) early_modules: Vec<String>,
    /// The kernel's modules, as a path of the machine outside.
    pub(crate) modules: String,
    pub(crate) release: String,
    /// 9p mount tags and the directories they stand for.
    pub(crate) shares: Vec<(String, String)>,
}

/// Writes the initramfs to `out`.
pub(crate) fn write(out: &mut impl Write, kernel: &Kernel, shares: Vec<(String, String)>) -> Result<()> {
    let modules = kernel.modules();
    let early = load_order(&modules, &EARLY_MODULES)?;
    let mut archive = Cpio { out, inode: 0 };
    for dir in ["dev", "lower", "modules", "proc", "rw"] {
        archive
            .entry(dir, 0o040_755, &[])
            .context("write the initramfs")?;
    }
    let mut early_modules = Vec::new();
    for path in early {
        let file = modules.join(&path);
        let content = fs::read(&file).with_context(|| format!("read kernel module {}", file.display()))?;
        let name = path.rsplit('/').next().unwrap_or(&path);
        archive
            .entry(&format!("modules/{name}"), 0o100_644, &content)
            .context("write the initramfs")?;
        early_modules.push(format!("/modules/{name}"));
    }
    let settings = Settings {
        early_modules,
        modules: path_text(&modules)?,
        release: kernel.release.clone(),
        shares,
    };
    let settings = serde_json::to_vec(&settings).context("encode the L1 host's settings")?;
    archive
        .entry("settings.json", 0o100_644, &settings)
        .context("write the initramfs")?;
    let program = fs::read("/proc/self/exe").context("read this program")?;
    archive
        .entry("init", 0o100_755, &program)
        .context("write the initramfs")?;
    archive.entry("TRAILER!!!", 0, &[]).context("write the initramfs")
}

/// A path as text: it has to pass through QEMU's options and JSON.
pub(crate) fn path_text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

/// The named modules and all they depend on, dependencies first, as paths below the modules directory.
fn load_order(modules: &Path, names: &[&str]) -> Result<Vec<String>> {
    let table = modules.join("modules.dep");
    let table = fs::read_to_string(&table)
        .with_context(|| format!("read {}: run `make setup` again", table.display()))?;
    let builtin = modules.join("modules.builtin");
    let builtin = fs::read_to_string(&builtin).with_context(|| format!("read {}", builtin.display()))?;
    let mut seen = BTreeSet::new();
    let mut order = Vec::new();
    for name in names {
        if builtin.lines().any(|path| module_name(path) == *name) {
            continue;
        }
        let (path, dependencies) = table
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| module_name(path) == *name)
            .with_context(|| format!("the L1 host's kernel has no module {name}"))?;
        // modules.dep lists what a module needs in reverse loading order.
        for path in dependencies.split_whitespace().rev().chain([path]) {
            if seen.insert(path.to_owned()) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// A cpio archive in the "newc" format (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
struct Cpio<'a, W> {
    out: &'a mut W,
    inode: u32,
}

impl<W: Write> Cpio<'_, W> {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, "file too large for cpio");
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.padded(&[header.as_bytes(), name.as_bytes(), b"\0"].concat())?;
        self.padded(content)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.out.write_all(&[0; 3][..bytes.len().wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_load_before_their_users_and_builtins_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let dep = "kernel/fs/9p.ko: kernel/net/9pnet.ko kernel/fs/netfs.ko\n\
                   kernel/net/9pnet.ko:\n\
                   kernel/fs/netfs.ko:\n\
                   kernel/net/9pnet-virtio.ko: kernel/net/9pnet.ko\n";
        fs::write(dir.path().join("modules.dep"), dep).unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/overlay.ko\n").unwrap();
        let order = load_order(dir.path(), &["9pnet_virtio", "9p", "overlay"]).unwrap();
        assert_eq!(
            order,
            [
                "kernel/net/9pnet.ko",
                "kernel/net/9pnet-virtio.ko",
                "kernel/fs/netfs.ko",
                "kernel/fs/9p.ko"
            ]
        );
        load_order(dir.path(), &["missing"]).unwrap_err();
    }

    #[test]
    fn entries_are_padded_to_four_bytes() {
        let mut out = Vec::new();
        Cpio {
            out: &mut out,
            inode: 0,
        }
        .entry("ab", 0o100_644, b"hello")
        .unwrap();
        assert_eq!(out.len(), 116 + 8);
        assert!(out.starts_with(b"07070100000001000081a4"));
        assert_eq!(&out[110..113], b"ab\0");
        assert_eq!(&out[116..124], b"hello\0\0\0");
    }
}
