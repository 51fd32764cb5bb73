//! A real registry on loopback: Debian's docker-registry, filled with skopeo as users do.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU16, Ordering},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::{self, Background};

/// An address on loopback that nobody listens on.
///
/// # Errors
/// The host has no free port.
pub fn free_address() -> Result<SocketAddr> {
    // Below those that the kernel gives to whoever asks for any, and none twice.
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    loop {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) => return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).context("find a free port"),
        }
    }
}

/// A registry; it ends when this is dropped.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    storage: PathBuf,
    _process: Background,
}

impl Registry {
    /// Starts a registry that keeps its blobs in this directory, and waits until it listens.
    ///
    /// # Errors
    /// It did not start; the message has its log.
    pub fn start(dir: &Path) -> Result<Self> {
        let (address, storage) = (free_address()?, dir.join("storage"));
        fs::create_dir_all(&storage).with_context(|| format!("make {}", storage.display()))?;
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{ level: info, accesslog: {{ disabled: true }} }}\nstorage:\n  filesystem: {{ \
             rootdirectory: {} }}\n  cache: {{}}\nhttp: {{ addr: \"{address}\" }}\n",
            storage.display()
        );
        fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
        let mut process =
            Background::start_daemon(Command::new("docker-registry").arg("serve").arg(&config))?;
        process.wait_line("the registry to listen", |line| line.contains("listening on"))?;
        Ok(Self {
            address,
            storage,
            _process: process,
        })
    }

    /// Host and port, as in image references.
    pub fn name(&self) -> String {
        self.address.to_string()
    }

    /// The full reference of an image in it.
    pub fn image(&self, repository_and_tag: &str) -> String {
        format!("{}/{repository_and_tag}", self.address)
    }

    /// Copies an image from an OCI layout.
    ///
    /// # Errors
    /// What skopeo says.
    pub fn push(&self, layout: &Path, repository_and_tag: &str) -> Result<()> {
        process::run(
            Command::new("skopeo")
                .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"])
                .arg(format!("oci:{}:latest", layout.display()))
                .arg(format!("docker://{}", self.image(repository_and_tag))),
            b"",
        )?
        .success()?;
        Ok(())
    }

    /// Changes one byte in the middle of a blob, as a bad disk would. The registry still serves it under its old digest.
    ///
    /// # Errors
    /// It has no such blob.
    pub fn corrupt(&self, digest: &str) -> Result<()> {
        let hex = digest
            .strip_prefix("sha256:")
            .with_context(|| format!("{digest} is no sha256 digest"))?;
        let path = self.storage.join(format!(
            "docker/registry/v2/blobs/sha256/{}/{hex}/data",
            &hex[..2]
        ));
        let mut bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        ensure!(!bytes.is_empty(), "{} is empty", path.display());
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))
    }
}

/// The digests of an image's layers in an OCI layout, lowest first.
///
/// # Errors
/// The layout has no such image.
pub fn layers(layout: &Path) -> Result<Vec<String>> {
    let read = |path: &Path| -> Result<Value> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
    };
    let index = read(&layout.join("index.json"))?;
    let manifest = index["manifests"][0]["digest"]
        .as_str()
        .and_then(|digest| digest.strip_prefix("sha256:"))
        .with_context(|| format!("{} names no manifest", layout.display()))?;
    let manifest = read(&layout.join("blobs/sha256").join(manifest))?;
    let layers = manifest["layers"].as_array().cloned().unwrap_or_default();
    let digests = layers.iter().filter_map(|layer| layer["digest"].as_str());
    Ok(digests.map(str::to_owned).collect())
}
