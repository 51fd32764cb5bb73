//! Where things are: the checkout, its run directory, the cache, and what the L1 host shares.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The paths that belong to one checkout.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// Top of the checkout.
    pub(crate) checkout: PathBuf,
    /// `target/nested` in it: socket, lock, logs.
    pub(crate) run_dir: PathBuf,
    /// What is shared by all checkouts of the machine.
    pub(crate) cache: PathBuf,
}

impl Place {
    /// Finds the checkout around the working directory, else around this program.
    pub(crate) fn find() -> Result<Self> {
        let cwd = env::current_dir().context("find the working directory")?;
        let program = env::current_exe().context("find this program")?;
        let Some(checkout) = [&cwd, &program]
            .into_iter()
            .find_map(|start| checkout_around(start))
        else {
            bail!(
                "neither {} nor {} is inside a checkout of this project",
                cwd.display(),
                program.display()
            );
        };
        let run_dir = checkout.join("target/nested");
        fs::create_dir_all(&run_dir).with_context(|| format!("create {}", run_dir.display()))?;
        Ok(Self {
            cache: cache_dir()?,
            run_dir,
            checkout,
        })
    }

    /// The kernel that `tools/setup` prepared.
    pub(crate) fn kernel(&self) -> Result<Kernel> {
        let dir = self.cache.join("l1-kernel");
        let dir = dir.canonicalize().with_context(|| {
            format!(
                "find the L1 host's kernel at {}: run `make setup` first",
                dir.display()
            )
        })?;
        let release = dir.join("release");
        let release = fs::read_to_string(&release)
            .with_context(|| format!("read {}", release.display()))?
            .trim()
            .to_owned();
        Ok(Kernel { dir, release })
    }

    /// Directories that change outside while an L1 host is up, and that commands in it may write to. All else
    /// is read through a cache that never looks again, with changes kept in the L1 host's memory.
    pub(crate) fn shared_dirs(&self, more: &[PathBuf]) -> Vec<PathBuf> {
        let cargo = ["CARGO_TARGET_DIR", "CARGO_BUILD_BUILD_DIR"]
            .into_iter()
            .filter_map(env::var_os)
            .map(|dir| self.checkout.join(dir));
        let mut dirs = vec![self.checkout.clone()];
        for dir in cargo.chain([self.cache.clone()]).chain(more.iter().cloned()) {
            let Ok(dir) = dir.canonicalize() else { continue };
            if dir.is_dir() && !dirs.iter().any(|known| dir.starts_with(known)) {
                dirs.push(dir);
            }
        }
        dirs
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir.join("control.sock")
    }

    pub(crate) fn console_log(&self) -> PathBuf {
        self.run_dir.join("console.log")
    }
}

/// An unpacked kernel package: `vmlinux`, `lib/modules/<release>`.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) dir: PathBuf,
    pub(crate) release: String,
}

impl Kernel {
    pub(crate) fn image(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    pub(crate) fn modules(&self) -> PathBuf {
        self.dir.join("lib/modules").join(&self.release)
    }
}

fn checkout_around(start: &Path) -> Option<PathBuf> {
    start
        .ancestors()
        .find(|dir| dir.join("tests/nested/Cargo.toml").is_file())?
        .canonicalize()
        .ok()
}

// The same rule as in `tools/setup`.
fn cache_dir() -> Result<PathBuf> {
    let set = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("ECI_CACHE_DIR")
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("eci-host")))
        .or_else(|| set("HOME").map(|dir| dir.join(".cache/eci-host")))
        .context("HOME is not set: set ECI_CACHE_DIR to the directory `make setup` filled")
}
