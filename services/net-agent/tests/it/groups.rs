//! Guests that share a group reach each other, and nobody else does: with real sockets on both ends, and by raw frames.

use crate::{
    egress::{connect, echo, refused, serve},
    guest::{BROADCAST, Guest, Packet, arp, link_address, nd, udp, udp6},
    machine::Machine,
    world::{World, links, ruleset},
};
use bothy_contract::{
    Code, VmId,
    net::{AcquireLease, Lease},
    net_group::{MAX_GROUPS, MAX_MEMBERS, Membership},
};
use bothy_net_agent::{link::Links, network::Network, nft::Nft, plan::Mac};
use bothy_testkit::require_root;
use std::net::{IpAddr, Ipv6Addr};

const ALICE: u32 = 1000;
const BOB: u32 = 1001;

fn of(owner: u32, names: &[&str]) -> Membership {
    Membership { owner, names: names.iter().map(|name| name.parse().unwrap()).collect() }
}

async fn lease(net: &Network, groups: Membership) -> (VmId, Lease) {
    let vm = VmId::new();
    let request = AcquireLease { groups: Some(groups), ..AcquireLease::new(vm) };
    (vm, net.acquire(request).await.unwrap())
}

async fn machine(world: &World, net: &Network, groups: Membership) -> (VmId, Machine) {
    let (vm, lease) = lease(net, groups).await;
    let machine = Machine::new(&world.ns, &lease);
    serve(&machine.ns, 80);
    (vm, machine)
}

fn addresses(machine: &Machine) -> [IpAddr; 2] {
    [machine.lease.address.into(), machine.lease.address6.unwrap().into()]
}

/// Whether `from` reaches `to` in both families; it may not be one only.
fn reaches(from: &Machine, to: &Machine) -> bool {
    let all = addresses(to).map(|address| match connect(&from.ns, address, 80) {
        Ok((_, seen)) => {
            assert!(addresses(from).iter().any(|a| a.to_string() == seen), "seen as itself: {seen}");
            true
        }
        refused_ if refused(&refused_) => false,
        other => panic!("{other:?}"),
    });
    assert_eq!(all[0], all[1], "IPv4 and IPv6 go together");
    all[0]
}

/// The elements of the sets of pairs, as text.
fn peers() -> String {
    let rules: serde_json::Value = serde_json::from_str(&ruleset()).unwrap();
    let sets = rules["nftables"].as_array().unwrap().iter();
    let peers = sets.filter(|o| o["set"]["name"].as_str().is_some_and(|name| name.starts_with("peers")));
    peers.map(|o| o["set"]["elem"].to_string()).collect()
}

#[test]
fn members_reach_each_other_and_nobody_else() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let (_, a) = machine(world, &net, of(ALICE, &["web"])).await;
        let (vm_b, b) = machine(world, &net, of(ALICE, &["web"])).await;
        let (_, theirs) = machine(world, &net, of(BOB, &["web"])).await;
        let (vm_d, d) = machine(world, &net, Membership::default()).await;
        assert!(reaches(&a, &b) && reaches(&b, &a));
        for other in [&theirs, &d] {
            assert!(!reaches(&a, other) && !reaches(other, &a));
        }

        net.set_groups(vm_d, of(ALICE, &["db"])).await.unwrap();
        net.set_groups(vm_b, of(ALICE, &["db", "web"])).await.unwrap();
        assert!(reaches(&d, &b) && reaches(&b, &d) && reaches(&a, &b));
        assert!(!reaches(&d, &a) && !reaches(&a, &d), "a friend's friend is none");

        // Leaving ends what is open, whoever opened it.
        let open: Vec<_> = addresses(&b)
            .map(|to| connect(&a.ns, to, 80).unwrap().0)
            .into_iter()
            .chain(addresses(&a).map(|to| connect(&b.ns, to, 80).unwrap().0))
            .collect();
        let mut kept = connect(&d.ns, addresses(&b)[0], 80).unwrap().0;
        net.set_groups(vm_b, of(ALICE, &["db"])).await.unwrap();
        for mut stream in open {
            assert!(!echo(&mut stream));
        }
        assert!(!reaches(&a, &b) && !reaches(&b, &a) && echo(&mut kept));

        net.release(vm_b).await.unwrap();
        assert_eq!(peers(), "nullnull", "nothing is left for the next VM of the slot");
    });
}

#[test]
fn groups_outlive_a_restart_and_what_others_remove() {
    require_root!();
    let world = &World::new();
    let (vm, a, b) = world.with_agent(|net| async move {
        let (vm, a) = machine(world, &net, of(ALICE, &["web"])).await;
        let (_, b) = machine(world, &net, of(ALICE, &["web"])).await;
        assert!(reaches(&a, &b));
        (vm, a, b)
    });
    let (a, b) = (&a, &b);
    let mut open = connect(&a.ns, addresses(b)[0], 80).unwrap().0;
    world.with_agent(|net| async move {
        assert!(echo(&mut open), "a new agent interrupts nothing");
        assert!(reaches(a, b) && reaches(b, a));
        let rows = net.list().leases;
        assert!(rows.len() == 2 && rows.iter().all(|row| row.groups == of(ALICE, &["web"])), "{rows:?}");

        Nft::open().unwrap().run("flush ruleset").unwrap();
        net.check().await.unwrap();
        assert!(echo(&mut open) && reaches(a, b) && peers().contains(&a.lease.address.to_string()));

        let raw = Links::open().unwrap();
        let bridge = links().await["bothy0"].index;
        let before = raw.proxied_neighbours(bridge).await.unwrap();
        assert!(before.contains(&addresses(b)[1]), "{before:?}");
        let slot = net.plan().slot(b.lease.slot).unwrap();
        raw.forget_neighbours(&net.plan(), &slot, bridge).await.unwrap();
        assert_eq!(raw.proxied_neighbours(bridge).await.unwrap().len(), before.len() - 1);
        net.check().await.unwrap();
        assert_eq!(raw.proxied_neighbours(bridge).await.unwrap(), before);

        // With the bridge go its settings.
        raw.delete(&raw.find("bothy0").await.unwrap().unwrap()).await.unwrap();
        net.check().await.unwrap();
        assert!(reaches(a, b) && reaches(b, a));

        net.set_groups(vm, Membership::default()).await.unwrap();
        assert!(!reaches(a, b) && !reaches(b, a));
    });
}

#[test]
fn nobody_takes_a_members_place() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let mut guests = Vec::new();
        for names in [&["web"][..], &["web", "db"], &["db"], &[]] {
            let (_, lease) = lease(&net, of(ALICE, names)).await;
            let mut guest = Guest::new(&world.ns, &lease);
            guest.gateway_mac();
            guests.push(guest);
        }
        let [mut a, mut b, c, mut stranger] = <[Guest; 4]>::try_from(guests).ok().unwrap();
        let via = a.gateway_mac();
        let (to, to6) = ((b.ip, 7000), (b.ip6, 7000));
        // As another member, as a member, directly, and as oneself without being a member.
        a.send(&udp(a.mac, via, (c.ip, 7000), to, b"as c"));
        a.send(&udp6(a.mac, via, (c.ip6, 7000), to6, b"as c"));
        for mac in [stranger.mac, a.mac] {
            stranger.send(&udp(mac, via, (a.ip, 7000), to, b"as a"));
            stranger.send(&udp6(mac, via, (a.ip6, 7000), to6, b"as a"));
        }
        a.send(&udp(a.mac, b.mac, (a.ip, 7000), to, b"not by way of the host"));
        a.send(&udp6(a.mac, b.mac, (a.ip6, 7000), to6, b"not by way of the host"));
        a.send(&udp6(a.mac, via, (a.mac.link_local(), 7000), to6, b"by another address"));
        stranger.send_udp(via, to, b"as itself");
        stranger.send(&udp6(stranger.mac, via, (stranger.ip6, 7000), to6, b"as itself"));
        // Nobody is told that a member is elsewhere.
        stranger.send(&arp(stranger.mac, BROADCAST, 2, (stranger.mac, a.ip), (b.mac, b.ip)));
        let claim = [a.ip6.octets().to_vec(), link_address(2, stranger.mac)].concat();
        stranger.send(&nd(stranger.mac, b.mac, (stranger.ip6, b.ip6), 136, [0x60, 0, 0, 0], &claim));

        a.send_udp(via, to, b"honest");
        let received = b.receive();
        assert_eq!(received, Packet::Udp { from: (a.ip, 7000), to, data: b"honest".to_vec() });
        a.send(&udp6(a.mac, via, (a.ip6, 7000), to6, b"honest"));
        assert_eq!(b.receive_udp6(), (b.mac, b"honest".to_vec()));
    });
}

#[test]
fn the_host_stands_in_for_guests_but_never_to_themselves() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let (_, first) = lease(&net, of(ALICE, &["web"])).await;
        let (_, second) = lease(&net, of(ALICE, &["web"])).await;
        let mut a = Guest::new(&world.ns, &first);
        let via = a.gateway_mac();
        let (mac, ip) = (a.mac, a.ip);
        let (other, other6) = (second.address, second.address6.unwrap());
        let solicited = |ip: Ipv6Addr| {
            let [.., x, y, z] = ip.octets();
            let group =
                Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(x), u16::from_be_bytes([y, z]));
            (Mac([0x33, 0x33, 0xff, x, y, z]), group)
        };
        // Is somebody else at my address? (RFC 5227, RFC 4862.) If the host said yes, the guest would be without it.
        a.send(&arp(mac, BROADCAST, 1, (mac, [0, 0, 0, 0].into()), (Mac([0; 6]), ip)));
        a.send(&arp(mac, BROADCAST, 1, (mac, ip), (Mac([0; 6]), ip)));
        let (to, group) = solicited(a.ip6);
        a.send(&nd(mac, to, (Ipv6Addr::UNSPECIFIED, group), 135, [0; 4], &a.ip6.octets()));
        // And then: who has the other's?
        a.send(&arp(mac, BROADCAST, 1, (mac, ip), (Mac([0; 6]), other)));
        assert_eq!(a.receive_arp_reply(), (other, via));
        let (to, group) = solicited(other6);
        let question = [&other6.octets()[..], &link_address(1, mac)].concat();
        a.send(&nd(mac, to, (a.ip6, group), 135, [0; 4], &question));
        assert_eq!(a.receive_advert(), (other6, via));
        // Is it still there?
        a.send(&nd(mac, via, (a.ip6, other6), 135, [0; 4], &question));
        assert_eq!(a.receive_advert(), (other6, via));
    });
}

#[test]
fn a_full_group_is_refused() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let mut vms = Vec::new();
        for _ in 0..MAX_MEMBERS {
            vms.push(lease(&net, of(ALICE, &["web"])).await.0);
        }
        let one_more =
            || AcquireLease { groups: Some(of(ALICE, &["web"])), ..AcquireLease::new(VmId::new()) };
        let refused = net.acquire(one_more()).await.unwrap_err();
        assert!(refused.code == Code::ResourceExhausted && refused.hint.is_some(), "{refused}");
        assert!(refused.message.contains("group web has 64"), "{refused}");
        assert_eq!(net.show().leased as usize, MAX_MEMBERS, "nothing is left of it");

        let (theirs, _) = lease(&net, of(BOB, &["web"])).await;
        let names: Vec<String> = (0..=MAX_GROUPS).map(|n| format!("g{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let refused = net.set_groups(theirs, of(BOB, &names)).await.unwrap_err();
        assert_eq!(refused.code, Code::ResourceExhausted);

        // One that is in stays in, and one that leaves makes room.
        net.set_groups(vms[0], of(ALICE, &["web", "db"])).await.unwrap();
        net.set_groups(vms[0], of(ALICE, &["db"])).await.unwrap();
        net.acquire(one_more()).await.unwrap();
        let gone = net.set_groups(VmId::new(), Membership::default()).await.unwrap_err();
        assert_eq!(gone.code, Code::NotFound);
    });
}
