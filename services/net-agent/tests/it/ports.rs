//! Published ports, from the host's sockets to the guest's.

use crate::{machine::Machine, world::World};
use bothy_contract::{
    Code, VmId,
    net::{AcquireLease, Publish},
};
use bothy_net_agent::network::Network;
use bothy_testkit::require_root;
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

fn publish(listen: &str, guest_port: u16) -> Publish {
    Publish { listen: listen.parse().unwrap(), guest_port }
}

/// What comes back of `data`, the other end having closed.
fn through(world: &World, at: &str, data: &[u8]) -> std::io::Result<Vec<u8>> {
    let at: SocketAddr = at.parse().unwrap();
    world.ns.run(|| {
        let mut stream = TcpStream::connect(at)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut writer = stream.try_clone()?;
        let data = data.to_vec();
        let sender = std::thread::spawn(move || {
            let _ = writer.write_all(&data);
            let _ = writer.shutdown(std::net::Shutdown::Write);
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back)?;
        sender.join().unwrap();
        Ok(back)
    })
}

/// An echo server in the guest that closes when its client has.
fn serve(m: &Machine, port: u16) {
    let listener = m.ns.run(|| TcpListener::bind(("0.0.0.0", port))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut writer = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut stream, &mut writer);
                let _ = writer.shutdown(std::net::Shutdown::Write);
            });
        }
    });
}

#[test]
fn a_published_port_leads_into_the_guest_and_stays_with_the_lease() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    world.ns.block_on(async {
        let net = Network::start(&world.config).await.unwrap();
        let vm = VmId::new();
        let ports = vec![publish("127.0.0.1:8080", 80), publish("192.0.2.1:9090", 80)];
        let request = AcquireLease { publish: Some(ports.clone()), ..AcquireLease::new(vm) };
        let lease = net.acquire(request).await.unwrap();
        let m = Machine::new(&world.ns, &lease);
        serve(&m, 80);
        let data: Vec<u8> = (0..2_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        assert!(through(world, "127.0.0.1:8080", &data).unwrap() == data, "from loopback, whole");
        let stream = outside.run(|| TcpStream::connect("192.0.2.1:9090")).unwrap();
        assert!(outside.run(|| TcpStream::connect("192.0.2.1:8080")).is_err(), "loopback is loopback");
        drop(stream);
        // A VM without egress that is reached so cannot begin anything itself.
        assert_eq!(net.list().leases[0].publish, ports);

        let again = net.acquire(AcquireLease::new(vm)).await.unwrap();
        assert_eq!(again, lease);
        assert_eq!(net.list().leases[0].publish, ports, "a start that says nothing keeps them");
        drop(net);
    });
    world.ns.block_on(async {
        let net = Network::start(&world.config).await.unwrap();
        let row = net.list().leases.remove(0);
        let m = Machine::new(&world.ns, &row.lease);
        serve(&m, 80);
        assert_eq!(through(world, "127.0.0.1:8080", b"again").unwrap(), b"again", "after a restart");
        drop(m);
        assert!(through(world, "127.0.0.1:8080", b"x").map_or(true, |b| b.is_empty()), "nobody is there");
        net.release(row.vm).await.unwrap();
        world.ns.run(|| TcpListener::bind("127.0.0.1:8080")).unwrap();
    });
}

#[test]
fn a_port_that_is_taken_costs_the_lease_and_nothing_else() {
    require_root!();
    let world = &World::new();
    let _theirs = world.ns.run(|| TcpListener::bind("127.0.0.1:8080")).unwrap();
    world.with_agent(|net| async move {
        let (warm, vm) = (net.show().warm, VmId::new());
        let ask = |vm, listen| AcquireLease {
            publish: Some(vec![publish("127.0.0.1:8081", 1), publish(listen, 80)]),
            ..AcquireLease::new(vm)
        };
        let refused = net.acquire(ask(vm, "127.0.0.1:8080")).await.unwrap_err();
        assert_eq!(refused.code, Code::AlreadyExists);
        assert!(refused.message.contains("127.0.0.1:8080") && refused.hint.is_some(), "{refused}");
        assert_eq!((net.show().warm, net.show().leased), (warm, 0));
        net.acquire(ask(vm, "127.0.0.1:8082")).await.unwrap();
        let other = VmId::new();
        net.acquire(AcquireLease::new(other)).await.unwrap();
        let refused = net.publish(other, vec![publish("0.0.0.0:8082", 80)]).await.unwrap_err();
        assert!(refused.code == Code::AlreadyExists && refused.message.contains("slot"), "{refused}");
        net.publish(vm, vec![]).await.unwrap();
        net.publish(other, vec![publish("0.0.0.0:8082", 80)]).await.unwrap();
        assert_eq!(net.publish(VmId::new(), vec![]).await.unwrap_err().code, Code::NotFound);
    });
}
