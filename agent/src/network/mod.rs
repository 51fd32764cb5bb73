//! The groups' network: a bridge of the agent's own, an address and a tap for each group, NAT, anti-spoofing and security
//! groups by nftables. Everything is idempotent: a new agent on an old host finds things as they are and goes on.
//!
//! Bridge and base rules stay while the agent is away, since groups live on; [`Network::cleanup`] removes them.

pub mod bandwidth;
pub mod cni;
mod family;
mod ipam;
mod ipv6;
mod link;
mod nft;
mod ports;
mod rules;
pub mod security;
mod subnet6;
mod together;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

pub use ipam::{AddressPool, Subnet};
pub use ports::{HostPort, HostProtocol};
pub use subnet6::{Addresses, Subnet6};

use crate::{
    config::NetworkConfig,
    error::{Error, ErrorKind, Result},
    group::{spec::GroupSpec, status::GroupId},
    sys,
};

use self::{bandwidth::Bandwidth, family::Prefixes, rules::Leased, security::SecurityGroup};

/// Where the host lists its name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// systemd-resolved's list of the real servers behind its local one.
const RESOLVED_CONF: &str = "/run/systemd/resolve/resolv.conf";

/// A group's place in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The host's tap interface.
    pub tap: String,
    /// `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// With the prefix length: `10.89.0.2/16`. An IPv6 address has 128, since even groups are reached through the bridge.
    pub addresses: Vec<String>,
    /// The bridge's.
    pub gateways: Vec<String>,
    /// MTU.
    pub mtu: u16,
    /// Network namespace that the tap is in; `None`: the host's.
    pub netns: Option<PathBuf>,
    /// Name servers of a network that has its own.
    pub dns: Option<cni::Dns>,
}

/// What holds for a group in the network beside its own address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// Ids of the security groups it is a member of.
    pub security_groups: Vec<String>,
    /// Limits of its traffic.
    pub bandwidth: Bandwidth,
    /// Ports of the host that lead to it.
    pub host_ports: Vec<HostPort>,
}

impl Policy {
    /// What a group asks for.
    pub fn of(spec: &GroupSpec) -> Self {
        Self {
            security_groups: spec.network.security_groups.clone(),
            bandwidth: Bandwidth {
                ingress_bits: spec.network.ingress_bits,
                egress_bits: spec.network.egress_bits,
            },
            host_ports: host_ports(spec).into_iter().map(|(_, _, port)| port).collect(),
        }
    }

    /// Whether there is anything for the rules to know.
    fn has_rules(&self) -> bool {
        !self.security_groups.is_empty() || !self.host_ports.is_empty()
    }
}

/// The host ports of a group, with the positions of container and port.
pub fn host_ports(spec: &GroupSpec) -> Vec<(usize, usize, HostPort)> {
    let mut found = Vec::new();
    for (container, spec) in spec.containers.iter().enumerate() {
        for (index, declared) in spec.ports.iter().enumerate() {
            if let (Some(port), Some(protocol)) =
                (declared.host_port, HostProtocol::parse(&declared.protocol))
            {
                let lead = HostPort {
                    ip: declared.host_ip,
                    port,
                    protocol,
                    target: declared.port,
                };
                found.push((container, index, lead));
            }
        }
    }
    found
}

/// A group that has an address already.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Which.
    pub id: GroupId,
    /// Its addresses.
    pub ip: Addresses,
    /// What holds for it.
    pub policy: Policy,
    /// It has a sandbox; those without are attached when they get one.
    pub is_attached: bool,
}

/// The groups' network on this host.
#[derive(Debug)]
pub struct Network {
    config: NetworkConfig,
    security_groups: Vec<SecurityGroup>,
    subnet: Subnet,
    subnet6: Option<Subnet6>,
    /// What the rules know of groups, to be taken back when they go.
    leased: Mutex<BTreeMap<GroupId, Leased>>,
    pool: Mutex<AddressPool>,
    links: Option<link::Links>,
    cni: Option<cni::Cni>,
}

impl Network {
    /// Makes bridge and base rules; `leases` are the addresses of groups that exist already.
    ///
    /// # Errors
    /// `InvalidArgument` for a subnet that can't be used; `FailedPrecondition` for one of IPv6 on a host without; `Internal` with what the kernel or `nft` said.
    pub async fn open(
        config: NetworkConfig,
        security_groups: Vec<SecurityGroup>,
        leases: Vec<Lease>,
        cni: Option<cni::Cni>,
    ) -> Result<Self> {
        let subnet = Subnet::parse(&config.subnet)
            .map_err(|error| Error::with_source(ErrorKind::InvalidArgument, "network.subnet", error))?;
        let subnet6 =
            match config.subnet6.as_str() {
                "" => None,
                text => Some(Subnet6::parse(text).map_err(|error| {
                    Error::with_source(ErrorKind::InvalidArgument, "network.subnet6", error)
                })?),
            };
        let mut network = Self {
            config,
            security_groups,
            subnet,
            subnet6,
            pool: Mutex::new(AddressPool::new(subnet)),
            leased: Mutex::default(),
            links: None,
            cni,
        };
        let (mut leased, mut limited, mut neighbours) = (Vec::new(), Vec::new(), Vec::new());
        let has_leases = !leases.is_empty();
        for lease in leases {
            network.lock_pool().take(lease.ip.v4);
            if lease.is_attached {
                leased.push(network.leased(&lease.id, lease.ip, &lease.policy));
                limited.push((lease.id, lease.policy.bandwidth));
                neighbours.push(lease.ip);
            }
        }
        // Groups that have a place in it keep that.
        if network.config.enabled && (!network.uses_cni() || has_leases) {
            let config = &network.config;
            let links = link::Links::open()?;
            links
                .ensure_bridge(
                    &config.bridge,
                    mac(subnet.gateway()),
                    (subnet.gateway(), subnet.prefix()),
                    config.mtu,
                )
                .await?;
            let prefixes = Prefixes {
                v4: subnet,
                v6: subnet6,
            };
            rules::apply_base(config, &network.security_groups, prefixes, &leased).await?;
            set("/proc/sys/net/ipv4/ip_forward")?;
            set(&format!(
                "/proc/sys/net/ipv4/conf/{}/route_localnet",
                config.bridge
            ))?;
            if let Some(subnet6) = subnet6 {
                ipv6::prepare(&links, &config.bridge, subnet6).await?;
                for ip in neighbours {
                    ipv6::know(&links, &config.bridge, ip).await?;
                }
            }
            limit_again(&links, limited).await?;
            network.links = Some(links);
        }
        Ok(network)
    }

    fn lock_pool(&self) -> MutexGuard<'_, AddressPool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_leased(&self) -> MutexGuard<'_, BTreeMap<GroupId, Leased>> {
        self.leased.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to hold for a group, noted so that it can be taken back. A security group that is not configured any more lets
    /// nothing through.
    fn leased(&self, id: &GroupId, ip: Addresses, policy: &Policy) -> Leased {
        let is_known = |wanted: &&String| self.security_groups().any(|id| id == *wanted);
        let (known, unknown): (Vec<&String>, Vec<&String>) =
            policy.security_groups.iter().partition(is_known);
        if !unknown.is_empty() {
            tracing::warn!(group_id = %id, ?unknown, "security groups are not configured: they allow nothing");
        }
        let leased = Leased {
            is_guarded: !policy.security_groups.is_empty(),
            security_groups: known.into_iter().cloned().collect(),
            host_ports: policy.host_ports.clone(),
            ..Leased::new(tap_name(id), self.served(ip))
        };
        self.lock_leased().insert(id.clone(), leased.clone());
        leased
    }

    /// Ids of the security groups that are configured.
    pub fn security_groups(&self) -> impl Iterator<Item = &str> {
        self.security_groups.iter().map(|group| group.id.as_str())
    }

    /// Whether groups have a network.
    pub fn is_enabled(&self) -> bool {
        self.links.is_some() || self.uses_cni()
    }

    /// Whether new groups get their network from CNI plugins.
    pub fn uses_cni(&self) -> bool {
        self.cni_network().is_some()
    }

    /// Which network that is.
    pub fn cni_network(&self) -> Option<&cni::conf::Network> {
        self.cni.as_ref()?.network()
    }

    /// The addresses that CNI plugins gave a group.
    pub fn given(&self, id: &GroupId) -> Option<Addresses> {
        self.cni.as_ref()?.addresses(id)
    }

    /// Reserves an address; the caller makes it durable. `None` when the network is switched off.
    ///
    /// # Errors
    /// `ResourceExhausted` when all are taken.
    pub fn reserve(&self) -> Result<Option<Ipv4Addr>> {
        if self.links.is_none() || self.uses_cni() {
            return Ok(None);
        }
        let mut pool = self.lock_pool();
        pool.allocate().map(Some).ok_or_else(|| {
            Error::new(
                ErrorKind::ResourceExhausted,
                format!(
                    "all {} addresses of {} are in use",
                    pool.size(),
                    self.config.subnet
                ),
            )
        })
    }

    /// The addresses of a group that has this lease: an IPv6 one too, where it wants one and there are any.
    pub fn addresses(&self, ip: Ipv4Addr, wants_ipv6: bool) -> Addresses {
        let subnet6 = self.subnet6.filter(|_| wants_ipv6);
        Addresses {
            v4: ip,
            v6: subnet6.map(|subnet6| subnet6.address(ip)),
        }
    }

    /// Whether groups can have IPv6 addresses.
    pub fn has_ipv6(&self) -> bool {
        self.links.is_some() && self.subnet6.is_some() && !self.uses_cni()
    }

    /// Without the IPv6 address when there are none any more: it is out of use until the network is configured again.
    fn served(&self, ip: Addresses) -> Addresses {
        Addresses {
            v6: ip.v6.filter(|_| self.subnet6.is_some()),
            ..ip
        }
    }

    /// Gives the addresses back.
    pub fn release(&self, ip: Addresses) {
        self.lock_pool().release(ip.v4);
    }

    /// This host's address in the groups' network.
    pub fn gateway(&self) -> Ipv4Addr {
        self.subnet.gateway()
    }

    /// All of its addresses there, the IPv4 one first.
    pub fn gateways(&self) -> Vec<String> {
        let own = Addresses {
            v4: self.gateway(),
            v6: self.subnet6.map(Subnet6::gateway),
        };
        own.texts().collect()
    }

    /// Makes the group's tap on the bridge, and the rules that keep it to its own address. Idempotent.
    ///
    /// # Errors
    /// `Internal` with what the kernel or `nft` said.
    pub async fn attach(&self, id: &GroupId, ip: Addresses) -> Result<Option<Attachment>> {
        let Some(links) = &self.links else {
            return Ok(None);
        };
        let ip = self.served(ip);
        let attachment = self.attachment(id, ip);
        let tap = attachment.tap.clone();
        if links.index(&tap).await?.is_none() {
            sys::tap::create(&tap).map_err(|error| {
                Error::with_source(
                    ErrorKind::Internal,
                    format!("make tap {tap}: is /dev/net/tun there (modprobe tun)?"),
                    error,
                )
            })?;
        }
        links
            .join_bridge(&tap, &self.config.bridge, self.config.mtu)
            .await?;
        ipv6::know(links, &self.config.bridge, ip).await?;
        rules::add_tap(&tap, ip).await?;
        Ok(Some(attachment))
    }

    /// Has CNI plugins make the group's network, where they do that on this host.
    ///
    /// # Errors
    /// As [`cni::Cni::add`].
    pub async fn attach_by_cni(&self, id: &GroupId, spec: &GroupSpec) -> Result<Option<Attachment>> {
        match &self.cni {
            Some(cni) if self.uses_cni() => cni.add(id, cni::Request::of(spec, id)).await.map(Some),
            _ => Ok(None),
        }
    }

    /// Makes what holds for a group hold, before its guest has anything of the group. Idempotent.
    ///
    /// # Errors
    /// `Internal` with what the kernel or `nft` said; then the group may not start.
    pub async fn govern(&self, id: &GroupId, ip: Addresses, policy: &Policy) -> Result<()> {
        let Some(links) = &self.links else {
            return Ok(());
        };
        if policy.bandwidth != Bandwidth::default() {
            links.limit(&tap_name(id), policy.bandwidth).await?;
        }
        if policy.has_rules() {
            rules::add_policy(&self.leased(id, ip, policy)).await?;
        }
        Ok(())
    }

    fn attachment(&self, id: &GroupId, ip: Addresses) -> Attachment {
        let mut addresses = vec![format!("{}/{}", ip.v4, self.subnet.prefix())];
        let mut gateways = vec![self.subnet.gateway().to_string()];
        if let (Some(ip), Some(subnet6)) = (ip.v6, self.subnet6) {
            addresses.push(format!("{ip}/128"));
            gateways.push(subnet6.gateway().to_string());
        }
        Attachment {
            tap: tap_name(id),
            mac: mac_text(mac(ip.v4)),
            addresses,
            gateways,
            mtu: self.config.mtu,
            netns: None,
            dns: None,
        }
    }

    /// Removes the group's tap and rules. Idempotent; the address stays reserved.
    ///
    /// # Errors
    /// `Internal` with what the kernel or `nft` said.
    pub async fn detach(&self, id: &GroupId, ip: Option<Addresses>) -> Result<()> {
        if let Some(cni) = &self.cni {
            cni.remove(id).await?;
        }
        let (Some(links), Some(ip)) = (&self.links, ip) else {
            return Ok(());
        };
        let known = self.lock_leased().get(id).cloned();
        let leased = known.unwrap_or_else(|| Leased::new(tap_name(id), self.served(ip)));
        rules::remove(&leased).await?;
        ipv6::forget(links, &self.config.bridge, leased.ip).await?;
        self.lock_leased().remove(id);
        links.remove(&leased.tap).await
    }

    /// Removes taps of ours that belong to none of these groups. Returns their names.
    ///
    /// # Errors
    /// `Internal` with what the kernel said.
    pub async fn remove_orphans(&self, known: &[GroupId]) -> Result<Vec<String>> {
        if let Some(cni) = &self.cni {
            for id in cni.orphans(known) {
                // It is tried again at the next start, and keeps nobody else from going.
                if let Err(error) = cni.remove(&id).await {
                    tracing::warn!(group_id = %id, error = %error.chain(), "the CNI network of no group stays");
                }
            }
        }
        let Some(links) = &self.links else {
            return Ok(Vec::new());
        };
        let keep: Vec<String> = known.iter().map(tap_name).collect();
        let mut removed = Vec::new();
        for name in links.ports_of(&self.config.bridge).await? {
            if is_tap_name(&name) && !keep.contains(&name) {
                links.remove(&name).await?;
                removed.push(name);
            }
        }
        Ok(removed)
    }

    /// Removes bridge and rules.
    ///
    /// # Errors
    /// `Internal` with what the kernel or `nft` said.
    pub async fn cleanup(&self) -> Result<()> {
        if let Some(links) = &self.links {
            rules::remove_base().await?;
            links.remove(&self.config.bridge).await?;
        }
        Ok(())
    }

    /// Name servers for groups without their own.
    pub fn nameservers(&self) -> Vec<String> {
        if !self.config.nameservers.is_empty() {
            return self.config.nameservers.iter().map(ToString::to_string).collect();
        }
        [RESOLVED_CONF, RESOLV_CONF]
            .iter()
            .filter_map(|path| std::fs::read_to_string(Path::new(path)).ok())
            .map(|text| nameservers(&text))
            .find(|servers| !servers.is_empty())
            .unwrap_or_default()
    }
}

/// Makes sure of the limits of taps that are there; one that is gone gets its limits with its successor.
async fn limit_again(links: &link::Links, limited: Vec<(GroupId, Bandwidth)>) -> Result<()> {
    for (id, bandwidth) in limited {
        let tap = tap_name(&id);
        if bandwidth != Bandwidth::default() && links.index(&tap).await?.is_some() {
            links.limit(&tap, bandwidth).await?;
        }
    }
    Ok(())
}

/// The servers of a resolv.conf that a group can reach: no loopback ones.
fn nameservers(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse::<IpAddr>().ok())
        .filter(|ip| ip.is_ipv4() && !ip.is_loopback())
        .map(|ip| ip.to_string())
        .take(3)
        .collect()
}

/// Switches a setting of the kernel on.
fn set(path: &str) -> Result<()> {
    if std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1") {
        return Ok(());
    }
    std::fs::write(path, "1")
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("write 1 to {path}"), error))
}

/// The tap of a group: the first 15 characters of its id, 11 of them random.
fn tap_name(id: &GroupId) -> String {
    id.as_str().chars().take(15).collect()
}

fn is_tap_name(name: &str) -> bool {
    name.len() == 15 && name.starts_with("eci-")
}

/// The MAC of an address: locally administered, unicast.
fn mac(ip: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ip.octets();
    [0x02, 0xec, a, b, c, d]
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_macs() {
        let id = GroupId::parse("eci-0123456789abcdefghij").unwrap();
        assert_eq!(tap_name(&id), "eci-0123456789a");
        assert!(is_tap_name(&tap_name(&id)) && !is_tap_name("eci0"));
        assert_eq!(mac_text(mac(Ipv4Addr::new(10, 89, 0, 2))), "02:ec:0a:59:00:02");
    }

    #[test]
    fn loopback_name_servers_are_left_out() {
        let text =
            "# x\nnameserver 127.0.0.53\nnameserver 10.0.0.2\nnameserver ::1\nsearch a\nnameserver 1.1.1.1";
        assert_eq!(nameservers(text), ["10.0.0.2", "1.1.1.1"]);
    }
}
