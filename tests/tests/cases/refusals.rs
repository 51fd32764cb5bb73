//! What can't work gets a clear answer, and leaves nothing behind.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::{
    host::{Host, Templates},
    leftovers::Snapshot,
    pod::Pod,
    process::{self, Finished},
    registry,
    stage::Stage,
};

use super::SAY_HELLO;

/// That an image can be neither pulled nor run, for a reason with these words; the group that wants it goes on trying, and
/// can be removed.
fn ensure_not_pulled(host: &Host, image: &str, words: &[&str]) -> Result<()> {
    host.ecictl(&["image", "pull", image])?.refused(1, words)?;
    let pod = Pod::new("unlucky").container("main", image, SAY_HELLO);
    host.try_create(&pod)?.refused(1, words)?;
    let group = host.wait_group("unlucky", "the reason in the status", |group| {
        group["status"]["reason"] == "ImagePullFailed"
    })?;
    let message = group["status"]["message"].as_str().unwrap_or_default();
    for word in words {
        ensure!(
            message.contains(word),
            "expected {word:?} in the status: {message}"
        );
    }
    host.remove("unlucky")
}

pub(crate) fn an_unknown_image_is_named(stage: &mut Stage) -> Result<()> {
    let image = stage.registry.image("demo/nothing:latest");
    ensure_not_pulled(&stage.host, &image, &[&image, "is not known to its registry"])?;
    // An image that exists, by a digest that does not.
    let image = stage
        .registry
        .image(&format!("demo/tools@sha256:{}", "0".repeat(64)));
    ensure_not_pulled(&stage.host, &image, &[&image, "is not known to its registry"])
}

pub(crate) fn content_with_another_digest_is_not_taken(stage: &mut Stage) -> Result<()> {
    // The small image and one more layer, which goes bad in the registry.
    let layout = stage.dir().join("bad");
    copy_layout(&stage.tools_layout(), &layout)?;
    let file = stage.dir().join("bad.txt");
    fs::write(&file, "this will not arrive\n".repeat(100)).context("write a file")?;
    process::run(
        Command::new("umoci")
            .args(["insert", "--image"])
            .arg(format!("{}:latest", layout.display()))
            .arg(&file)
            .arg("/bad.txt"),
        b"",
    )?
    .success()?;
    stage.registry.push(&layout, "demo/bad:latest")?;
    let layers = registry::layers(&layout)?;
    let bad = layers.last().context("find the last layer")?;
    stage.registry.corrupt(bad)?;
    let image = stage.registry.image("demo/bad:latest");
    ensure_not_pulled(&stage.host, &image, &["Digest of", bad])
}

fn copy_layout(from: &Path, to: &Path) -> Result<()> {
    process::run(Command::new("cp").arg("-a").arg(from).arg(to), b"")?
        .success()
        .map(|_| ())
}

pub(crate) fn an_unreachable_registry_is_named(stage: &mut Stage) -> Result<()> {
    // Nobody listens there.
    let registry = registry::free_address()?;
    let image = format!("{registry}/demo/tools:latest");
    ensure_not_pulled(
        &stage.host,
        &image,
        &["Failed to reach registry", &registry.to_string(), "refused"],
    )
}

/// That a group is not accepted, for a reason with these words.
fn ensure_not_accepted(host: &Host, pod: &Pod, words: &[&str]) -> Result<()> {
    host.try_create(pod)?.refused(1, words)
}

pub(crate) fn more_than_twenty_containers_are_too_many(stage: &mut Stage) -> Result<()> {
    let mut pod = Pod::new("crowd");
    for index in 0..21 {
        pod = pod.container(&format!("c{index}"), &stage.tools(), SAY_HELLO);
    }
    ensure_not_accepted(&stage.host, &pod, &["spec.containers", "21", "20"])
}

pub(crate) fn reserved_ports_are_refused(stage: &mut Stage) -> Result<()> {
    let ports = json!({ "ports": [{ "containerPort": 10250 }] });
    let pod = Pod::new("greedy").container_with("main", &stage.tools(), SAY_HELLO, ports);
    let words = ["spec.containers[0].ports[0].containerPort", "10250", "reserved"];
    ensure_not_accepted(&stage.host, &pod, &words)
}

pub(crate) fn a_container_without_memory_is_refused(stage: &mut Stage) -> Result<()> {
    let none = json!({ "resources": { "limits": { "memory": "0" } } });
    let pod = Pod::new("modest").container_with("main", &stage.tools(), SAY_HELLO, none);
    let words = ["spec.containers[0].resources.limits.memory", "0"];
    ensure_not_accepted(&stage.host, &pod, &words)
}

pub(crate) fn a_malformed_manifest_is_refused_with_line_and_field(stage: &mut Stage) -> Result<()> {
    let head = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: bad\nspec:\n";
    for (manifest, words) in [
        // Not YAML: there are no fields yet.
        (
            format!("{head}  containers: [\n  - x: }}\n"),
            &["not valid YAML", "line 7"][..],
        ),
        // YAML, but a number where a list belongs.
        (
            format!("{head}  containers:\n  - name: a\n    image: b\n    command: 7\n"),
            &["spec.containers[0].command", "line 9"],
        ),
        // A field that is spelt wrong.
        (
            format!("{head}  containers:\n  - name: a\n    imgae: b\n"),
            &["spec.containers[0].imgae (line 8)", "no such field"],
        ),
    ] {
        let answer = stage
            .host
            .ecictl_with(&["create", "-f", "-"], manifest.as_bytes())?;
        answer.refused(1, words).with_context(|| manifest.clone())?;
    }
    Ok(())
}

/// A shell command in a mount namespace of its own, where files may be hidden from one program.
fn elsewhere(script: &str, words: &[&Path]) -> Result<Finished> {
    process::run(
        Command::new("unshare")
            .args(["--mount", "sh", "-ec", script, "sh"])
            .args(words),
        b"",
    )
}

pub(crate) fn a_host_without_usable_kvm_says_so(stage: &mut Stage) -> Result<()> {
    let agent = stage.product.program("eci-agent");
    let config = stage.host.config();
    // A /dev/kvm that opens, on a processor that shows neither vmx nor svm.
    let plain = stage.dir().join("cpuinfo");
    let processor = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let without = |line: &str| {
        let words = line.split(' ').filter(|word| !matches!(*word, "svm" | "vmx"));
        words.collect::<Vec<_>>().join(" ") + "\n"
    };
    fs::write(&plain, processor.lines().map(without).collect::<String>()).context("write a cpuinfo")?;
    let check = elsewhere(
        "mount --bind \"$1\" /proc/cpuinfo; exec \"$2\" check --config \"$3\"",
        &[&plain, &agent, &config],
    )?;
    ensure!(
        check.code == 1
            && check
                .stdout
                .contains("cannot run ordinary guests (no vmx/svm in /proc/cpuinfo)"),
        "check on a processor without: {check}"
    );
    // No /dev/kvm at all: a directory is there instead, which can't be opened for writing.
    let hidden = stage.dir().join("hidden");
    fs::create_dir_all(&hidden).context("make a directory")?;
    let without_kvm = "mkdir -p \"$1/net\"; touch \"$1/net/tun\" \"$1/null\" \"$1/urandom\"; \
                       for f in net/tun null urandom; do mount --bind /dev/$f \"$1/$f\"; done; mount --rbind \"$1\" /dev; ";
    let check = elsewhere(
        &format!("{without_kvm} exec \"$2\" check --config \"$3\""),
        &[&hidden, &agent, &config],
    )?;
    ensure!(
        check.code == 1
            && check.stdout.contains("/dev/kvm does not open")
            && check.stdout.contains("modprobe kvm"),
        "check without /dev/kvm: {check}"
    );
    let serve = elsewhere(
        &format!("{without_kvm} exec \"$2\" serve --config \"$3\""),
        &[&hidden, &agent, &config],
    )?;
    serve.refused(
        1,
        &["/dev/kvm does not open", "this host can't run container groups"],
    )?;

    // It goes away while the agent serves.
    let kvm = HiddenKvm::hide()?;
    let pod = Pod::new("grounded").container("main", &stage.tools(), SAY_HELLO);
    let created = stage.host.try_create(&pod)?;
    stage.host.remove("grounded")?;
    kvm.show()?;
    created.refused(1, &["The sandbox did not start", "/dev/kvm"])
}

/// `/dev/kvm` under another name, until this is dropped.
struct HiddenKvm;

const KVM: &str = "/dev/kvm";
const HIDDEN_KVM: &str = "/dev/kvm.hidden";

impl HiddenKvm {
    fn hide() -> Result<Self> {
        fs::rename(KVM, HIDDEN_KVM).context("hide /dev/kvm")?;
        Ok(Self)
    }

    fn show(self) -> Result<()> {
        fs::rename(HIDDEN_KVM, KVM).context("show /dev/kvm again")
    }
}

impl Drop for HiddenKvm {
    fn drop(&mut self) {
        // It was shown already, unless the case failed before.
        let _ = fs::rename(HIDDEN_KVM, KVM);
    }
}

pub(crate) fn a_full_disk_ends_a_pull_and_nothing_else(stage: &mut Stage) -> Result<()> {
    /// Room for the state of an agent and the small image.
    const DISK: &str = "size=48m";
    /// What is left of it then: enough for the agent's records, too little for another image.
    const LEFT_BYTES: u64 = 1 << 20;
    stage
        .registry
        .push(&stage.product.images.join("web"), "demo/web:latest")?;
    let image = stage.registry.image("demo/web:latest");
    let disk = Disk::mount(&stage.dir().join("small"), DISK)?;
    stage.without_host(|stage| {
        let dir = stage.dir().join("other");
        let host = Host::start(
            &stage.product,
            &dir,
            &disk.0.join("state"),
            &stage.registry.name(),
            Templates::Off,
        )?;
        host.ecictl(&["image", "pull", &stage.tools()])?.success()?;
        let before = Snapshot::take(&host)?;
        let filler = disk.fill(LEFT_BYTES)?;
        let words = ["No space left"];
        host.ecictl(&["image", "pull", &image])?.refused(1, &words)?;
        before.ensure_same(&host)?;
        let pod = Pod::new("squeezed").container("main", &image, SAY_HELLO);
        host.try_create(&pod)?.refused(1, &words)?;
        host.remove("squeezed")?;
        before.ensure_same(&host)?;
        // With room again everything goes on, and what was there is as good as it was.
        fs::remove_file(filler).context("remove the filler")?;
        let pod = Pod::new("roomy").container("main", &stage.tools(), SAY_HELLO);
        host.create(&pod)?;
        host.exec("roomy", "main", &["/bin/true"])?.success()?;
        host.remove("roomy")?;
        before.ensure_same(&host)?;
        host.ecictl(&["image", "pull", &image])?.success()?;
        host.stop()
    })
}

/// A small file system in memory; unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(dir: &Path, options: &str) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        process::run(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", options, "tmpfs"])
                .arg(dir),
            b"",
        )?
        .success()?;
        Ok(Self(dir.to_owned()))
    }

    /// Fills it with one file, up to some bytes.
    fn fill(&self, left_bytes: u64) -> Result<PathBuf> {
        let path = self.0.join("filler");
        let mut file = File::create(&path).context("make a filler")?;
        let zeros = vec![0; 1 << 16];
        let full = loop {
            if let Err(error) = file.write_all(&zeros) {
                break error;
            }
        };
        ensure!(
            full.kind() == io::ErrorKind::StorageFull,
            "the disk is not full but: {full}"
        );
        let length = file.metadata().context("look at the filler")?.len();
        file.set_len(length.saturating_sub(left_bytes))
            .context("shorten the filler")?;
        Ok(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What is left mounted shows in the comparison that follows the case.
        let _ = process::run(Command::new("umount").arg(&self.0), b"");
    }
}
