//! Entry points of the fuzz targets in `fuzz/` at the top of the repository: documents and first lines that come from the
//! host. Built for fuzzers and for tests only; the tests replay the seeds.

use crate::container::{
    plan::{self, Places, Stdio},
    spec, user,
};
pub use crate::service::fuzz::stdio_preface;

/// A target: its name and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this crate.
pub const TARGETS: &[Target] = &[("oci_spec", oci_spec), ("stdio_preface", stdio_preface)];

/// A runtime specification, planned as a container's init and its process as an exec.
///
/// # Panics
/// When a step of a plan has no name.
pub fn oci_spec(data: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<spec::Spec>(data) else {
        return;
    };
    let places = Places {
        rootfs: "/run/eci/containers/c/rootfs".into(),
        identity_files: "/run/eci/etc".into(),
        devices: "/run/eci/containers/c/devices".into(),
        termination_message: None,
    };
    let identity = user::by_ids("root:x:0:0:root:/root:/bin/sh\n", 0, 0, &[]);
    if let Ok(program) = plan::init(&spec, &identity, &places, Stdio::Terminal) {
        assert!(!program.steps.is_empty());
        for step in &program.steps {
            // What a failed step is called in the answer.
            let text = step.to_string();
            assert!(!text.is_empty());
        }
    }
    if let Some(process) = &spec.process {
        let init = std::fs::File::open("/dev/null").expect("every machine has it");
        let init = std::sync::Arc::new(init.into());
        drop(plan::exec(&spec, process, &identity, init, Stdio::Terminal));
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
