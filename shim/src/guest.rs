//! Client of the guest init. The guest is hostile: each call has a deadline, each answer a bound.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use protobuf::MessageField;
use protocol::{
    guest as api,
    guest_ttrpc::{GuestClient, LifecycleClient},
};
use tokio::net::UnixStream;
use ttrpc::{Code, r#async::transport::Socket, context};

use crate::{
    error::{Error, ErrorKind, Result},
    resource::{slices::Slice, volumes::FileVolume},
    timestamp::{from_unix_nanos, unix_nanos},
};

/// For calls that only look something up or change a number.
const SHORT_TIMEOUT: Duration = Duration::from_secs(10);
/// For calls that mount, execute or remove something.
const LONG_TIMEOUT: Duration = Duration::from_secs(60);
/// Most process ids taken from the guest.
const MAX_PIDS: usize = 32_768;
/// Most events taken from one answer (guest.proto, GetEvents).
const MAX_EVENTS: usize = 64;
/// Most containers taken from one answer.
const MAX_HEALTH: usize = 64;
/// Longest container id (guest.proto).
const MAX_CONTAINER_ID_BYTES: usize = 128;
/// Longest text of the guest in an error message.
const MAX_MESSAGE_CHARS: usize = 1000;
/// Longest id in the guest's answer: a UUID.
const MAX_ID_CHARS: usize = 36;
/// Random bytes given to the guest.
const ENTROPY_BYTES: usize = 64;

/// Statistics of a container as the guest gives them.
pub type ContainerStats = api::ContainerStatsResponse;
/// How a container is looked after, as the guest is told.
pub type ContainerLifecycle = api::ContainerLifecycle;
/// How a container ended, as the guest tells it.
pub type ContainerEnd = api::ContainerEnd;
/// What happened in the guest, and how its containers are.
pub type GuestNews = api::GetEventsResponse;
/// Statistics of the guest.
pub type SandboxStats = api::SandboxStatsResponse;
/// What a guest has after it was resized, as it says.
pub type Resized = api::ResizeSandboxResponse;
/// A volume of files. Never printed: it may hold secrets.
pub type VolumeFiles = api::PutFilesRequest;
/// A directory of an NFS server, as the guest is told.
pub type NfsDirectory = api::NfsDirectory;

/// Names a process: the container's init (empty `exec_id`) or an exec.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessKey {
    /// The container.
    pub container_id: String,
    /// The exec; empty for the container's init.
    pub exec_id: String,
}

impl ProcessKey {
    /// The container's init process.
    pub fn init(container_id: impl Into<String>) -> Self {
        Self {
            container_id: container_id.into(),
            exec_id: String::new(),
        }
    }

    /// Whether this is a container's init process.
    pub fn is_init(&self) -> bool {
        self.exec_id.is_empty()
    }

    fn request(&self) -> api::ProcessRequest {
        api::ProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            ..Default::default()
        }
    }
}

impl std::fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_init() {
            write!(f, "container {:?}", self.container_id)
        } else {
            write!(f, "exec {:?} of container {:?}", self.exec_id, self.container_id)
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessEnd {
    /// Exit code, or 128 + signal.
    pub exit_status: u32,
    /// When, by the guest's clock.
    pub exited_at: SystemTime,
}

/// The guest's identity.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Host name.
    pub hostname: String,
    /// Where it is known; may be empty.
    pub domain: String,
    /// The one network interface.
    pub interface: Option<Interface>,
    /// Name servers.
    pub nameservers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Resolver options.
    pub options: Vec<String>,
    /// Lines for /etc/hosts: address and names.
    pub host_aliases: Vec<(String, Vec<String>)>,
    /// Sysctls.
    pub sysctls: std::collections::HashMap<String, String>,
    /// 32 hex digits; empty: the guest draws one.
    pub machine_id: String,
}

/// How the VM came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was booted, with all its CPUs online.
    Booted,
    /// It was restored from a template of a class: this many CPUs are the group's.
    Template {
        /// CPUs to bring online, the first included.
        n_vcpus: u32,
    },
}

/// What the guest answers once it has its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configured {
    /// Microseconds from the kernel's start to the init being ready, in the VM that was booted.
    pub ready_us: u64,
    /// `/etc/machine-id` of its containers.
    pub machine_id: String,
    /// Their `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Their `/run/eci/generation`.
    pub generation: String,
}

/// The guest's network interface.
#[derive(Debug, Clone)]
pub struct Interface {
    /// Found by this.
    pub mac: [u8; 6],
    /// CIDR form.
    pub addresses: Vec<String>,
    /// Default routes.
    pub gateways: Vec<String>,
    /// Bytes.
    pub mtu: u32,
}

/// Something the guest reports by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestEvent {
    /// Increases.
    pub sequence: u64,
    /// The container.
    pub container_id: String,
    /// An OOM kill; false for kinds this shim does not know.
    pub oom: bool,
}

/// Why a call failed.
#[derive(Debug)]
pub enum CallError {
    /// The guest answered with an error.
    Refused(Error),
    /// No answer: the connection is gone or the deadline has passed.
    Lost(Error),
}

impl From<CallError> for Error {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(error) | CallError::Lost(error) => error,
        }
    }
}

/// The connection to the guest init; cheap to clone.
#[derive(Clone)]
pub struct Guest {
    client: GuestClient,
    lifecycle: LifecycleClient,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").finish_non_exhaustive()
    }
}

impl Guest {
    /// Speaks the guest API over a connected stream.
    pub fn new(stream: UnixStream) -> Self {
        let client = ttrpc::r#async::Client::new(Socket::from(stream));
        Self {
            client: GuestClient::new(client.clone()),
            lifecycle: LifecycleClient::new(client),
        }
    }

    /// Gives the guest its identity and the scratch partition of the read-write disk.
    ///
    /// # Errors
    /// The guest refuses or does not answer; `DeadlineExceeded` when the VM is restored and its kernel saw no new VM
    /// generation id.
    pub async fn configure(&self, identity: Identity, scratch: &Slice, origin: Origin) -> Result<Configured> {
        let mut request = identity_request(identity)?;
        request.scratch = MessageField::some(slice_message("vdb", "ext4", scratch));
        if let Origin::Template { n_vcpus } = origin {
            (request.is_clone, request.n_vcpus) = (true, n_vcpus);
        }
        let context = context::with_duration(LONG_TIMEOUT);
        let response = call(
            "configure the guest",
            self.client.configure_sandbox(context, &request),
        )
        .await?;
        Ok(configured(response))
    }

    /// Stops all processes of all containers: the VM can be captured once this has returned.
    ///
    /// # Errors
    /// The guest refuses or does not answer; `DeadlineExceeded` when a process does not stand still, and everything runs
    /// on then.
    pub async fn freeze(&self) -> Result<()> {
        let context = context::with_duration(SHORT_TIMEOUT);
        call(
            "freeze the containers",
            self.client.freeze(context, &api::Empty::new()),
        )
        .await?;
        Ok(())
    }

    /// Lets all processes run again.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn thaw(&self) -> Result<()> {
        let context = context::with_duration(SHORT_TIMEOUT);
        call(
            "thaw the containers",
            self.client.thaw(context, &api::Empty::new()),
        )
        .await?;
        Ok(())
    }

    /// Gives the guest of a VM that was captured between [`Guest::freeze`] and [`Guest::thaw`] another identity. Streams
    /// are to be connected anew afterwards, before it is thawed.
    ///
    /// # Errors
    /// The guest refuses or does not answer; `DeadlineExceeded` when its kernel saw no new VM generation id.
    pub async fn adopt_identity(&self, identity: Identity) -> Result<Configured> {
        let mut request = identity_request(identity)?;
        request.is_clone = true;
        let context = context::with_duration(LONG_TIMEOUT);
        let response = call(
            "give the clone its identity",
            self.client.adopt_identity(context, &request),
        )
        .await?;
        Ok(configured(response))
    }

    /// Puts the files of a volume into the guest.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn put_files(&self, files: &VolumeFiles) -> Result<()> {
        let context = context::with_duration(LONG_TIMEOUT);
        call("put files into the guest", self.client.put_files(context, files)).await?;
        Ok(())
    }

    /// Has the guest mount a volume, or grow it.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn attach_volume(&self, volume: &FileVolume, slice: &Slice) -> Result<()> {
        let request = api::AttachVolumeRequest {
            volume: volume.name.clone(),
            slice: MessageField::some(slice_message("vdb", "ext4", slice)),
            is_empty_dir: volume.is_empty_dir,
            is_device: volume.is_device,
            gid: volume.gid,
            ..Default::default()
        };
        self.attach(&request).await
    }

    /// Has the guest mount a volume from a server.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn attach_nfs(&self, volume: String, directory: NfsDirectory) -> Result<()> {
        let request = api::AttachVolumeRequest {
            volume,
            nfs: MessageField::some(directory),
            ..Default::default()
        };
        self.attach(&request).await
    }

    async fn attach(&self, request: &api::AttachVolumeRequest) -> Result<()> {
        let context = context::with_duration(LONG_TIMEOUT);
        call(
            "attach a volume in the guest",
            self.client.attach_volume(context, request),
        )
        .await?;
        Ok(())
    }

    /// Has the guest use so many CPUs, and limits all its containers together, or not.
    ///
    /// # Errors
    /// The guest refuses or does not answer; `FailedPrecondition` when its containers use more.
    pub async fn resize(&self, n_vcpus: u32, memory_limit_bytes: Option<u64>) -> Result<Resized> {
        let request = api::ResizeSandboxRequest {
            n_vcpus,
            memory_limit_bytes: memory_limit_bytes.unwrap_or(0),
            ..Default::default()
        };
        let context = context::with_duration(LONG_TIMEOUT);
        Ok(call("resize the guest", self.client.resize_sandbox(context, &request)).await?)
    }

    /// Gives a container other limits: OCI `LinuxResources` as JSON.
    ///
    /// # Errors
    /// The guest refuses or does not answer; `FailedPrecondition` when the container uses more.
    pub async fn update_container(&self, container_id: &str, resources: Vec<u8>) -> Result<()> {
        let request = api::UpdateContainerRequest {
            container_id: container_id.into(),
            resources,
            ..Default::default()
        };
        let context = context::with_duration(LONG_TIMEOUT);
        call(
            "change a container's limits in the guest",
            self.client.update_container(context, &request),
        )
        .await?;
        Ok(())
    }

    /// Prepares a container on an image slice of the read-only disk.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn create_container(
        &self,
        id: &str,
        rootfs: &Slice,
        spec: Vec<u8>,
        lifecycle: Option<ContainerLifecycle>,
    ) -> Result<()> {
        let request = api::CreateContainerRequest {
            container_id: id.into(),
            lifecycle: lifecycle.into(),
            rootfs: MessageField::some(slice_message("vda", protocol::ROOTFS_MOUNT_TYPE, rootfs)),
            spec,
            ..Default::default()
        };
        let context = context::with_duration(LONG_TIMEOUT);
        call(
            "create the container in the guest",
            self.client.create_container(context, &request),
        )
        .await?;
        Ok(())
    }

    /// Adds a process to a container.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn create_process(&self, key: &ProcessKey, process: Vec<u8>) -> Result<()> {
        let request = api::CreateProcessRequest {
            container_id: key.container_id.clone(),
            exec_id: key.exec_id.clone(),
            process,
            ..Default::default()
        };
        let context = context::with_duration(LONG_TIMEOUT);
        call(
            "create the process in the guest",
            self.client.create_process(context, &request),
        )
        .await?;
        Ok(())
    }

    /// Starts a prepared process.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn start_process(&self, key: &ProcessKey) -> Result<()> {
        let context = context::with_duration(LONG_TIMEOUT);
        call(
            "start the process in the guest",
            self.client.start_process(context, &key.request()),
        )
        .await?;
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn signal_process(&self, key: &ProcessKey, signal: u32, all: bool) -> Result<()> {
        let request = api::SignalProcessRequest {
            container_id: key.container_id.clone(),
            exec_id: key.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        let context = context::with_duration(SHORT_TIMEOUT);
        call(
            "signal the process in the guest",
            self.client.signal_process(context, &request),
        )
        .await?;
        Ok(())
    }

    /// Waits for the end of a process, without a deadline: the caller ends the wait with the VM.
    ///
    /// # Errors
    /// `Refused` when the guest does not know the process, `Lost` when the connection is gone.
    pub async fn wait_process(&self, key: &ProcessKey) -> std::result::Result<ProcessEnd, CallError> {
        let request = key.request();
        let waited = self.client.wait_process(context::Context::default(), &request);
        let response = call("wait for the process in the guest", waited).await?;
        let exited_at = match response.exited_at_ns {
            0 => SystemTime::now(),
            nanos => from_unix_nanos(nanos),
        };
        Ok(ProcessEnd {
            exit_status: response.exit_status & 0xff,
            exited_at,
        })
    }

    /// Sets the size of a TTY.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn resize_terminal(&self, key: &ProcessKey, rows: u32, columns: u32) -> Result<()> {
        let request = api::ResizeTerminalRequest {
            container_id: key.container_id.clone(),
            exec_id: key.exec_id.clone(),
            rows,
            columns,
            ..Default::default()
        };
        let context = context::with_duration(SHORT_TIMEOUT);
        call(
            "resize the terminal in the guest",
            self.client.resize_terminal(context, &request),
        )
        .await?;
        Ok(())
    }

    /// Removes an ended process, or the container with its init.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn delete_process(&self, key: &ProcessKey) -> Result<()> {
        let context = context::with_duration(LONG_TIMEOUT);
        call(
            "delete the process in the guest",
            self.client.delete_process(context, &key.request()),
        )
        .await?;
        Ok(())
    }

    /// The guest's process ids of a container.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn list_processes(&self, container_id: &str) -> Result<Vec<u32>> {
        let request = api::ContainerRequest {
            container_id: container_id.into(),
            ..Default::default()
        };
        let context = context::with_duration(SHORT_TIMEOUT);
        let mut pids = call(
            "list processes in the guest",
            self.client.list_processes(context, &request),
        )
        .await?
        .pids;
        pids.truncate(MAX_PIDS);
        Ok(pids)
    }

    /// Statistics of a container.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn container_stats(&self, container_id: &str) -> Result<ContainerStats> {
        let request = api::ContainerRequest {
            container_id: container_id.into(),
            ..Default::default()
        };
        let context = context::with_duration(SHORT_TIMEOUT);
        Ok(call(
            "read container statistics",
            self.client.container_stats(context, &request),
        )
        .await?)
    }

    /// Statistics of the guest.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn sandbox_stats(&self) -> Result<SandboxStats> {
        let context = context::with_duration(SHORT_TIMEOUT);
        Ok(call(
            "read guest statistics",
            self.client.sandbox_stats(context, &api::Empty::new()),
        )
        .await?)
    }

    /// Waits for events after `after`, without a deadline.
    ///
    /// # Errors
    /// As [`Guest::wait_process`].
    pub async fn events(&self, after: u64) -> std::result::Result<Vec<GuestEvent>, CallError> {
        let request = api::GetEventsRequest {
            after,
            ..Default::default()
        };
        let waited = self.client.get_events(context::Context::default(), &request);
        let response = call("wait for guest events", waited).await?;
        let event = |event: api::Event| GuestEvent {
            sequence: event.sequence,
            oom: event.kind.enum_value() == Ok(api::event::Kind::OOM),
            container_id: event.container_id,
        };
        Ok(response.events.into_iter().take(MAX_EVENTS).map(event).collect())
    }

    /// Waits for events after `after` and how the containers are then, without a deadline. What the guest says is bounded,
    /// and what this shim does not know of it is left out.
    ///
    /// # Errors
    /// As [`Guest::wait_process`].
    pub async fn news(&self, after: u64) -> std::result::Result<GuestNews, CallError> {
        let request = api::GetEventsRequest {
            after,
            ..Default::default()
        };
        let waited = self.lifecycle.follow(context::Context::default(), &request);
        Ok(bounded(call("follow the guest's containers", waited).await?))
    }

    /// Begins to end a container: its hook, SIGTERM, and SIGKILL after `grace_ms`.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn stop_container(&self, container_id: &str, grace_ms: u64) -> Result<()> {
        let request = api::StopContainerRequest {
            container_id: container_id.into(),
            grace_ms,
            ..Default::default()
        };
        let context = context::with_duration(SHORT_TIMEOUT);
        call(
            "stop the container in the guest",
            self.lifecycle.stop_container(context, &request),
        )
        .await?;
        Ok(())
    }

    /// How a container ended.
    ///
    /// # Errors
    /// The guest refuses or does not answer.
    pub async fn container_end(&self, container_id: &str) -> Result<ContainerEnd> {
        let request = api::ContainerRequest {
            container_id: container_id.into(),
            ..Default::default()
        };
        let context = context::with_duration(SHORT_TIMEOUT);
        let end = call(
            "ask how the container ended",
            self.lifecycle.get_container_end(context, &request),
        )
        .await?;
        let mut termination_message = end.termination_message;
        termination_message.truncate(protocol::TERMINATION_MESSAGE_MAX_BYTES);
        Ok(ContainerEnd {
            oom_killed: end.oom_killed,
            cause: end.cause,
            termination_message,
            ..Default::default()
        })
    }

    /// Asks for an orderly end; the answer may be lost with the VM, so only a refusal says something.
    ///
    /// # Errors
    /// As [`Guest::wait_process`].
    pub async fn shutdown(&self, grace: Duration) -> std::result::Result<(), CallError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let request = api::ShutdownRequest {
            grace_ms,
            ..Default::default()
        };
        let context = context::with_duration(grace + SHORT_TIMEOUT);
        call("shut the guest down", self.client.shutdown(context, &request))
            .await
            .map(drop)
    }
}

/// The message both handshakes share; the clock is read and entropy drawn now.
fn identity_request(identity: Identity) -> Result<api::ConfigureSandboxRequest> {
    let interface = |interface: Interface| api::Interface {
        name: "eth0".into(),
        mac: interface.mac.to_vec(),
        addresses: interface.addresses,
        gateways: interface.gateways,
        mtu: interface.mtu,
        ..Default::default()
    };
    let alias = |(ip, hostnames)| api::HostAlias {
        ip,
        hostnames,
        ..Default::default()
    };
    Ok(api::ConfigureSandboxRequest {
        hostname: identity.hostname,
        domain: identity.domain,
        interfaces: identity.interface.map(interface).into_iter().collect(),
        dns: MessageField::some(api::Dns {
            nameservers: identity.nameservers,
            searches: identity.searches,
            options: identity.options,
            ..Default::default()
        }),
        host_aliases: identity.host_aliases.into_iter().map(alias).collect(),
        entropy: entropy()?,
        sysctls: identity.sysctls,
        machine_id: identity.machine_id,
        // Last: it ages.
        wall_clock_ns: unix_nanos(SystemTime::now()),
        ..Default::default()
    })
}

/// Ids are bounded: what a guest says goes to logs.
fn configured(response: api::ConfigureSandboxResponse) -> Configured {
    let bounded = |text: String| {
        text.chars()
            .filter(|c| c.is_ascii_hexdigit() || *c == '-')
            .take(MAX_ID_CHARS)
            .collect()
    };
    Configured {
        ready_us: response.ready_us,
        machine_id: bounded(response.machine_id),
        boot_id: bounded(response.boot_id),
        generation: bounded(response.generation),
    }
}

fn slice_message(disk: &str, fs_type: &str, slice: &Slice) -> api::Slice {
    api::Slice {
        disk: disk.into(),
        partition: slice.partition,
        offset_bytes: slice.offset_bytes,
        length_bytes: slice.length_bytes,
        fs_type: fs_type.into(),
        ..Default::default()
    }
}

fn entropy() -> Result<Vec<u8>> {
    let path = Path::new("/dev/urandom");
    let mut bytes = vec![0; ENTROPY_BYTES];
    std::fs::File::open(path)
        .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut bytes))
        .map_err(|error| Error::io(format!("read {}", path.display()), error))?;
    Ok(bytes)
}

async fn call<T>(
    what: &str,
    response: impl Future<Output = ttrpc::Result<T>>,
) -> std::result::Result<T, CallError> {
    response.await.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) => {
            let text: String = status
                .message
                .chars()
                .filter(|c| !c.is_control())
                .take(MAX_MESSAGE_CHARS)
                .collect();
            CallError::Refused(Error::new(kind_of(status.code()), format!("{what}: {text}")))
        }
        // The client says so in words only, and a caller gains nothing from telling it from a lost connection.
        error => CallError::Lost(Error::with_source(ErrorKind::Unavailable, what, error)),
    })
}

fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::INVALID_ARGUMENT => ErrorKind::InvalidArgument,
        Code::NOT_FOUND => ErrorKind::NotFound,
        Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
        Code::PERMISSION_DENIED => ErrorKind::PermissionDenied,
        Code::RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
        Code::FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
        Code::DEADLINE_EXCEEDED => ErrorKind::DeadlineExceeded,
        Code::UNIMPLEMENTED => ErrorKind::Unimplemented,
        Code::UNAVAILABLE => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    }
}

/// The guest's news within the bounds of the guest API.
fn bounded(news: GuestNews) -> GuestNews {
    let text = |mut text: String, most: usize| {
        text.truncate(text.floor_char_boundary(most));
        text
    };
    let event = |event: api::Event| api::Event {
        sequence: event.sequence,
        timestamp_ns: event.timestamp_ns,
        container_id: text(event.container_id, MAX_CONTAINER_ID_BYTES),
        kind: event.kind,
        message: text(event.message, protocol::EVENT_MESSAGE_MAX_BYTES),
        cause: event.cause,
        ..Default::default()
    };
    let health = |health: api::ContainerHealth| api::ContainerHealth {
        container_id: text(health.container_id, MAX_CONTAINER_ID_BYTES),
        started: health.started,
        ready: health.ready,
        ..Default::default()
    };
    GuestNews {
        events: news.events.into_iter().take(MAX_EVENTS).map(event).collect(),
        health: news.health.into_iter().take(MAX_HEALTH).map(health).collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_bounded() {
        let event = api::Event {
            message: "\u{e9}".repeat(5000),
            container_id: "x".repeat(5000),
            ..Default::default()
        };
        let news = bounded(GuestNews {
            events: vec![event; 100],
            health: vec![api::ContainerHealth::default(); 100],
            ..Default::default()
        });
        assert_eq!((news.events.len(), news.health.len()), (MAX_EVENTS, MAX_HEALTH));
        assert_eq!(news.events[0].message.len(), protocol::EVENT_MESSAGE_MAX_BYTES);
        assert_eq!(news.events[0].container_id.len(), MAX_CONTAINER_ID_BYTES);
    }
}
