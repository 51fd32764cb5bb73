//! The long ways: starting a VM and creating containers and execs, step by step, with what undoes them.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{io::AsyncReadExt, net::UnixStream, sync::oneshot, time::timeout};
use vmm::{
    config::{Extent, NetConfig, Origin, VmConfig},
    control::ExitReason,
};

use super::{
    snapshot::{self, CapturedContainer, SCRATCH_FILE, Shape, SnapshotRecord},
    spec::{
        ContainerSpec, ExecSpec, MAX_SPEC_BYTES, MEMORY_FILE, STATE_FILE, SandboxSpec, StartKind,
        WRITTEN_FILE, check_terminal,
    },
};
use crate::{
    console,
    error::{Error, ErrorKind, Result},
    guest::{self, Guest, ProcessKey},
    persist::{Bundle, CONSOLE_FILE, LOG_FILE, ProcessId, VMM_PID_FILE},
    phases::Phases,
    resource::{
        cgroup, network,
        rootfs::{ImageDisk, ImageFiles, ImageSlice},
        slices::{SLICE_BEGIN_ALIGN_BYTES, Slice},
        volumes::Volumes,
    },
    stdio::copy::Streams,
    vmm::{Launcher, VmExit, Vmm, VmmClient, VmmSpec},
};

/// Partition of the scratch slice on the read-write disk.
const SCRATCH_PARTITION: u32 = 1;
/// The guest's vsock address. The device is in the VMM, so no other guest or host socket shares the number space.
const GUEST_CID: u32 = 3;
/// Kernel arguments of every guest: few messages, and a panic ends the VM at once.
const BASE_KERNEL_ARGS: &str = "quiet panic=-1";
/// MTU when the caller gives none.
const DEFAULT_MTU: u16 = 1500;

/// Of the time for a start, this part goes to a template.
const TEMPLATE_TIME_SHARE: u32 = 3;

/// What a host must offer, and how long it may take.
#[derive(Clone)]
pub struct HostConfig {
    /// `/dev/kvm`.
    pub kvm_path: PathBuf,
    /// From the VMM's start to a configured guest.
    pub start_timeout: Duration,
    /// Makes the VMM.
    pub launcher: Launcher,
}

impl std::fmt::Debug for HostConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostConfig")
            .field("kvm_path", &self.kvm_path)
            .finish_non_exhaustive()
    }
}

/// A VM whose guest is configured.
#[derive(Debug)]
pub struct RunningVm {
    /// The VMM.
    pub vmm: Vmm,
    /// The guest init.
    pub guest: Guest,
    /// The read-only disk.
    pub images: Arc<ImageDisk>,
    /// Volumes on the read-write disk.
    pub volumes: Arc<Volumes>,
    /// Microseconds from guest kernel start to init ready.
    pub guest_ready_us: u64,
    /// How the guest came about, in a word: `boot`, `template`, `standby` or `snapshot`.
    pub start_kind: &'static str,
    /// For a snapshot of it.
    pub shape: Shape,
    /// Length of its scratch slice.
    pub scratch_bytes: u64,
    /// Containers it has from its begin, frozen.
    pub captured: HashMap<String, CapturedContainer>,
    /// What the time of the start went into.
    pub phases: Phases,
    /// Why the template that was given was not used.
    pub template_refused: Option<String>,
}

impl RunningVm {
    /// With what its guest answered: the connection, when it was ready, what it was made of.
    fn new(vmm: Vmm, (guest, guest_ready_us, made): (Guest, u64, Made), start_kind: &'static str) -> Self {
        Self {
            vmm,
            guest,
            images: made.images,
            volumes: Volumes::new(),
            guest_ready_us,
            start_kind,
            shape: made.shape,
            scratch_bytes: made.scratch.length_bytes,
            captured: HashMap::new(),
            phases: made.phases,
            template_refused: None,
        }
    }

    /// For commands to the VMM.
    pub fn client(&self) -> VmmClient {
        self.vmm.client()
    }
}

/// Why a start failed.
#[derive(Debug)]
pub struct StartError {
    /// For the caller.
    pub error: Error,
    /// The VM's own reason, if it got so far.
    pub exit: Option<VmExit>,
    /// It was not wanted any more.
    pub cancelled: bool,
}

impl From<Error> for StartError {
    fn from(error: Error) -> Self {
        Self {
            error,
            exit: None,
            cancelled: false,
        }
    }
}

/// Starts the VMM and boots or restores the guest, and configures it. A template that is of no use costs the time to find
/// out, and the guest boots. When this returns an error, nothing is left.
///
/// # Errors
/// [`StartError`], with the VM's reason and the guest's last words.
pub async fn start(
    spec: SandboxSpec,
    bundle: Bundle,
    host: HostConfig,
    mut cancel: oneshot::Receiver<()>,
) -> std::result::Result<RunningVm, StartError> {
    let mut template_refused = None;
    if let StartKind::Template { directory, .. } = &spec.start {
        // A template that does not go on soon will not; there must be time left to boot.
        let host = HostConfig {
            start_timeout: host.start_timeout / TEMPLATE_TIME_SHARE,
            ..host.clone()
        };
        let attempt = Attempt::new(&spec, &bundle, &host, Begin::Template(directory), &mut cancel);
        match attempt.run().await {
            Ok(vm) => return Ok(vm),
            Err(failed) if failed.cancelled => return Err(failed),
            Err(StartError { error, exit, .. }) => {
                let why = match exit {
                    Some(VmExit::Reported(ExitReason::SnapshotRefused { message })) => message,
                    _ => error.chain(),
                };
                tracing::warn!(directory = %directory.display(), why, "the template is of no use: booting instead");
                template_refused = Some(why);
            }
        }
    }
    if let StartKind::Snapshot { directory } = &spec.start {
        // What ran in it cannot be booted: there is no other way than this one.
        let record = read_record(directory, &spec).await?;
        let begin = Begin::Snapshot(directory, record);
        return Attempt::new(&spec, &bundle, &host, begin, &mut cancel)
            .run()
            .await;
    }
    let mut vm = Attempt::new(&spec, &bundle, &host, Begin::Boot, &mut cancel)
        .run()
        .await?;
    vm.template_refused = template_refused;
    Ok(vm)
}

async fn read_record(directory: &Path, spec: &SandboxSpec) -> Result<SnapshotRecord> {
    let directory = directory.to_owned();
    let record = blocking("read a snapshot", move || SnapshotRecord::read(&directory)).await?;
    record.check(spec)?;
    Ok(record)
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, what, error)))
}

/// Boots a guest up to its readiness and captures it into the directory; its VM has ended then.
///
/// # Errors
/// As [`start`]; the directory then holds no template.
pub async fn capture(
    directory: PathBuf,
    spec: SandboxSpec,
    bundle: Bundle,
    host: HostConfig,
    mut cancel: oneshot::Receiver<()>,
) -> std::result::Result<(), StartError> {
    let (state, memory) = vm_files(&directory)?;
    let attempt = Attempt::new(&spec, &bundle, &host, Begin::Boot, &mut cancel);
    let mut vmm = attempt
        .ready_then(async |vmm, _| {
            let vmm = vmm.client();
            vmm.pause().await?;
            vmm.begin_snapshot(state, memory).await?;
            vmm.finish_snapshot().await
        })
        .await?
        .0;
    vmm.kill();
    vmm.client().exited().await;
    bundle.remove(VMM_PID_FILE);
    Ok(())
}

fn vm_files(directory: &Path) -> Result<(OwnedFd, OwnedFd)> {
    let create = |name| {
        let path = directory.join(name);
        snapshot::create(&path)
            .map(OwnedFd::from)
            .map_err(|error| Error::io(format!("create {}", path.display()), error))
    };
    Ok((create(STATE_FILE)?, create(MEMORY_FILE)?))
}

/// Takes a snapshot of a sandbox whose containers run, into an empty directory. They stand still meanwhile: how long. Their
/// memory is written afterwards, while they run.
///
/// # Errors
/// What failed; they run all the same, and the directory holds no snapshot.
pub async fn checkpoint(
    directory: PathBuf,
    record: SnapshotRecord,
    scratch_path: PathBuf,
    guest: &Guest,
    vmm: &VmmClient,
) -> Result<Duration> {
    let files = vm_files(&directory)?;
    let (begun, mut phases) = (Instant::now(), Phases::begin());
    let taken = match guest.freeze().await {
        Ok(()) => {
            phases.end("freeze");
            take(&directory, files, scratch_path, vmm, &mut phases).await
        }
        Err(error) => Err(error),
    };
    let thawed = guest.thaw().await;
    let pause = begun.elapsed();
    phases.end("thaw");
    tracing::info!(phases = phases.text(), "containers stood still");
    taken?;
    thawed?;
    vmm.finish_snapshot().await?;
    blocking("write a snapshot's record", move || record.write(&directory)).await?;
    Ok(pause)
}

/// The part of [`checkpoint`] during which the whole VM stands still.
async fn take(
    directory: &Path,
    (state, memory): (OwnedFd, OwnedFd),
    scratch_path: PathBuf,
    vmm: &VmmClient,
    phases: &mut Phases,
) -> Result<()> {
    vmm.pause().await?;
    phases.end("pause");
    let copy = directory.join(SCRATCH_FILE);
    let copied = tokio::spawn(blocking("copy the scratch disk", move || {
        sparse_file::copy(&scratch_path, &copy)
            .map_err(|error| Error::io(format!("copy {}", scratch_path.display()), error))
    }));
    let begun = vmm.begin_snapshot(state, memory).await;
    phases.end("copy_vm");
    let copied = copied.await.unwrap_or_else(|error| {
        Err(Error::with_source(
            ErrorKind::Internal,
            "copy the scratch disk",
            error,
        ))
    });
    phases.end("copy_scratch");
    let resumed = vmm.resume().await;
    phases.end("resume");
    begun?;
    copied?;
    resumed
}

/// What one try at a guest begins with.
enum Begin<'a> {
    Boot,
    Template(&'a Path),
    Snapshot(&'a Path, SnapshotRecord),
}

impl Begin<'_> {
    fn origin(&self) -> Origin {
        match self {
            Self::Boot => Origin::Boot,
            Self::Template(_) | Self::Snapshot(..) => Origin::Snapshot { with_written: false },
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Template(_) => "template",
            Self::Snapshot(..) => "snapshot",
        }
    }
}

/// One try at a guest.
struct Attempt<'a> {
    spec: &'a SandboxSpec,
    bundle: &'a Bundle,
    host: &'a HostConfig,
    begin: Begin<'a>,
    cancel: &'a mut oneshot::Receiver<()>,
}

impl<'a> Attempt<'a> {
    fn new(
        spec: &'a SandboxSpec,
        bundle: &'a Bundle,
        host: &'a HostConfig,
        begin: Begin<'a>,
        cancel: &'a mut oneshot::Receiver<()>,
    ) -> Self {
        Self {
            spec,
            bundle,
            host,
            begin,
            cancel,
        }
    }

    /// Up to a guest with an identity.
    async fn run(self) -> std::result::Result<RunningVm, StartError> {
        let identity = self.spec.identity.clone();
        let n_vcpus = self.spec.n_vcpus;
        let start_kind = self.begin.name();
        let captured = match &self.begin {
            Begin::Snapshot(_, record) => record.containers.clone(),
            _ => HashMap::new(),
        };
        let introduce = async |vmm: &mut Vmm, mut made: Made| {
            let guest = connect_guest(vmm).await?;
            made.phases.end("connect");
            let configured = match start_kind {
                "snapshot" => guest.adopt_identity(identity).await?,
                "template" => {
                    let origin = guest::Origin::Template { n_vcpus };
                    guest.configure(identity, &made.scratch, origin).await?
                }
                _ => {
                    guest
                        .configure(identity, &made.scratch, guest::Origin::Booted)
                        .await?
                }
            };
            made.phases.end("identity");
            Ok((guest, configured.ready_us, made))
        };
        let (vmm, done) = self.ready_then(introduce).await?;
        Ok(RunningVm {
            captured,
            ..RunningVm::new(vmm, done, start_kind)
        })
    }

    /// Starts the VMM, waits for a guest that is ready, and does `then` with it.
    async fn ready_then<T>(
        self,
        then: impl AsyncFnOnce(&mut Vmm, Made) -> Result<T>,
    ) -> std::result::Result<(Vmm, T), StartError> {
        let Self {
            spec,
            bundle,
            host,
            begin,
            cancel,
        } = self;
        let (config, fds, mut made) = prepare(spec, bundle, host, &begin)?;
        made.phases.end("open");
        let launched = (host.launcher)(&VmmSpec {
            vmm_path: spec.vmm_path.clone(),
            log_path: bundle.path(LOG_FILE),
        })?;
        let vmm = Vmm::supervise(launched)?;
        made.phases.end("spawn");
        let work = async |vmm: &mut Vmm| {
            run_up(vmm, spec, bundle, config, fds, &mut made.phases).await?;
            then(vmm, made).await
        };
        attempt(vmm, bundle, host.start_timeout, cancel, work).await
    }
}

/// Does `work` with a VM in time, or ends it.
async fn attempt<T>(
    mut vmm: Vmm,
    bundle: &Bundle,
    time: Duration,
    cancel: &mut oneshot::Receiver<()>,
    work: impl AsyncFnOnce(&mut Vmm) -> Result<T>,
) -> std::result::Result<(Vmm, T), StartError> {
    let mut cancelled = false;
    let outcome = tokio::select! {
        outcome = timeout(time, work(&mut vmm)) => {
            outcome.unwrap_or_else(|_| {
                let seconds = time.as_secs();
                Err(Error::new(ErrorKind::DeadlineExceeded, format!("the guest was not ready within {seconds} s")))
            })
        }
        _ = cancel => {
            cancelled = true;
            Err(Error::new(ErrorKind::Unavailable, "the sandbox was stopped while it started"))
        }
    };
    match outcome {
        Ok(done) => Ok((vmm, done)),
        Err(error) => {
            vmm.kill();
            let exit = vmm.client().exited().await;
            bundle.remove(VMM_PID_FILE);
            let console = console::tail(&bundle.path(CONSOLE_FILE));
            let said = if console.is_empty() {
                "nothing".into()
            } else {
                format!("\n{console}")
            };
            let error = error.context(format!("start the VM (VMM: {exit}; guest console: {said})"));
            Err(StartError {
                error,
                exit: Some(exit),
                cancelled,
            })
        }
    }
}

/// A guest made from a template that waits for its identity. Dropping it ends its VM.
#[derive(Debug)]
pub struct StandBy {
    vmm: Vmm,
    guest: Guest,
    made: Made,
}

/// Restores a guest from the template and leaves it waiting. When this returns an error, nothing is left.
///
/// # Errors
/// As [`start`]; also when the template is of no use.
pub async fn stand_by(
    spec: &SandboxSpec,
    bundle: &Bundle,
    host: &HostConfig,
    mut cancel: oneshot::Receiver<()>,
) -> std::result::Result<StandBy, StartError> {
    let StartKind::Template { directory, .. } = &spec.start else {
        let text = "options.standby needs options.template";
        return Err(Error::new(ErrorKind::InvalidArgument, text).into());
    };
    let begin = Begin::Template(directory);
    let (vmm, (guest, made)) = Attempt::new(spec, bundle, host, begin, &mut cancel)
        .ready_then(async |vmm, made| {
            let guest = connect_guest(vmm).await?;
            // An answer shows that it lives, and has the pages that every call needs in place.
            guest.sandbox_stats().await?;
            Ok((guest, made))
        })
        .await?;
    Ok(StandBy { vmm, guest, made })
}

/// Gives a waiting guest its identity. When this returns an error, nothing is left of it.
///
/// # Errors
/// As [`start`].
pub async fn introduce(
    standby: StandBy,
    spec: &SandboxSpec,
    bundle: &Bundle,
    host: &HostConfig,
    mut cancel: oneshot::Receiver<()>,
) -> std::result::Result<RunningVm, StartError> {
    let StandBy { vmm, guest, mut made } = standby;
    made.phases = Phases::begin();
    let origin = guest::Origin::Template {
        n_vcpus: spec.n_vcpus,
    };
    let identity = spec.identity.clone();
    let configure = async |_: &mut Vmm| {
        let configured = guest.configure(identity, &made.scratch, origin).await?;
        made.phases.end("identity");
        Ok((guest, configured.ready_us, made))
    };
    let (vmm, done) = attempt(vmm, bundle, host.start_timeout, &mut cancel, configure).await?;
    Ok(RunningVm::new(vmm, done, "standby"))
}

async fn connect_guest(vmm: &Vmm) -> Result<Guest> {
    Ok(Guest::new(vmm.client().connect(protocol::GUEST_API_PORT).await?))
}

/// What a VM is given, as far as it is looked at later.
#[derive(Debug)]
struct Made {
    shape: Shape,
    scratch: Slice,
    images: Arc<ImageDisk>,
    phases: Phases,
}

/// Opens everything the VMM gets. The order of descriptors is `vmm::config::FdRole`'s.
fn prepare(
    spec: &SandboxSpec,
    bundle: &Bundle,
    host: &HostConfig,
    begin: &Begin<'_>,
) -> Result<(VmConfig, Vec<OwnedFd>, Made)> {
    let phases = Phases::begin();
    let console_path = bundle.path(CONSOLE_FILE);
    let console = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&console_path)
        .map_err(|error| Error::io(format!("open {}", console_path.display()), error))?;
    let mut fds: Vec<OwnedFd> = vec![open(&host.kvm_path, true)?.into()];
    let mut origin = begin.origin();
    match begin {
        Begin::Template(directory) | Begin::Snapshot(directory, _) => {
            fds.push(open(&directory.join(STATE_FILE), false)?.into());
            fds.push(open(&directory.join(MEMORY_FILE), false)?.into());
            // Nobody has made a list before the first guest of a template wrote to something.
            if let (Begin::Template(_), Ok(written)) = (begin, File::open(directory.join(WRITTEN_FILE))) {
                fds.push(written.into());
                origin = Origin::Snapshot { with_written: true };
            }
        }
        Begin::Boot => {
            fds.push(open(&spec.kernel_path, false)?.into());
            fds.push(open(&spec.initrd_path, false)?.into());
        }
    }
    fds.push(console.into());
    let net = match (&spec.tap, &spec.identity.interface) {
        (Some(name), Some(interface)) => {
            let tap = network::open(name, &spec.netns)?;
            let mtu = u16::try_from(interface.mtu)
                .ok()
                .filter(|mtu| *mtu != 0)
                .unwrap_or(DEFAULT_MTU);
            let net = NetConfig {
                mac: interface.mac,
                mtu,
                vhost: tap.vhost_fd.is_some(),
            };
            fds.push(tap.tap_fd);
            fds.extend(tap.vhost_fd);
            Some(net)
        }
        _ => None,
    };
    let mut images = ImageDisk::new();
    let mut read_only_extents = Vec::new();
    if let Begin::Snapshot(_, record) = begin {
        let restored = ImageDisk::restore(&record.images)?;
        (images, read_only_extents) = (restored.disk, restored.extents);
        fds.extend(restored.fds);
    }
    let scratch = open(&spec.scratch_path, true)?;
    let place = scratch_slice(&spec.scratch_path, &scratch)?;
    fds.push(scratch.into());
    let mut shape = Shape {
        n_vcpus: spec.n_vcpus,
        n_online: spec.n_vcpus,
        n_possible_vcpus: spec.n_vcpus.max(spec.n_possible_vcpus),
        memory_mib: u64::from(spec.memory_mib),
        hotplug_mib: spec.hotplug_mib,
        plugged_mib: 0,
        size_mib: u64::from(spec.memory_mib),
        containers_memory_bytes: 0,
        has_interface: net.is_some(),
    };
    match (begin, &spec.start) {
        (Begin::Snapshot(_, record), _) => {
            if place.length_bytes != record.scratch_bytes {
                let text = format!(
                    "the snapshot has a scratch disk of {} bytes, {} are given",
                    record.scratch_bytes, place.length_bytes
                );
                return Err(Error::new(ErrorKind::FailedPrecondition, text));
            }
            shape = record.shape.clone();
        }
        (Begin::Template(_), start) => shape.n_possible_vcpus = start.n_possible_vcpus(spec.n_vcpus),
        (Begin::Boot, start @ StartKind::Capture { .. }) => {
            // A guest that becomes a template has one vCPU, which every group needs.
            shape.n_vcpus = 1;
            shape.n_possible_vcpus = start.n_possible_vcpus(spec.n_vcpus);
        }
        // One that boots for itself has all.
        (Begin::Boot, _) => {}
    }
    let config = VmConfig {
        origin,
        n_vcpus: shape.n_vcpus,
        n_possible_vcpus: shape.n_possible_vcpus,
        memory_mib: shape.memory_mib,
        hotplug_mib: shape.hotplug_mib,
        kernel_args: format!("{BASE_KERNEL_ARGS} {}", spec.kernel_args)
            .trim_end()
            .to_owned(),
        cid: GUEST_CID,
        net,
        read_only_extents,
        read_write_extents: vec![Extent {
            disk_offset_bytes: place.offset_bytes,
            file_offset_bytes: 0,
            length_bytes: place.length_bytes,
        }],
        io_uring: true,
    };
    config.validate().map_err(|error| {
        Error::with_source(ErrorKind::InvalidArgument, "check the VM's configuration", error)
    })?;
    let made = Made {
        shape,
        scratch: place,
        images,
        phases,
    };
    Ok((config, fds, made))
}

fn open(path: &Path, write: bool) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map_err(|error| Error::io(format!("open {}", path.display()), error))
}

fn scratch_slice(path: &Path, file: &File) -> Result<Slice> {
    let metadata = file
        .metadata()
        .map_err(|error| Error::io(format!("stat {}", path.display()), error))?;
    // The rest of a last odd block is not offered: it could not be written.
    let length_bytes = metadata.len() / protocol::SLICE_ALIGN_BYTES * protocol::SLICE_ALIGN_BYTES;
    Ok(Slice {
        partition: SCRATCH_PARTITION,
        offset_bytes: SLICE_BEGIN_ALIGN_BYTES,
        length_bytes,
        files: Vec::new(),
    })
}

/// Gets the VM going, up to a guest whose init answers.
async fn run_up(
    vmm: &mut Vmm,
    spec: &SandboxSpec,
    bundle: &Bundle,
    config: VmConfig,
    fds: Vec<OwnedFd>,
    phases: &mut Phases,
) -> Result<()> {
    if let Some(pid) = vmm.pid() {
        bundle.write_process(VMM_PID_FILE, ProcessId::of(pid)?)?;
        cgroup::expose(pid);
        if let Some(path) = &spec.cgroup_path {
            cgroup::enter(path, pid)?;
        }
    }
    let boots = config.origin == Origin::Boot;
    vmm.start(config, &fds).await?;
    drop(fds);
    phases.end("vm");
    if boots {
        let connection = vmm.guest_connection(protocol::READY_PORT).await?;
        if matches!(spec.start, StartKind::Capture { .. }) {
            // The guest closes it at once. A guest that is captured without connections need not be told, every time it goes
            // on, that they are gone.
            let connection = std::os::unix::net::UnixStream::from(connection);
            let mut connection = connection
                .set_nonblocking(true)
                .and_then(|()| UnixStream::from_std(connection))
                .map_err(|error| Error::io("poll the guest's ready connection", error))?;
            let nothing = connection.read(&mut [0; 1]).await;
            nothing.map_err(|error| Error::io("wait for the end of the ready connection", error))?;
        }
        phases.end("boot");
    }
    Ok(())
}

/// Maps the image, prepares the container in the guest, connects its streams. When this returns an error, nothing is
/// left but the mapped image, which waits for its next user.
///
/// # Errors
/// What failed.
pub async fn create_container(
    spec: &ContainerSpec,
    guest: &Guest,
    vmm: &VmmClient,
    images: &Arc<ImageDisk>,
) -> Result<(ImageSlice, Streams)> {
    let (config_path, image_paths, terminal) = (
        spec.bundle.join("config.json"),
        spec.image_paths.clone(),
        spec.stdio.terminal,
    );
    let read = tokio::task::spawn_blocking(move || {
        let config = read_bounded(&config_path)?;
        check_terminal("config.json", &config, false, terminal)?;
        let files = ImageFiles::open(&image_paths)?;
        Ok::<_, Error>((config, files))
    });
    let (config, files) = read
        .await
        .map_err(|error| Error::with_source(ErrorKind::Internal, "read the bundle", error))??;
    let image = images.map(files, vmm).await?;
    guest
        .create_container(&spec.id, image.slice(), config, spec.lifecycle.clone())
        .await?;
    let key = ProcessKey::init(&spec.id);
    match Streams::connect(&key, &spec.stdio, vmm).await {
        Ok(streams) => Ok((image, streams)),
        Err(error) => Err(undo_create(&key, guest, error).await),
    }
}

/// Prepares an exec in the guest and connects its streams. When this returns an error, nothing is left.
///
/// # Errors
/// What failed.
pub async fn create_exec(
    key: &ProcessKey,
    spec: ExecSpec,
    guest: &Guest,
    vmm: &VmmClient,
) -> Result<Streams> {
    check_terminal("spec", &spec.process, true, spec.stdio.terminal)?;
    guest.create_process(key, spec.process).await?;
    match Streams::connect(key, &spec.stdio, vmm).await {
        Ok(streams) => Ok(streams),
        Err(error) => Err(undo_create(key, guest, error).await),
    }
}

/// Connects the streams of a container that was captured with the guest, which has lost its own.
///
/// # Errors
/// What failed; nothing has changed.
pub async fn adopt_container(
    spec: &ContainerSpec,
    captured: &CapturedContainer,
    vmm: &VmmClient,
    images: &Arc<ImageDisk>,
) -> Result<(ImageSlice, Streams)> {
    if captured.terminal != spec.stdio.terminal {
        let text = format!(
            "terminal is {} in the request and {} in the snapshot: give the same",
            spec.stdio.terminal, captured.terminal
        );
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    let image = images.reuse(captured.partition)?;
    let streams = Streams::connect(&ProcessKey::init(&spec.id), &spec.stdio, vmm).await?;
    Ok((image, streams))
}

async fn undo_create(key: &ProcessKey, guest: &Guest, error: Error) -> Error {
    if let Err(undo) = guest.delete_process(key).await {
        tracing::error!(%key, error = undo.chain(), "cannot remove what was just created; it stays until the sandbox ends");
    }
    error
}

fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_SPEC_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| Error::io(format!("read {}", path.display()), error))?;
    Ok(bytes)
}
