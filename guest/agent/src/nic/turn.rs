//! A template's link becomes a machine's in one go. What the link has is known from the template, so nothing is asked for: all
//! changes go to the kernel in one message, which it works off in order. The link stays up: taking it down and up again, which
//! the general way does for the sake of the link-local address, makes the kernel wait for all its processors twice.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use rtnetlink::RouteMessageBuilder;

use super::{Nic, link_local};

/// The longest answer: an error repeats the message that it is about.
const MAX_ANSWER: usize = 16 << 10;

/// A link and what it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(super) index: u32,
    pub(super) six: bool,
    pub(super) nic: Nic,
}

impl Known {
    /// Makes it `nic`'s.
    ///
    /// # Errors
    /// When the kernel refuses a change: some of them are made, and [`super::apply`] must make the rest.
    pub(crate) fn turn_into(&self, nic: &Nic) -> io::Result<()> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let (wire, last) = wire(self.changes(nic));
        if send(socket.as_raw_fd(), &wire, MsgFlags::empty())? != wire.len() {
            return Err(io::Error::other("the kernel took a part of the changes"));
        }
        answers(&socket, last)
    }

    /// All changes, in an order in which each can be made.
    fn changes(&self, new: &Nic) -> Vec<(RouteNetlinkMessage, u16)> {
        use RouteNetlinkMessage::{DelAddress, NewAddress, NewRoute, SetLink};
        let (add, replace) = (NLM_F_CREATE | NLM_F_EXCL, NLM_F_CREATE | NLM_F_REPLACE);
        let old = &self.nic;
        let mut changes = Vec::new();
        if old.mac != new.mac {
            let mut link = LinkMessage::default();
            link.header.index = self.index;
            link.attributes.push(LinkAttribute::Address(new.mac.to_vec()));
            changes.push((SetLink(link), 0));
        }
        if (old.address, old.prefix) != (new.address, new.prefix) {
            changes.push((DelAddress(self.four(old.address, old.prefix)), 0));
            changes.push((NewAddress(self.four(new.address, new.prefix)), add));
        }
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().gateway(new.gateway).output_interface(self.index).build();
        changes.push((NewRoute(route), replace));
        if !self.six {
            return changes;
        }
        // The link-local addresses are the ones that the host lets through for the MACs.
        let of = |nic: &Nic| {
            let mut all = vec![(link_local(nic.mac), 64)];
            all.extend(nic.six.map(|six| (six.address, six.prefix)));
            all
        };
        let (had, has) = (of(old), of(new));
        for (address, prefix) in has.iter().filter(|address| !had.contains(address)) {
            changes.push((NewAddress(self.sixth(*address, *prefix)), add));
        }
        for (address, prefix) in had.iter().filter(|address| !has.contains(address)) {
            changes.push((DelAddress(self.sixth(*address, *prefix)), 0));
        }
        if let Some(six) = new.six {
            let route = RouteMessageBuilder::<Ipv6Addr>::new()
                .gateway(six.gateway)
                .output_interface(self.index)
                .build();
            changes.push((NewRoute(route), replace));
        }
        changes
    }

    fn four(&self, address: Ipv4Addr, prefix: u8) -> AddressMessage {
        let mut message = self.address(netlink_packet_route::AddressFamily::Inet, prefix);
        message.attributes.push(AddressAttribute::Local(IpAddr::V4(address)));
        message.attributes.push(AddressAttribute::Address(IpAddr::V4(address)));
        let host = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
        message.attributes.push(AddressAttribute::Broadcast(Ipv4Addr::from(u32::from(address) | host)));
        message
    }

    fn sixth(&self, address: Ipv6Addr, prefix: u8) -> AddressMessage {
        let mut message = self.address(netlink_packet_route::AddressFamily::Inet6, prefix);
        if address.is_unicast_link_local() {
            message.header.scope = AddressScope::Link;
        }
        message.attributes.push(AddressAttribute::Address(IpAddr::V6(address)));
        // The host gives each address once.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        message
    }

    fn address(&self, family: netlink_packet_route::AddressFamily, prefix: u8) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = family;
        message.header.prefix_len = prefix;
        message.header.index = self.index;
        message
    }
}

/// The changes one behind the other, and the number of the last, which alone is to be answered where all goes well.
fn wire(changes: Vec<(RouteNetlinkMessage, u16)>) -> (Vec<u8>, u32) {
    let (count, mut all) = (changes.len(), Vec::new());
    for (place, (change, flags)) in changes.into_iter().enumerate() {
        let mut message = NetlinkMessage::from(change);
        message.header.flags = NLM_F_REQUEST | flags | if place + 1 == count { NLM_F_ACK } else { 0 };
        message.header.sequence_number = u32::try_from(place + 1).unwrap_or(u32::MAX);
        message.finalize();
        let begin = all.len();
        all.resize(begin + message.buffer_len().next_multiple_of(4), 0);
        if let Some(room) = all.get_mut(begin..begin + message.buffer_len()) {
            message.serialize(room);
        }
    }
    (all, u32::try_from(count).unwrap_or(u32::MAX))
}

/// Reads answers until that to the message numbered `last`.
fn answers(socket: &OwnedFd, last: u32) -> io::Result<()> {
    let mut buffer = vec![0; MAX_ANSWER];
    loop {
        let read = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => continue,
            read => read?,
        };
        let mut rest = buffer.get(..read).unwrap_or_default();
        while !rest.is_empty() {
            let answer =
                NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
            if let NetlinkPayload::Error(error) = &answer.payload
                && let Some(code) = error.code
            {
                let number = answer.header.sequence_number;
                return Err(io::Error::other(format!("change {number} of {last} of the link: {}", {
                    io::Error::from_raw_os_error(code.get().saturating_neg())
                })));
            }
            if answer.header.sequence_number == last {
                return Ok(());
            }
            let length = usize::try_from(NetlinkBuffer::new(rest).length()).unwrap_or(usize::MAX);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
