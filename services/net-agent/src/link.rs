//! The bridge and the TAPs as links of the kernel, by rtnetlink(7).

use crate::plan::{Plan, Slot};
use bothy_contract::{Code, Error};
use futures::TryStreamExt;
use nix::errno::Errno;
use rtnetlink::packet_core::Nla;
use rtnetlink::packet_route::{
    link::{
        BridgeStpState, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoTun, LinkAttribute, LinkFlags,
        LinkInfo, LinkMessage,
    },
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec, RouteMessageBuilder};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

/// IFLA_TUN_OWNER and IFLA_TUN_GROUP of linux/if_link.h.
const TUN_OWNER: u16 = 1;
const TUN_GROUP: u16 = 2;

/// RT_TABLE_LOCAL of linux/rtnetlink.h: the host's own addresses.
const TABLE_LOCAL: u8 = 255;

/// What a link is, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `bridge`, `tun`, ...; none for hardware.
    pub kind: Option<InfoKind>,
    /// The index of the bridge it is attached to.
    pub bridge: Option<u32>,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is an isolated port.
    pub isolated: bool,
    /// Its MAC address.
    pub mac: Vec<u8>,
    /// Owner and group of a TAP.
    pub owner: (Option<u32>, Option<u32>),
}

impl Link {
    /// Whether it is the TAP of `slot`, for its user alone.
    pub fn belongs_to(&self, slot: &Slot) -> bool {
        self.name == slot.tap
            && self.kind == Some(InfoKind::Tun)
            && self.owner == (Some(slot.uid), Some(slot.uid))
    }

    /// Whether it is a working port of the bridge with that index.
    pub fn is_port_of(&self, bridge: u32) -> bool {
        self.bridge == Some(bridge) && self.isolated && self.up
    }
}

/// One IPv4 route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its destination.
    pub destination: (Ipv4Addr, u8),
    /// The links it leaves by.
    pub links: Vec<u32>,
    /// Whether it leads to other hosts.
    pub unicast: bool,
}

/// A netlink socket, in the network namespace of the thread that opened it.
#[derive(Debug, Clone)]
pub struct Links {
    handle: Handle,
    /// A socket has one dump at a time: the kernel answers a second one with EBUSY (netlink(7), NLM_F_DUMP).
    dump: Arc<tokio::sync::Mutex<()>>,
}

impl Links {
    /// Opens the socket. Call it within a runtime, which then serves the socket.
    pub fn open() -> Result<Self, Error> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|e| Error::internal("cannot open a netlink socket", &e))?;
        tokio::spawn(connection);
        Ok(Self { handle, dump: Arc::default() })
    }

    /// All links, by name.
    pub async fn list(&self) -> Result<BTreeMap<String, Link>, Error> {
        let _alone = self.dump.lock().await;
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("list the links", &e))?;
        Ok(links.iter().filter_map(read_link).map(|link| (link.name.clone(), link)).collect())
    }

    /// The link of that name.
    pub async fn find(&self, name: &str) -> Result<Option<Link>, Error> {
        let found: Result<Vec<LinkMessage>, _> =
            self.handle.link().get().match_name(name.to_owned()).execute().try_collect().await;
        match found {
            Ok(links) => Ok(links.iter().find_map(read_link)),
            Err(e) if errno(&e) == Some(Errno::ENODEV) => Ok(None),
            Err(e) => Err(failed(format!("find link {name}"), &e)),
        }
    }

    /// Makes the bridge, or adopts the one that is there if it is ours, and returns its index.
    ///
    /// Ours is a bridge of that name with the plan's MAC address, which it has from the instant it exists.
    ///
    /// # Errors
    /// `already_exists` where the name belongs to something else.
    pub async fn ensure_bridge(&self, plan: &Plan) -> Result<u32, Error> {
        let name = plan.bridge.as_str();
        let mac = plan.bridge_mac().0.to_vec();
        let link = match self.find(name).await? {
            Some(link) => link,
            None => {
                let message = LinkBridge::new(name)
                    .address(mac.clone())
                    .stp_state(BridgeStpState::Disabled)
                    .mcast_snooping(false)
                    .build();
                self.handle
                    .link()
                    .add(message)
                    .execute()
                    .await
                    .map_err(|e| failed(format!("make bridge {name}"), &e))?;
                self.find(name).await?.ok_or_else(|| {
                    Error::new(Code::Unavailable, format!("bridge {name} went away as soon as it was made"))
                })?
            }
        };
        if link.kind != Some(InfoKind::Bridge) || link.mac != mac {
            return Err(Error::new(
                Code::AlreadyExists,
                format!("there is a device {name} that bothy has not made for subnet {}", plan.cidr()),
            )
            .hint(format!("remove it with `ip link delete {name}`, or set another net.bridge")));
        }
        let gateway = IpAddr::V4(plan.gateway());
        let address = self.handle.address().add(link.index, gateway, plan.prefix).replace();
        address.execute().await.map_err(|e| failed(format!("set address {gateway} of bridge {name}"), &e))?;
        if !link.up {
            self.set(LinkUnspec::new_with_index(link.index).up().build(), name).await?;
        }
        Ok(link.index)
    }

    /// Makes the TAP an isolated port of the bridge, then brings it up: it never forwards a frame unisolated.
    pub async fn attach(&self, tap: &Link, bridge: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(tap.index).controller(bridge).build();
        self.set(message, &tap.name).await?;
        let port = LinkBridgePort::new(tap.index).isolated(true).up().build();
        let done = self.handle.link().set_port(port).execute().await;
        done.map_err(|e| failed(format!("isolate {}", tap.name), &e))
    }

    /// Removes a link. One that is gone already is fine.
    pub async fn delete(&self, link: &Link) -> Result<(), Error> {
        match self.handle.link().del(link.index).execute().await {
            Err(e) if errno(&e) != Some(Errno::ENODEV) => Err(failed(format!("remove {}", link.name), &e)),
            _ => Ok(()),
        }
    }

    /// All IPv4 routes of all tables.
    pub async fn routes(&self) -> Result<Vec<Route>, Error> {
        let _alone = self.dump.lock().await;
        let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Vec<RouteMessage> = self
            .handle
            .route()
            .get(query)
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("list the routes", &e))?;
        Ok(routes.iter().map(read_route).collect())
    }

    /// The names of the links, but for `bridge` and loopback, by which packets may leave the host.
    pub async fn uplinks(&self, bridge: &str) -> Result<BTreeSet<String>, Error> {
        let out: BTreeSet<u32> =
            self.routes().await?.into_iter().filter(|r| r.unicast).flat_map(|r| r.links).collect();
        let links = self.list().await?;
        let uplink = |link: &&Link| out.contains(&link.index) && link.name != bridge && link.name != "lo";
        Ok(links.values().filter(uplink).map(|link| link.name.clone()).collect())
    }

    async fn set(&self, message: LinkMessage, name: &str) -> Result<(), Error> {
        self.handle.link().set(message).execute().await.map_err(|e| failed(format!("change {name}"), &e))
    }
}

fn read_link(message: &LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        bridge: None,
        up: message.header.flags.contains(LinkFlags::Up),
        isolated: false,
        mac: Vec::new(),
        owner: (None, None),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.bridge = Some(*index),
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| read_info(info, &mut link)),
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn read_info(info: &LinkInfo, link: &mut Link) {
    match info {
        LinkInfo::Kind(kind) => link.kind = Some(kind.clone()),
        LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
            link.isolated = port.contains(&InfoBridgePort::Isolated(true));
        }
        LinkInfo::Data(InfoData::Tun(data)) => {
            for attribute in data {
                let InfoTun::Other(attribute) = attribute else { continue };
                let mut value = [0; 4];
                if attribute.value_len() != value.len() {
                    continue;
                }
                attribute.emit_value(&mut value);
                match attribute.kind() {
                    TUN_OWNER => link.owner.0 = Some(u32::from_ne_bytes(value)),
                    TUN_GROUP => link.owner.1 = Some(u32::from_ne_bytes(value)),
                    _ => {}
                }
            }
        }
        _ => {}
    }
}

fn read_route(message: &RouteMessage) -> Route {
    let mut route = Route {
        destination: (Ipv4Addr::UNSPECIFIED, message.header.destination_prefix_length),
        links: Vec::new(),
        unicast: message.header.kind == RouteType::Unicast && message.header.table != TABLE_LOCAL,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => route.destination.0 = *address,
            RouteAttribute::Oif(index) => route.links.push(*index),
            RouteAttribute::MultiPath(hops) => route.links.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    route
}

/// The kernel's reason, where it gave one.
fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(Errno::from_raw(message.raw_code().checked_neg()?)),
        _ => None,
    }
}

fn failed(what: impl std::fmt::Display, error: &rtnetlink::Error) -> Error {
    let refused = errno(error) == Some(Errno::EPERM);
    let error = match errno(error) {
        Some(errno) => Error::new(Code::Internal, format!("cannot {what}: {}", errno.desc())),
        None => Error::internal(format!("cannot {what}"), error),
    };
    if refused {
        error.hint("the net-agent needs CAP_NET_ADMIN: start it as root or by its unit")
    } else {
        error
    }
}
