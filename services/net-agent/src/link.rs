//! The bridge and the TAPs as links of the kernel, by rtnetlink(7).

use crate::plan::{Plan, Slot};
use bothy_contract::{Code, Error};
use futures::TryStreamExt;
use nix::errno::Errno;
use rtnetlink::packet_core::Nla;
use rtnetlink::packet_route::{
    AddressFamily,
    link::{
        BridgeStpState, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoTun, LinkAttribute, LinkFlags,
        LinkInfo, LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec, RouteMessageBuilder};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
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

/// One route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its destination.
    pub destination: (IpAddr, u8),
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
        // Before it is up, so that the host says nothing in IPv6 there by itself.
        crate::forwarding::prepare_bridge(name, plan.prefix6.is_some())?;
        let addresses =
            [Some((IpAddr::V4(plan.gateway()), plan.prefix)), plan.gateway6().map(|g| (g.into(), 64))];
        for (gateway, prefix) in addresses.into_iter().flatten() {
            let address = self.handle.address().add(link.index, gateway, prefix).replace();
            let done = address.execute().await;
            done.map_err(|e| failed(format!("set address {gateway} of bridge {name}"), &e))?;
        }
        if !link.up {
            self.set(LinkUnspec::new_with_index(link.index).up().build(), name).await?;
        }
        Ok(link.index)
    }

    /// Gives the bridge fixed neighbour entries for a slot, and one to answer for it in IPv6 neighbour discovery, where the
    /// bridge may: guests see the host alone (for IPv4, one setting says so for all). So the host never asks a guest who it is, and nothing that a
    /// guest says in ARP or neighbour discovery changes where the host sends packets.
    pub async fn fix_neighbours(&self, plan: &Plan, slot: &Slot, bridge: u32) -> Result<(), Error> {
        for address in neighbours_of(plan, slot) {
            let add = self.handle.neighbours().add(bridge, address).link_layer_address(&slot.mac.0);
            let done = add.state(NeighbourState::Permanent).replace().execute().await;
            done.map_err(|e| failed(format!("fix the neighbour entry of {address}"), &e))?;
        }
        if let Some(address) = plan.address6(slot.number) {
            let add = self.handle.neighbours().add(bridge, address.into()).flags(NeighbourFlags::Proxy);
            let done = add.replace().execute().await;
            done.map_err(|e| failed(format!("make the proxy entry of {address}"), &e))?;
        }
        Ok(())
    }

    /// Takes them back. What is not there is fine.
    pub async fn forget_neighbours(&self, plan: &Plan, slot: &Slot, bridge: u32) -> Result<(), Error> {
        let plain = neighbours_of(plan, slot).map(|address| (address, NeighbourFlags::empty()));
        let proxy = plan.address6(slot.number).map(|address| (address.into(), NeighbourFlags::Proxy));
        for (address, flags) in plain.chain(proxy) {
            let mut message = NeighbourMessage::default();
            message.header.flags = flags;
            message.header.family =
                if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            message.header.ifindex = bridge;
            message.attributes.push(NeighbourAttribute::Destination(address.into()));
            match self.handle.neighbours().del(message).execute().await {
                Err(e) if !matches!(errno(&e), Some(Errno::ENOENT | Errno::ENODEV)) => {
                    return Err(failed(format!("remove the neighbour entry of {address}"), &e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The fixed neighbour entries of a link.
    pub async fn fixed_neighbours(&self, link: u32) -> Result<BTreeMap<IpAddr, Vec<u8>>, Error> {
        let _alone = self.dump.lock().await;
        let all: Vec<NeighbourMessage> = self
            .handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("list the neighbours", &e))?;
        let fixed =
            |m: &&NeighbourMessage| m.header.ifindex == link && m.header.state == NeighbourState::Permanent;
        Ok(all.iter().filter(fixed).filter_map(read_neighbour).collect())
    }

    /// The addresses for which a link answers in their stead.
    pub async fn proxied_neighbours(&self, link: u32) -> Result<BTreeSet<IpAddr>, Error> {
        let _alone = self.dump.lock().await;
        let all: Vec<NeighbourMessage> = self
            .handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Inet6)
            .proxies()
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("list the proxy entries", &e))?;
        let address = |m: &NeighbourMessage| {
            m.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => Some(IpAddr::from(*a)),
                _ => None,
            })
        };
        let ours = |m: &&NeighbourMessage| {
            m.header.ifindex == link && m.header.flags.contains(NeighbourFlags::Proxy)
        };
        Ok(all.iter().filter(ours).filter_map(address).collect())
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
        self.routes_by(RouteMessageBuilder::<Ipv4Addr>::new().build()).await
    }

    async fn routes_by(&self, query: RouteMessage) -> Result<Vec<Route>, Error> {
        let _alone = self.dump.lock().await;
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

    /// The names of the links, but for `bridge` and loopback, by which IPv4 packets may leave the host.
    pub async fn uplinks(&self, bridge: &str) -> Result<BTreeSet<String>, Error> {
        let out = self.routes().await?.into_iter().filter(|r| r.unicast).flat_map(|r| r.links).collect();
        self.names(&out, bridge).await
    }

    /// The same for IPv6; a link that has no more than link-local addresses leads nowhere.
    pub async fn uplinks6(&self, bridge: &str) -> Result<BTreeSet<String>, Error> {
        let routes = self.routes_by(RouteMessageBuilder::<Ipv6Addr>::new().build()).await?;
        let leads = |r: &Route| {
            let local =
                matches!(r.destination.0, IpAddr::V6(a) if a.is_unicast_link_local() || a.is_multicast());
            r.unicast && !local
        };
        let out = routes.into_iter().filter(leads).flat_map(|r| r.links).collect();
        self.names(&out, bridge).await
    }

    /// The names of the links to networks inside the host: other bridges and the like, such as those of containers, that
    /// are no way to the world, having no default route.
    pub async fn inside(&self, bridge: &str) -> Result<BTreeSet<String>, Error> {
        let routes = self.routes().await?;
        let by = |default: bool| -> BTreeSet<u32> {
            let of = |r: &&Route| r.unicast && (r.destination.1 == 0) == default;
            routes.iter().filter(of).flat_map(|r| r.links.iter().copied()).collect()
        };
        let local: BTreeSet<u32> = by(false).difference(&by(true)).copied().collect();
        let kinds = [InfoKind::Bridge, InfoKind::Dummy, InfoKind::Vxlan];
        let links = self.list().await?;
        let inside = |l: &&Link| {
            local.contains(&l.index) && l.name != bridge && l.kind.as_ref().is_some_and(|k| kinds.contains(k))
        };
        Ok(links.values().filter(inside).map(|link| link.name.clone()).collect())
    }

    async fn names(&self, indices: &BTreeSet<u32>, bridge: &str) -> Result<BTreeSet<String>, Error> {
        let links = self.list().await?;
        let uplink = |link: &&Link| indices.contains(&link.index) && link.name != bridge && link.name != "lo";
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
    let unspecified: IpAddr = match message.header.address_family {
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    let mut route = Route {
        destination: (unspecified, message.header.destination_prefix_length),
        links: Vec::new(),
        unicast: message.header.kind == RouteType::Unicast && message.header.table != TABLE_LOCAL,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                route.destination.0 = (*address).into()
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                route.destination.0 = (*address).into();
            }
            RouteAttribute::Oif(index) => route.links.push(*index),
            RouteAttribute::MultiPath(hops) => route.links.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    route
}

fn read_neighbour(message: &NeighbourMessage) -> Option<(IpAddr, Vec<u8>)> {
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => address = Some(IpAddr::from(*a)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => address = Some(IpAddr::from(*a)),
            NeighbourAttribute::LinkLayerAddress(a) => mac = Some(a.clone()),
            _ => {}
        }
    }
    address.zip(mac)
}

/// The addresses of a slot by which the host sends to it.
pub fn neighbours_of(plan: &Plan, slot: &Slot) -> impl Iterator<Item = IpAddr> {
    std::iter::once(IpAddr::V4(slot.address)).chain(plan.address6(slot.number).map(IpAddr::V6))
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
