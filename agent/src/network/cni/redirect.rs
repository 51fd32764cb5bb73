//! The way from a network's interface to a group's guest: in the network namespace that the plugins worked in there is the
//! group's tap beside their interface, and the kernel sends on to the one all that the other gets, unseen by the namespace's own
//! network (`mirred`, as Kata Containers' `tcfilter`). Sizes of structures are those of linux/pkt_cls.h and
//! linux/tc_act/tc_mirred.h.

use std::{io, path::Path};

use rtnetlink::{
    packet_core::{DefaultNla, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        link::LinkAttribute,
        tc::{TcAction, TcActionAttribute, TcActionOption},
    },
};

use super::plugin::INTERFACE;
use crate::{
    error::{Error, ErrorKind, Result},
    network::{
        bandwidth,
        link::{Links, failed},
    },
    sys,
};

/// linux/tc_act/tc_mirred.h
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
/// linux/pkt_cls.h: the packet is somebody else's now.
const TC_ACT_STOLEN: u32 = 4;

/// What the plugins' interface is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
}

/// Makes a group's tap there, and joins it with the interface.
pub(super) async fn join(netns: &Path, tap: &str) -> Result<Interface> {
    let links = {
        let (namespace, runtime) = (netns.to_owned(), tokio::runtime::Handle::current());
        let name = tap.to_owned();
        let opened = tokio::task::spawn_blocking(move || {
            sys::netns::within(&namespace, || {
                let _runtime = runtime.enter();
                sys::tap::create(&name)?;
                Links::open().map_err(io::Error::other)
            })
        });
        let opened = opened.await.map_err(io::Error::other).flatten();
        opened.map_err(|error| {
            let what = format!("make tap {tap} in network namespace {}", netns.display());
            Error::with_source(ErrorKind::Internal, what, error)
        })?
    };
    let missing = |name: &str| {
        Error::new(
            ErrorKind::Internal,
            format!("the CNI plugins made no interface {name}"),
        )
    };
    let link = links.link(INTERFACE).await?.ok_or_else(|| missing(INTERFACE))?;
    let of_tap = links.index(tap).await?.ok_or_else(|| missing(tap))?;
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => <[u8; 6]>::try_from(mac.as_slice()).ok(),
        _ => None,
    });
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => u16::try_from(*mtu).ok(),
        _ => None,
    });
    let (Some(mac), Some(mtu)) = (mac, mtu) else {
        return Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "the CNI plugins' interface {INTERFACE} has no MAC or no MTU: only Ethernet can reach a guest"
            ),
        ));
    };
    links.bring_up(INTERFACE, link.header.index, None).await?;
    links.bring_up(tap, of_tap, Some(mtu)).await?;
    for (from, to) in [(link.header.index, of_tap), (of_tap, link.header.index)] {
        for message in [
            RouteNetlinkMessage::NewQueueDiscipline(bandwidth::ingress(from)),
            RouteNetlinkMessage::NewTrafficFilter(bandwidth::filter_all(from, redirection(to))),
        ] {
            let made = links.make(message, NLM_F_EXCL).await;
            made.map_err(failed(format!(
                "join {tap} with {INTERFACE} (modprobe sch_ingress cls_matchall act_mirred)"
            )))?;
        }
    }
    Ok(Interface { mac, mtu })
}

/// `struct tc_mirred`: index, capabilities, action, two counts; what to do, and with which interface.
fn redirect_parameters(to: u32) -> Vec<u8> {
    let fields = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to];
    fields.into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn redirection(to: u32) -> TcAction {
    let parameters = DefaultNla::new(TCA_MIRRED_PARMS, redirect_parameters(to));
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Other(parameters)]),
    ];
    action
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_as_long_as_the_kernels() {
        let parameters = redirect_parameters(9);
        assert_eq!(parameters.len(), 28);
        assert_eq!(parameters[24..], 9_u32.to_ne_bytes());
    }
}
