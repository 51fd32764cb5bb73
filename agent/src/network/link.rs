//! Interfaces through rtnetlink.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, LinkBridge, LinkUnspec, new_connection,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags},
        link::{LinkAttribute, LinkMessage},
    },
};

use super::bandwidth::{self, Bandwidth};
use crate::error::{Error, ErrorKind, Result};

/// A connection to the kernel's routing socket.
#[derive(Clone)]
pub(super) struct Links {
    pub(super) handle: Handle,
}

impl std::fmt::Debug for Links {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Links")
    }
}

pub(super) fn failed(what: String) -> impl FnOnce(rtnetlink::Error) -> Error {
    move |error| Error::with_source(ErrorKind::Internal, what, error)
}

impl Links {
    pub(super) fn open() -> Result<Self> {
        let (connection, handle, _) = new_connection()
            .map_err(|error| Error::with_source(ErrorKind::Internal, "open a netlink socket", error))?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    pub(super) async fn link(&self, name: &str) -> Result<Option<LinkMessage>> {
        match self
            .handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute()
            .try_next()
            .await
        {
            Ok(found) => Ok(found),
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc_enodev() => Ok(None),
            Err(error) => Err(failed(format!("find interface {name}"))(error)),
        }
    }

    pub(super) async fn index(&self, name: &str) -> Result<Option<u32>> {
        Ok(self.link(name).await?.map(|link| link.header.index))
    }

    /// The bridge exists, is up and has the addresses. Without a MAC of its own it would have that of one of its ports, another
    /// whenever those change, and all would forget who is whose neighbour each time.
    pub(super) async fn ensure_bridge(
        &self,
        name: &str,
        mac: [u8; 6],
        (ip, prefix): (Ipv4Addr, u8),
        mtu: u16,
    ) -> Result<()> {
        let has_mac = |link: &LinkMessage| {
            let is_mac = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::Address(has) if has[..] == mac);
            link.attributes.iter().any(is_mac)
        };
        let found = self.link(name).await?;
        let has_mac = found.as_ref().is_some_and(has_mac);
        let index = match found {
            Some(link) => link.header.index,
            None => {
                let message = LinkBridge::new(name).mtu(mtu.into()).build();
                self.handle
                    .link()
                    .add(message)
                    .execute()
                    .await
                    .map_err(failed(format!(
                        "make bridge {name}: is bridge support there (modprobe bridge)?"
                    )))?;
                self.index(name).await?.ok_or_else(|| {
                    Error::new(
                        ErrorKind::Internal,
                        format!("bridge {name} vanished as it was made"),
                    )
                })?
            }
        };
        let mut message = LinkUnspec::new_with_index(index).mtu(mtu.into()).up();
        if !has_mac {
            message = message.address(mac.to_vec());
        }
        let message = message.build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(failed(format!("set up bridge {name}")))?;
        self.ensure_address(name, index, ip.into(), prefix).await
    }

    /// The interface has the address, which is in use at once.
    pub(super) async fn ensure_address(
        &self,
        name: &str,
        index: u32,
        wanted: IpAddr,
        prefix: u8,
    ) -> Result<()> {
        let mut addresses = self.handle.address().get().set_link_index_filter(index).execute();
        while let Some(message) = addresses
            .try_next()
            .await
            .map_err(failed(format!("list addresses of {name}")))?
        {
            let is_wanted = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Address(ip) if *ip == wanted);
            if message.attributes.iter().any(is_wanted) {
                return Ok(());
            }
        }
        let mut request = self.handle.address().add(index, wanted, prefix);
        if wanted.is_ipv6() {
            // Nobody else has it, and a bridge without ports would wait for one to find out.
            request
                .message_mut()
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let added = request.execute().await;
        added.map_err(failed(format!("give {name} the address {wanted}/{prefix}")))
    }

    /// The interface is up and a port of the bridge.
    pub(super) async fn join_bridge(&self, name: &str, bridge: &str, mtu: u16) -> Result<()> {
        let find = async |name: &str| {
            self.index(name)
                .await?
                .ok_or_else(|| Error::new(ErrorKind::Internal, format!("interface {name} is not there")))
        };
        let (index, controller) = (find(name).await?, find(bridge).await?);
        let message = LinkUnspec::new_with_index(index)
            .mtu(mtu.into())
            .controller(controller)
            .up()
            .build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(failed(format!("make {name} a port of {bridge}")))
    }

    /// The interface has these limits. Idempotent: an interface's limits do not change.
    pub(super) async fn limit(&self, name: &str, limits: Bandwidth) -> Result<()> {
        let index = self
            .index(name)
            .await?
            .ok_or_else(|| Error::new(ErrorKind::Internal, format!("interface {name} is not there")))?;
        if let Some(bits) = limits.ingress_bits {
            let message = RouteNetlinkMessage::NewQueueDiscipline(bandwidth::shaper(index, bits));
            self.make(message, NLM_F_REPLACE).await.map_err(failed(format!(
                "limit what {name} sends to its guest (modprobe sch_tbf)"
            )))?;
        }
        if let Some(bits) = limits.egress_bits {
            let what = format!(
                "limit what {name} gets from its guest (modprobe sch_ingress cls_matchall act_police)"
            );
            for message in [
                RouteNetlinkMessage::NewQueueDiscipline(bandwidth::ingress(index)),
                RouteNetlinkMessage::NewTrafficFilter(bandwidth::policer(index, bits)),
            ] {
                match self.make(message, NLM_F_EXCL).await {
                    Err(rtnetlink::Error::NetlinkError(error))
                        if error.raw_code() == -rustix::io::Errno::EXIST.raw_os_error() => {}
                    result => result.map_err(failed(what.clone()))?,
                }
            }
        }
        Ok(())
    }

    /// The interface is up, with this MTU where one is given.
    pub(super) async fn bring_up(&self, name: &str, index: u32, mtu: Option<u16>) -> Result<()> {
        let mut message = LinkUnspec::new_with_index(index).up();
        if let Some(mtu) = mtu {
            message = message.mtu(mtu.into());
        }
        let set = self.handle.link().set(message.build()).execute().await;
        set.map_err(failed(format!("bring up {name}")))
    }

    /// Makes what a message describes; `flags` say what is to happen when it is there.
    pub(super) async fn make(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> std::result::Result<(), rtnetlink::Error> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | flags;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(request)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return match error.code {
                    None => Ok(()),
                    Some(_) => Err(rtnetlink::Error::NetlinkError(error)),
                };
            }
        }
        Ok(())
    }

    /// Names of the bridge's ports.
    pub(super) async fn ports_of(&self, bridge: &str) -> Result<Vec<String>> {
        let Some(index) = self.index(bridge).await? else {
            return Ok(Vec::new());
        };
        let mut ports = Vec::new();
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links
            .try_next()
            .await
            .map_err(failed("list interfaces".to_owned()))?
        {
            let is_port = link
                .attributes
                .iter()
                .any(|attribute| matches!(attribute, LinkAttribute::Controller(controller) if *controller == index));
            let name = link.attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            });
            ports.extend(name.filter(|_| is_port));
        }
        Ok(ports)
    }

    /// Removes an interface; it may be gone already.
    pub(super) async fn remove(&self, name: &str) -> Result<()> {
        let Some(index) = self.index(name).await? else {
            return Ok(());
        };
        self.handle
            .link()
            .del(index)
            .execute()
            .await
            .map_err(failed(format!("remove interface {name}")))
    }
}

/// errno of a missing interface, `ENODEV` (asm-generic/errno-base.h).
fn libc_enodev() -> i32 {
    rustix::io::Errno::NODEV.raw_os_error()
}
