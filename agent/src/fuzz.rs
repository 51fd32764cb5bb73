//! Entry points of the fuzz targets in `fuzz/` at the top of the repository: what users, registries and containers send to
//! the agent. Built for fuzzers and for tests only; the tests replay the seeds.

pub use crate::api::eci::fuzz::{eci_signature, http1_requests};
use crate::group::eci::params::Params;
use crate::group::rules::Rules;
use crate::group::{eci, pod, validate};
pub use crate::image::fuzz::{layer_archive, registry_documents};
pub use crate::logs::fuzz::cri_log;

/// A target: its name and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this crate.
pub const TARGETS: &[Target] = &[
    ("cri_log", cri_log),
    ("eci_query", eci_query),
    ("eci_signature", eci_signature),
    ("http1_requests", http1_requests),
    ("layer_archive", layer_archive),
    ("pod_manifest", pod_manifest),
    ("registry_documents", registry_documents),
];

/// The parameters of a CreateContainerGroup.
///
/// # Panics
/// When a group is accepted that the validation refuses.
pub fn eci_query(data: &[u8]) {
    let Ok(params) = Params::parse(form_urlencoded::parse(data)) else {
        return;
    };
    params.fingerprint(&["ClientToken"]);
    if let Ok(group) = eci::to_group(&params, &Rules::default()) {
        assert_eq!(validate::validate(&group).0, [], "accepted although not valid");
    }
}

/// A Pod, YAML or JSON.
///
/// # Panics
/// When a group is accepted that the validation refuses.
pub fn pod_manifest(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match pod::parse_manifest(text) {
        Ok(manifest) => {
            if let Ok(group) = pod::to_group(manifest, &Rules::default()) {
                assert_eq!(validate::validate(&group).0, [], "accepted although not valid");
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Seeds and former findings, and what is left of each when its end is lost.
    #[test]
    fn seeds_replay() {
        for (target, run) in super::TARGETS {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../fuzz/seeds")
                .join(target);
            let mut seeds: Vec<_> = std::fs::read_dir(&directory)
                .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
                .map(|entry| entry.unwrap().path())
                .collect();
            assert!(!seeds.is_empty(), "{} has no seeds", directory.display());
            seeds.sort();
            for seed in seeds {
                println!("{}", seed.display());
                let bytes = std::fs::read(&seed).unwrap();
                run(&bytes);
                for eighth in 0..8 {
                    run(&bytes[..bytes.len() * eighth / 8]);
                }
            }
        }
    }
}
