//! Generated messages to and from the shim's own types.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, ExecProcessRequest, Mount},
    cgroups_v2::metrics as cgroup,
};
use protobuf::{
    EnumOrUnknown, Message, MessageField,
    well_known_types::{any::Any, timestamp::Timestamp},
};
use protocol::sandbox::{self as options, AttachVolume};

use crate::{
    error::{Error, ErrorKind, Result},
    guest::{
        ContainerLifecycle, ContainerStats, Identity, Interface, NfsDirectory, SandboxStats, VolumeFiles,
    },
    resource::{
        network::parse_mac,
        volumes::{FileVolume, VolumeSpec},
    },
    sandbox::{
        resize::Target,
        spec::{ContainerSpec, ExecSpec, MAX_SPEC_BYTES, SandboxSpec, StartKind},
    },
    stdio::{Sink, StdioSpec},
    vmm::check_absolute,
};

/// Option of a rootfs mount that names a layer blob.
const DEVICE_OPTION: &str = "device=";

/// A time as protobuf has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    time.into()
}

/// stdin as it stood in the request.
pub fn stdin_text(stdio: &StdioSpec) -> String {
    stdio
        .stdin
        .as_ref()
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// An output as it stood in the request.
pub fn sink_text(sink: Option<&Sink>) -> String {
    match sink {
        None => String::new(),
        Some(Sink::Fifo(path)) => path.to_string_lossy().into_owned(),
        Some(Sink::CriLog(path)) => format!("{}{}", protocol::CRI_LOG_SCHEME, path.display()),
    }
}

fn invalid(context: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, context)
}

/// What a sandbox is to be, out of `CreateSandboxRequest.options`.
///
/// # Errors
/// `InvalidArgument`, naming the field.
pub fn sandbox_spec(packed: Option<&Any>) -> Result<SandboxSpec> {
    let type_url = packed.map(|any| any.type_url.as_str()).unwrap_or_default();
    // A packer may put a host name before the type's own name.
    let type_name = type_url.rsplit('/').next().unwrap_or_default();
    let Some(packed) = packed.filter(|_| type_name == protocol::SANDBOX_OPTIONS_TYPE_URL) else {
        return Err(invalid(format!(
            "options have type_url {type_url:?}: give an {}",
            protocol::SANDBOX_OPTIONS_TYPE_URL
        )));
    };
    let given = options::SandboxOptions::parse_from_bytes(&packed.value)
        .map_err(|error| Error::with_source(ErrorKind::InvalidArgument, "parse options", error))?;
    let network = given.network.into_option();
    let interface = network
        .as_ref()
        .map(|network| {
            Ok::<_, Error>(Interface {
                mac: parse_mac(&network.mac)?,
                addresses: network.addresses.clone(),
                gateways: network.gateways.clone(),
                mtu: network.mtu,
            })
        })
        .transpose()?;
    let dns = given.dns.into_option().unwrap_or_default();
    Ok(SandboxSpec {
        n_vcpus: given.n_vcpus,
        memory_mib: given.memory_mib,
        hotplug_mib: given.hotplug_mib,
        n_possible_vcpus: given.n_possible_vcpus,
        netns: network
            .as_ref()
            .map(|network| network.netns.clone())
            .unwrap_or_default(),
        tap: network.map(|network| network.tap),
        identity: Identity {
            hostname: given.hostname,
            domain: given.domain,
            interface,
            nameservers: dns.nameservers,
            searches: dns.searches,
            options: dns.options,
            host_aliases: given
                .host_aliases
                .into_iter()
                .map(|alias| (alias.ip, alias.hostnames))
                .collect(),
            sysctls: given.sysctls,
            machine_id: String::new(),
        },
        scratch_path: given.scratch_path.into(),
        kernel_path: given.kernel_path.into(),
        initrd_path: given.initrd_path.into(),
        vmm_path: given.vmm_path.into(),
        cgroup_path: (!given.cgroup_path.is_empty()).then(|| given.cgroup_path.into()),
        kernel_args: given.kernel_args,
        start: start_kind(
            given.template.into_option(),
            given.capture_directory,
            given.snapshot_directory,
        )?,
        is_standby: given.standby,
    })
}

fn start_kind(
    template: Option<options::Template>,
    capture_directory: String,
    snapshot_directory: String,
) -> Result<StartKind> {
    let template = template.unwrap_or_default();
    let n_possible_vcpus = template.n_possible_vcpus;
    let given = |directory: String| (!directory.is_empty()).then(|| PathBuf::from(directory));
    match (
        given(template.directory),
        given(capture_directory),
        given(snapshot_directory),
    ) {
        (None, None, None) => Ok(StartKind::Boot),
        (Some(directory), None, None) => Ok(StartKind::Template {
            directory,
            n_possible_vcpus,
        }),
        (None, Some(directory), None) => Ok(StartKind::Capture {
            directory,
            n_possible_vcpus,
        }),
        (None, None, Some(directory)) => Ok(StartKind::Snapshot { directory }),
        _ => Err(invalid(
            "options have more than one of template.directory, capture_directory and snapshot_directory: give one"
                .to_owned(),
        )),
    }
}

/// A container to create.
///
/// # Errors
/// `InvalidArgument`, naming the field.
pub fn container_spec(request: CreateTaskRequest) -> Result<ContainerSpec> {
    let stdio = StdioSpec::parse(&request.stdin, &request.stdout, &request.stderr, request.terminal)?;
    let is_captured = !request.checkpoint.is_empty();
    let image_paths = if is_captured {
        Vec::new()
    } else {
        image_paths(&request.rootfs)?
    };
    Ok(ContainerSpec {
        id: request.id,
        bundle: request.bundle.into(),
        image_paths,
        is_captured,
        stdio,
        lifecycle: request.options.as_ref().map(lifecycle).transpose()?,
    })
}

/// How a container is looked after, out of `CreateTaskRequest.options`; without what this shim does not know.
fn lifecycle(packed: &Any) -> Result<ContainerLifecycle> {
    let type_name = packed.type_url.rsplit('/').next().unwrap_or_default();
    if type_name != protocol::CONTAINER_LIFECYCLE_TYPE_URL {
        return Err(invalid(format!(
            "options have type_url {:?}: give none, or an {}",
            packed.type_url,
            protocol::CONTAINER_LIFECYCLE_TYPE_URL
        )));
    }
    let mut lifecycle = ContainerLifecycle::parse_from_bytes(&packed.value)
        .map_err(|error| Error::with_source(ErrorKind::InvalidArgument, "parse options", error))?;
    lifecycle.mut_unknown_fields().clear();
    Ok(lifecycle)
}

fn image_paths(rootfs: &[Mount]) -> Result<Vec<PathBuf>> {
    let [mount] = rootfs else {
        return Err(invalid(format!(
            "rootfs has {} mounts: give one of type \"erofs\"",
            rootfs.len()
        )));
    };
    if mount.type_ != protocol::ROOTFS_MOUNT_TYPE {
        return Err(invalid(format!(
            "rootfs[0].type is {:?}: give \"erofs\"",
            mount.type_
        )));
    }
    let devices = mount
        .options
        .iter()
        .filter_map(|option| option.strip_prefix(DEVICE_OPTION));
    let paths: Vec<PathBuf> = std::iter::once(mount.source.as_str())
        .chain(devices)
        .map(PathBuf::from)
        .collect();
    match paths.iter().find(|path| !path.is_absolute()) {
        Some(path) => Err(invalid(format!(
            "rootfs[0] names {:?}: give an absolute path",
            path.display()
        ))),
        None => Ok(paths),
    }
}

/// What a sandbox is to have.
///
/// # Errors
/// `InvalidArgument`, naming the field.
pub fn target(message: &[u8]) -> Result<Target> {
    let given = options::ResizeSandbox::parse_from_bytes(message)
        .map_err(|error| Error::with_source(ErrorKind::InvalidArgument, "parse ResizeSandbox", error))?;
    if !(1..=protocol::RESIZE_MAX_DEADLINE_MS).contains(&given.deadline_ms) {
        return Err(invalid(format!(
            "deadline_ms is {}: give 1 to {}",
            given.deadline_ms,
            protocol::RESIZE_MAX_DEADLINE_MS
        )));
    }
    Ok(Target {
        n_vcpus: given.n_vcpus,
        memory_mib: given.memory_mib,
        containers_memory_bytes: given.containers_memory_bytes,
        deadline: Duration::from_millis(given.deadline_ms),
    })
}

/// Limits of a container, as the guest is told them.
///
/// # Errors
/// `InvalidArgument` when they are no JSON object, or longer than any are.
pub fn resources(json: Vec<u8>) -> Result<Vec<u8>> {
    let is_object = json.len() <= MAX_SPEC_BYTES
        && serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&json).is_ok();
    if is_object {
        Ok(json)
    } else {
        Err(invalid(format!(
            "resources have {} bytes: give a JSON object of at most {MAX_SPEC_BYTES}",
            json.len()
        )))
    }
}

/// A process to add.
///
/// # Errors
/// `InvalidArgument`, naming the field.
pub fn exec_spec(request: ExecProcessRequest) -> Result<ExecSpec> {
    let stdio = StdioSpec::parse(&request.stdin, &request.stdout, &request.stderr, request.terminal)?;
    let process = request
        .spec
        .into_option()
        .map(|any| any.value)
        .unwrap_or_default();
    Ok(ExecSpec { process, stdio })
}

/// Statistics of a container as containerd's cgroup v2 metrics, packed.
///
/// # Errors
/// The message cannot be written.
pub fn container_metrics(stats: &ContainerStats) -> Result<Any> {
    let metrics = cgroup::Metrics {
        pids: MessageField::some(cgroup::PidsStat {
            current: stats.pids,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(cgroup::CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_periods,
            nr_throttled: stats.cpu_throttled_periods,
            throttled_usec: stats.cpu_throttled_us,
            ..Default::default()
        }),
        memory: MessageField::some(cgroup::MemoryStat {
            anon: stats.memory_anon_bytes,
            file: stats.memory_file_bytes,
            inactive_file: stats.memory_inactive_file_bytes,
            // containerd and kubelets take usage less inactive_file as the working set; the split of the rest follows.
            active_file: stats
                .memory_file_bytes
                .saturating_sub(stats.memory_inactive_file_bytes),
            pgfault: stats.memory_page_faults,
            pgmajfault: stats.memory_major_page_faults,
            usage: stats.memory_usage_bytes,
            // The kernel's "max", as cgroup2 readers give it.
            usage_limit: if stats.memory_limit_bytes == 0 {
                u64::MAX
            } else {
                stats.memory_limit_bytes
            },
            ..Default::default()
        }),
        io: MessageField::some(cgroup::IOStat {
            usage: vec![cgroup::IOEntry {
                rbytes: stats.io_read_bytes,
                wbytes: stats.io_write_bytes,
                rios: stats.io_read_ops,
                wios: stats.io_write_ops,
                ..Default::default()
            }],
            ..Default::default()
        }),
        memory_events: MessageField::some(cgroup::MemoryEvents {
            oom: stats.oom_kills,
            oom_kill: stats.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    };
    pack("io.containerd.cgroups.v2.Metrics", &metrics)
}

/// Statistics of the guest, packed as they came, without what this shim does not know.
///
/// # Errors
/// The message cannot be written.
pub fn sandbox_metrics(mut stats: SandboxStats) -> Result<Any> {
    stats.mut_unknown_fields().clear();
    pack(protocol::SANDBOX_STATS_TYPE_URL, &stats)
}

/// The files of a volume.
///
/// # Errors
/// `InvalidArgument` when the message can't be read.
pub fn files(message: &[u8]) -> Result<VolumeFiles> {
    VolumeFiles::parse_from_bytes(message).map_err(|error| {
        let context = format!("read {}", protocol::PUT_FILES_TYPE_URL);
        Error::with_source(ErrorKind::InvalidArgument, context, error)
    })
}

/// A volume with a file of its own, or on a server.
///
/// # Errors
/// `InvalidArgument` when the message can't be read, or its path is not absolute.
pub fn volume(message: &[u8]) -> Result<VolumeSpec> {
    let message = AttachVolume::parse_from_bytes(message).map_err(|error| {
        let context = format!("read {}", protocol::ATTACH_VOLUME_TYPE_URL);
        Error::with_source(ErrorKind::InvalidArgument, context, error)
    })?;
    if let Some(nfs) = message.nfs.into_option() {
        let directory = NfsDirectory {
            address: nfs.address,
            server: nfs.server,
            path: nfs.path,
            read_only: nfs.read_only,
            ..Default::default()
        };
        return Ok(VolumeSpec::Nfs(message.volume, directory));
    }
    Ok(VolumeSpec::File(FileVolume {
        path: check_absolute("path", &message.path)?,
        name: message.volume,
        is_empty_dir: message.is_empty_dir,
        is_device: message.is_device,
        gid: message.gid,
    }))
}

fn pack(type_url: &str, message: &impl Message) -> Result<Any> {
    let value = message
        .write_to_bytes()
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("write {type_url}"), error))?;
    Ok(Any {
        type_url: type_url.into(),
        value,
        ..Default::default()
    })
}

/// A known enum value in a message.
pub fn known<E: protobuf::Enum>(value: E) -> EnumOrUnknown<E> {
    EnumOrUnknown::new(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(options: &options::SandboxOptions) -> Any {
        pack(protocol::SANDBOX_OPTIONS_TYPE_URL, options).unwrap()
    }

    #[test]
    fn options_are_refused_by_name() {
        let wrong_type = Any {
            type_url: "x".into(),
            ..Default::default()
        };
        for (any, expected) in [
            (None, "type_url"),
            (Some(wrong_type), "type_url \"x\""),
            (
                Some(packed(&options::SandboxOptions {
                    network: MessageField::some(options::Network {
                        mac: "zz".into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                })),
                "network.mac",
            ),
        ] {
            let error = sandbox_spec(any.as_ref()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.chain().contains(expected), "{}", error.chain());
        }
        let spec = sandbox_spec(Some(&packed(&options::SandboxOptions::default()))).unwrap();
        assert!(spec.validate().unwrap_err().chain().contains("n_vcpus is 0"));
    }

    #[test]
    fn image_paths_in_order() {
        let mount = |type_: &str, source: &str, options: &[&str]| Mount {
            type_: type_.into(),
            source: source.into(),
            options: options.iter().map(|option| (*option).into()).collect(),
            ..Default::default()
        };
        let paths = image_paths(&[mount("erofs", "/meta", &["ro", "device=/one", "device=/two"])]).unwrap();
        assert_eq!(paths, ["/meta", "/one", "/two"].map(PathBuf::from));
        for (mounts, expected) in [
            (vec![], "0 mounts"),
            (vec![mount("overlay", "/meta", &[])], "\"overlay\""),
            (vec![mount("erofs", "/meta", &["device=one"])], "\"one\""),
        ] {
            let error = image_paths(&mounts).unwrap_err();
            assert!(error.chain().contains(expected), "{}", error.chain());
        }
    }

    #[test]
    fn every_statistic_arrives() {
        let stats = ContainerStats {
            cpu_usage_us: 1,
            memory_usage_bytes: 2,
            oom_kills: 3,
            pids: 4,
            io_write_ops: 5,
            memory_file_bytes: 9,
            memory_inactive_file_bytes: 6,
            ..Default::default()
        };
        let any = container_metrics(&stats).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = cgroup::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 1);
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (2, u64::MAX));
        assert_eq!((metrics.memory.inactive_file, metrics.memory.active_file), (6, 3));
        assert_eq!(metrics.memory_events.oom_kill, 3);
        assert_eq!(metrics.pids.current, 4);
        assert_eq!(metrics.io.usage[0].wios, 5);
    }
}
