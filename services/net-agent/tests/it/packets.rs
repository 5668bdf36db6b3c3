//! What guests can reach and what they cannot, with real packets. That something is dropped is shown by order, not by
//! waiting: it is sent first, and what is allowed arrives first.

use crate::{
    guest::{BROADCAST, Guest, Packet, arp, link_address, nd, udp, udp6},
    world::{World, ask},
};
use bothy_contract::{
    VmId,
    net::{Egress, Lease},
};
use bothy_net_agent::{link::Links, network::Network, plan::Mac};
use bothy_testkit::{Netns, require_root};
use std::{
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    time::Duration,
};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

fn socket(ns: &Netns, port: u16) -> UdpSocket {
    let socket = ns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

fn next(socket: &UdpSocket) -> (Vec<u8>, std::net::SocketAddr) {
    let mut data = [0; 100];
    let (n, from) = socket.recv_from(&mut data).expect("a packet");
    (data[..n].to_vec(), from)
}

async fn lease(net: &Network, nat: bool) -> (VmId, Lease) {
    let vm = VmId::new();
    (vm, net.acquire(ask(vm, nat)).await.unwrap())
}

#[test]
fn nat_masquerades_and_ends_at_once() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    let server = socket(&outside, 9);
    world.with_agent(|net| async move {
        let (vm, lease) = lease(&net, true).await;
        let mut guest = Guest::new(&world.ns, &lease);
        let via = guest.gateway_mac();

        guest.send_udp(via, (OUTSIDE, 9), b"hello");
        let (data, from) = next(&server);
        assert_eq!((data.as_slice(), from.ip()), (&b"hello"[..], HOST.into()), "seen as the host");
        server.send_to(b"welcome", from).unwrap();
        let answer = guest.receive();
        assert_eq!(
            answer,
            Packet::Udp { from: (OUTSIDE, 9), to: (guest.ip, 7000), data: b"welcome".to_vec() }
        );

        // Somebody else's address, MAC, or both, and the gateway's.
        let other = Mac([0x52, 0x54, 0, 1, 2, 3]);
        let neighbour = Ipv4Addr::new(10, 77, 0, 99);
        for (mac, ip) in [(guest.mac, neighbour), (other, guest.ip), (other, neighbour), (via, lease.gateway)]
        {
            guest.send(&udp(mac, via, (ip, 7000), (OUTSIDE, 9), b"spoofed"));
        }
        guest.send_udp(via, (OUTSIDE, 9), b"honest");
        assert_eq!(next(&server).0, b"honest");

        net.set_egress(vm, Egress::None).await.unwrap();
        guest.send_udp(via, (OUTSIDE, 9), b"without nat, on a connection that was open");
        net.set_egress(vm, Egress::Open).await.unwrap();
        guest.send_udp(via, (OUTSIDE, 9), b"with nat");
        assert_eq!(next(&server).0, b"with nat");
    });
}

#[test]
fn the_host_does_not_route_for_its_neighbours() {
    require_root!();
    let world = &World::new();
    let _outside = world.neighbour();
    world.with_agent(|net| async move {
        lease(&net, true).await;
        assert!(crate::world::ruleset().contains("uplinks") && world.forwarding("up0") == "1");
        // Where the host forwards for everybody, it is not ours to guard.
        world.ns.run(|| fs_err::write("/proc/sys/net/ipv4/ip_forward", "1")).unwrap();
        net.check().await.unwrap();
        assert!(!crate::world::ruleset().contains("up0"));
        net.teardown().await.unwrap();
        assert_eq!(world.forwarding("up0"), "1", "theirs now");
    });
}

#[test]
fn the_host_is_out_of_reach_and_may_reach_in() {
    require_root!();
    let world = &World::new();
    let host = socket(&world.ns, 5000);
    world.with_agent(|net| async move {
        let (_, lease) = lease(&net, true).await;
        let mut guest = Guest::new(&world.ns, &lease);
        let via = guest.gateway_mac();
        for address in [lease.gateway, Ipv4Addr::new(10, 77, 0, 255), Ipv4Addr::BROADCAST] {
            guest.send_udp(via, (address, 5000), b"from the guest");
        }
        host.send_to(b"from the host", (guest.ip, 7000)).unwrap();
        let received = guest.receive();
        let Packet::Udp { from, data, .. } = received else { panic!("{received:?}") };
        assert_eq!(data, b"from the host");
        guest.send_udp(via, from, b"an answer");
        assert_eq!(next(&host).0, b"an answer", "and nothing before it");
    });
}

#[test]
fn guests_do_not_see_each_other() {
    require_root!();
    let world = &World::new();
    let host = socket(&world.ns, 0);
    world.with_agent(|net| async move {
        let (_, first) = lease(&net, true).await;
        let (_, second) = lease(&net, true).await;
        let mut a = Guest::new(&world.ns, &first);
        let mut b = Guest::new(&world.ns, &second);
        let via = a.gateway_mac();
        b.gateway_mac();
        // Directly, by broadcast, by way of the host, and as the gateway.
        a.send(&udp(a.mac, b.mac, (a.ip, 7000), (b.ip, 7000), b"direct"));
        a.send(&arp(a.mac, BROADCAST, 1, (a.mac, a.ip), (Mac([0; 6]), b.ip)));
        a.send(&arp(a.mac, BROADCAST, 2, (a.mac, a.gateway), (b.mac, b.ip)));
        a.send_udp(via, (b.ip, 7000), b"routed");
        host.send_to(b"from the host", (b.ip, 7000)).unwrap();
        let received = b.receive();
        assert!(matches!(&received, Packet::Udp { from, data, .. } if from.0 == b.gateway && data == b"from the host"),
            "{received:?}");
    });
}

#[test]
fn a_released_tap_is_cut_off() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let (vm, lease) = lease(&net, false).await;
        let mut guest = Guest::new(&world.ns, &lease);
        guest.gateway_mac();
        net.release(vm).await.unwrap();
        let gone = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guest.send(&[0; 60])));
        assert!(gone.is_err(), "the old descriptor is dead, whatever is made under the name");
    });
}

#[test]
fn ipv6_of_somebody_else_is_dropped() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    world.neighbour6(&outside);
    let server = outside.run(|| UdpSocket::bind("[::]:9")).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    world.with_agent(|net| async move {
        let (_, first) = lease(&net, true).await;
        let (_, second) = lease(&net, true).await;
        let mut guest = Guest::new(&world.ns, &first);
        let via = guest.gateway_mac();
        let to: (Ipv6Addr, u16) = ("fd00:1::2".parse().unwrap(), 9);
        let other = Mac([0x52, 0x54, 0, 1, 2, 3]);
        let (theirs, gateway) = (second.address6.unwrap(), first.gateway6.unwrap());
        let nobodys = Ipv6Addr::from(u128::from(gateway) + 0xffff);
        for (mac, ip) in [
            (guest.mac, theirs),
            (guest.mac, gateway),
            (guest.mac, nobodys),
            (guest.mac, Ipv6Addr::UNSPECIFIED),
            (other, guest.ip6),
            (other, theirs),
        ] {
            guest.send(&udp6(mac, via, (ip, 7000), to, b"spoofed"));
        }
        guest.send(&udp6(guest.mac, via, (guest.ip6, 7000), to, b"honest"));
        assert_eq!(next(&server).0, b"honest");
    });
}

#[test]
fn nothing_said_in_neighbour_discovery_or_arp_moves_the_host() {
    require_root!();
    let world = &World::new();
    let host = world.ns.run(|| UdpSocket::bind("[::]:0")).unwrap();
    world.with_agent(|net| async move {
        let (_, first) = lease(&net, true).await;
        let (_, second) = lease(&net, true).await;
        let mut liar = Guest::new(&world.ns, &first);
        let mut b = Guest::new(&world.ns, &second);
        let via = liar.gateway_mac();
        b.gateway_mac();
        let bridge = crate::world::links().await["bothy0"].index;
        let neighbours = || async move { Links::open().unwrap().fixed_neighbours(bridge).await.unwrap() };
        let text = |path: &str| fs_err::read_to_string(format!("/proc/thread-self/net/{path}")).unwrap();
        // Destination, gateway and link of each route; the rest are counters.
        let routes = || -> Vec<[String; 3]> {
            let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            text("ipv6_route").lines().map(words).map(|w| [0, 4, 9].map(|n| w[n].clone())).collect()
        };
        let before = (neighbours().await, text("if_inet6"), routes());
        assert_eq!(before.0[&b.ip6.into()], b.mac.0);

        let (gateway, link_local) = (first.gateway6.unwrap(), liar.mac.link_local());
        let target = |ip: Ipv6Addr| ip.octets().to_vec();
        let lie = link_address(1, Mac([0x52, 0x54, 0, 9, 9, 9]));
        // "I am b", as an override and unasked; "ask me at another MAC"; "b asks, at my MAC"; "I am a router"; "go by me".
        let claim = [target(b.ip6), link_address(2, liar.mac)].concat();
        liar.send(&nd(liar.mac, via, (liar.ip6, gateway), 136, [0x60, 0, 0, 0], &claim));
        liar.send(&nd(liar.mac, via, (b.ip6, gateway), 136, [0x60, 0, 0, 0], &claim));
        liar.send(&nd(liar.mac, via, (liar.ip6, gateway), 135, [0; 4], &[target(gateway), lie].concat()));
        let asks = [target(gateway), link_address(1, liar.mac)].concat();
        liar.send(&nd(liar.mac, via, (b.ip6, gateway), 135, [0; 4], &asks));
        let all: Ipv6Addr = "ff02::1".parse().unwrap();
        let router = [vec![0; 8], link_address(1, liar.mac)].concat();
        liar.send(&nd(
            liar.mac,
            Mac([0x33, 0x33, 0, 0, 0, 1]),
            (link_local, all),
            134,
            [64, 0, 7, 8],
            &router,
        ));
        let redirect = [target(link_local), target(b.ip6)].concat();
        liar.send(&nd(liar.mac, via, (link_local, gateway), 137, [0; 4], &redirect));
        liar.send(&arp(liar.mac, via, 2, (liar.mac, b.ip), (via, first.gateway)));
        liar.send(&arp(liar.mac, via, 2, (Mac([2; 6]), liar.ip), (via, first.gateway)));

        host.send_to(b"to b", (b.ip6, 7000)).unwrap();
        let (mac, data) = b.receive_udp6();
        assert_eq!((mac, data.as_slice()), (b.mac, &b"to b"[..]));
        host.send_to(b"to you", (liar.ip6, 7000)).unwrap();
        assert_eq!(liar.receive_udp6(), (liar.mac, b"to you".to_vec()), "and nothing for b");
        assert_eq!((neighbours().await, text("if_inet6"), routes()), before);
    });
}
