//! Templates: guests captured when their init was ready, one per class of group, which groups go on from instead of booting.
//!
//! ```text
//!  (none) --first wanted--> Building --captured, digests written--> Ready --refused by a shim--> (none)
//!     ^                        |                                      ^
//!     +---- after RETRY_AFTER -+ Failed        found at start, digests right
//! ```
//! A template holds no group's data: it is captured before its guest has a name, an address or a disk's content. It lives
//! with the host's uptime, in memory ([`crate::config::Config::run_dir`]), under a name made of everything that it
//! depends on; templates of other names are removed at start. Building goes on in the background, one at a time, and a
//! group that finds no template boots.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use protocol::sandbox::{Network as NetworkOptions, SandboxOptions, Template};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::{
    bundle::Bundle,
    sealed::{self, Digests, hex},
    shim::ShimProgram,
    standby::Shape,
};
use crate::{
    config::{Config, TemplateConfig},
    error::{Error, ErrorKind, Result},
    group::status::GroupId,
    random,
    scratch::ScratchDisks,
};

/// Changes when what a template means to a shim changes.
const FORMAT: u32 = 1;
/// A class whose template could not be made is tried again no sooner.
const RETRY_AFTER: Duration = Duration::from_secs(300);
/// Templates that are made or wait for it.
const MAX_BUILDING: usize = 2;
/// The files a capture makes. A shim adds a hint later, `written`, which is no part of what is sealed.
const FILES: [&str; 2] = ["state", "memory"];
const MANIFEST: &str = "manifest.json";
/// Never a group's address: no frame leaves a template, and a group is given its own before a container runs.
const TEMPLATE_MAC: &str = "02:ec:1f:ff:ff:fe";

/// Groups that can go on from the same template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Class {
    /// vCPUs that the guest knows of.
    pub n_possible_vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// Memory that can be plugged beside.
    pub hotplug_mib: u64,
    /// It has an interface.
    pub has_network: bool,
}

impl Class {
    /// The class of a sandbox of that shape; `None` when it is larger than templates are made for.
    pub fn of(shape: Shape, has_network: bool, config: &TemplateConfig) -> Option<Self> {
        let fits = config.enabled && shape.memory_mib <= config.max_memory_mib;
        fits.then(|| Self {
            n_possible_vcpus: shape.n_possible_vcpus.next_power_of_two(),
            memory_mib: shape.memory_mib,
            hotplug_mib: shape.hotplug_mib,
            has_network,
        })
    }

    /// A name for directories and people.
    fn name(self) -> String {
        let network = if self.has_network { "net" } else { "nonet" };
        format!(
            "{}vcpu-{}+{}mib-{network}",
            self.n_possible_vcpus, self.memory_mib, self.hotplug_mib
        )
    }
}

/// A class's template, as far as there is one.
#[derive(Debug)]
enum State {
    Building,
    Ready { directory: PathBuf, last_used: Instant },
    Failed { at: Instant },
}

/// What a template consists of, written beside it when it is complete.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    /// Of each file.
    digests: Digests,
}

/// What templates are made with.
#[derive(Debug, Clone)]
struct Workshop {
    shim: ShimProgram,
    scratch: ScratchDisks,
    /// Where all sandboxes have their bundles: one that is left behind is buried from there at the agent's next start.
    bundles: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    vmm: PathBuf,
    kernel_args: String,
}

/// All templates of this host. Clones share them.
#[derive(Debug, Clone)]
pub struct Templates {
    directory: PathBuf,
    /// Of everything a template depends on beside its class.
    identity: String,
    config: TemplateConfig,
    workshop: Workshop,
    states: Arc<Mutex<HashMap<Class, State>>>,
    /// A build takes a processor for as long as a boot does.
    one_at_a_time: Arc<Semaphore>,
}

impl Templates {
    /// Removes the templates that fit no more. Those of earlier runs of the agent are used once their digests were
    /// verified, in the background; a class whose template is missing has one built when it is first wanted.
    ///
    /// # Errors
    /// The directory cannot be made, or a file that templates depend on is not there.
    pub fn open(config: &Config, shim: ShimProgram, scratch: ScratchDisks) -> Result<Self> {
        let directory = config.run_dir.join("templates");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(failed(format!("make {}", directory.display())))?;
        let files = &config.files;
        let identity = identity(
            &[&files.kernel, &files.initrd, &files.vmm],
            &config.sandbox.kernel_args,
        )?;
        let templates = Self {
            workshop: Workshop {
                shim,
                scratch,
                bundles: config.bundles_dir(),
                kernel: files.kernel.clone(),
                initrd: files.initrd.clone(),
                vmm: files.vmm.clone(),
                kernel_args: config.sandbox.kernel_args.clone(),
            },
            config: config.template.clone(),
            directory,
            identity,
            states: Arc::default(),
            one_at_a_time: Arc::new(Semaphore::new(1)),
        };
        templates.remove_others()?;
        Ok(templates)
    }

    /// Where the template of a class is, when there is one; else one is made in the background for those who come later.
    pub fn find(&self, class: Class) -> Option<Template> {
        let mut states = self.lock();
        match states.get_mut(&class) {
            Some(State::Ready { directory, last_used }) if directory.join(MANIFEST).exists() => {
                *last_used = Instant::now();
                return Some(Template {
                    directory: directory.to_string_lossy().into_owned(),
                    n_possible_vcpus: class.n_possible_vcpus,
                    ..Template::default()
                });
            }
            Some(State::Building) => return None,
            Some(State::Failed { at }) if at.elapsed() < RETRY_AFTER => return None,
            _ => {}
        }
        // Whoever asks for groups of many sizes does not keep the host busy with templates.
        let n_building = states
            .values()
            .filter(|state| matches!(state, State::Building))
            .count();
        if n_building >= MAX_BUILDING {
            return None;
        }
        states.insert(class, State::Building);
        let templates = self.clone();
        tokio::spawn(async move { templates.build(class).await });
        None
    }

    /// The template of a class was of no use: it is removed, and the next group that wants it has another one made.
    pub fn refused(&self, class: Class, why: &str) {
        let mut states = self.lock();
        // Another group may have said so before, and a new one be under way.
        if matches!(states.get(&class), Some(State::Ready { .. })) {
            tracing::warn!(
                class = class.name(),
                why,
                "a template was of no use and is removed"
            );
            states.remove(&class);
            self.remove(&self.place(class));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Class, State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, class: Class) -> PathBuf {
        self.directory.join(format!("{}-{}", self.identity, class.name()))
    }

    /// Takes over or makes the template of a class that is [`State::Building`].
    async fn build(self, class: Class) {
        let begun = Instant::now();
        let result = match self.one_at_a_time.acquire().await {
            Ok(_permit) => self.verify_or_capture(class).await,
            Err(_) => return,
        };
        let state = match result {
            Ok(directory) => {
                tracing::info!(
                    class = class.name(),
                    seconds = begun.elapsed().as_secs_f64(),
                    "template is ready"
                );
                State::Ready {
                    directory,
                    last_used: Instant::now(),
                }
            }
            Err(error) => {
                tracing::warn!(class = class.name(), error = %error.chain(), "no template: groups of this class boot");
                State::Failed { at: Instant::now() }
            }
        };
        self.lock().insert(class, state);
        self.remove_least_used();
    }

    async fn verify_or_capture(&self, class: Class) -> Result<PathBuf> {
        let place = self.place(class);
        let found = {
            let place = place.clone();
            blocking(move || Ok(verify(&place))).await?
        };
        if found {
            return Ok(place);
        }
        self.remove(&place);
        let draft = place.with_extension("draft");
        self.remove(&draft);
        make_private_directory(&draft)?;
        let captured = self.capture(class, &draft).await;
        if captured.is_err() {
            self.remove(&draft);
        }
        captured?;
        blocking(move || {
            seal(&draft)?;
            fs::rename(&draft, &place).map_err(failed(format!("keep {}", place.display())))?;
            Ok(place)
        })
        .await
    }

    /// Boots a guest that belongs to nobody, and captures it.
    async fn capture(&self, class: Class, draft: &Path) -> Result<()> {
        let workshop = &self.workshop;
        let id = random::group_id()?;
        let bundle = Bundle::new(workshop.bundles.join(id.as_str()));
        bundle
            .create()
            .map_err(failed(format!("make bundle {}", bundle.dir().display())))?;
        let result = self.capture_in(class, draft, &id, &bundle).await;
        let disks = workshop.scratch.clone();
        if let Err(error) = blocking(move || disks.remove(&id)).await {
            tracing::warn!(error = %error.chain(), "the scratch disk of a template stays");
        }
        self.remove(bundle.dir());
        result
    }

    async fn capture_in(&self, class: Class, draft: &Path, id: &GroupId, bundle: &Bundle) -> Result<()> {
        let workshop = &self.workshop;
        let scratch = {
            let (disks, id) = (workshop.scratch.clone(), id.clone());
            blocking(move || disks.create(&id)).await?
        };
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let options = SandboxOptions {
            n_vcpus: 1,
            memory_mib: class.memory_mib,
            hotplug_mib: class.hotplug_mib,
            // Nobody made this tap: opening it makes one that is gone with its VMM.
            network: class
                .has_network
                .then(|| NetworkOptions {
                    tap: format!("ecit{}", &id.as_str()[id.as_str().len() - 8..]),
                    mac: TEMPLATE_MAC.to_owned(),
                    ..NetworkOptions::default()
                })
                .into(),
            scratch_path: text(&scratch),
            kernel_path: text(&workshop.kernel),
            initrd_path: text(&workshop.initrd),
            vmm_path: text(&workshop.vmm),
            kernel_args: workshop.kernel_args.clone(),
            template: Some(Template {
                n_possible_vcpus: class.n_possible_vcpus,
                ..Template::default()
            })
            .into(),
            capture_directory: text(draft),
            ..SandboxOptions::default()
        };
        let captured = async {
            let connection = workshop.shim.start(id.as_str(), bundle).await?;
            connection.start_sandbox(bundle.dir(), &options).await?;
            connection.shutdown_sandbox().await
        };
        let result = captured.await;
        if result.is_err() {
            let words = bundle.last_words();
            tracing::debug!(words, "a template was not captured");
            if let Err(error) = workshop.shim.bury(id.as_str(), bundle).await {
                tracing::warn!(error = %error.chain(), "the shim of a template stays");
            }
        }
        result
    }

    /// Keeps at most as many templates as configured.
    fn remove_least_used(&self) {
        let mut states = self.lock();
        loop {
            let ready = states.iter().filter_map(|(class, state)| match state {
                State::Ready { last_used, .. } => Some((*class, *last_used)),
                _ => None,
            });
            let ready: Vec<_> = ready.collect();
            if ready.len() <= self.config.max_templates {
                return;
            }
            let Some((class, _)) = ready.into_iter().min_by_key(|(_, last_used)| *last_used) else {
                return;
            };
            states.remove(&class);
            // VMs that were made from it keep its pages; only the names go.
            self.remove(&self.place(class));
        }
    }

    /// Removes what has another identity, and drafts.
    fn remove_others(&self) -> Result<()> {
        let listing =
            fs::read_dir(&self.directory).map_err(failed(format!("list {}", self.directory.display())))?;
        for entry in listing.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with(&format!("{}-", self.identity)) || name.ends_with(".draft") {
                self.remove(&entry.path());
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a template stays");
            }
            _ => {}
        }
    }
}

fn failed(what: String) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::with_source(ErrorKind::Internal, what, error)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::with_source(
            ErrorKind::Internal,
            "a blocking task ended",
            error,
        ))
    })
}

fn make_private_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(failed(format!("make {}", path.display())))
}

/// A name for the files and arguments a guest is made of. Files are told apart by what changes whenever they do, for
/// reading them takes longer than a start.
fn identity(files: &[&Path], kernel_args: &str) -> Result<String> {
    let mut digest = Sha256::new();
    digest.update(FORMAT.to_le_bytes());
    for path in files {
        let metadata = fs::metadata(path).map_err(failed(format!("look at {}", path.display())))?;
        for number in [
            metadata.dev(),
            metadata.ino(),
            metadata.size(),
            metadata.mtime().cast_unsigned(),
            metadata.mtime_nsec().cast_unsigned(),
        ] {
            digest.update(number.to_le_bytes());
        }
    }
    digest.update(kernel_args);
    Ok(hex(&digest.finalize()[..8]))
}

/// Writes the digests of a complete template.
fn seal(directory: &Path) -> Result<()> {
    let manifest = Manifest {
        format: FORMAT,
        digests: sealed::digests(directory, &FILES)
            .map_err(failed(format!("read {}", directory.display())))?,
    };
    let text = serde_json::to_vec(&manifest)
        .map_err(|error| Error::with_source(ErrorKind::Internal, "encode a manifest", error))?;
    let path = directory.join(MANIFEST);
    fs::write(&path, text).map_err(failed(format!("write {}", path.display())))
}

/// Whether a complete template is there, as it was sealed.
fn verify(directory: &Path) -> bool {
    let manifest = fs::read(directory.join(MANIFEST))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok());
    let Some(manifest) = manifest.filter(|manifest| manifest.format == FORMAT) else {
        return false;
    };
    match sealed::check(directory, &FILES, &manifest.digests) {
        Ok(()) => true,
        Err(why) => {
            tracing::warn!(directory = %directory.display(), why, "a template is not what was sealed");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn sealed() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("state"), b"registers").unwrap();
        let memory = File::create(directory.path().join("memory")).unwrap();
        memory.set_len(1 << 20).unwrap();
        seal(directory.path()).unwrap();
        directory
    }

    #[test]
    fn a_template_is_what_was_sealed_or_is_not_used() {
        let directory = sealed();
        assert!(verify(directory.path()));
        for (file, content) in [("state", b"registerz".as_slice()), ("memory", b"short")] {
            let directory = sealed();
            fs::write(directory.path().join(file), content).unwrap();
            assert!(!verify(directory.path()), "{file}");
        }
        fs::remove_file(directory.path().join(MANIFEST)).unwrap();
        assert!(!verify(directory.path()));
    }

    #[test]
    fn identity_changes_with_each_file_and_the_arguments() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        fs::write(&a, "kernel").unwrap();
        fs::write(&b, "init").unwrap();
        let first = identity(&[&a, &b], "").unwrap();
        assert_eq!(identity(&[&a, &b], "").unwrap(), first);
        assert_ne!(identity(&[&a, &b], "debug").unwrap(), first);
        fs::write(&b, "other init").unwrap();
        assert_ne!(identity(&[&a, &b], "").unwrap(), first);
    }

    #[test]
    fn classes_round_up_vcpus_and_keep_memory() {
        let config = TemplateConfig::default();
        let shape = Shape {
            n_vcpus: 2,
            memory_mib: 512,
            n_possible_vcpus: 3,
            hotplug_mib: 1536,
        };
        let class = Class::of(shape, true, &config).unwrap();
        assert_eq!((class.n_possible_vcpus, class.memory_mib), (4, 512));
        assert_eq!(class.name(), "4vcpu-512+1536mib-net");
        let large = Shape {
            memory_mib: config.max_memory_mib + 1,
            ..shape
        };
        assert_eq!(Class::of(large, true, &config), None);
        let off = TemplateConfig {
            enabled: false,
            ..config
        };
        assert_eq!(Class::of(shape, true, &off), None);
    }
}
