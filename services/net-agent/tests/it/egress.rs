//! Policies and IPv6, with real sockets on both ends.

use crate::{
    machine::Machine,
    world::{World, ask, ruleset},
};
use bothy_contract::{
    Code, VmId,
    net::{AcquireLease, Egress},
};
use bothy_net_agent::{link::Links, network::Network, nft::Nft};
use bothy_testkit::{Netns, require_root};
use rtnetlink::{LinkBridge, RouteMessageBuilder};
use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

pub(crate) const OUTSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
const PATIENCE: Duration = Duration::from_secs(10);

fn outside6() -> IpAddr {
    "fd00:1::2".parse().unwrap()
}

pub(crate) fn allow(names: &[&str]) -> Egress {
    Egress::Allow { names: names.iter().map(|n| (*n).to_owned()).collect() }
}

/// A server in `ns` that greets each connection with the peer's address and echoes what it gets.
pub(crate) fn serve(ns: &Netns, port: u16) {
    let listener = ns.run(|| TcpListener::bind(("::", port))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let peer = stream.peer_addr().unwrap().ip().to_canonical().to_string();
                let _ = stream.write_all(format!("{peer:<40}").as_bytes());
                let mut data = [0; 64];
                while let Ok(n @ 1..) = stream.read(&mut data) {
                    let _ = stream.write_all(&data[..n]);
                }
            });
        }
    });
}

/// A connection, and whom the server saw.
pub(crate) fn connect(ns: &Netns, to: IpAddr, port: u16) -> Result<(TcpStream, String), ErrorKind> {
    ns.run(|| {
        let connected = TcpStream::connect_timeout(&SocketAddr::new(to, port), PATIENCE);
        let mut stream = connected.map_err(|e| e.kind())?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut peer = [0; 40];
        stream.read_exact(&mut peer).map_err(|e| e.kind())?;
        Ok((stream, String::from_utf8_lossy(&peer).trim().to_owned()))
    })
}

pub(crate) fn refused<T>(result: &Result<T, ErrorKind>) -> bool {
    matches!(result, Err(ErrorKind::ConnectionRefused))
}

pub(crate) fn echo(stream: &mut TcpStream) -> bool {
    let mut data = [0; 1];
    stream.write_all(b"x").is_ok() && stream.read_exact(&mut data).is_ok()
}

pub(crate) async fn machine(world: &World, net: &Network, egress: Egress) -> (VmId, Machine) {
    let vm = VmId::new();
    let request = AcquireLease { egress: Some(egress), ..AcquireLease::new(vm) };
    let lease = net.acquire(request).await.unwrap();
    (vm, Machine::new(&world.ns, &lease))
}

/// What `nft` says in the host's namespace.
fn nft(world: &World, args: &[&str]) -> String {
    let out = world.ns.run(|| std::process::Command::new("nft").args(args).output().unwrap());
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn only_resolved_names_are_reached() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    world.neighbour6(&outside);
    serve(&outside, 80);
    serve(&outside, 53);
    world.with_agent(|net| async move {
        let (vm, m) = machine(world, &net, allow(&["a.test", "*.b.test"])).await;
        let guest = IpAddr::V4(m.lease.address);
        assert!(refused(&connect(&m.ns, OUTSIDE, 80)), "never resolved");
        let minute = Duration::from_secs(60);
        net.allow(guest, "A.test.", &[(OUTSIDE, minute), (outside6(), minute)]).await.unwrap();
        let (mut open, seen) = connect(&m.ns, OUTSIDE, 80).unwrap();
        assert_eq!(seen, "192.0.2.1", "masqueraded");
        let (mut open6, seen) = connect(&m.ns, outside6(), 80).unwrap();
        assert_eq!(seen, "fd00:1::1", "masqueraded");
        assert!(refused(&connect(&m.ns, OUTSIDE, 53)), "no DNS elsewhere, whoever it is");
        let not_its = net.allow(guest, "c.test", &[(OUTSIDE, minute)]).await.unwrap_err();
        assert_eq!(not_its.code, Code::NotFound);
        net.denied(guest, "c.test");
        net.denied(guest, "c.test");

        let report = net.egress_report(vm).await.unwrap();
        assert_eq!(report.allowed.len(), 1);
        assert_eq!((report.allowed[0].name.as_str(), report.allowed[0].addresses.len()), ("a.test", 2));
        let count = |name: &str| report.denied.iter().find(|d| d.name == name).map(|d| d.count);
        assert_eq!(count("c.test"), Some(2));
        assert_eq!(count("192.0.2.2"), Some(2), "two connections, one packet each: {report:?}");

        // A policy that still covers the name interrupts nothing, and one that does not ends what is open.
        net.set_egress(vm, allow(&["a.test", "new.test"])).await.unwrap();
        assert!(echo(&mut open) && echo(&mut open6) && connect(&m.ns, OUTSIDE, 80).is_ok());
        net.set_egress(vm, allow(&["new.test"])).await.unwrap();
        assert!(refused(&connect(&m.ns, OUTSIDE, 80)) && !echo(&mut open) && !echo(&mut open6));
        net.set_egress(vm, Egress::Open).await.unwrap();
        assert!(connect(&m.ns, OUTSIDE, 80).is_ok() && connect(&m.ns, outside6(), 80).is_ok());
        net.set_egress(vm, Egress::None).await.unwrap();
        assert!(refused(&connect(&m.ns, OUTSIDE, 80)) && refused(&connect(&m.ns, outside6(), 80)));
        assert_eq!(net.allow(guest, "a.test", &[(OUTSIDE, minute)]).await.unwrap_err().code, Code::NotFound);
        let rules = ruleset();
        net.release(vm).await.unwrap();
        assert!(!rules.contains("allow_1") && !rules.contains("a4_1"), "nothing is left of the names");
    });
}

#[test]
fn one_vm_s_names_are_not_another_s() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    serve(&outside, 80);
    world.with_agent(|net| async move {
        let (_, a) = machine(world, &net, allow(&["a.test"])).await;
        let (_, b) = machine(world, &net, allow(&["a.test"])).await;
        let minute = Duration::from_secs(60);
        net.allow(a.lease.address.into(), "a.test", &[(OUTSIDE, minute)]).await.unwrap();
        assert!(connect(&a.ns, OUTSIDE, 80).is_ok() && refused(&connect(&b.ns, OUTSIDE, 80)));
    });
}

#[test]
fn names_outlive_the_agent_and_a_flush() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    serve(&outside, 80);
    world.ns.block_on(async {
        let net = Network::start(&world.config).await.unwrap();
        let (vm, m) = machine(world, &net, allow(&["a.test"])).await;
        let guest = IpAddr::V4(m.lease.address);
        net.allow(guest, "a.test", &[(OUTSIDE, Duration::from_secs(600))]).await.unwrap();
        let (mut open, _) = connect(&m.ns, OUTSIDE, 80).unwrap();
        Nft::open().unwrap().run("flush ruleset").unwrap();
        net.check().await.unwrap();
        assert!(echo(&mut open) && connect(&m.ns, OUTSIDE, 80).is_ok(), "mended as it was");
        drop(net);

        let net = Network::start(&world.config).await.unwrap();
        assert_eq!(net.policy_of(guest), Some(allow(&["a.test"])));
        assert!(echo(&mut open) && connect(&m.ns, OUTSIDE, 80).is_ok(), "nothing was interrupted");
        let report = net.egress_report(vm).await.unwrap();
        assert!(report.allowed.iter().any(|a| a.name == "a.test" && a.addresses == [OUTSIDE]), "{report:?}");
        net.set_egress(vm, allow(&["a.test", "c.test"])).await.unwrap();
        assert!(echo(&mut open) && connect(&m.ns, OUTSIDE, 80).is_ok(), "still covered by its name");
        net.set_egress(vm, allow(&["b.test"])).await.unwrap();
        assert!(refused(&connect(&m.ns, OUTSIDE, 80)));
    });
}

#[test]
fn some_places_are_closed_under_every_policy() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    let metadata = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
    let container = IpAddr::V4(Ipv4Addr::new(172, 30, 0, 7));
    world.ns.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        handle.link().add(LinkBridge::new("docker0").up().build()).execute().await.unwrap();
        let index = Links::open().unwrap().find("docker0").await.unwrap().unwrap().index;
        let ours = IpAddr::V4(Ipv4Addr::new(172, 30, 0, 1));
        handle.address().add(index, ours, 24).execute().await.unwrap();
        let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway([192, 0, 2, 2].into()).build();
        handle.route().add(default).execute().await.unwrap();
    });
    outside.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let index = Links::open().unwrap().find("out0").await.unwrap().unwrap().index;
        handle.address().add(index, metadata, 32).execute().await.unwrap();
    });
    serve(&outside, 80);
    assert!(connect(&world.ns, metadata, 80).is_ok(), "the host may");
    world.with_agent(|net| async move {
        let (vm, m) = machine(world, &net, Egress::Open).await;
        assert!(connect(&m.ns, OUTSIDE, 80).is_ok());
        assert!(refused(&connect(&m.ns, metadata, 80)) && refused(&connect(&m.ns, container, 80)));
        let report = net.egress_report(vm).await.unwrap();
        for closed in [metadata, container] {
            assert!(report.denied.iter().any(|d| d.name == closed.to_string()), "{report:?}");
        }
        // A resolver that hands out such an address changes nothing.
        net.set_egress(vm, allow(&["a.test"])).await.unwrap();
        let minute = Duration::from_secs(60);
        net.allow(m.lease.address.into(), "a.test", &[(metadata, minute), (container, minute)])
            .await
            .unwrap();
        assert!(refused(&connect(&m.ns, metadata, 80)) && refused(&connect(&m.ns, container, 80)));
        // The next VM of that address does not inherit it.
        let bridge = net.show().bridge;
        let counted = || nft(world, &["list", "set", "inet", &bridge, "denied4"]);
        assert!(counted().contains(&m.lease.address.to_string()), "{}", counted());
        net.release(vm).await.unwrap();
        assert!(!counted().contains(&m.lease.address.to_string()), "{}", counted());
    });
}

#[test]
fn of_the_host_a_guest_reaches_dns_on_the_bridge_only() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    world.neighbour6(&outside);
    world.with_agent(|net| async move {
        let (_, m) = machine(world, &net, Egress::Open).await;
        let (gateway, gateway6) = (IpAddr::V4(m.lease.gateway), IpAddr::V6(m.lease.gateway6.unwrap()));
        let socket = |at: (&str, u16)| {
            let socket = world.ns.run(|| UdpSocket::bind(at)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        let (dns, other) = (socket(("::", 53)), socket(("::", 5000)));
        let host = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
        let host6: IpAddr = "fd00:1::1".parse().unwrap();
        let next = |socket: &UdpSocket| {
            let mut data = [0; 64];
            let (n, from) = socket.recv_from(&mut data).expect("a packet");
            (String::from_utf8_lossy(&data[..n]).into_owned(), from)
        };
        for (gateway, elsewhere, bind) in [(gateway, host, "0.0.0.0:0"), (gateway6, host6, "[::]:0")] {
            let guest = m.ns.run(|| UdpSocket::bind(bind)).unwrap();
            guest.set_read_timeout(Some(PATIENCE)).unwrap();
            // What is dropped is sent first; what is allowed arrives first.
            for closed in [(gateway, 5000), (elsewhere, 5000), (elsewhere, 53)] {
                guest.send_to(b"closed", closed).unwrap();
            }
            guest.send_to(b"question", (gateway, 53)).unwrap();
            let (text, from) = next(&dns);
            assert_eq!(text, "question");
            dns.send_to(b"answer", from).unwrap();
            assert_eq!(next(&guest).0, "answer");
            // The host itself reaches its guests, and gets their answers.
            let me =
                if gateway.is_ipv4() { m.lease.address.into() } else { m.lease.address6.unwrap().into() };
            other.send_to(b"hello", (mapped(me), guest.local_addr().unwrap().port())).unwrap();
            let (text, from) = next(&guest);
            assert_eq!(text, "hello");
            guest.send_to(b"and hello", from).unwrap();
            assert_eq!(next(&other).0, "and hello", "and nothing before it");
        }
    });
}

fn mapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().into(),
        v6 => v6,
    }
}

#[test]
fn guests_do_not_reach_each_other_in_ipv6() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let (_, a) = machine(world, &net, Egress::Open).await;
        let (_, b) = machine(world, &net, Egress::Open).await;
        let (to, bind) = (b.lease.address6.unwrap(), b.lease.address);
        let socket = |m: &Machine| {
            let socket = m.ns.run(|| UdpSocket::bind("[::]:7000")).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        let (from_a, in_b) = (socket(&a), socket(&b));
        let host = world.ns.run(|| UdpSocket::bind("[::]:0")).unwrap();
        // On the link, and by way of the gateway as if it were not on the link.
        let _ = from_a.send_to(b"direct", (to, 7000));
        let _ = from_a.send_to(b"direct", (mapped(bind.into()), 7000));
        a.ns.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(to, 128)
                .gateway(a.lease.gateway6.unwrap())
                .build();
            handle.route().add(route).execute().await.unwrap();
        });
        let _ = from_a.send_to(b"routed", (to, 7000));
        host.send_to(b"from the host", (to, 7000)).unwrap();
        let mut data = [0; 64];
        let (n, _) = in_b.recv_from(&mut data).unwrap();
        assert_eq!(&data[..n], b"from the host");
    });
}

#[test]
fn ipv6_forwarding_is_for_guests_and_put_back() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    world.neighbour6(&outside);
    let read = |path: &str| {
        let path = format!("/proc/sys/net/ipv6/conf/{path}");
        world.ns.run(|| fs_err::read_to_string(path)).ok().map(|text| text.trim().to_owned())
    };
    let settings = ["all/forwarding", "up0/force_forwarding", "up0/accept_ra"];
    let before = settings.map(read);
    world.with_agent(|net| async move {
        assert_eq!(settings.map(read), before, "nobody goes out yet");
        let vm = VmId::new();
        net.acquire(ask(vm, true)).await.unwrap();
        assert_ne!(settings.map(read), before);
        let rules = ruleset();
        assert!(rules.contains("uplinks6"));
        net.release(vm).await.unwrap();
        net.teardown().await.unwrap();
        assert_eq!(settings.map(read), before, "put back");
    });
}

#[test]
fn a_policy_that_is_none_is_refused() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let vm = VmId::new();
        net.acquire(ask(vm, false)).await.unwrap();
        let bad = net.set_egress(vm, allow(&["*"])).await.unwrap_err();
        assert!(bad.code == Code::InvalidArgument && bad.hint.is_some());
        assert_eq!(net.list().leases[0].egress, Egress::None);
        assert_eq!(net.set_egress(VmId::new(), Egress::Open).await.unwrap_err().code, Code::NotFound);
    });
}
