//! The guest's one network interface, by netlink: Debian's cloud kernel has no `ip=`, and images may lack every tool.

mod turn;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use bothy_guest_proto::v1;
use futures::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

/// A checked [`v1::Nic`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nic {
    mac: [u8; 6],
    pub(crate) address: Ipv4Addr,
    prefix: u8,
    gateway: Ipv4Addr,
    six: Option<Six>,
    pub(crate) dns: Vec<IpAddr>,
}

/// The same in IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Six {
    address: Ipv6Addr,
    prefix: u8,
    gateway: Ipv6Addr,
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
            six: Six::parse(nic)?,
            dns: nic
                .dns
                .iter()
                .map(|server| server.parse().map_err(|_| format!("`{server}` is not an address")))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl Nic {
    /// The gateways, of both address families.
    pub(crate) fn gateways(&self) -> Vec<IpAddr> {
        let six = self.six.map(|six| IpAddr::V6(six.gateway));
        [Some(IpAddr::V4(self.gateway)), six].into_iter().flatten().collect()
    }
}

impl Six {
    fn parse(nic: &v1::Nic) -> Result<Option<Self>, String> {
        let v1::Nic { address6, prefix6, gateway6, .. } = nic;
        if address6.is_empty() && *prefix6 == 0 && gateway6.is_empty() {
            return Ok(None);
        }
        let address = |text: &str| {
            let parsed = text.parse::<Ipv6Addr>().ok().filter(|a| !a.is_unspecified() && !a.is_multicast());
            parsed.ok_or_else(|| format!("`{text}` is not an IPv6 address of one machine"))
        };
        Ok(Some(Self {
            address: address(address6)?,
            prefix: u8::try_from(*prefix6)
                .ok()
                .filter(|prefix| (1..=128).contains(prefix))
                .ok_or_else(|| format!("{prefix6} is not a prefix length"))?,
            gateway: address(gateway6)?,
        }))
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

/// The link-local address that follows from `mac`: the only one that the host lets through.
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let half = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Addr::from((0xfe80_u128 << 112) | u128::from(u64::from_be_bytes(half)))
}

pub(crate) use turn::Known;

/// What can be said of the interface that [`apply`] made `nic`'s.
///
/// # Errors
/// When there is no interface any more.
pub(crate) async fn known(nic: &Nic) -> io::Result<Known> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let driver = tokio::spawn(connection);
    let link = wait_for_ethernet(&handle).await;
    driver.abort();
    let link = link?;
    Ok(Known { index: link.header.index, six: quiet_ipv6(&link)?, nic: nic.clone() })
}

/// Gives the interface this identity and no other: MAC, one address in each family, the default routes; and loopback
/// its own.
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
    // Before the link is up, when the kernel makes its link-local address.
    let six = quiet_ipv6(&link)?.then_some(nic.six).flatten();
    change(handle, LinkUnspec::new_with_index(index).up())
        .await
        .map_err(|e| named("bring the link up", e))?;

    let mut wanted = vec![(IpAddr::V4(nic.address), nic.prefix)];
    wanted.extend(six.map(|six| (IpAddr::V6(six.address), six.prefix)));
    for (address, prefix) in missing(handle, index, nic, wanted).await? {
        let mut request = handle.address().add(index, address, prefix);
        if address.is_ipv6() {
            // The host gives each address once; the test for a double would only make the guest wait.
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.map_err(|e| named(&format!("add the address {address}"), e))?;
    }
    let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(nic.gateway).output_interface(index).build();
    handle.route().add(route).replace().execute().await.map_err(|e| named("set the default route", e))?;
    if let Some(six) = six {
        let route =
            RouteMessageBuilder::<Ipv6Addr>::new().gateway(six.gateway).output_interface(index).build();
        let set = handle.route().add(route).replace().execute().await;
        set.map_err(|e| named("set the default route in IPv6", e))?;
    }
    Ok(())
}

/// Removes every address of the link but the `wanted` ones and the link-local one of its MAC; those of `wanted` that are
/// not there yet.
async fn missing(
    handle: &Handle,
    index: u32,
    nic: &Nic,
    mut wanted: Vec<(IpAddr, u8)>,
) -> io::Result<Vec<(IpAddr, u8)>> {
    let mut addresses = handle.address().get().set_link_index_filter(index).execute();
    let mut old = Vec::new();
    while let Some(address) = addresses.try_next().await.map_err(|e| named("list addresses", e))? {
        // IPv4 tells its own as `Local`; IPv6 as `Address`, where there is no peer.
        let of = |local: bool| {
            address.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(own) if local => Some(*own),
                AddressAttribute::Address(own) if !local => Some(*own),
                _ => None,
            })
        };
        let Some(own) = of(true).or_else(|| of(false)) else { continue };
        let place = wanted.iter().position(|wanted| *wanted == (own, address.header.prefix_len));
        if let Some(place) = place {
            wanted.remove(place);
        } else if own != IpAddr::V6(link_local(nic.mac)) {
            old.push(address);
        }
    }
    drop(addresses);
    for address in old {
        handle.address().del(address).execute().await.map_err(|e| named("remove an old address", e))?;
    }
    Ok(wanted)
}

/// Has the link take nothing from routers, ask nobody whether its addresses are free, and make its link-local address from
/// its MAC. Whether the link has IPv6 at all: the kernel may lack it, or the image have it turned off.
fn quiet_ipv6(link: &LinkMessage) -> io::Result<bool> {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    });
    let Some(name) = name else { return Ok(false) };
    let conf = Path::new("/proc/sys/net/ipv6/conf").join(name);
    match fs_err::read_to_string(conf.join("disable_ipv6")) {
        Ok(disabled) if disabled.trim() == "0" => {}
        Ok(_) => return Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    }
    for setting in ["accept_ra", "autoconf", "accept_dad", "addr_gen_mode"] {
        let file = conf.join(setting);
        // Only a change is written: writing the mode makes the kernel look at the link's addresses again.
        if fs_err::read_to_string(&file)?.trim() != "0" {
            fs_err::write(&file, "0")?;
        }
    }
    Ok(true)
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
pub(crate) async fn wait_for_ethernet(handle: &Handle) -> io::Result<LinkMessage> {
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
    use bothy_testkit::{Netns, require_root};
    use std::os::fd::AsRawFd;
    use std::process::{Command, Stdio};

    #[test]
    fn the_hosts_words_are_checked() {
        let good = v1::Nic {
            mac: "02:00:0a:4d:00:07".into(),
            address: "10.77.0.7".into(),
            prefix: 24,
            gateway: "10.77.0.1".into(),
            dns: vec!["10.77.0.1".into()],
            address6: "fd12:3456:789a::7".into(),
            prefix6: 64,
            gateway6: "fd12:3456:789a::1".into(),
        };
        assert_eq!(Nic::parse(&good).unwrap().mac, [2, 0, 0x0a, 0x4d, 0, 7]);
        let four = v1::Nic { address6: String::new(), prefix6: 0, gateway6: String::new(), ..good.clone() };
        assert_eq!(Nic::parse(&four).unwrap().six, None);
        let broken: [fn(&mut v1::Nic); 10] = [
            |nic| nic.mac = "02:00:0a:4d:00".into(),
            |nic| nic.mac = "03:00:0a:4d:00:07".into(),
            |nic| nic.address = "10.77.0".into(),
            |nic| nic.prefix = 33,
            |nic| nic.gateway = String::new(),
            |nic| nic.dns = vec!["x\nsearch evil".into()],
            |nic| nic.address6.clear(),
            |nic| nic.address6 = "ff02::1".into(),
            |nic| nic.prefix6 = 129,
            |nic| nic.gateway6 = "10.77.0.1".into(),
        ];
        for change in broken {
            let mut nic = good.clone();
            change(&mut nic);
            assert!(Nic::parse(&nic).is_err(), "{nic:?}");
        }
    }

    #[test]
    fn the_link_local_address_is_the_macs() {
        let text = link_local([0x52, 0x54, 0, 0x12, 0x34, 0x56]).to_string();
        assert_eq!(text, "fe80::5054:ff:fe12:3456");
    }

    fn ip(netns: &Netns, line: &str) -> String {
        let mut command = Command::new("ip");
        command.args(line.split(' ')).stdin(Stdio::null()).stdout(Stdio::piped());
        let output = netns.spawn(&mut command).unwrap().wait_with_output().unwrap();
        assert!(output.status.success(), "ip {line}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn nic(n: u8) -> Nic {
        Nic {
            mac: [0x52, 0x54, 0, 0, 0, n],
            address: Ipv4Addr::new(10, 77, 0, n),
            prefix: 24,
            gateway: Ipv4Addr::new(10, 77, 0, 1),
            six: Some(Six {
                address: Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, n.into()),
                prefix: 64,
                gateway: Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 1),
            }),
            dns: Vec::new(),
        }
    }

    #[test]
    fn a_link_becomes_the_next_machines_and_stays_it() {
        require_root!();
        let (netns, far) = (Netns::new(), Netns::new());
        ip(&netns, "link add eth0 type veth peer name far");
        let path = format!("/proc/{}/fd/{}", std::process::id(), far.fd().as_raw_fd());
        ip(&netns, &format!("link set far netns {path}"));
        ip(&far, "link set far up");
        netns.block_on(async { apply(&nic(7)).await.unwrap() });
        netns.block_on(async { apply(&nic(8)).await.unwrap() });
        let seen = || {
            let all = ["-o address show dev eth0", "route", "-6 route show default", "link show eth0"];
            // Whether an address was ever in doubt is of no importance.
            all.map(|line| ip(&netns, line).replace(" nodad", ""))
        };
        let [addresses, routes, routes6, link] = seen();
        let own: Vec<&str> = addresses.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
        assert_eq!(own, ["10.77.0.8/24", "fd00:0:0:1::8/64", "fe80::5054:ff:fe00:8/64"], "{addresses}");
        assert!(!addresses.contains("tentative"), "{addresses}");
        assert!(routes.contains("default via 10.77.0.1 dev eth0"), "{routes}");
        assert!(routes6.contains("default via fd00:0:0:1::1 dev eth0"), "{routes6}");
        assert!(link.contains("52:54:00:00:00:08"), "{link}");
        for stray in ["10.9.9.9/24", "fd00:0:0:9::9/64", "fe80::9/64"] {
            ip(&netns, &format!("address add {stray} dev eth0"));
        }
        let again = netns.block_on(async { apply(&nic(8)).await });
        again.unwrap();
        let eight = [addresses, routes, routes6, link];
        assert_eq!(seen(), eight, "the same again leaves the same");

        // In one go, as a template's link becomes a machine's: to another and back, and with the gateways moved as well.
        let moved = Nic {
            gateway: Ipv4Addr::new(10, 77, 0, 254),
            six: nic(9).six.map(|six| Six { gateway: Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 0xfe), ..six }),
            ..nic(9)
        };
        netns.block_on(async { known(&nic(8)).await.unwrap().turn_into(&moved).unwrap() });
        let [addresses, routes, routes6, link] = seen();
        let own: Vec<&str> = addresses.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
        assert_eq!(own, ["10.77.0.9/24", "fd00:0:0:1::9/64", "fe80::5054:ff:fe00:9/64"], "{addresses}");
        assert!(!addresses.contains("tentative") && addresses.contains("brd 10.77.0.255"), "{addresses}");
        assert!(routes.contains("default via 10.77.0.254") && !routes.contains("10.77.0.1 "), "{routes}");
        assert!(
            routes6.contains("via fd00:0:0:1::fe") && !routes6.contains("via fd00:0:0:1::1 "),
            "{routes6}"
        );
        assert!(link.contains("52:54:00:00:00:09"), "{link}");
        netns.block_on(async { known(&moved).await.unwrap().turn_into(&nic(8)).unwrap() });
        assert_eq!(seen(), eight, "and back");
        // A link that is not as it is thought to be is an error, and the long way mends it.
        let wrong = netns.block_on(async { known(&nic(5)).await.unwrap().turn_into(&nic(6)).unwrap_err() });
        assert!(wrong.to_string().contains("assign requested address"), "{wrong}");
        netns.block_on(async { apply(&nic(8)).await.unwrap() });
        assert_eq!(seen(), eight);
    }

    #[test]
    fn a_link_without_ipv6_gets_ipv4_alone() {
        require_root!();
        let netns = Netns::new();
        ip(&netns, "link add eth0 type veth peer name far");
        let off = || fs_err::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
        netns.run(off).unwrap();
        netns.block_on(async { apply(&nic(7)).await.unwrap() });
        let addresses = ip(&netns, "-o address");
        assert!(addresses.contains("10.77.0.7/24") && !addresses.contains("inet6"), "{addresses}");
    }
}
