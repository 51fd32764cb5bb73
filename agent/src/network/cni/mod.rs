//! Groups in a network of CNI instead of the agent's own: for each sandbox a network namespace, in which plugins make an interface,
//! and a tap beside it that is joined with that (`redirect.rs`). The VMM gets the tap's descriptor, as ever, and the guest the
//! interface's MAC and addresses.
//!
//! ```text
//!   record --> namespace --> ADD --> answer in the record --> tap, joined --> in use --> DEL --> namespace gone --> record gone
//! ```

pub mod conf;
mod plugin;
mod record;
mod redirect;
mod result;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde_json::{Map, Value, json};

pub use result::Dns;

use self::{
    conf::{Capability, Network},
    plugin::Call,
    record::{Record, Records},
    result::{Answer, Given},
};
use super::{Addresses, Attachment, Policy, bandwidth::Bandwidth, mac_text, tap_name};
use crate::{
    config::{CniConfig, CniMode},
    error::{Error, ErrorKind, Result},
    group::{spec::GroupSpec, status::GroupId},
    sys,
};

/// Bits that may go at once, as time at the rate, for plugins that limit bandwidth: a tenth of a second.
const BURST_FRACTION: u64 = 10;
/// Least burst, bits: some frames.
const LEAST_BURST: u64 = 160_000;

/// What plugins are told of a group.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Request {
    args: String,
    runtime: Map<String, Value>,
}

impl Request {
    /// Of a group, and its sandbox `id`.
    pub fn of(spec: &GroupSpec, id: &GroupId) -> Self {
        let Policy {
            bandwidth,
            host_ports,
            ..
        } = Policy::of(spec);
        let mut runtime = Map::new();
        if !host_ports.is_empty() {
            let mappings = host_ports.iter().map(|lead| {
                let mut mapping = json!({
                    "hostPort": lead.port, "containerPort": lead.target, "protocol": lead.protocol.name(),
                });
                if let Some(ip) = lead.ip {
                    mapping["hostIP"] = ip.to_string().into();
                }
                mapping
            });
            runtime.insert(Capability::PortMappings.name().into(), mappings.collect());
        }
        if bandwidth != Bandwidth::default() {
            let mut limits = Map::new();
            for (name, bits) in [
                ("ingress", bandwidth.ingress_bits),
                ("egress", bandwidth.egress_bits),
            ] {
                if let Some(bits) = bits {
                    limits.insert(format!("{name}Rate"), bits.into());
                    // The plugin takes no more.
                    let burst = (bits / BURST_FRACTION).clamp(LEAST_BURST, u32::MAX.into());
                    limits.insert(format!("{name}Burst"), burst.into());
                }
            }
            runtime.insert(Capability::Bandwidth.name().into(), limits.into());
        }
        // What a kubelet's runtime tells them.
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={id}",
            spec.namespace, spec.name
        );
        Self { args, runtime }
    }
}

/// Networks of CNI on this host.
#[derive(Debug)]
pub struct Cni {
    /// What new groups get; `None`: the agent's own network.
    network: Option<Network>,
    bin_dirs: Vec<PathBuf>,
    namespaces: PathBuf,
    records: Records,
    known: Mutex<BTreeMap<GroupId, Record>>,
}

impl Cni {
    /// Looks which network is configured, and which groups are in one.
    ///
    /// # Errors
    /// `FailedPrecondition` when one is required and none configured, `InvalidArgument` for a configuration that can't be used;
    /// records that can't be read.
    pub fn open(config: &CniConfig, state_dir: &Path, run_dir: &Path) -> Result<Self> {
        let found = match config.mode {
            CniMode::Off => None,
            CniMode::Auto | CniMode::Required => conf::find(&config.conf_dir)?,
        };
        if config.mode == CniMode::Required && found.is_none() {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "network.cni.mode is required, and {} has no configuration: put one there, or set auto or off",
                    config.conf_dir.display()
                ),
            ));
        }
        if let Some((path, network)) = &found {
            tracing::info!(network = network.name, path = %path.display(), "groups get their network from CNI plugins");
        }
        let namespaces = run_dir.join("netns");
        let failed = |what: &'static str| move |error| Error::with_source(ErrorKind::Internal, what, error);
        std::fs::create_dir_all(&namespaces).map_err(failed("make a directory for network namespaces"))?;
        let records =
            Records::open(state_dir.join("cni")).map_err(failed("make a directory for CNI records"))?;
        let known = records.all().map_err(failed("read the CNI records"))?;
        Ok(Self {
            network: found.map(|(_, network)| network),
            bin_dirs: config.bin_dirs.clone(),
            namespaces,
            records,
            known: Mutex::new(known.into_iter().collect()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, Record>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The network that new groups get.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// The addresses of a group in one.
    pub fn addresses(&self, id: &GroupId) -> Option<Addresses> {
        Some(self.lock().get(id)?.given.as_ref()?.own)
    }

    /// Those in one that are none of these.
    pub fn orphans(&self, known: &[GroupId]) -> Vec<GroupId> {
        let ids = self.lock();
        ids.keys().filter(|id| !known.contains(id)).cloned().collect()
    }

    /// Puts a group into the network. What was left of an attempt before is taken back first.
    ///
    /// # Errors
    /// What a plugin said, or what a guest can't have; what was made by then is left for [`Cni::remove`].
    pub async fn add(&self, id: &GroupId, request: Request) -> Result<Attachment> {
        self.remove(id).await?;
        let Some(network) = self.network.clone() else {
            return Err(Error::new(ErrorKind::Internal, "no CNI network is configured"));
        };
        let netns = self.namespaces.join(id.as_str());
        let Request { args, runtime } = request;
        let mut record = Record {
            network,
            netns,
            args,
            runtime,
            answer: None,
            given: None,
        };
        self.put(id, &record)?;
        sys::netns::create(&record.netns).map_err(|error| {
            let what = format!("make network namespace {}", record.netns.display());
            Error::with_source(ErrorKind::Internal, what, error)
        })?;
        let answer = self.call(id, &record).add().await?;
        let given = serde_json::from_value::<Answer>(answer.clone())
            .map_err(|error| Error::with_source(ErrorKind::Internal, "read the answer of CNI plugins", error))
            .and_then(|answer| Given::from(&answer));
        // Whatever it is worth to the group: DEL wants it.
        record.answer = Some(answer);
        record.given = given.as_ref().ok().cloned();
        self.put(id, &record)?;
        let given = given?;
        let tap = tap_name(id);
        let redirect::Interface { mac, mtu } = redirect::join(&record.netns, &tap).await?;
        Ok(Attachment {
            tap,
            mac: mac_text(mac),
            addresses: given.addresses,
            gateways: given.gateways,
            mtu,
            netns: Some(record.netns),
            dns: Some(given.dns),
        })
    }

    /// Takes a group out of its network, whichever that was, however far it got. Idempotent.
    ///
    /// # Errors
    /// What a plugin said: then all is left for the next attempt.
    pub async fn remove(&self, id: &GroupId) -> Result<()> {
        let Some(record) = self.lock().get(id).cloned() else {
            return Ok(());
        };
        self.call(id, &record).del(record.answer.as_ref()).await?;
        let failed = |what: &'static str| move |error| Error::with_source(ErrorKind::Internal, what, error);
        sys::netns::remove(&record.netns).map_err(failed("remove a network namespace"))?;
        self.records.remove(id).map_err(failed("remove a CNI record"))?;
        self.lock().remove(id);
        Ok(())
    }

    fn call<'a>(&'a self, id: &'a GroupId, record: &'a Record) -> Call<'a> {
        Call {
            network: &record.network,
            bin_dirs: &self.bin_dirs,
            id,
            netns: &record.netns,
            args: &record.args,
            runtime: &record.runtime,
        }
    }

    fn put(&self, id: &GroupId, record: &Record) -> Result<()> {
        let written = self.records.put(id, record);
        written.map_err(|error| Error::with_source(ErrorKind::Internal, "write a CNI record", error))?;
        self.lock().insert(id.clone(), record.clone());
        Ok(())
    }
}
#[cfg(test)]
mod tests;
