//! Registries that lie, break off, send too much, or want to know who asks.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use super::super::{Credentials, ImageConfig, ImageStore, PullError, PullErrorKind, PullPolicy};
use super::fake::{FakeRegistry, Reply, honest};
use super::silent;
use super::support::{Attrs, LayerBuilder, OCI_INDEX, TestImage, digest, gzip};

const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn small_image() -> TestImage {
    let noise: Vec<u8> = (0..200_000u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    TestImage::from_archives(&[LayerBuilder::new().file("a", &noise).finish()])
}

fn open(registry: &FakeRegistry, dir: &TempDir, change: impl FnOnce(&mut ImageConfig)) -> ImageStore {
    let mut config = ImageConfig {
        insecure_registries: vec![registry.address.clone()],
        ..ImageConfig::default()
    };
    change(&mut config);
    ImageStore::open(dir.path(), config).unwrap()
}

/// The error of pulling `a:1`, after checking that it left nothing behind.
async fn pull_error(registry: &FakeRegistry, change: impl FnOnce(&mut ImageConfig)) -> PullError {
    let dir = TempDir::new().unwrap();
    let store = open(registry, &dir, change);
    let reference = format!("{}/a:1", registry.address);
    let error = store
        .pull(&reference, None, PullPolicy::Always, silent())
        .await
        .unwrap_err();
    assert_eq!(files_below(dir.path()), ["lock"], "{error}");
    error
}

pub(super) fn files_below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else {
                found.push(path.strip_prefix(dir).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}

async fn check_image(
    image: TestImage,
    change: impl FnOnce(&mut ImageConfig),
    kind: PullErrorKind,
    text: &str,
) {
    let registry = FakeRegistry::serve(image, |_| None).await;
    let error = pull_error(&registry, change).await;
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_a_digest_mismatch_whatever_they_are() {
    let image = small_image();
    for part in 0..image.blobs.len() {
        let right = image.blobs[part].clone();
        let mut flipped = right.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for wrong in [
            vec![b'x'; right.len()],
            flipped,
            gzip(b"no archive at all, and of another length"),
        ] {
            let path = digest(&right);
            let registry = FakeRegistry::serve(image.clone(), move |request| {
                request
                    .path
                    .ends_with(&path)
                    .then(|| Reply::ok(&[&wrong, [0; 900_000].as_slice()].concat()))
            })
            .await;
            let error = pull_error(&registry, |_| {}).await;
            let PullError::DigestMismatch { what, expected, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!(*expected, digest(&right), "{what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_asked_for_by_digest_must_have_it() {
    let image = small_image();
    let registry = FakeRegistry::serve(image.clone(), |_| None).await;
    let dir = TempDir::new().unwrap();
    let store = open(&registry, &dir, |_| {});
    let right = format!("{}/a@{}", registry.address, image.digest());
    store
        .pull(&right, None, PullPolicy::Always, silent())
        .await
        .unwrap();
    let wrong = format!("{}/a@sha256:{}", registry.address, "0".repeat(64));
    let error = store
        .pull(&wrong, None, PullPolicy::Always, silent())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::DigestMismatch, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_is_not_the_diff_id_is_refused() {
    let archive = LayerBuilder::new().file("a", b"right").finish();
    let other = LayerBuilder::new().file("a", b"other").finish();
    let image = TestImage::new(&[(gzip(&other), archive, LAYER_TYPE)], &serde_json::json!({}));
    check_image(image, |_| {}, PullErrorKind::DigestMismatch, "unpacked layer").await;
}

/// Half of every body is lost the first time it is asked for from its start.
async fn check_resume(honours_range: bool) {
    let image = small_image();
    let layer = image.blobs[0].clone();
    let half = layer.len() / 2;
    let registry = FakeRegistry::serve(image, move |request| {
        if !request.path.ends_with(&digest(&layer)) {
            return None;
        }
        match request.headers.get("range") {
            None => Some(Reply {
                cut_after: Some(half),
                ..Reply::ok(&layer)
            }),
            Some(_) if !honours_range => Some(Reply::ok(&layer)),
            Some(range) => {
                let from: usize = range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()?;
                let content_range = format!("bytes {from}-{}/{}", layer.len() - 1, layer.len());
                let reply = Reply {
                    status: 206,
                    ..Reply::ok(&layer[from..])
                };
                Some(reply.with("content-range", &content_range))
            }
        }
    })
    .await;
    let dir = TempDir::new().unwrap();
    let store = open(&registry, &dir, |_| {});
    store
        .pull(
            &format!("{}/a:1", registry.address),
            None,
            PullPolicy::Always,
            silent(),
        )
        .await
        .unwrap();
    let asked = registry.asked.lock().unwrap();
    assert!(asked.iter().any(|(_, range)| range.is_some()), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_download_is_continued() {
    check_resume(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_download_is_continued_where_ranges_are_ignored() {
    check_resume(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_answers_are_cut_off() {
    let registry = FakeRegistry::serve(small_image(), |request| {
        let is_manifest = request.path.contains("/manifests/");
        is_manifest.then(|| Reply {
            is_endless: true,
            ..Reply::manifest(&[b' '; 65536])
        })
    })
    .await;
    let error = pull_error(&registry, |_| {}).await;
    assert_eq!(error.kind(), PullErrorKind::TooLarge, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_layers_bombs_and_too_many_files_are_refused() {
    let layer = LayerBuilder::new().file("a", b"a").finish();
    let many = TestImage::from_archives(&vec![layer; 51]);
    check_image(
        many,
        |_| {},
        PullErrorKind::TooManyLayers,
        "51 layers, at most 50",
    )
    .await;
    let bomb = TestImage::from_archives(&[LayerBuilder::new().file("a", &vec![0; 4 << 20]).finish()]);
    check_image(
        bomb,
        |config| config.max_unpacked_bytes = 1 << 20,
        PullErrorKind::TooLarge,
        "1048576 bytes",
    )
    .await;
    let mut files = LayerBuilder::new();
    for n in 0..20 {
        files.file(&format!("f{n}"), b"");
    }
    let files = TestImage::from_archives(&[files.finish()]);
    check_image(
        files,
        |config| config.max_entries = 10,
        PullErrorKind::TooLarge,
        "10 entries",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_reach_out_of_the_image_are_refused() {
    for (archive, text) in [
        (
            LayerBuilder::new().file("../../etc/passwd", b"x").finish(),
            "'..'",
        ),
        (LayerBuilder::new().file("a/../../b", b"x").finish(), "'..'"),
        (LayerBuilder::new().link("a", "../etc/passwd").finish(), "'..'"),
        (
            LayerBuilder::new().link("a", "nothing").finish(),
            "does not exist",
        ),
        (
            LayerBuilder::new().dir("d", 0o755).link("a", "d").finish(),
            "directory",
        ),
        (
            LayerBuilder::new().symlink("l", "l").file("l/x", b"").finish(),
            "too many symbolic links",
        ),
        (LayerBuilder::new().file(".wh...", b"").finish(), "whiteout"),
        (
            LayerBuilder::new().file(&"n".repeat(256), b"").finish(),
            "longer than 255",
        ),
        (
            b"this is not an archive, but long enough to be looked at as one".repeat(20),
            "no tar archive",
        ),
    ] {
        // What only merging finds leaves the layer behind, for the next collection.
        let registry = FakeRegistry::serve(TestImage::from_archives(&[archive]), |_| None).await;
        let dir = TempDir::new().unwrap();
        let store = open(&registry, &dir, |_| {});
        let reference = format!("{}/a:1", registry.address);
        let error = store
            .pull(&reference, None, PullPolicy::Always, silent())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), PullErrorKind::InvalidImage, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        store.gc().unwrap();
        assert_eq!(files_below(dir.path()), ["lock"], "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn absolute_paths_and_links_stay_in_the_image() {
    let archive = LayerBuilder::new()
        .file_with("/etc/passwd", &Attrs::default(), b"inside")
        .symlink("out", "/../../../../etc")
        .file("out/shadow", b"inside too")
        .finish();
    let registry = FakeRegistry::serve(TestImage::from_archives(&[archive]), |_| None).await;
    let dir = TempDir::new().unwrap();
    let store = open(&registry, &dir, |_| {});
    let reference = format!("{}/a:1", registry.address);
    let image = store
        .pull(&reference, None, PullPolicy::Always, silent())
        .await
        .unwrap();
    assert_eq!(image.read_file("etc/passwd").unwrap().unwrap(), b"inside");
    assert_eq!(image.read_file("etc/shadow").unwrap().unwrap(), b"inside too");
    assert_eq!(
        image.read_file("/out/../out/shadow").unwrap().unwrap(),
        b"inside too"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_of_other_kinds_are_refused() {
    let archive = LayerBuilder::new().file("a", b"a").finish();
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let image = TestImage::new(&[(gzip(&archive), archive, foreign)], &serde_json::json!({}));
    check_image(image, |_| {}, PullErrorKind::UnsupportedMediaType, foreign).await;
    let mut image = small_image();
    image.manifest =
        br#"{"schemaVersion":1,"mediaType":"application/vnd.docker.distribution.manifest.v1+json"}"#.to_vec();
    check_image(image, |_| {}, PullErrorKind::UnsupportedMediaType, "manifest.v1").await;
    let mut image = small_image();
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["manifests"] = serde_json::json!([]);
    image.manifest = serde_json::to_vec(&manifest).unwrap();
    check_image(image, |_| {}, PullErrorKind::InvalidImage, "at once").await;
    let mut image = small_image();
    image.manifest = b"<html>".to_vec();
    check_image(image, |_| {}, PullErrorKind::InvalidImage, "not valid").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_searched_for_this_platform() {
    let image = small_image();
    let entry = |architecture: &str, digest: String| {
        serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest,
            "size": 1, "platform": {"os": "linux", "architecture": architecture}})
    };
    let index = |entries: Vec<serde_json::Value>| {
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        serde_json::to_vec(&index).unwrap()
    };
    let arm = entry("arm64", format!("sha256:{}", "1".repeat(64)));
    let both = index(vec![arm.clone(), entry("amd64", image.digest())]);
    let registry = FakeRegistry::serve(image.clone(), move |request| {
        request
            .path
            .ends_with("/manifests/1")
            .then(|| Reply::ok(&both).with("content-type", OCI_INDEX))
    })
    .await;
    let dir = TempDir::new().unwrap();
    let store = open(&registry, &dir, |_| {});
    let reference = format!("{}/a:1", registry.address);
    let pulled = store
        .pull(&reference, None, PullPolicy::Always, silent())
        .await
        .unwrap();
    assert_eq!(pulled.manifest_digest, image.digest());
    let only_arm = index(vec![arm]);
    let registry = FakeRegistry::serve(image, move |request| {
        request
            .path
            .contains("/manifests/")
            .then(|| Reply::ok(&only_arm).with("content-type", OCI_INDEX))
    })
    .await;
    let error = pull_error(&registry, |_| {}).await;
    assert_eq!(error.kind(), PullErrorKind::NotFound);
    assert!(
        error.to_string().contains("linux/amd64") && error.to_string().contains("linux/arm64"),
        "{error}"
    );
}

/// Asks for a token, of which it accepts one.
async fn start_with_tokens(scheme: &'static str) -> FakeRegistry {
    let image = small_image();
    let realm: std::sync::Arc<std::sync::OnceLock<String>> = std::sync::Arc::default();
    let known_realm = std::sync::Arc::clone(&realm);
    let registry = FakeRegistry::serve(image.clone(), move |request| {
        let authorization = request.headers.get("authorization").map(String::as_str);
        // jane:secret
        let is_jane = authorization == Some("Basic amFuZTpzZWNyZXQ=");
        if request.path.starts_with("/token?") {
            let right =
                request.path.contains("service=test") && request.path.contains("scope=repository%3Aa%3Apull");
            return Some(if is_jane && right {
                Reply::ok(br#"{"token":"t1"}"#)
            } else {
                Reply::status(401)
            });
        }
        if (scheme == "Basic" && is_jane) || (scheme == "Bearer" && authorization == Some("Bearer t1")) {
            return Some(honest(&image, request));
        }
        let challenge = match scheme {
            "Basic" => "Basic realm=\"test\"".to_owned(),
            _ => {
                let address = known_realm.get().unwrap();
                format!(
                    "Bearer realm=\"http://{address}/token\",service=\"test\",scope=\"repository:a:pull\""
                )
            }
        };
        Some(Reply::status(401).with("www-authenticate", &challenge))
    })
    .await;
    realm.set(registry.address.clone()).unwrap();
    registry
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_answer_basic_and_token_challenges() {
    let jane = |password: &str| Credentials::Basic {
        username: "jane".into(),
        password: password.into(),
    };
    for scheme in ["Basic", "Bearer"] {
        let registry = start_with_tokens(scheme).await;
        let dir = TempDir::new().unwrap();
        let store = open(&registry, &dir, |_| {});
        let reference = format!("{}/a:1", registry.address);
        for wrong in [None, Some(jane("wrong")), Some(Credentials::Token("t2".into()))] {
            let error = store
                .pull(&reference, wrong, PullPolicy::Always, silent())
                .await
                .unwrap_err();
            assert_eq!(error.kind(), PullErrorKind::Unauthorized, "{scheme}: {error}");
            assert!(error.to_string().contains(&reference), "{error}");
        }
        store
            .pull(&reference, Some(jane("secret")), PullPolicy::Always, silent())
            .await
            .unwrap();
    }
    assert!(!format!("{:?}", jane("secret")).contains("secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_not_there_is_named() {
    let address = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let registry = FakeRegistry {
        address: address.clone(),
        asked: std::sync::Arc::default(),
    };
    let error = pull_error(&registry, |_| {}).await;
    assert_eq!(error.kind(), PullErrorKind::Unavailable);
    assert!(
        error.to_string().contains(&address) && std::error::Error::source(&error).is_some(),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_needs_the_operators_word() {
    let was_asked = std::sync::Arc::new(AtomicBool::new(false));
    let seen = std::sync::Arc::clone(&was_asked);
    let registry = FakeRegistry::serve(small_image(), move |_| {
        seen.store(true, Ordering::SeqCst);
        None
    })
    .await;
    let error = pull_error(&registry, |config| config.insecure_registries.clear()).await;
    assert_eq!(error.kind(), PullErrorKind::Unavailable, "{error}");
    let is_https =
        matches!(&error, PullError::Unreachable { address, .. } if address.starts_with("https://"));
    assert!(is_https && !was_asked.load(Ordering::SeqCst), "{error}");
}
