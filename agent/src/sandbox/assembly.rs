//! Puts a sandbox together from the host's parts, and takes it apart again. Taking apart is idempotent and goes on past
//! failures, so it also clears what a killed agent left behind.

use std::{path::Path, sync::Arc, time::Duration};

use protocol::sandbox::{Dns, HostAlias, Network as NetworkOptions, SandboxOptions, Template};

use super::{
    client::SandboxConnection,
    standby::{Resources, Shape, Standby},
    templates::Class,
};
use crate::{
    capacity,
    error::{Error, ErrorKind, Result},
    group::{
        network,
        spec::{DnsSpec, GroupSpec},
        status::GroupId,
        sysctls,
    },
    network::{Addresses, Policy},
    parts::HostParts,
    profile::{self, phase},
    snapshots::SnapshotId,
};

const MIB: u64 = 1 << 20;
/// For the guest to end by itself once its containers have.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Makes all that a group's sandbox needs, and starts it, or has it go on from a snapshot.
///
/// # Errors
/// The first failure; what was made by then is left for [`take_apart`].
pub async fn put_together(
    parts: &Arc<HostParts>,
    id: &GroupId,
    spec: &GroupSpec,
    ip: Option<Addresses>,
    restores: Option<&SnapshotId>,
) -> Result<SandboxConnection> {
    let turn = phase("queue", parts.starts.acquire()).await;
    let _turn = turn.map_err(|error| Error::with_source(ErrorKind::Internal, "wait to start", error))?;
    if let Some(standby) = parts.standbys.assigned(id).filter(|_| restores.is_none()) {
        let connection = standby.resources.connection.clone();
        match take_over(parts, id, spec, ip, standby).await {
            Ok(()) => return Ok(connection),
            Err(error) => {
                tracing::warn!(group_id = %id, error = %error.chain(), "the sandbox that stood by is of no use");
                profile::standby("failed");
                take_apart(parts, id, ip, Some(connection)).await?;
            }
        }
    }
    let memory_bytes = capacity::footprint(spec.size, &parts.config.sandbox).memory_bytes;
    let resources = gather(parts, id, ip, Some(spec), memory_bytes, restores).await?;
    govern(parts, id, spec, ip).await?;
    let shape = Shape::of(spec.size, parts);
    let mut options = introduced(parts, spec, &resources, machine(parts, shape, &resources));
    let class = shape.class(resources.attachment.is_some(), &parts.config);
    let template = class
        .filter(|_| restores.is_none())
        .and_then(|class| Some((class, parts.templates.find(class)?)));
    if let Some(snapshot) = restores {
        let directory = parts.snapshots.directory(snapshot);
        options.snapshot_directory = directory.to_string_lossy().into_owned();
    }
    if let Some((_, template)) = &template {
        options.template = Some(template.clone()).into();
    }
    let template = template.map(|(class, _)| class);
    if let (Some(_), None) = (class, restores) {
        profile::template(if template.is_some() { "hit" } else { "miss" });
    }
    let connection = resources.connection;
    let bundle = parts.bundle(id);
    phase("sandbox", connection.start_sandbox(bundle.dir(), &options)).await?;
    tell_start(Arc::clone(parts), id.clone(), template, connection.clone());
    limit_cpu(parts, id, spec).await?;
    Ok(connection)
}

/// Gives a sandbox that stands by to a group.
async fn take_over(
    parts: &Arc<HostParts>,
    id: &GroupId,
    spec: &GroupSpec,
    ip: Option<Addresses>,
    mut standby: Standby,
) -> Result<()> {
    let memory_bytes = capacity::footprint(spec.size, &parts.config.sandbox).memory_bytes;
    blocking(parts, id, move |parts, id| {
        parts.cgroups.limit_memory(id, memory_bytes)
    })
    .await?;
    // It was made with what every group has.
    if let (Some(ip), true) = (ip, ip != standby.ip) {
        standby.resources.attachment = parts.network.attach(id, ip).await?;
    }
    govern(parts, id, spec, ip).await?;
    let shape = Shape::of(spec.size, parts);
    let mut options = introduced(
        parts,
        spec,
        &standby.resources,
        machine(parts, shape, &standby.resources),
    );
    options.template = Some(standby.template).into();
    let connection = standby.resources.connection;
    let bundle = parts.bundle(id);
    phase("sandbox", connection.start_sandbox(bundle.dir(), &options)).await?;
    tell_start(Arc::clone(parts), id.clone(), None, connection);
    limit_cpu(parts, id, spec).await
}

/// Makes what the group asks of the network hold, before its guest knows who it is.
async fn govern(parts: &HostParts, id: &GroupId, spec: &GroupSpec, ip: Option<Addresses>) -> Result<()> {
    match ip {
        Some(ip) => parts.network.govern(id, ip, &Policy::of(spec)).await,
        None => Ok(()),
    }
}

async fn limit_cpu(parts: &Arc<HostParts>, id: &GroupId, spec: &GroupSpec) -> Result<()> {
    let cpu_milli = spec.size.cpu_milli;
    blocking(parts, id, move |parts, id| parts.cgroups.limit_cpu(id, cpu_milli)).await
}

/// Makes a sandbox of that shape, whose guest waits for its identity.
///
/// # Errors
/// The first failure; what was made by then is left for [`take_apart`].
pub async fn stand_by(
    parts: &Arc<HostParts>,
    id: &GroupId,
    ip: Option<Addresses>,
    shape: Shape,
    template: &Template,
) -> Result<Resources> {
    let overhead_mib = u64::from(parts.config.sandbox.host_overhead_mib);
    let memory_bytes = (u64::from(shape.memory_mib) + overhead_mib) * MIB;
    let resources = gather(parts, id, ip, None, memory_bytes, None).await?;
    let options = SandboxOptions {
        template: Some(template.clone()).into(),
        standby: true,
        ..machine(parts, shape, &resources)
    };
    let bundle = parts.bundle(id);
    resources
        .connection
        .create_sandbox(bundle.dir(), &options)
        .await?;
    Ok(resources)
}

/// Makes what a sandbox needs on the host, at the same time.
async fn gather(
    parts: &Arc<HostParts>,
    id: &GroupId,
    ip: Option<Addresses>,
    spec: Option<&GroupSpec>,
    memory_bytes: u64,
    restores: Option<&SnapshotId>,
) -> Result<Resources> {
    let bundle = parts.bundle(id);
    bundle.create().map_err(|error| {
        Error::with_source(
            ErrorKind::Internal,
            format!("make bundle {}", bundle.dir().display()),
            error,
        )
    })?;
    let snapshot = restores.cloned();
    let scratch = blocking(parts, id, move |parts, id| match snapshot {
        Some(snapshot) => parts.scratch.create_from(id, &parts.snapshots.scratch(&snapshot)),
        None => parts.scratch.create(id),
    });
    let cgroup = blocking(parts, id, move |parts, id| parts.cgroups.create(id, memory_bytes));
    let attach = async {
        match (ip, spec) {
            (Some(ip), _) => parts.network.attach(id, ip).await,
            (None, Some(spec)) => parts.network.attach_by_cni(id, spec).await,
            (None, None) => Ok(None),
        }
    };
    let shim = parts.shim.start(id.as_str(), &bundle);
    let all = async {
        tokio::try_join!(
            phase("scratch", scratch),
            phase("cgroup", cgroup),
            phase("network", attach),
            phase("shim", shim)
        )
    };
    let (scratch, cgroup, attachment, connection) = phase("resources", all).await?;
    Ok(Resources {
        connection,
        scratch,
        cgroup,
        attachment,
    })
}

/// Tells, beside the group's own start, how it came about, and takes a template that was of no use away.
fn tell_start(parts: Arc<HostParts>, id: GroupId, template: Option<Class>, connection: SandboxConnection) {
    tokio::spawn(async move {
        let Ok((_, info)) = connection.sandbox_status().await else {
            return;
        };
        let get = |key: &str| info.get(key).map(String::as_str).unwrap_or_default();
        let (start_kind, start_us) = (get("start_kind"), get("start_us"));
        let phases_us = get("start_phases_us");
        tracing::info!(group_id = %id, start_kind, start_us, phases_us, "sandbox started");
        profile::sandbox_started(&info);
        if let (Some(class), Some(why)) = (template, info.get("template_refused")) {
            profile::template("refused");
            parts.templates.refused(class, why);
        }
    });
}

async fn blocking<T: Send + 'static>(
    parts: &Arc<HostParts>,
    id: &GroupId,
    work: impl FnOnce(&HostParts, &GroupId) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (parts, id) = (Arc::clone(parts), id.clone());
    tokio::task::spawn_blocking(move || work(&parts, &id))
        .await
        .unwrap_or_else(|error| {
            Err(Error::with_source(
                ErrorKind::Internal,
                "a blocking task ended",
                error,
            ))
        })
}

/// What the shim is told of the machine.
fn machine(parts: &HostParts, shape: Shape, resources: &Resources) -> SandboxOptions {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let config = &parts.config;
    let network = resources.attachment.as_ref().map(|attachment| NetworkOptions {
        tap: attachment.tap.clone(),
        mac: attachment.mac.clone(),
        addresses: attachment.addresses.clone(),
        gateways: attachment.gateways.clone(),
        mtu: attachment.mtu.into(),
        netns: attachment.netns.as_deref().map(text).unwrap_or_default(),
        ..NetworkOptions::default()
    });
    SandboxOptions {
        n_vcpus: shape.n_vcpus,
        memory_mib: shape.memory_mib,
        n_possible_vcpus: shape.n_possible_vcpus,
        hotplug_mib: shape.hotplug_mib,
        network: network.into(),
        scratch_path: text(&resources.scratch),
        kernel_path: text(&config.files.kernel),
        initrd_path: text(&config.files.initrd),
        vmm_path: text(&config.files.vmm),
        cgroup_path: resources.cgroup.as_deref().map(text).unwrap_or_default(),
        kernel_args: config.sandbox.kernel_args.clone(),
        ..SandboxOptions::default()
    }
}

/// What it is told of the group beside.
fn introduced(
    parts: &HostParts,
    spec: &GroupSpec,
    resources: &Resources,
    machine: SandboxOptions,
) -> SandboxOptions {
    let of_network = resources
        .attachment
        .as_ref()
        .and_then(|attachment| attachment.dns.as_ref());
    let of_network = of_network
        .filter(|dns| !dns.nameservers.is_empty())
        .map(|dns| DnsSpec {
            nameservers: dns.nameservers.clone(),
            searches: dns.search.clone(),
            options: dns.options.clone(),
        });
    let wanted = spec.dns.clone().or(of_network);
    let nameservers = match &wanted {
        Some(dns) => dns.nameservers.clone(),
        None => parts.network.nameservers(),
    };
    let dns = wanted.unwrap_or_default();
    let cluster_domain = &parts.config.network.cluster_domain;
    SandboxOptions {
        hostname: network::seen_hostname(spec, cluster_domain),
        domain: network::domain(spec, cluster_domain).unwrap_or_default(),
        dns: Some(Dns {
            nameservers,
            searches: dns.searches,
            options: dns.options,
            ..Dns::default()
        })
        .into(),
        host_aliases: spec
            .host_aliases
            .iter()
            .map(|(ip, hostnames)| HostAlias {
                ip: ip.clone(),
                hostnames: hostnames.clone(),
                ..HostAlias::default()
            })
            .collect(),
        sysctls: spec
            .sysctls
            .iter()
            .map(|(name, value)| (sysctls::path(name), value.clone()))
            .collect(),
        ..machine
    }
}

/// Stops a group's sandbox if it still runs, and removes all that it needed: shim, VMM, cgroup, tap, scratch disk, bundle.
///
/// # Errors
/// The first failure; the rest was tried all the same.
pub async fn take_apart(
    parts: &Arc<HostParts>,
    id: &GroupId,
    ip: Option<Addresses>,
    connection: Option<SandboxConnection>,
) -> Result<()> {
    let bundle = parts.bundle(id);
    let mut first = Ok(());
    let mut note = |result: Result<()>| {
        if let Err(error) = result {
            tracing::warn!(group_id = %id, error = %error.chain(), "a step of taking a sandbox apart failed");
            if first.is_ok() {
                first = Err(error);
            }
        }
    };
    if !stop_politely(id, connection).await {
        note(parts.shim.bury(id.as_str(), &bundle).await);
    }
    note(blocking(parts, id, |parts, id| parts.cgroups.remove(id)).await);
    note(parts.network.detach(id, ip).await);
    note(blocking(parts, id, |parts, id| parts.scratch.remove(id)).await);
    let dir = bundle.dir().to_owned();
    let removed = tokio::fs::remove_dir_all(&dir).await;
    note(match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::with_source(
            ErrorKind::Internal,
            format!("remove bundle {}", dir.display()),
            error,
        )),
        _ => Ok(()),
    });
    first
}

/// Asks guest and shim to end. `false` when the shim has to be buried instead.
async fn stop_politely(id: &GroupId, connection: Option<SandboxConnection>) -> bool {
    let Some(connection) = connection else {
        return false;
    };
    if let Err(error) = connection.stop_sandbox(STOP_GRACE).await {
        tracing::debug!(group_id = %id, error = %error.chain(), "the sandbox did not stop when asked");
        if error.kind == ErrorKind::Unavailable {
            return false;
        }
    }
    match connection.shutdown_sandbox().await {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(group_id = %id, error = %error.chain(), "the shim did not end when asked");
            false
        }
    }
}
