//! The images of this host on disk.
//!
//! ```text
//! lock                   held while the store is open
//! tmp/                   what is being written; emptied when the store is opened
//! layers/HEX.blob        data of a layer's files; HEX is the layer's diff id
//! layers/HEX.index       its tree; the layer exists once this does
//! images/HEX.erofs       metadata of an image; HEX is its id
//! images/HEX.json        its record; the image exists once this does
//! refs/HEX.json          a reference and the image it names; HEX is the reference's SHA-256
//! ```
//!
//! Every file is written in `tmp`, made durable, then renamed, in the order of this list: at whatever moment the host
//! dies, opening the store finds whole objects, and sweeps those nothing leads to. What exists is also kept in
//! memory, under one lock that is never held across an `await`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::disk;
use super::error::StoreError;
use super::record::{Image, ImageRecord, ImageRootfs, ReferenceRecord};
use super::reference::ImageReference;
use super::registry::RegistryClient;

/// How images are pulled and kept.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// Registries spoken to by plain HTTP, as `host` or `host:port`.
    pub insecure_registries: Vec<String>,
    /// Certificate authorities (PEM) trusted besides those of the host.
    pub extra_ca_files: Vec<PathBuf>,
    /// Most layers of an image.
    pub max_layers: usize,
    /// Most bytes of one layer after decompression.
    pub max_unpacked_bytes: u64,
    /// Most files of one layer.
    pub max_entries: u64,
    /// Layers fetched at the same time, for all pulls together.
    pub concurrent_layers: usize,
    /// Longest wait for a connection.
    pub connect_timeout_seconds: u64,
    /// Longest wait for the next bytes.
    pub read_timeout_seconds: u64,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            insecure_registries: Vec::new(),
            extra_ca_files: Vec::new(),
            max_layers: 50,
            max_unpacked_bytes: 64 << 30,
            max_entries: 1_000_000,
            concurrent_layers: 3,
            connect_timeout_seconds: 10,
            read_timeout_seconds: 60,
        }
    }
}

/// The images of this host. Cheap to clone; all clones are the same store.
#[derive(Clone, Debug)]
pub struct ImageStore {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: ImageConfig,
    pub(super) registry: RegistryClient,
    pub(super) folders: Folders,
    pub(super) downloads: tokio::sync::Semaphore,
    known: Mutex<Known>,
    /// Holds the file lock.
    _lock: File,
}

/// What exists, and who needs it.
#[derive(Debug, Default)]
struct Known {
    images: BTreeMap<String, ImageRecord>,
    references: BTreeMap<String, ReferenceRecord>,
    /// Leases by image id.
    leases: HashMap<String, usize>,
    /// Layers a pull is about to use.
    pins: HashMap<String, usize>,
    /// Held while a layer is fetched, so that it is fetched once.
    fetching: HashMap<String, Weak<tokio::sync::Mutex<()>>>,
}

/// Paths of the store's objects.
#[derive(Clone, Debug)]
pub(super) struct Folders {
    root: PathBuf,
}

impl Folders {
    pub(super) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    pub(super) fn blob(&self, layer: &str) -> PathBuf {
        self.root.join("layers").join(format!("{layer}.blob"))
    }

    pub(super) fn index(&self, layer: &str) -> PathBuf {
        self.root.join("layers").join(format!("{layer}.index"))
    }

    fn metadata(&self, image: &str) -> PathBuf {
        self.root.join("images").join(format!("{image}.erofs"))
    }

    fn record(&self, image: &str) -> PathBuf {
        self.root.join("images").join(format!("{image}.json"))
    }

    fn reference(&self, reference: &str) -> PathBuf {
        self.root
            .join("refs")
            .join(format!("{}.json", hex::encode(Sha256::digest(reference))))
    }

    pub(super) fn has_layer(&self, layer: &str) -> bool {
        self.index(layer).is_file() && self.blob(layer).is_file()
    }

    fn has_image(&self, record: &ImageRecord) -> bool {
        self.metadata(&record.id).is_file() && record.layers.iter().all(|layer| self.has_layer(layer))
    }
}

impl ImageStore {
    /// Opens or creates the store in `dir`, and sweeps what an earlier process left unfinished. Blocking.
    ///
    /// # Errors
    /// `Locked` when another process has it open.
    pub fn open(dir: &Path, config: ImageConfig) -> Result<Self, StoreError> {
        let folders = Folders { root: dir.to_owned() };
        for folder in [
            folders.tmp(),
            dir.join("layers"),
            dir.join("images"),
            dir.join("refs"),
        ] {
            std::fs::create_dir_all(&folder)
                .map_err(|source| StoreError::storage("create", &folder, source))?;
        }
        let lock_path = dir.join("lock");
        let lock =
            File::create(&lock_path).map_err(|source| StoreError::storage("create", &lock_path, source))?;
        lock.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => StoreError::Locked { path: dir.to_owned() },
            std::fs::TryLockError::Error(source) => StoreError::storage("lock", &lock_path, source),
        })?;
        let known = load(&folders)?;
        let registry = RegistryClient::new(&config)?;
        let downloads = tokio::sync::Semaphore::new(config.concurrent_layers.max(1));
        let known = Mutex::new(known);
        Ok(Self {
            shared: Arc::new(Shared {
                config,
                registry,
                folders,
                downloads,
                known,
                _lock: lock,
            }),
        })
    }

    /// The image a reference names on this host, without asking its registry.
    #[must_use]
    pub fn get(&self, reference: &str) -> Option<Image> {
        let reference = reference.parse::<ImageReference>().ok()?.to_string();
        let known = self.shared.known();
        self.shared.image(&known, known.references.get(&reference)?)
    }

    /// The image of an id (`sha256:...`), also when no reference names it any more but a lease keeps it.
    #[must_use]
    pub fn get_by_id(&self, id: &str) -> Option<Image> {
        let id = id.strip_prefix("sha256:").unwrap_or(id);
        let known = self.shared.known();
        if let Some(reference) = known.references.values().find(|reference| reference.id == id) {
            return self.shared.image(&known, reference);
        }
        let nameless = ReferenceRecord {
            reference: String::new(),
            id: id.to_owned(),
            manifest_digest: String::new(),
            pulled_at: SystemTime::UNIX_EPOCH,
        };
        self.shared.image(&known, &nameless)
    }

    /// All references with their images, in the order of their names.
    #[must_use]
    pub fn list(&self) -> Vec<Image> {
        let known = self.shared.known();
        known
            .references
            .values()
            .filter_map(|reference| self.shared.image(&known, reference))
            .collect()
    }

    /// Forgets a reference. Its image's files go with the next [`ImageStore::gc`], unless something else needs them.
    /// Blocking.
    ///
    /// # Errors
    /// `InUse` while a lease of its image is held, `NotFound`.
    pub fn remove(&self, reference: &str) -> Result<(), StoreError> {
        let parsed: ImageReference = reference.parse().map_err(|_| StoreError::InvalidReference {
            reference: reference.to_owned(),
        })?;
        let reference = parsed.to_string();
        let mut known = self.shared.known();
        let Some(record) = known.references.get(&reference) else {
            return Err(StoreError::NotFound { reference });
        };
        if let Some(n_leases) = known.leases.get(&record.id).copied() {
            return Err(StoreError::InUse { reference, n_leases });
        }
        self.shared
            .remove_file(&self.shared.folders.reference(&reference))?;
        known.references.remove(&reference);
        Ok(())
    }

    /// Keeps an image's files until the lease is dropped. Leases do not outlive the process: after a restart take
    /// those of running groups again before calling [`ImageStore::gc`].
    ///
    /// # Errors
    /// `NotFound` when the image was collected meanwhile.
    pub fn lease(&self, image: &Image) -> Result<Lease, StoreError> {
        let id = image.id.strip_prefix("sha256:").unwrap_or(&image.id).to_owned();
        let mut known = self.shared.known();
        if !known.images.contains_key(&id) {
            return Err(StoreError::NotFound {
                reference: image.reference.clone(),
            });
        }
        *known.leases.entry(id.clone()).or_default() += 1;
        drop(known);
        Ok(Lease {
            shared: Arc::clone(&self.shared),
            id,
        })
    }

    /// Somebody holds a lease of the image.
    #[must_use]
    pub fn in_use(&self, image: &Image) -> bool {
        let id = image.id.strip_prefix("sha256:").unwrap_or(&image.id);
        self.shared.known().leases.contains_key(id)
    }

    /// Removes images that no reference names and no lease holds, and layers that no image needs. Returns the bytes
    /// freed on disk. Blocking.
    ///
    /// # Errors
    /// Those of removing files; what could not be removed stays for the next call.
    pub fn gc(&self) -> Result<u64, StoreError> {
        use std::os::unix::fs::MetadataExt;
        let shared = &self.shared;
        let mut known = shared.known();
        let mut freed = 0;
        let mut remove = |path: PathBuf| {
            freed += path.metadata().map_or(0, |metadata| metadata.blocks() * 512);
            shared.remove_file(&path)
        };
        let named: BTreeSet<String> = known
            .references
            .values()
            .map(|record| record.id.clone())
            .collect();
        let dead: Vec<String> = known.images.keys().cloned().collect();
        for id in dead
            .iter()
            .filter(|id| !named.contains(*id) && !known.leases.contains_key(*id))
        {
            remove(shared.folders.record(id))?;
            remove(shared.folders.metadata(id))?;
        }
        let leases = std::mem::take(&mut known.leases);
        known
            .images
            .retain(|id, _| named.contains(id) || leases.contains_key(id));
        known.leases = leases;
        let needed: BTreeSet<&String> = known
            .images
            .values()
            .flat_map(|image| &image.layers)
            .chain(known.pins.keys())
            .collect();
        for layer in stems(&shared.folders.root.join("layers"))? {
            if !needed.contains(&layer) {
                remove(shared.folders.index(&layer))?;
                remove(shared.folders.blob(&layer))?;
            }
        }
        Ok(freed)
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Every change is made after the file system's, in one statement: a panic leaves nothing half done.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn image(&self, known: &Known, reference: &ReferenceRecord) -> Option<Image> {
        let record = known.images.get(&reference.id)?;
        Some(Image {
            reference: reference.reference.clone(),
            id: format!("sha256:{}", record.id),
            manifest_digest: reference.manifest_digest.clone(),
            config: Arc::clone(&record.config),
            rootfs: ImageRootfs {
                metadata: self.folders.metadata(&record.id),
                blobs: record
                    .blobs
                    .iter()
                    .map(|layer| self.folders.blob(layer))
                    .collect(),
            },
            size_bytes: record.size_bytes,
            pulled_at: reference.pulled_at,
        })
    }

    fn remove_file(&self, path: &Path) -> Result<(), StoreError> {
        disk::remove(path)
            .and_then(|()| disk::sync_folder_of(path))
            .map_err(|source| StoreError::storage("remove", path, source))
    }

    pub(super) fn has_image(&self, id: &str) -> bool {
        self.known().images.contains_key(id)
    }

    /// Keeps layers from being collected until the pins are dropped, whether they exist or not.
    pub(super) fn pin(self: &Arc<Self>, layers: Vec<String>) -> Pins {
        let mut known = self.known();
        for layer in &layers {
            *known.pins.entry(layer.clone()).or_default() += 1;
        }
        drop(known);
        Pins {
            shared: Arc::clone(self),
            layers,
        }
    }

    /// The lock under which a layer is fetched.
    pub(super) fn fetch_lock(&self, layer: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut known = self.known();
        known.fetching.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = known.fetching.get(layer).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        known.fetching.insert(layer.to_owned(), Arc::downgrade(&lock));
        lock
    }

    /// Gives the image its files and its name. `image` comes with its metadata unless the image exists already.
    /// The caller holds pins on its layers. Returns `None` when the image was collected meanwhile.
    pub(super) fn commit(
        &self,
        image: Option<(ImageRecord, NamedTempFile)>,
        reference: ReferenceRecord,
    ) -> io::Result<Option<Image>> {
        let mut known = self.known();
        let tmp = self.folders.tmp();
        if let Some((record, metadata)) = image {
            disk::publish(metadata, &self.folders.metadata(&record.id))?;
            let bytes = serde_json::to_vec(&record)?;
            disk::write_bytes(&tmp, &self.folders.record(&record.id), &bytes)?;
            known.images.insert(record.id.clone(), record);
        }
        if !known.images.contains_key(&reference.id) {
            return Ok(None);
        }
        let bytes = serde_json::to_vec(&reference)?;
        disk::write_bytes(&tmp, &self.folders.reference(&reference.reference), &bytes)?;
        let image = self.image(&known, &reference);
        known.references.insert(reference.reference.clone(), reference);
        Ok(image)
    }
}

/// Keeps an image's files on disk.
#[derive(Debug)]
#[must_use = "dropping the lease lets the image's files go"]
pub struct Lease {
    shared: Arc<Shared>,
    id: String,
}

impl Lease {
    /// The image's id, `sha256:...`.
    #[must_use]
    pub fn image_id(&self) -> String {
        format!("sha256:{}", self.id)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        release(&mut self.shared.known().leases, &self.id);
    }
}

/// Keeps layers on disk during a pull.
#[derive(Debug)]
pub(super) struct Pins {
    shared: Arc<Shared>,
    layers: Vec<String>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut known = self.shared.known();
        for layer in &self.layers {
            release(&mut known.pins, layer);
        }
    }
}

fn release(counts: &mut HashMap<String, usize>, key: &str) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// Reads all records and removes what nothing complete leads to.
fn load(folders: &Folders) -> Result<Known, StoreError> {
    let mut known = Known::default();
    let tmp = folders.tmp();
    for entry in std::fs::read_dir(&tmp).map_err(|source| StoreError::storage("read", &tmp, source))? {
        let path = entry
            .map_err(|source| StoreError::storage("read", &tmp, source))?
            .path();
        disk::remove(&path).map_err(|source| StoreError::storage("remove", &path, source))?;
    }
    let remove =
        |path: PathBuf| disk::remove(&path).map_err(|source| StoreError::storage("remove", &path, source));
    for layer in stems(&folders.root.join("layers"))? {
        if !folders.has_layer(&layer) {
            remove(folders.index(&layer))?;
            remove(folders.blob(&layer))?;
        }
    }
    for id in stems(&folders.root.join("images"))? {
        match read_record::<ImageRecord>(&folders.record(&id)) {
            Some(record) if record.id == id && folders.has_image(&record) => {
                known.images.insert(id, record);
            }
            _ => {
                remove(folders.record(&id))?;
                remove(folders.metadata(&id))?;
            }
        }
    }
    let refs = folders.root.join("refs");
    for stem in stems(&refs)? {
        let path = refs.join(format!("{stem}.json"));
        match read_record::<ReferenceRecord>(&path) {
            Some(record) if known.images.contains_key(&record.id) => {
                known.references.insert(record.reference.clone(), record);
            }
            _ => remove(path)?,
        }
    }
    Ok(known)
}

/// Names in a folder without their endings, each once.
fn stems(folder: &Path) -> Result<BTreeSet<String>, StoreError> {
    let failed = |source| StoreError::storage("read", folder, source);
    let mut stems = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()) {
            stems.insert(stem.to_owned());
        }
    }
    Ok(stems)
}

fn read_record<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = std::fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "Dropped an unreadable image record");
            None
        }
    }
}
