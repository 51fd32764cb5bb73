//! Pulling: from a reference to an image on this host.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::{Buf, Bytes};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use super::disk;
use super::erofs::write_metadata;
use super::error::PullError;
use super::layer::{self, BLOCK_BYTES, LayerIndex, LayerLimits, check_digest};
use super::record::{Image, ImageRecord, ReferenceRecord};
use super::reference::{ImageReference, sha256_hex};
use super::registry::{Credentials, Session};
use super::store::{ImageStore, Pins, Shared};
use super::tree::Tree;

const MAX_MANIFEST_BYTES: u64 = 4 << 20;
const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Pieces of a download waiting to be unpacked.
const MAX_QUEUED_CHUNKS: usize = 64;
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYERS: [&str; 2] = [
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar",
];

/// When to ask the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    /// Every time; layers that are here already are not fetched again.
    Always,
    /// Only when the reference names nothing on this host.
    IfNotPresent,
    /// Not at all.
    Never,
}

/// News of a pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullProgress {
    /// Digest of the layer as the registry stores it, `sha256:...`; empty for news of the whole image.
    pub layer_digest: String,
    /// Bytes of the layer.
    pub total_bytes: u64,
    /// Bytes of it that have arrived.
    pub done_bytes: u64,
    /// What is being done.
    pub phase: PullPhase,
}

/// What is being done to a layer or, for the last one, to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPhase {
    /// Known, not started: another pull fetches it, or its turn has not come.
    Waiting,
    /// Being fetched and converted.
    Downloading,
    /// Was on this host already.
    Present,
    /// Fetched, verified and converted.
    Complete,
    /// All layers are there, the image's tree is being written.
    Merging,
}

/// Hears the news of a pull, from any thread; must not block.
pub type Progress = Arc<dyn Fn(PullProgress) + Send + Sync>;

impl ImageStore {
    /// Makes an image available on this host and returns it. Dropping the future stops the work and leaves nothing
    /// unfinished behind; layers that were complete stay until the next [`ImageStore::gc`].
    ///
    /// # Errors
    /// See [`PullError::kind`].
    pub async fn pull(
        &self,
        reference: &str,
        credentials: Option<Credentials>,
        policy: PullPolicy,
        progress: Progress,
    ) -> Result<Image, PullError> {
        let parsed: ImageReference = reference.parse()?;
        match (policy, self.get(reference)) {
            (PullPolicy::IfNotPresent | PullPolicy::Never, Some(image)) => return Ok(image),
            (PullPolicy::Never, None) => {
                return Err(PullError::NotPresent {
                    reference: parsed.to_string(),
                });
            }
            _ => {}
        }
        let insecure = &self.shared.config.insecure_registries;
        let session = self.shared.registry.session(&parsed, credentials, insecure);
        let source = Source::resolve(&session, self.shared.config.max_layers).await?;
        let diffs: Vec<String> = source
            .layers
            .iter()
            .map(|layer| layer.diff_sha256.clone())
            .collect();
        let pins = Arc::new(self.shared.pin(diffs));
        let fetch = Fetch {
            shared: &self.shared,
            session: &session,
            pins: &pins,
            progress: &progress,
        };
        // A list and not a mapped iterator: rustc can't prove the latter's closure `Send` for callers that box this future.
        let mut layers = Vec::with_capacity(source.layers.len());
        for layer in &source.layers {
            layers.push(fetch.layer(layer));
        }
        stream::iter(layers)
            .buffer_unordered(self.shared.config.concurrent_layers.max(1))
            .try_collect::<()>()
            .await?;
        let news = PullProgress {
            layer_digest: String::new(),
            total_bytes: 0,
            done_bytes: 0,
            phase: PullPhase::Merging,
        };
        progress(news);
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            let image = merge(&shared, source, &parsed);
            drop(pins);
            image
        })
        .await
    }
}

/// What a reference led to.
struct Source {
    manifest_digest: String,
    /// Hex.
    config_sha256: String,
    config: ImageConfiguration,
    layers: Vec<SourceLayer>,
}

struct SourceLayer {
    digest: String,
    size: u64,
    diff_sha256: String,
}

impl Source {
    /// Fetches index, manifest and configuration, as far as there are, and checks them against each other.
    async fn resolve(session: &Session, max_layers: usize) -> Result<Self, PullError> {
        let index_type = MediaType::ImageIndex.to_string();
        let manifest_type = MediaType::ImageManifest.to_string();
        let accept = [manifest_type.as_str(), DOCKER_MANIFEST, &index_type, DOCKER_INDEX].join(", ");
        let mut version = session.reference.version().to_owned();
        let mut is_from_index = false;
        let (manifest, manifest_digest) = loop {
            let document = session.manifest(&version, &accept, MAX_MANIFEST_BYTES).await?;
            let digest = format!("sha256:{}", hex::encode(Sha256::digest(&document.bytes)));
            if version.contains(':') && version != digest {
                let what = format!("manifest of {}", session.reference);
                return Err(PullError::DigestMismatch {
                    what,
                    expected: version,
                    got: digest,
                });
            }
            let what = format!("Manifest {digest}");
            let shape: Shape = parse_json(&document.bytes, &what)?;
            // A document that can be read as both is an attack on whoever verified it as the other.
            if shape.manifests.is_some() && (shape.layers.is_some() || shape.config.is_some()) {
                let reason = "it is an index and a manifest at once".to_owned();
                return Err(PullError::InvalidManifest { what, reason });
            }
            let media_type = shape.media_type.or(document.media_type).unwrap_or_default();
            let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
            if (media_type == index_type || media_type == DOCKER_INDEX) && !is_from_index {
                version = choose_platform(&parse_json(&document.bytes, &what)?, &session.reference)?;
                is_from_index = true;
            } else if media_type == manifest_type || media_type == DOCKER_MANIFEST {
                break (parse_json::<ImageManifest>(&document.bytes, &what)?, digest);
            } else {
                return Err(PullError::UnsupportedMediaType { what, media_type });
            }
        };
        let n_layers = manifest.layers().len();
        if n_layers > max_layers {
            let reference = session.reference.to_string();
            return Err(PullError::TooManyLayers {
                reference,
                n_layers,
                limit: max_layers,
            });
        }
        let config_sha256 = checked_digest(manifest.config(), "configuration")?.to_owned();
        let config_type = manifest.config().media_type().to_string();
        if config_type != MediaType::ImageConfig.to_string() && config_type != DOCKER_CONFIG {
            let what = format!("configuration of {}", session.reference);
            return Err(PullError::UnsupportedMediaType {
                what,
                media_type: config_type,
            });
        }
        let config = session
            .small_blob(manifest.config().digest().as_ref(), MAX_CONFIG_BYTES)
            .await?
            .bytes;
        let got = hex::encode(Sha256::digest(&config));
        check_digest("configuration", &config_sha256, &got)?;
        let config: ImageConfiguration =
            parse_json(&config, &format!("Configuration sha256:{config_sha256}"))?;
        let layers = pair_layers(
            &manifest,
            &config,
            &format!("Configuration sha256:{config_sha256}"),
        )?;
        if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
            return Err(PullError::NoPlatform {
                reference: session.reference.to_string(),
                wanted: "linux/amd64".into(),
                available: format!("{}/{}", config.os(), config.architecture()),
            });
        }
        Ok(Self {
            manifest_digest,
            config_sha256,
            config,
            layers,
        })
    }
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

fn parse_json<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, PullError> {
    serde_json::from_slice(bytes).map_err(|error| PullError::InvalidManifest {
        what: what.to_owned(),
        reason: error.to_string(),
    })
}

fn choose_platform(index: &ImageIndex, reference: &ImageReference) -> Result<String, PullError> {
    let platform_of = |entry: &Descriptor| {
        let platform = entry.platform().as_ref()?;
        Some(format!("{}/{}", platform.os(), platform.architecture()))
    };
    let wanted = "linux/amd64";
    match index
        .manifests()
        .iter()
        .find(|entry| platform_of(entry).as_deref() == Some(wanted))
    {
        Some(entry) => {
            checked_digest(entry, "manifest in an index")?;
            Ok(entry.digest().to_string())
        }
        None => Err(PullError::NoPlatform {
            reference: reference.to_string(),
            wanted: wanted.to_owned(),
            available: index
                .manifests()
                .iter()
                .filter_map(platform_of)
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}

fn pair_layers(
    manifest: &ImageManifest,
    config: &ImageConfiguration,
    what: &str,
) -> Result<Vec<SourceLayer>, PullError> {
    let diffs = config.rootfs().diff_ids();
    if diffs.len() != manifest.layers().len() {
        let reason = format!(
            "it has {} diff ids for {} layers",
            diffs.len(),
            manifest.layers().len()
        );
        return Err(PullError::InvalidManifest {
            what: what.to_owned(),
            reason,
        });
    }
    let mut layers = Vec::new();
    for (layer, diff) in manifest.layers().iter().zip(diffs) {
        checked_digest(layer, "layer")?;
        let media_type = layer.media_type().to_string();
        let is_known = matches!(
            layer.media_type(),
            MediaType::ImageLayer | MediaType::ImageLayerGzip | MediaType::ImageLayerZstd
        );
        if !is_known && !DOCKER_LAYERS.contains(&media_type.as_str()) {
            return Err(PullError::UnsupportedMediaType {
                what: format!("layer {}", layer.digest()),
                media_type,
            });
        }
        let diff_sha256 = sha256_hex(diff).ok_or_else(|| PullError::InvalidManifest {
            what: what.to_owned(),
            reason: format!("diff id '{diff}' is not a sha256 digest"),
        })?;
        layers.push(SourceLayer {
            digest: layer.digest().to_string(),
            size: layer.size(),
            diff_sha256: diff_sha256.to_owned(),
        });
    }
    Ok(layers)
}

fn checked_digest<'d>(descriptor: &'d Descriptor, what: &str) -> Result<&'d str, PullError> {
    let digest: &str = descriptor.digest().as_ref();
    sha256_hex(digest).ok_or_else(|| PullError::InvalidManifest {
        what: format!("Descriptor of a {what}"),
        reason: format!("digest '{digest}' is not a sha256 digest"),
    })
}

/// Fetches the layers of one pull.
struct Fetch<'pull> {
    shared: &'pull Arc<Shared>,
    session: &'pull Session,
    pins: &'pull Arc<Pins>,
    progress: &'pull Progress,
}

impl Fetch<'_> {
    /// Makes sure that a layer is on this host.
    async fn layer(&self, layer: &SourceLayer) -> Result<(), PullError> {
        let report = |done_bytes: u64, phase: PullPhase| {
            let (layer_digest, total_bytes) = (layer.digest.clone(), layer.size);
            (self.progress)(PullProgress {
                layer_digest,
                total_bytes,
                done_bytes,
                phase,
            });
        };
        report(0, PullPhase::Waiting);
        let lock = self.shared.fetch_lock(&layer.diff_sha256);
        let _fetching = lock.lock().await;
        if self.shared.folders.has_layer(&layer.diff_sha256) {
            report(layer.size, PullPhase::Present);
            return Ok(());
        }
        let _turn = self
            .shared
            .downloads
            .acquire()
            .await
            .map_err(|_| PullError::Cancelled)?;
        report(0, PullPhase::Downloading);
        let (sink, source) = mpsc::channel(MAX_QUEUED_CHUNKS);
        let wanted = Wanted {
            sha256: checked_hex(&layer.digest).to_owned(),
            diff_sha256: layer.diff_sha256.clone(),
        };
        let (shared, pins) = (Arc::clone(self.shared), Arc::clone(self.pins));
        let convert = blocking(move || {
            let result = convert_layer(&shared, source, &wanted);
            drop(pins);
            result
        });
        let download = self.session.download(&layer.digest, layer.size, sink, |done| {
            report(done, PullPhase::Downloading);
        });
        match tokio::join!(download, convert) {
            // The conversion gave up first and knows why.
            (Ok(()) | Err(PullError::Cancelled), Err(error)) | (Err(error), _) => return Err(error),
            (Ok(()), Ok(())) => {}
        }
        report(layer.size, PullPhase::Complete);
        Ok(())
    }
}

fn checked_hex(digest: &str) -> &str {
    sha256_hex(digest).expect("checked when the manifest was read")
}

struct Wanted {
    sha256: String,
    diff_sha256: String,
}

/// Unpacks a layer while it arrives; it gets its name only if both digests are right.
fn convert_layer(shared: &Shared, source: mpsc::Receiver<Bytes>, wanted: &Wanted) -> Result<(), PullError> {
    let folders = &shared.folders;
    let (tmp, blob_path) = (folders.tmp(), folders.blob(&wanted.diff_sha256));
    let storage = |path: PathBuf| move |source: io::Error| PullError::storage("write", &path, source);
    let blob = NamedTempFile::new_in(&tmp).map_err(storage(tmp.clone()))?;
    let file = blob.reopen().map_err(storage(blob.path().to_owned()))?;
    let limits = LayerLimits {
        max_unpacked_bytes: shared.config.max_unpacked_bytes,
        max_entries: shared.config.max_entries,
    };
    let source = ChunkReader {
        chunks: source,
        current: Bytes::new(),
    };
    let digests = (wanted.sha256.as_str(), wanted.diff_sha256.as_str());
    let index = layer::convert(source, file, &blob_path, limits, digests)?;
    disk::publish(blob, &blob_path).map_err(storage(blob_path.clone()))?;
    let index_path = folders.index(&wanted.diff_sha256);
    disk::write_file(&tmp, &index_path, |file| index.write(file)).map_err(storage(index_path.clone()))
}

/// Writes the image's metadata and gives it its name.
fn merge(shared: &Shared, source: Source, reference: &ImageReference) -> Result<Image, PullError> {
    let named = ReferenceRecord {
        reference: reference.to_string(),
        id: source.config_sha256.clone(),
        manifest_digest: source.manifest_digest.clone(),
        pulled_at: SystemTime::now(),
    };
    let commit = |image| {
        let tmp = shared.folders.tmp();
        shared
            .commit(image, named.clone())
            .map_err(|source| PullError::storage("write", &tmp, source))
    };
    if shared.has_image(&source.config_sha256)
        && let Some(image) = commit(None)?
    {
        return Ok(image);
    }
    let mut tree = Tree::new();
    let mut blob_blocks = Vec::new();
    let mut blobs = Vec::new();
    for layer in &source.layers {
        let path = shared.folders.index(&layer.diff_sha256);
        let index = LayerIndex::read(&path).map_err(|source| PullError::storage("read", &path, source))?;
        tree.apply(&index)?;
        blob_blocks.push(index.blob_blocks);
        if index.blob_blocks > 0 {
            blobs.push(layer.diff_sha256.clone());
        }
    }
    let mut uuid = [0; 16];
    hex::decode_to_slice(&source.config_sha256[..32], &mut uuid).expect("a checked digest is hex");
    let metadata = write_metadata(&tree, &blob_blocks, uuid)?;
    let tmp = shared.folders.tmp();
    let storage = |source: io::Error| PullError::storage("write", &tmp, source);
    let mut file = NamedTempFile::new_in(&tmp).map_err(storage)?;
    io::Write::write_all(&mut file, &metadata).map_err(storage)?;
    let blob_bytes: u64 = blob_blocks
        .iter()
        .map(|blocks| u64::from(*blocks) * BLOCK_BYTES)
        .sum();
    let record = ImageRecord {
        id: source.config_sha256,
        layers: source.layers.into_iter().map(|layer| layer.diff_sha256).collect(),
        blobs,
        size_bytes: metadata.len() as u64 + blob_bytes,
        config: Arc::new(source.config),
    };
    Ok(commit(Some((record, file)))?.expect("the image was named in the same breath"))
}

/// Runs on a thread that may block; dropping the future does not stop it.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PullError> + Send + 'static,
) -> Result<T, PullError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(PullError::Cancelled),
    }
}

/// What a download sends, as a stream of bytes that ends when the sender is dropped.
struct ChunkReader {
    chunks: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for ChunkReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = chunk,
                None => return Ok(0),
            }
        }
        let part = buf.len().min(self.current.len());
        self.current.copy_to_slice(&mut buf[..part]);
        Ok(part)
    }
}
