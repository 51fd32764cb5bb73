//! What `make build` made, and what the machine needs for it.

use std::{
    fs::OpenOptions,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

/// Where the product's files are.
#[derive(Debug, Clone)]
pub struct Product {
    /// Its programs.
    pub programs: PathBuf,
    /// The guest's kernel and initramfs.
    pub guest: PathBuf,
    /// The demonstration's images, as OCI layouts.
    pub images: PathBuf,
    /// A Python that has the official SDKs.
    pub python: PathBuf,
    /// The scripts that use them.
    pub sdk_scripts: PathBuf,
}

impl Product {
    /// Finds everything, and KVM.
    ///
    /// # Errors
    /// What is missing and which command makes it. A test that can't run has failed: nobody reads what was skipped.
    pub fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("find the workspace of this crate")?;
        let target = root.join("target");
        let product = Self {
            programs: target.join("release"),
            guest: target.join("guest"),
            images: target.join("demo"),
            python: std::env::var_os("ECI_SDK_PYTHON")
                .map_or_else(|| target.join("sdk/bin/python"), PathBuf::from),
            sdk_scripts: root.join("tests/sdk"),
        };
        kvm_runs_guests()?;
        for (path, target) in [
            (product.program("eci-agent"), "build"),
            (product.program("ecictl"), "build"),
            (product.program("containerd-shim-eci-v2"), "build"),
            (product.program("eci-vmm"), "build"),
            (product.guest.join("vmlinux"), "build"),
            (product.guest.join("initramfs.cpio"), "build"),
            (product.images.join("tools/index.json"), "images"),
            (product.python.clone(), "sdks"),
        ] {
            ensure!(
                path.exists(),
                "{} is missing: run `make {target}`",
                path.display()
            );
        }
        Ok(product)
    }

    /// The path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }
}

/// The condition of design decision 9: some machines have a `/dev/kvm` that opens but can't run an ordinary guest.
fn kvm_runs_guests() -> Result<()> {
    const WHERE: &str = "These tests run guests: run them where KVM works, with `make test`";
    let processor = std::fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    ensure!(
        processor
            .split_whitespace()
            .any(|flag| flag == "svm" || flag == "vmx"),
        "this processor shows neither vmx nor svm. {WHERE}"
    );
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .with_context(|| format!("open /dev/kvm. {WHERE}"))?;
    Ok(())
}
