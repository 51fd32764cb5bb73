//! Fuzz target of what a hostile registry says before the first layer.

use super::super::runtime_config::{ProcessOverrides, process_args};
use super::{
    ImageConfiguration, ImageIndex, ImageManifest, ImageReference, Shape, checked_digest, choose_platform,
    pair_layers, parse_json,
};

/// A challenge, an index, a manifest and a configuration, with a NUL between them.
///
/// # Panics
/// When an index leads to something that is no digest, or layers are not paired one to one.
pub fn registry_documents(data: &[u8]) {
    let mut documents = data.split(|byte| *byte == 0);
    let mut next = || documents.next().unwrap_or_default();
    let (challenge, index, manifest, config) = (next(), next(), next(), next());
    if let Ok(text) = std::str::from_utf8(challenge) {
        for challenge in http_auth::parse_challenges(text).unwrap_or_default() {
            for (_, value) in &challenge.params {
                value.to_unescaped();
            }
        }
        // Users write it, but it is what a registry's answers are compared with.
        drop(text.parse::<ImageReference>());
    }
    let reference: ImageReference = "registry.example/a/b:1".parse().expect("a reference");
    for document in [index, manifest] {
        drop(parse_json::<Shape>(document, "document"));
    }
    if let Ok(index) = parse_json::<ImageIndex>(index, "index")
        && let Ok(digest) = choose_platform(&index, &reference)
    {
        assert!(super::sha256_hex(&digest).is_some(), "{digest:?} is no digest");
    }
    let Ok(config) = parse_json::<ImageConfiguration>(config, "configuration") else {
        return;
    };
    drop(process_args(
        &config,
        &ProcessOverrides::default(),
        b"root:x:0:0::/root:/bin/sh\nbad\nuser:x:1000:100::/:",
        b"users:x:100:user,root\n",
    ));
    if let Ok(manifest) = parse_json::<ImageManifest>(manifest, "manifest") {
        drop(checked_digest(manifest.config(), "configuration"));
        if let Ok(layers) = pair_layers(&manifest, &config, "configuration") {
            assert_eq!(layers.len(), manifest.layers().len());
            assert_eq!(layers.len(), config.rootfs().diff_ids().len());
        }
    }
}
