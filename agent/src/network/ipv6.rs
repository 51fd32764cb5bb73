//! IPv6 on the agent's bridge. Groups reach each other through this host, as through a router: each has its address alone (/128),
//! so its guest asks for nobody's MAC but the bridge's, and the host knows that of every group without asking. No group has to be
//! believed when it says whose address it has: what groups say about that is dropped (`rules.rs`).

use std::net::IpAddr;

use rtnetlink::packet_route::{
    AddressFamily,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
};

use super::{
    Addresses, Subnet6,
    link::{Links, failed},
    mac,
};
use crate::error::{Error, ErrorKind, Result};

const CONF: &str = "/proc/sys/net/ipv6/conf";

/// The bridge has its address, and the host forwards.
pub(super) async fn prepare(links: &Links, bridge: &str, subnet: Subnet6) -> Result<()> {
    if !std::path::Path::new(CONF).exists() {
        return Err(Error::new(
            ErrorKind::FailedPrecondition,
            "network.subnet6 is set, but the host's kernel has no IPv6 (ipv6.disable=1?): switch it on, or set no subnet6",
        ));
    }
    let of_bridge = |setting: &str| format!("{CONF}/{bridge}/{setting}");
    write(&of_bridge("disable_ipv6"), "0")?;
    write(&of_bridge("accept_ra"), "0")?;
    // Link-local addresses too are in use at once.
    write(&of_bridge("accept_dad"), "0")?;
    let index = index_of(links, bridge).await?;
    links
        .ensure_address(bridge, index, subnet.gateway().into(), subnet.prefix())
        .await?;
    forward()
}

async fn index_of(links: &Links, name: &str) -> Result<u32> {
    let index = links.index(name).await?;
    index.ok_or_else(|| Error::new(ErrorKind::Internal, format!("interface {name} is not there")))
}

/// Has the host forward. A host that forwards takes no more notice of its routers' advertisements unless told to: an interface
/// that did goes on doing so (Documentation/networking/ip-sysctl.rst, `accept_ra`).
fn forward() -> Result<()> {
    let forwarding = format!("{CONF}/all/forwarding");
    if read(&forwarding)? == "1" {
        return Ok(());
    }
    let interfaces = std::fs::read_dir(CONF)
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("list {CONF}"), error))?;
    for interface in interfaces.flatten() {
        let accept_ra = interface.path().join("accept_ra");
        let accept_ra = accept_ra.to_string_lossy();
        // One that goes meanwhile needs nothing.
        if read(&accept_ra).is_ok_and(|value| value == "1") {
            write(&accept_ra, "2")?;
        }
    }
    write(&forwarding, "1")
}

fn read(path: &str) -> Result<String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("read {path}"), error))?;
    Ok(text.trim().to_owned())
}

fn write(path: &str, value: &str) -> Result<()> {
    std::fs::write(path, value)
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("write {value} to {path}"), error))
}

/// The host knows the MAC of a group's IPv6 address for good. Idempotent.
pub(super) async fn know(links: &Links, bridge: &str, ip: Addresses) -> Result<()> {
    let Some(v6) = ip.v6 else {
        return Ok(());
    };
    let index = index_of(links, bridge).await?;
    let request = links.handle.neighbours().add(index, IpAddr::V6(v6));
    let added = request.link_layer_address(&mac(ip.v4)).replace().execute().await;
    added.map_err(failed(format!("tell the host where {v6} is")))
}

/// The host knows it no more. Idempotent.
pub(super) async fn forget(links: &Links, bridge: &str, ip: Addresses) -> Result<()> {
    let (Some(v6), Some(index)) = (ip.v6, links.index(bridge).await?) else {
        return Ok(());
    };
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.ifindex = index;
    message
        .attributes
        .push(NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)));
    match links.handle.neighbours().del(message).execute().await {
        Err(rtnetlink::Error::NetlinkError(error))
            if error.raw_code() == -rustix::io::Errno::NOENT.raw_os_error() =>
        {
            Ok(())
        }
        result => result.map_err(failed(format!("have the host forget where {v6} is"))),
    }
}
