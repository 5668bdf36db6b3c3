//! What guests can reach and what they cannot, with real packets. That something is dropped is shown by order, not by
//! waiting: it is sent first, and what is allowed arrives first.

use crate::{
    guest::{BROADCAST, Guest, Packet, arp, udp},
    world::{World, ask},
};
use bothy_contract::{
    VmId,
    net::{Egress, Lease},
};
use bothy_net_agent::{network::Network, plan::Mac};
use bothy_testkit::{Netns, require_root};
use std::{
    net::{Ipv4Addr, UdpSocket},
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
