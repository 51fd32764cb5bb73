//! Images from end to end: pushed to a real registry, pulled, and looked at through the kernel.

mod fake;
mod hostile;
mod slice;
mod storing;
mod support;

use std::sync::Arc;

use tar::EntryType;
use tempfile::TempDir;

use self::slice::{Content, Seen, check_readers_agree};
use self::support::{Attrs, LayerBuilder, TestImage, TestRegistry};
use super::{Image, ImageConfig, ImageStore, Progress, PullPolicy};

fn store_for(registry: &TestRegistry, dir: &TempDir) -> ImageStore {
    let config = ImageConfig {
        insecure_registries: vec![registry.address.clone()],
        ..ImageConfig::default()
    };
    ImageStore::open(dir.path(), config).unwrap()
}

fn silent() -> Progress {
    Arc::new(|_| {})
}

fn file<'s>(seen: &'s Seen, path: &str) -> &'s slice::SeenFile {
    seen.get(path.as_bytes())
        .unwrap_or_else(|| panic!("no {path} in {:?}", seen.keys()))
}

fn has(seen: &Seen, path: &str) -> bool {
    seen.contains_key(path.as_bytes())
}

/// Pushes an image of these archives, pulls it, and shows its tree.
async fn round_trip(archives: &[Vec<u8>]) -> Option<(Image, Seen, TempDir)> {
    let registry = TestRegistry::start("")?;
    registry.push("a", "1", &TestImage::from_archives(archives)).await;
    let dir = TempDir::new().unwrap();
    let store = store_for(&registry, &dir);
    let image = store
        .pull(&registry.reference("a:1"), None, PullPolicy::Always, silent())
        .await
        .unwrap();
    let seen = check_readers_agree(image.rootfs.files());
    Some((image, seen, dir))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_every_kind_of_file_reaches_the_kernel() {
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    let big: Vec<u8> = (0..3_000_000u32).flat_map(|n| (n / 3).to_le_bytes()).collect();
    let long = format!("long/{}/{}", "d".repeat(200), "f".repeat(255));
    let mut lower = LayerBuilder::new();
    lower
        .dir("./", 0o755)
        .dir("bin/", 0o711)
        .file_with(
            "bin/su",
            &Attrs {
                mode: 0o4755,
                uid: 0,
                gid: 42,
                ..Attrs::default()
            },
            b"#!/bin/sh\n",
        )
        .file_with(
            "bin/ping",
            &Attrs {
                mode: 0o755,
                uid: 70_000,
                gid: 4_000_000,
                mtime: 12,
                xattrs: vec![
                    ("security.capability".into(), capability.clone()),
                    ("user.note".into(), b"line\nline".to_vec()),
                    ("trusted.overlay.opaque".into(), b"y".to_vec()),
                ],
            },
            b"ping",
        )
        .link("bin/ping6", "bin/ping")
        .symlink("sbin", "bin")
        .file("empty", b"")
        .file("big", &big)
        .file(&long, b"deep")
        .add(
            EntryType::Char,
            "dev/null",
            &Attrs {
                mode: 0o666,
                ..Attrs::default()
            },
            None,
            Some((1, 3)),
            b"",
        )
        .add(
            EntryType::Block,
            "dev/loop",
            &Attrs {
                mode: 0o660,
                ..Attrs::default()
            },
            None,
            Some((259, 70_000)),
            b"",
        )
        .add(EntryType::Fifo, "dev/pipe", &Attrs::default(), None, None, b"")
        .symlink("far", &"x/".repeat(1500))
        .file("gone", b"gone")
        .dir("opaque/", 0o755)
        .file("opaque/old", b"old")
        .dir("becomes-file/", 0o755)
        .file("becomes-file/inside", b"x")
        .file("becomes-dir", b"x");
    let mut upper = LayerBuilder::new();
    upper
        .file("opaque/new", b"new")
        .whiteout("opaque/.wh..wh..opq")
        .whiteout(".wh.gone")
        .file("becomes-file", b"now a file")
        .dir("becomes-dir/", 0o700)
        .file("becomes-dir/inside", b"y")
        .link("ping-too", "sbin/ping")
        .file("sbin/through-link", b"z");
    let Some((image, seen, _dir)) = round_trip(&[lower.finish(), upper.finish()]).await else {
        return;
    };

    assert_eq!(file(&seen, "bin/su").mode, 0o4755);
    assert_eq!(file(&seen, "bin/su").gid, 42);
    let ping = file(&seen, "bin/ping");
    assert_eq!(
        (ping.uid, ping.gid, ping.mtime, ping.n_links),
        (70_000, 4_000_000, 12, 3)
    );
    assert_eq!(
        ping.xattrs,
        [
            (b"security.capability".to_vec(), capability),
            (b"user.note".to_vec(), b"line\nline".to_vec())
        ]
    );
    assert_eq!(file(&seen, "bin/ping6").same_as, b"bin/ping");
    assert_eq!(file(&seen, "ping-too").same_as, b"bin/ping");
    assert_eq!(file(&seen, "sbin").content, Content::Symlink(b"bin".to_vec()));
    assert_eq!(
        file(&seen, "bin/through-link").content,
        Content::File(b"z".to_vec())
    );
    assert_eq!(file(&seen, "empty").content, Content::File(Vec::new()));
    assert_eq!(file(&seen, "big").content, Content::File(big));
    assert_eq!(file(&seen, &long).content, Content::File(b"deep".to_vec()));
    assert_eq!(file(&seen, "dev/null").content, Content::Device(true, 1, 3));
    assert_eq!(
        file(&seen, "dev/loop").content,
        Content::Device(false, 259, 70_000)
    );
    assert_eq!(file(&seen, "dev/pipe").content, Content::Fifo);
    assert_eq!(
        file(&seen, "far").content,
        Content::Symlink("x/".repeat(1500).into_bytes())
    );
    assert_eq!(file(&seen, "dev").mode, 0o755);
    assert!(!has(&seen, "gone") && !has(&seen, "opaque/old") && has(&seen, "opaque/new"));
    assert_eq!(
        file(&seen, "becomes-file").content,
        Content::File(b"now a file".to_vec())
    );
    assert_eq!(file(&seen, "becomes-dir").mode, 0o700);
    assert!(has(&seen, "becomes-dir/inside"));
    assert_eq!(image.read_file("/sbin/ping").unwrap().unwrap(), b"ping");
    assert_eq!(image.read_file("nothing").unwrap(), None);
    assert_eq!(image.read_file("bin").unwrap(), None);
}
