//! Messages to domain types and back.

use protocol::guest::{
    AttachVolumeRequest, ConfigureSandboxRequest, ConfigureSandboxResponse, ContainerStatsResponse,
    File as FileMessage, NetworkStats, SandboxStatsResponse, Slice as SliceMessage,
    WritableLayer as WritableLayerMessage,
};
use serde::de::DeserializeOwned;

use crate::{
    boot::clock,
    error::{Error, Result},
    identity::{Id, Identity, Ids, Origin},
    network::Interface,
    stats::{ContainerStats, SandboxStats, WritableLayer},
    storage::{AttachedVolume, Export, File, NfsVolume, Slice},
};

/// Reads an OCI document; `field` is its name in messages.
pub(super) fn json<T: DeserializeOwned>(field: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::invalid(format!("{field}: {error}")))
}

/// Checks a slice; `field` is its name in messages.
pub(super) fn slice(field: &str, message: Option<&SliceMessage>) -> Result<Option<Slice>> {
    let parse = |slice: &SliceMessage| {
        Slice::parse(
            field,
            &slice.disk,
            slice.partition,
            slice.offset_bytes,
            slice.length_bytes,
            &slice.fs_type,
        )
    };
    message.map(parse).transpose()
}

/// A volume to attach.
pub(super) enum Attach {
    /// It has a slice of its own.
    Slice(AttachedVolume),
    /// It is on a server.
    Nfs(NfsVolume),
}

/// Checks a volume to attach.
pub(super) fn attached(request: AttachVolumeRequest) -> Result<Attach> {
    if let Some(nfs) = request.nfs.into_option() {
        return Ok(Attach::Nfs(NfsVolume {
            name: request.volume,
            export: Export::parse(&nfs.address, nfs.server, nfs.path, nfs.read_only)?,
        }));
    }
    let slice = slice("slice", request.slice.as_ref())?
        .ok_or_else(|| Error::invalid("slice is missing: give the slice of the volume"))?;
    Ok(Attach::Slice(AttachedVolume {
        name: request.volume,
        slice,
        is_empty_dir: request.is_empty_dir,
        is_device: request.is_device,
        gid: request.gid,
    }))
}

/// The files of a volume.
pub(super) fn files(messages: Vec<FileMessage>) -> Vec<File> {
    let file = |message: FileMessage| File {
        path: message.path,
        mode: message.mode,
        content: message.content,
    };
    messages.into_iter().map(file).collect()
}

/// Checks what the host gives the sandbox.
pub(super) fn identity(request: ConfigureSandboxRequest) -> Result<Identity> {
    let interfaces = request
        .interfaces
        .iter()
        .enumerate()
        .map(|(index, interface)| {
            let (addresses, gateways) = (&interface.addresses, &interface.gateways);
            Interface::parse(
                index,
                &interface.name,
                &interface.mac,
                addresses,
                gateways,
                interface.mtu,
            )
        })
        .collect::<Result<_>>()?;
    let scratch = slice("scratch", request.scratch.as_ref())?;
    let dns = request.dns.into_option().unwrap_or_default();
    let machine_id = (!request.machine_id.is_empty())
        .then(|| Id::parse_hex("machine_id", &request.machine_id))
        .transpose()?;
    Ok(Identity {
        origin: if request.is_clone {
            Origin::Cloned
        } else {
            Origin::Booted
        },
        hostname: request.hostname,
        domain: request.domain,
        machine_id,
        n_vcpus: request.n_vcpus,
        interfaces,
        nameservers: dns.nameservers,
        searches: dns.searches,
        dns_options: dns.options,
        host_aliases: request
            .host_aliases
            .into_iter()
            .map(|alias| (alias.ip, alias.hostnames))
            .collect(),
        wall_clock_ns: request.wall_clock_ns,
        entropy: request.entropy,
        scratch,
        sysctls: request.sysctls,
    })
}

pub(super) fn configured(ready_us: u64, ids: Ids) -> ConfigureSandboxResponse {
    ConfigureSandboxResponse {
        ready_us,
        machine_id: ids.machine.hex(),
        boot_id: ids.boot.uuid(),
        generation: ids.generation.uuid(),
        ..Default::default()
    }
}

pub(super) fn container_stats(stats: ContainerStats) -> ContainerStatsResponse {
    ContainerStatsResponse {
        timestamp_ns: clock::now_ns(),
        cpu_usage_us: stats.cpu_usage_us,
        cpu_user_us: stats.cpu_user_us,
        cpu_system_us: stats.cpu_system_us,
        cpu_periods: stats.cpu_periods,
        cpu_throttled_periods: stats.cpu_throttled_periods,
        cpu_throttled_us: stats.cpu_throttled_us,
        memory_usage_bytes: stats.memory_usage_bytes,
        memory_limit_bytes: stats.memory_limit_bytes,
        memory_anon_bytes: stats.memory_anon_bytes,
        memory_file_bytes: stats.memory_file_bytes,
        memory_inactive_file_bytes: stats.memory_inactive_file_bytes,
        memory_page_faults: stats.memory_page_faults,
        memory_major_page_faults: stats.memory_major_page_faults,
        oom_kills: stats.oom_kills,
        pids: stats.pids,
        pids_limit: stats.pids_limit,
        io_read_bytes: stats.io_read_bytes,
        io_write_bytes: stats.io_write_bytes,
        io_read_ops: stats.io_read_ops,
        io_write_ops: stats.io_write_ops,
        ..Default::default()
    }
}

pub(super) fn sandbox_stats(stats: SandboxStats, layers: Vec<WritableLayer>) -> SandboxStatsResponse {
    let networks = stats
        .networks
        .into_iter()
        .map(|network| {
            let [rx_bytes, rx_packets, rx_errors, rx_dropped] = network.rx;
            let [tx_bytes, tx_packets, tx_errors, tx_dropped] = network.tx;
            NetworkStats {
                name: network.name,
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
                ..Default::default()
            }
        })
        .collect();
    SandboxStatsResponse {
        timestamp_ns: clock::now_ns(),
        cpu_usage_us: stats.cpu_usage_us,
        memory_total_bytes: stats.memory_total_bytes,
        memory_available_bytes: stats.memory_available_bytes,
        networks,
        scratch_capacity_bytes: stats.scratch_capacity_bytes,
        scratch_used_bytes: stats.scratch_used_bytes,
        scratch_inodes: stats.scratch_inodes,
        scratch_used_inodes: stats.scratch_used_inodes,
        init_resident_bytes: stats.init_resident_bytes,
        writable_layers: layers
            .into_iter()
            .map(|layer| WritableLayerMessage {
                container_id: layer.container_id,
                used_bytes: layer.used_bytes,
                used_inodes: layer.used_inodes,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}
