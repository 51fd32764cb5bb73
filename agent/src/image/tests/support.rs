//! A real registry, and images made by hand.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use flate2::Compression;
use flate2::write::GzEncoder;
use reqwest::header::{CONTENT_TYPE, LOCATION};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use tempfile::TempDir;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub(super) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// One layer's archive.
pub(super) struct LayerBuilder {
    tar: tar::Builder<Vec<u8>>,
}

/// Attributes of an entry to be added.
#[derive(Clone)]
pub(super) struct Attrs {
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: u64,
    pub(super) xattrs: Vec<(String, Vec<u8>)>,
}

impl Default for Attrs {
    fn default() -> Self {
        Self {
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_700_000_000,
            xattrs: Vec::new(),
        }
    }
}

impl LayerBuilder {
    pub(super) fn new() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }

    pub(super) fn add(
        &mut self,
        kind: EntryType,
        path: &str,
        attrs: &Attrs,
        link: Option<&str>,
        device: Option<(u32, u32)>,
        data: &[u8],
    ) -> &mut Self {
        let mut pax: Vec<(String, Vec<u8>)> = Vec::new();
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(attrs.mode);
        header.set_uid(attrs.uid);
        header.set_gid(attrs.gid);
        header.set_mtime(attrs.mtime);
        header.set_size(data.len() as u64);
        if let Some((major, minor)) = device {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        }
        // The field is written raw: the crate refuses what hostile archives contain.
        if path.len() < 100 {
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        } else {
            pax.push(("path".into(), path.into()));
        }
        if let Some(link) = link {
            if link.len() < 100 {
                header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
            } else {
                pax.push(("linkpath".into(), link.into()));
            }
        }
        pax.extend(
            attrs
                .xattrs
                .iter()
                .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.clone())),
        );
        if !pax.is_empty() {
            let records = pax.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
            self.tar.append_pax_extensions(records).unwrap();
        }
        header.set_cksum();
        self.tar.append(&header, data).unwrap();
        self
    }

    pub(super) fn dir(&mut self, path: &str, mode: u32) -> &mut Self {
        self.add(
            EntryType::Directory,
            path,
            &Attrs {
                mode,
                ..Attrs::default()
            },
            None,
            None,
            b"",
        )
    }

    pub(super) fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.add(EntryType::Regular, path, &Attrs::default(), None, None, data)
    }

    pub(super) fn file_with(&mut self, path: &str, attrs: &Attrs, data: &[u8]) -> &mut Self {
        self.add(EntryType::Regular, path, attrs, None, None, data)
    }

    pub(super) fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.add(
            EntryType::Symlink,
            path,
            &Attrs {
                mode: 0o777,
                ..Attrs::default()
            },
            Some(target),
            None,
            b"",
        )
    }

    pub(super) fn link(&mut self, path: &str, target: &str) -> &mut Self {
        self.add(EntryType::Link, path, &Attrs::default(), Some(target), None, b"")
    }

    pub(super) fn whiteout(&mut self, path: &str) -> &mut Self {
        self.file(path, b"")
    }

    pub(super) fn finish(&mut self) -> Vec<u8> {
        std::mem::replace(&mut self.tar, tar::Builder::new(Vec::new()))
            .into_inner()
            .unwrap()
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image as a registry holds it.
#[derive(Clone)]
pub(super) struct TestImage {
    pub(super) blobs: Vec<Vec<u8>>,
    pub(super) manifest: Vec<u8>,
}

impl TestImage {
    /// From layers as stored, each with its archive and media type.
    pub(super) fn new(layers: &[(Vec<u8>, Vec<u8>, &str)], config: &serde_json::Value) -> Self {
        let diff_ids: Vec<String> = layers.iter().map(|(_, archive, _)| digest(archive)).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": [],
        });
        let config = serde_json::to_vec(&config).unwrap();
        let descriptors: Vec<_> = layers
            .iter()
            .map(|(stored, _, kind)| {
                serde_json::json!({"mediaType": kind, "digest": digest(stored), "size": stored.len()})
            })
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(&config), "size": config.len()},
            "layers": descriptors,
        });
        let mut blobs: Vec<_> = layers.iter().map(|(stored, _, _)| stored.clone()).collect();
        blobs.push(config);
        Self {
            blobs,
            manifest: serde_json::to_vec(&manifest).unwrap(),
        }
    }

    /// From archives, stored with gzip.
    pub(super) fn from_archives(archives: &[Vec<u8>]) -> Self {
        let layers: Vec<_> = archives
            .iter()
            .map(|archive| {
                (
                    gzip(archive),
                    archive.clone(),
                    "application/vnd.oci.image.layer.v1.tar+gzip",
                )
            })
            .collect();
        Self::new(&layers, &serde_json::json!({}))
    }

    pub(super) fn digest(&self) -> String {
        digest(&self.manifest)
    }
}

/// `docker-registry` on a port of its own.
pub(super) struct TestRegistry {
    child: Child,
    pub(super) address: String,
    _dir: TempDir,
}

impl TestRegistry {
    /// Starts it; `None`, said aloud, where the program is not installed.
    pub(super) fn start(extra_config: &str) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: 127.0.0.1:0\n{extra_config}",
            dir.path().join("data").display()
        );
        let config_path = dir.path().join("config.yml");
        std::fs::write(&config_path, config).unwrap();
        let spawned = Command::new("docker-registry")
            .args([Path::new("serve"), &config_path])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut child) = spawned else {
            eprintln!("SKIPPED: docker-registry is not installed");
            return None;
        };
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines
            .by_ref()
            .map(|line| line.unwrap())
            .find_map(|line| {
                Some(
                    line.split_once("listening on ")?
                        .1
                        .split(['"', ','])
                        .next()?
                        .to_owned(),
                )
            })
            .expect("the registry says where it listens");
        // Keep the pipe from filling up.
        std::thread::spawn(move || lines.for_each(drop));
        Some(Self {
            child,
            address,
            _dir: dir,
        })
    }

    pub(super) fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    pub(super) async fn push(&self, repository: &str, tag: &str, image: &TestImage) {
        for blob in &image.blobs {
            self.push_blob(repository, blob).await;
        }
        self.push_manifest(repository, tag, &image.manifest, OCI_MANIFEST)
            .await;
    }

    pub(super) async fn push_blob(&self, repository: &str, blob: &[u8]) {
        let http = plain_http();
        let base = format!("http://{}", self.address);
        let start = http
            .post(format!("{base}/v2/{repository}/blobs/uploads/"))
            .send()
            .await
            .unwrap();
        assert!(start.status().is_success(), "{start:?}");
        let location = start.headers()[LOCATION].to_str().unwrap().to_owned();
        let location = if location.starts_with('/') {
            format!("{base}{location}")
        } else {
            location
        };
        let glue = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{glue}digest={}", digest(blob));
        let put = http
            .put(url)
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(blob.to_vec());
        let put = put.send().await.unwrap();
        assert!(put.status().is_success(), "{put:?}");
    }

    pub(super) async fn push_manifest(&self, repository: &str, tag: &str, manifest: &[u8], media_type: &str) {
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.address);
        let put = plain_http()
            .put(url)
            .header(CONTENT_TYPE, media_type)
            .body(manifest.to_vec());
        let put = put.send().await.unwrap();
        let status = put.status();
        assert!(status.is_success(), "{status}: {}", put.text().await.unwrap());
    }
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn plain_http() -> reqwest::Client {
    let tls = rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_root_certificates(rustls::RootCertStore::empty())
    .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .no_proxy()
        .build()
        .unwrap()
}
