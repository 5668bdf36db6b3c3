//! The guest's one network interface, by netlink: Debian's cloud kernel has no `ip=`, and images may lack every tool.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use bothy_guest_proto::v1;
use futures::TryStreamExt;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

/// A checked [`v1::Nic`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nic {
    mac: [u8; 6],
    pub(crate) address: Ipv4Addr,
    prefix: u8,
    gateway: Ipv4Addr,
    pub(crate) dns: Vec<IpAddr>,
}

impl Nic {
    /// Reads the host's words.
    ///
    /// # Errors
    /// Says which of them is wrong.
    pub(crate) fn parse(nic: &v1::Nic) -> Result<Self, String> {
        Ok(Self {
            mac: parse_mac(&nic.mac).ok_or_else(|| format!("`{}` is not a MAC of one machine", nic.mac))?,
            address: nic.address.parse().map_err(|_| format!("`{}` is not an IPv4 address", nic.address))?,
            prefix: u8::try_from(nic.prefix)
                .ok()
                .filter(|prefix| (1..=32).contains(prefix))
                .ok_or_else(|| format!("{} is not a prefix length", nic.prefix))?,
            gateway: nic.gateway.parse().map_err(|_| format!("`{}` is not an IPv4 address", nic.gateway))?,
            dns: nic
                .dns
                .iter()
                .map(|server| server.parse().map_err(|_| format!("`{server}` is not an address")))
                .collect::<Result<_, _>>()?,
        })
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let group = mac.first().is_none_or(|first| first & 1 != 0);
    (parts.next().is_none() && !group).then_some(mac)
}

/// Gives the interface this identity and no other: MAC, one IPv4 address, the default route; and loopback its own.
///
/// # Errors
/// When there is no interface, or the kernel refuses a step; says which.
pub(crate) async fn apply(nic: &Nic) -> io::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let driver = tokio::spawn(connection);
    let result = apply_with(&handle, nic).await;
    driver.abort();
    result
}

async fn apply_with(handle: &Handle, nic: &Nic) -> io::Result<()> {
    let link = wait_for_ethernet(handle).await?;
    let index = link.header.index;
    let now = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => Some(address.as_slice()),
        _ => None,
    });
    if now != Some(nic.mac.as_slice()) {
        // Down first: without it the IPv6 link-local address stays the one of the old MAC.
        change(handle, LinkUnspec::new_with_index(index).down())
            .await
            .map_err(|e| named("take the link down", e))?;
        change(handle, LinkUnspec::new_with_index(index).address(nic.mac.to_vec()))
            .await
            .map_err(|e| named("set the MAC", e))?;
    }
    change(handle, LinkUnspec::new_with_index(index).up())
        .await
        .map_err(|e| named("bring the link up", e))?;

    let mut there = false;
    let mut addresses = handle.address().get().set_link_index_filter(index).execute();
    let mut old = Vec::new();
    while let Some(address) = addresses.try_next().await.map_err(|e| named("list addresses", e))? {
        let local = address.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(local)) => Some(*local),
            _ => None,
        });
        if local == Some(nic.address) && address.header.prefix_len == nic.prefix {
            there = true;
        } else if local.is_some() {
            old.push(address);
        }
    }
    drop(addresses);
    for address in old {
        handle.address().del(address).execute().await.map_err(|e| named("remove an old address", e))?;
    }
    if !there {
        let address = IpAddr::V4(nic.address);
        handle
            .address()
            .add(index, address, nic.prefix)
            .execute()
            .await
            .map_err(|e| named("add the address", e))?;
    }
    let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(nic.gateway).output_interface(index).build();
    handle.route().add(route).replace().execute().await.map_err(|e| named("set the default route", e))
}

/// Brings loopback up: systemd does that too, but nobody does in an image without it.
///
/// # Errors
/// When the kernel refuses.
pub(crate) async fn loopback() -> io::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let driver = tokio::spawn(connection);
    // The kernel's first device, in every network namespace.
    let result =
        change(&handle, LinkUnspec::new_with_index(1).up()).await.map_err(|e| named("bring loopback up", e));
    driver.abort();
    result
}

async fn change(
    handle: &Handle,
    link: rtnetlink::LinkMessageBuilder<LinkUnspec>,
) -> Result<(), rtnetlink::Error> {
    handle.link().set(link.build()).execute().await
}

/// The first Ethernet interface, which takes a moment to appear after its driver.
async fn wait_for_ethernet(handle: &Handle) -> io::Result<LinkMessage> {
    for _ in 0..500 {
        let mut links = handle.link().get().execute();
        while let Some(link) = links.try_next().await.map_err(|e| named("list links", e))? {
            if link.header.link_layer_type == LinkLayerType::Ether
                && !link.header.flags.contains(LinkFlags::Loopback)
            {
                return Ok(link);
            }
        }
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "no network interface: is it on the VMM's command line?"))
}

fn named(what: &str, error: rtnetlink::Error) -> io::Error {
    io::Error::other(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_words_are_checked() {
        let good = v1::Nic {
            mac: "02:00:0a:4d:00:07".into(),
            address: "10.77.0.7".into(),
            prefix: 24,
            gateway: "10.77.0.1".into(),
            dns: vec!["10.77.0.1".into()],
        };
        assert_eq!(Nic::parse(&good).unwrap().mac, [2, 0, 0x0a, 0x4d, 0, 7]);
        let broken: [fn(&mut v1::Nic); 6] = [
            |nic| nic.mac = "02:00:0a:4d:00".into(),
            |nic| nic.mac = "03:00:0a:4d:00:07".into(),
            |nic| nic.address = "10.77.0".into(),
            |nic| nic.prefix = 33,
            |nic| nic.gateway = String::new(),
            |nic| nic.dns = vec!["x\nsearch evil".into()],
        ];
        for change in broken {
            let mut nic = good.clone();
            change(&mut nic);
            assert!(Nic::parse(&nic).is_err(), "{nic:?}");
        }
    }
}
