//! What the store keeps, lets go, shares, and finds again after a crash.

use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;

use super::super::{ImageConfig, ImageStore, PullErrorKind, PullPhase, PullPolicy, StoreError};
use super::fake::{FakeRegistry, Reply};
use super::hostile::files_below;
use super::silent;
use super::support::{LayerBuilder, TestImage, digest};

fn config(registry: &FakeRegistry) -> ImageConfig {
    ImageConfig {
        insecure_registries: vec![registry.address.clone()],
        ..ImageConfig::default()
    }
}

fn noise(seed: u32, len: u32) -> Vec<u8> {
    (0..len)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).wrapping_add(seed).to_le_bytes())
        .collect()
}

/// `a:1` and `a:2` share their lower layer; `a:3` is like `a:1` under another name.
async fn family() -> FakeRegistry {
    let lower = LayerBuilder::new().file("lower", &noise(1, 5000)).finish();
    let upper = |seed| LayerBuilder::new().file("upper", &noise(seed, 5000)).finish();
    let first = TestImage::from_archives(&[lower.clone(), upper(2)]);
    let second = TestImage::from_archives(&[lower, upper(3)]);
    let both = TestImage {
        blobs: [first.blobs.clone(), second.blobs].concat(),
        ..first.clone()
    };
    FakeRegistry::serve(both, move |request| {
        let manifest = match request.path.rsplit_once("/manifests/")?.1 {
            "2" => &second.manifest,
            "1" | "3" => &first.manifest,
            _ => return Some(Reply::status(404)),
        };
        Some(Reply::manifest(manifest))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_and_names_keep_images_and_shared_layers_stay() {
    let registry = family().await;
    let dir = TempDir::new().unwrap();
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    let name = |tag: &str| format!("{}/a:{tag}", registry.address);
    let mut images = Vec::new();
    for tag in ["1", "2", "3"] {
        images.push(
            store
                .pull(&name(tag), None, PullPolicy::Always, silent())
                .await
                .unwrap(),
        );
    }
    assert_eq!(
        (images[0].id == images[1].id, images[0].id == images[2].id),
        (false, true)
    );
    assert_eq!(images[0].rootfs.blobs[0], images[1].rootfs.blobs[0]);
    assert_eq!(store.list().len(), 3);
    assert_eq!(
        registry.n_asked("/blobs/"),
        6,
        "three configurations and three layers"
    );
    assert_eq!(store.gc().unwrap(), 0);

    let lease = store.lease(&images[0]).unwrap();
    assert_eq!(lease.image_id(), images[0].id);
    assert!(matches!(
        store.remove(&name("1")),
        Err(StoreError::InUse { n_leases: 1, .. })
    ));
    store.remove(&name("2")).unwrap();
    assert!(matches!(
        store.remove(&name("2")),
        Err(StoreError::NotFound { .. })
    ));
    assert!(store.gc().unwrap() > 0);
    assert!(images[0].rootfs.files().all(|path| path.exists()));
    assert!(!images[1].rootfs.metadata.exists() && !images[1].rootfs.blobs[1].exists());
    assert!(matches!(
        store.lease(&images[1]),
        Err(StoreError::NotFound { .. })
    ));

    drop(lease);
    store.remove(&name("1")).unwrap();
    store.gc().unwrap();
    assert!(images[0].rootfs.metadata.exists(), "it has another name");
    let lease = store.lease(&images[0]).unwrap();
    drop(store.remove(&name("3")).unwrap_err());
    drop(lease);
    store.remove(&name("3")).unwrap();
    store.gc().unwrap();
    assert_eq!(files_below(dir.path()), ["lock"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_tag_leaves_a_leased_image_in_place() {
    let registry = family().await;
    let dir = TempDir::new().unwrap();
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    let name = |tag: &str| format!("{}/a:{tag}", registry.address);
    let image = store
        .pull(&name("1"), None, PullPolicy::Always, silent())
        .await
        .unwrap();
    let lease = store.lease(&image).unwrap();
    store
        .shared
        .commit(None, moved(&store, &name("1"), &name("2")).await)
        .unwrap();
    assert_ne!(store.get(&name("1")).unwrap().id, image.id);
    store.gc().unwrap();
    assert_eq!(store.get_by_id(&image.id).unwrap().rootfs, image.rootfs);
    assert!(image.read_file("upper").unwrap().is_some());
    drop(lease);
    store.gc().unwrap();
    assert!(store.get_by_id(&image.id).is_none());
}

/// The record of `tag`, pointing at the image of `other`.
async fn moved(store: &ImageStore, tag: &str, other: &str) -> super::super::record::ReferenceRecord {
    let other = store
        .pull(other, None, PullPolicy::Always, silent())
        .await
        .unwrap();
    super::super::record::ReferenceRecord {
        reference: tag.to_owned(),
        id: other.id.strip_prefix("sha256:").unwrap().to_owned(),
        manifest_digest: other.manifest_digest,
        pulled_at: other.pulled_at,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_decide_who_is_asked() {
    let registry = family().await;
    let dir = TempDir::new().unwrap();
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    let name = format!("{}/a:1", registry.address);
    let error = store
        .pull(&name, None, PullPolicy::Never, silent())
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), registry.n_asked("/")),
        (PullErrorKind::NotPresent, 0)
    );
    store
        .pull(&name, None, PullPolicy::IfNotPresent, silent())
        .await
        .unwrap();
    let n_asked = registry.n_asked("/");
    store
        .pull(&name, None, PullPolicy::IfNotPresent, silent())
        .await
        .unwrap();
    store
        .pull(&name, None, PullPolicy::Never, silent())
        .await
        .unwrap();
    assert_eq!(registry.n_asked("/"), n_asked);
    store
        .pull(&name, None, PullPolicy::Always, silent())
        .await
        .unwrap();
    assert_eq!(registry.n_asked("/"), n_asked + 2, "manifest and configuration");
    let unknown = format!("{}/a:9", registry.address);
    let error = store
        .pull(&unknown, None, PullPolicy::Always, silent())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::NotFound);
    assert!(error.to_string().contains(&unknown), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_opened_again_has_its_images_and_no_leftovers() {
    let registry = family().await;
    let dir = TempDir::new().unwrap();
    let name = format!("{}/a:1", registry.address);
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    let image = store
        .pull(&name, None, PullPolicy::Always, silent())
        .await
        .unwrap();
    assert!(matches!(
        ImageStore::open(dir.path(), config(&registry)),
        Err(StoreError::Locked { .. })
    ));
    drop(store);
    // What a process killed at the worst moments leaves.
    let whole = files_below(dir.path());
    for leftover in [
        "tmp/.tmpX",
        "layers/0a.blob",
        "layers/0b.index",
        "images/0c.erofs",
        "refs/0d.json",
    ] {
        std::fs::write(dir.path().join(leftover), b"part").unwrap();
    }
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    assert_eq!(files_below(dir.path()), whole);
    let again = store.get(&name).unwrap();
    assert_eq!(
        (again.id, again.rootfs, again.size_bytes),
        (image.id, image.rootfs.clone(), image.size_bytes)
    );
    assert_eq!(again.pulled_at, image.pulled_at);
    drop(store);
    // A layer that was lost takes what needs it with it.
    std::fs::remove_file(&image.rootfs.blobs[0]).unwrap();
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    assert!(store.get(&name).is_none());
    let repaired = store
        .pull(&name, None, PullPolicy::IfNotPresent, silent())
        .await
        .unwrap();
    assert_eq!(repaired.rootfs, image.rootfs);
    assert!(repaired.read_file("lower").unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_the_same_time_fetch_each_layer_once() {
    let registry = family().await;
    let dir = TempDir::new().unwrap();
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    let pulls = (0..12).map(|n| {
        let (store, name) = (store.clone(), format!("{}/a:{}", registry.address, n % 3 + 1));
        tokio::spawn(async move { store.pull(&name, None, PullPolicy::Always, silent()).await })
    });
    for pull in futures_util::future::join_all(pulls).await {
        let image = pull.unwrap().unwrap();
        assert_eq!(image.read_file("lower").unwrap().unwrap(), noise(1, 5000));
    }
    let configs = 12;
    assert_eq!(registry.n_asked("/blobs/"), configs + 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_image_gives_the_same_bytes() {
    let registry = family().await;
    let mut seen = Vec::new();
    for _ in 0..2 {
        let dir = TempDir::new().unwrap();
        let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
        let name = format!("{}/a:1", registry.address);
        let image = store
            .pull(&name, None, PullPolicy::Always, silent())
            .await
            .unwrap();
        seen.push(
            image
                .rootfs
                .files()
                .map(|path| std::fs::read(path).unwrap())
                .collect::<Vec<_>>(),
        );
    }
    assert!(seen[0] == seen[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_told_and_a_dropped_pull_leaves_nothing() {
    let image = TestImage::from_archives(&[LayerBuilder::new().file("a", &noise(9, 300_000)).finish()]);
    let layer = image.blobs[0].clone();
    let layer_digest = digest(&layer);
    let part = layer.len() / 2;
    let registry = FakeRegistry::serve(image, move |request| {
        let reply = Reply {
            cut_after: Some(part),
            is_stalled: true,
            ..Reply::ok(&layer)
        };
        request.path.ends_with(&digest(&layer)).then_some(reply)
    })
    .await;
    let dir = TempDir::new().unwrap();
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    let news = Arc::new(Mutex::new(Vec::new()));
    let half_way = Arc::new(tokio::sync::Notify::new());
    let (heard, arrived) = (Arc::clone(&news), Arc::clone(&half_way));
    let name = format!("{}/a:1", registry.address);
    let pull = store.pull(
        &name,
        None,
        PullPolicy::Always,
        Arc::new(move |news| {
            if news.done_bytes == part as u64 {
                arrived.notify_one();
            }
            heard.lock().unwrap().push(news);
        }),
    );
    tokio::select! {
        result = pull => panic!("{result:?}"),
        () = half_way.notified() => {}
    }
    let news = news.lock().unwrap().clone();
    assert_eq!(news[0].phase, PullPhase::Waiting);
    assert!(
        news.iter()
            .all(|news| news.layer_digest == layer_digest && news.done_bytes <= news.total_bytes)
    );
    assert!(
        news.windows(2)
            .all(|pair| pair[0].done_bytes <= pair[1].done_bytes)
    );
    // The thread that unpacks ends soon after its source.
    tokio::time::timeout(Duration::from_secs(20), async {
        while files_below(dir.path()) != ["lock"] {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("nothing is left");
}

/// A file system of its own for the store; `None`, said aloud, where this process may not mount.
fn small_disk() -> Option<SmallDisk> {
    let dir = TempDir::new().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none"])
        .arg(dir.path())
        .output()
        .unwrap();
    if !mount.status.success() {
        eprintln!(
            "SKIPPED: this process may not mount: {}",
            String::from_utf8_lossy(&mount.stderr)
        );
        return None;
    }
    Some(SmallDisk(dir))
}

struct SmallDisk(TempDir);

impl Drop for SmallDisk {
    fn drop(&mut self) {
        assert!(
            Command::new("umount")
                .arg(self.0.path())
                .status()
                .unwrap()
                .success()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_named_and_left_as_it_was() {
    let Some(disk) = small_disk() else { return };
    let image = TestImage::from_archives(&[LayerBuilder::new().file("a", &noise(1, 1_000_000)).finish()]);
    let registry = FakeRegistry::serve(image, |_| None).await;
    let store = ImageStore::open(disk.0.path(), config(&registry)).unwrap();
    let name = format!("{}/a:1", registry.address);
    let error = store
        .pull(&name, None, PullPolicy::Always, silent())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::DiskFull, "{error:?}");
    assert!(
        error.to_string().contains(disk.0.path().to_str().unwrap()),
        "{error}"
    );
    assert_eq!(files_below(disk.0.path()), ["lock"]);
    drop(store);
}
