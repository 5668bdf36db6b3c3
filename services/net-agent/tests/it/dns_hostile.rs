//! Guests that do the name server ill: what is no question, too many of them, and connections that say nothing.

use crate::{
    egress::machine,
    machine::Machine,
    resolver::{Resolver, ask, ask_tcp, data, question, read, write},
    world::World,
};
use bothy_contract::net::Egress;
use bothy_testkit::{Netns, require_root};
use hickory_proto::{
    op::{Message, OpCode, ResponseCode},
    rr::RecordType,
};
use std::{
    io::Write,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(10);

fn socket(ns: &Netns, to: SocketAddr) -> UdpSocket {
    let socket = ns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn dns(m: &Machine) -> SocketAddr {
    (IpAddr::from(m.lease.gateway), 53).into()
}

#[test]
fn what_is_no_question_does_no_harm() {
    require_root!();
    let world = &World::new();
    world.with_dns(|net| async move {
        let (vm, m) = machine(world, &net, Egress::Open).await;
        net.set_name(vm, Some("web".parse().unwrap())).await.unwrap();
        let good = question("web.vm.", RecordType::A).to_vec().unwrap();
        let bent = |at: usize, to: u8| {
            let mut bytes = good.clone();
            bytes[at] = to;
            bytes
        };
        // A name that leads to itself; numbers of records that are not there; too long; from nowhere to the end.
        let looped = [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
        let long = [&good[..], &[0; 4096]].concat();
        let unanswered: [&[u8]; 6] = [b"", b"x", &good[..11], &bent(2, 0x81), &long, &[0xff; 512]];
        let s = socket(&m.ns, dns(&m));
        for bytes in unanswered {
            s.send(bytes).unwrap();
        }
        for (bytes, code) in [
            (looped, ResponseCode::FormErr),
            (bent(5, 2), ResponseCode::FormErr),
            (bent(7, 0xff), ResponseCode::FormErr),
            (good[..20].to_vec(), ResponseCode::FormErr),
            (bent(2, (u8::from(OpCode::Update)) << 3), ResponseCode::NotImp),
            (question("web.vm.", RecordType::AXFR).to_vec().unwrap(), ResponseCode::NotImp),
            // The class of "version.bind".
            (bent(good.len() - 1, 3), ResponseCode::Refused),
        ] {
            s.send(&bytes).unwrap();
            let mut answer = [0; 512];
            // The first answer there is: what went before got none.
            let n = s.recv(&mut answer).unwrap();
            let answer = Message::from_vec(&answer[..n]).unwrap();
            assert_eq!(
                (answer.metadata.response_code, &bytes[..2]),
                (code, &answer.metadata.id.to_be_bytes()[..])
            );
        }
        // Noise: headers that promise much, always the same.
        let mut seed = 1_u32;
        for _ in 0..500 {
            let mut noise = good[..12].to_vec();
            for _ in 0..(seed >> 8) % 200 {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                noise.push(seed.to_be_bytes()[0]);
            }
            let at = 4 + (seed >> 16) as usize % 8;
            noise[at] = seed.to_be_bytes()[1];
            seed = seed.wrapping_add(1);
            s.send(&noise).unwrap();
        }
        assert_eq!(data(&ask(&m.ns, dns(&m).ip(), "web.vm.", RecordType::A)), [m.lease.address.to_string()]);

        // The same over TCP, where half a question and silence are possible, too.
        let connect = || {
            let stream = m.ns.run(|| TcpStream::connect_timeout(&dns(&m), PATIENCE)).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        };
        for bytes in [&[0, 0][..], &[0, 1, 0], &[0xff, 0xff], &[&[0, 12], &[0xff; 12][..]].concat()] {
            let mut stream = connect();
            stream.write_all(bytes).unwrap();
            assert_eq!(read(&mut stream), None, "the connection ends");
        }
        let mut half = connect();
        half.write_all(&[0, 40, 1, 2]).unwrap();
        assert_eq!(data(&ask_tcp(&m.ns, dns(&m).ip(), "web.vm.", RecordType::A)).len(), 1);
    });
}

#[test]
fn connections_are_bounded_for_each_guest() {
    require_root!();
    let world = &World::new();
    world.with_dns(|net| async move {
        let (vm, a) = machine(world, &net, Egress::None).await;
        let (_, b) = machine(world, &net, Egress::None).await;
        net.set_name(vm, Some("web".parse().unwrap())).await.unwrap();
        let mut open: Vec<TcpStream> =
            (0..20).map(|_| a.ns.run(|| TcpStream::connect_timeout(&dns(&a), PATIENCE)).unwrap()).collect();
        let asked = question("web.vm.", RecordType::A).to_vec().unwrap();
        let answered = open.iter_mut().filter_map(|stream| {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            write(stream, &asked).ok().and_then(|()| read(stream))
        });
        assert_eq!(answered.count(), 8);
        assert_eq!(
            data(&ask_tcp(&b.ns, dns(&b).ip(), "web.vm.", RecordType::A)).len(),
            1,
            "while they are open"
        );
    });
}

/// How long each of some questions took, sorted.
fn times(m: &Machine, name: impl Fn(u32) -> String) -> Vec<Duration> {
    let mut times: Vec<Duration> = (0..100)
        .map(|n| {
            let began = Instant::now();
            assert_eq!(data(&ask(&m.ns, dns(m).ip(), &name(n), RecordType::A)).len(), 1);
            began.elapsed()
        })
        .collect();
    times.sort_unstable();
    times
}

#[test]
fn a_flood_of_one_guest_leaves_the_others_their_answers() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    let resolver = Resolver::default();
    for n in 0..100 {
        for kind in ["calm", "flooded"] {
            resolver.add(&format!("{kind}{n}.test."), 60, "198.51.100.7");
        }
    }
    resolver.start(&outside, "192.0.2.2");
    world.resolvers(&["192.0.2.2"]);
    world.with_dns(|net| async move {
        let (vm, a) = machine(world, &net, Egress::Open).await;
        let (_, b) = machine(world, &net, Egress::Open).await;
        net.set_name(vm, Some("web".parse().unwrap())).await.unwrap();
        let own = |_| "web.vm.".to_owned();
        let calm = (times(&b, own), times(&b, |n| format!("calm{n}.test.")));
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let flooded = std::thread::scope(|s| {
            // Names that no resolver answers for, names that are known, and noise, from two sockets.
            for _ in 0..2 {
                s.spawn(|| {
                    let socket = socket(&a.ns, dns(&a));
                    // Bounded, should nobody say stop.
                    for n in 0..2_000_000_u64 {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let bytes = match n % 3 {
                            0 => question(&format!("slow{n}.test."), RecordType::A).to_vec().unwrap(),
                            1 => question("web.vm.", RecordType::A).to_vec().unwrap(),
                            _ => vec![0xff; 64],
                        };
                        let _ = socket.send(&bytes);
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            while sent.load(Ordering::Relaxed) < 5000 {
                std::thread::sleep(Duration::from_millis(1));
            }
            let flooded = (times(&b, own), times(&b, |n| format!("flooded{n}.test.")));
            stop.store(true, Ordering::Relaxed);
            flooded
        });
        let middle = |times: &[Duration]| (times[50].as_micros(), times[98].as_micros());
        println!(
            "{} packets of a flood; p50 and p98 in us: own names {:?}, flooded {:?}; others {:?}, flooded {:?}",
            sent.load(Ordering::Relaxed),
            middle(&calm.0),
            middle(&flooded.0),
            middle(&calm.1),
            middle(&flooded.1),
        );
    });
}
