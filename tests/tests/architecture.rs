//! The rules of `ARCHITECTURE.md` that a compiler does not check: who may depend on whom, where unsafe code may live,
//! and that the documents name only paths that exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate is in the workspace")
        .to_owned()
}

fn sources(crate_dir: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        for entry in entries {
            let path = entry.expect("readable source tree").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(crate_dir).join("src"), &mut found);
    found.sort();
    assert!(!found.is_empty(), "no sources in {crate_dir}");
    found
}

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version=1",
            "--locked",
            "--offline",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

/// Normal (not dev, not build) dependencies of each package in the graph, by name.
fn normal_dependencies(metadata: &serde_json::Value) -> BTreeMap<String, BTreeSet<String>> {
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let names: BTreeMap<String, String> = list(&metadata["packages"])
        .iter()
        .map(|package| (text(&package["id"]), text(&package["name"])))
        .collect();
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in list(&metadata["resolve"]["nodes"]) {
        let of = graph.entry(names[&text(&node["id"])].clone()).or_default();
        for dependency in list(&node["deps"]) {
            if list(&dependency["dep_kinds"])
                .iter()
                .any(|kind| kind["kind"].is_null())
            {
                of.insert(names[&text(&dependency["pkg"])].clone());
            }
        }
    }
    graph
}

fn reachable(graph: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from.to_owned()];
    while let Some(name) = open.pop() {
        for next in graph.get(&name).into_iter().flatten() {
            if seen.insert(next.clone()) {
                open.push(next.clone());
            }
        }
    }
    seen
}

#[test]
fn crates_depend_only_downwards() {
    let graph = normal_dependencies(&metadata());
    let forbidden: [(&str, &[&str]); 5] = [
        ("agent", &["shim", "vmm", "guest-init", "kvm-ioctls"]),
        ("shim", &["agent", "guest-init"]),
        ("guest-init", &["agent", "shim", "vmm", "kvm-ioctls"]),
        (
            "vmm",
            &[
                "agent",
                "shim",
                "guest-init",
                "protocol",
                "tokio",
                "ttrpc",
                "protobuf",
                "containerd-shim-protos",
            ],
        ),
        ("protocol", &["agent", "shim", "guest-init", "vmm"]),
    ];
    for (name, others) in forbidden {
        let reached = reachable(&graph, name);
        assert!(graph.contains_key(name), "no crate {name}");
        for other in others {
            assert!(
                !reached.contains(*other),
                "{name} must not depend on {other}, not even through others"
            );
        }
    }
}

/// Modules of `vmm` from low to high: a module may use only those of its own layer and lower ones.
const VMM_LAYERS: &[&[&str]] = &[
    &["config", "rate_limiter"],
    &["sys", "control"],
    &["irq", "bus"],
    &["kvm", "memory"],
    &["devices"],
    &["arch"],
    &["vcpu"],
    &["vm"],
    &["resources", "snapshot"],
    &["reporter"],
    &["builder"],
    &["event_loop"],
    &["fuzz"],
];

#[test]
fn vmm_modules_use_only_lower_layers() {
    let layer = |module: &str| VMM_LAYERS.iter().position(|names| names.contains(&module));
    let mut wrong = Vec::new();
    for path in sources("vmm") {
        let relative = path.strip_prefix(root().join("vmm/src")).expect("below vmm/src");
        let own = relative
            .components()
            .next()
            .expect("not empty")
            .as_os_str()
            .to_string_lossy()
            .replace(".rs", "");
        if own == "lib" || own == "main" {
            continue;
        }
        let Some(own_layer) = layer(&own) else {
            wrong.push(format!(
                "{}: module `{own}` has no layer: add it to VMM_LAYERS",
                relative.display()
            ));
            continue;
        };
        for (number, line) in fs::read_to_string(&path).expect("readable").lines().enumerate() {
            let code = line.trim_start();
            if code.starts_with("//") {
                continue;
            }
            for (position, _) in code.match_indices("crate::") {
                let used: String = code[position + 7..]
                    .chars()
                    .take_while(|letter| letter.is_ascii_alphanumeric() || *letter == '_')
                    .collect();
                if used != own && layer(&used).is_some_and(|used_layer| used_layer > own_layer) {
                    wrong.push(format!(
                        "{}:{}: uses higher layer `{used}`",
                        relative.display(),
                        number + 1
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Where unsafe code may live.
const UNSAFE_PLACES: &[&str] = &[
    "vmm/src/sys/",
    "vmm/src/kvm/",
    "vmm/src/memory/",
    "shim/src/sys",
    "guest-init/src/sys",
    "agent/src/sys",
];

#[test]
fn unsafe_code_lives_only_in_its_modules() {
    let mut wrong = Vec::new();
    for crate_dir in ["agent", "shim", "vmm", "guest-init", "protocol"] {
        for path in sources(crate_dir) {
            let relative = path
                .strip_prefix(root())
                .expect("below the root")
                .to_string_lossy()
                .into_owned();
            if UNSAFE_PLACES.iter().any(|place| relative.starts_with(place)) {
                continue;
            }
            for (number, line) in fs::read_to_string(&path).expect("readable").lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                if ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
                    .iter()
                    .any(|word| code.contains(word))
                {
                    wrong.push(format!("{relative}:{}", number + 1));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "unsafe outside of {UNSAFE_PLACES:?}:\n{}",
        wrong.join("\n")
    );
}

/// Generated wire types stop at the edge of the shim: its pure state machine and slice allocator do no I/O.
const PURE_FILES: &[&str] = &[
    "agent/src/group/plan.rs",
    "agent/src/capacity.rs",
    "shim/src/sandbox/state.rs",
    "shim/src/resource/slices.rs",
    "vmm/src/devices/virtio/block/request.rs",
    "vmm/src/config.rs",
];

#[test]
fn pure_files_do_no_io() {
    let mut wrong = Vec::new();
    for file in PURE_FILES {
        let text = fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        let body = text.split("#[cfg(test)]").next().unwrap_or_default();
        for word in [
            "std::fs",
            "std::net",
            "std::process",
            "tokio::",
            "SystemTime::now",
            "Instant::now",
            "async fn",
        ] {
            if body.contains(word) {
                wrong.push(format!("{file}: {word}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Names of the entries of a directory, without extension.
fn stems(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    entries
        .map(|entry| {
            let path = entry.expect("readable").path();
            path.file_stem()
                .expect("it has a name")
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

/// A target that is in none of the tables would be fuzzed but never replayed by `cargo test`.
#[test]
fn every_fuzz_target_is_built_seeded_and_replayed() {
    let targets = stems(&root().join("fuzz/fuzz_targets"));
    assert_eq!(targets, stems(&root().join("fuzz/seeds")), "targets, seeds");
    let manifest = fs::read_to_string(root().join("fuzz/Cargo.toml")).expect("readable");
    let tables = ["agent", "guest-init", "shim", "vmm"]
        .map(|name| fs::read_to_string(root().join(name).join("src/fuzz.rs")).expect("readable"))
        .concat();
    for target in targets {
        assert!(
            manifest.contains(&format!("name = \"{target}\"")),
            "{target} is not in fuzz/Cargo.toml"
        );
        assert!(
            tables.contains(&format!("(\"{target}\", {target})")),
            "{target} is in no crate's TARGETS"
        );
    }
}

#[test]
fn documents_name_only_paths_that_exist() {
    let mut wrong = Vec::new();
    for document in ["ARCHITECTURE.md", "README.md"] {
        let text =
            fs::read_to_string(root().join(document)).unwrap_or_else(|error| panic!("{document}: {error}"));
        if document == "ARCHITECTURE.md" {
            assert!(
                text.lines().count() < 300,
                "ARCHITECTURE.md is {} lines: under 300",
                text.lines().count()
            );
        }
        for quoted in text.split('`').skip(1).step_by(2) {
            let path_like = quoted.contains('/')
                && !quoted.starts_with(['/', '~', '$', '-'])
                && !quoted.starts_with("target/")
                && quoted
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"_./-".contains(&byte))
                && [
                    "agent/",
                    "shim/",
                    "vmm/",
                    "guest-init/",
                    "protocol/",
                    "kernel-config/",
                    "tests/",
                    "docs/",
                    "fuzz/",
                    "packaging/",
                    "tools/",
                    ".ci/",
                ]
                .iter()
                .any(|top| quoted.starts_with(top));
            if path_like && !root().join(quoted).exists() {
                wrong.push(format!("{document}: `{quoted}`"));
            }
        }
    }
    assert!(wrong.is_empty(), "these do not exist:\n{}", wrong.join("\n"));
}
