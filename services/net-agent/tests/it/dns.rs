//! The name server, asked by guests and by the host.

use crate::{
    egress::{OUTSIDE, allow, connect, machine, refused, serve},
    resolver::{Resolver, ask, ask_tcp, data},
    world::{World, links},
};
use bothy_contract::net::{Egress, NAME_SERVER};
use bothy_net_agent::link::Links;
use bothy_testkit::require_root;
use hickory_proto::{op::ResponseCode, rr::RecordType};
use std::net::IpAddr;

fn code(answer: &hickory_proto::op::Message) -> ResponseCode {
    answer.metadata.response_code
}

#[test]
fn vms_are_known_by_name_from_the_instant_that_they_have_one() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    let resolver = Resolver::default();
    resolver.start(&outside, "192.0.2.2");
    world.resolvers(&["192.0.2.2"]);
    world.with_dns(|net| async move {
        let (one, m) = machine(world, &net, Egress::Open).await;
        let (two, other) = machine(world, &net, Egress::None).await;
        let (four, six) = (IpAddr::from(m.lease.gateway), IpAddr::from(m.lease.gateway6.unwrap()));
        assert_eq!(m.lease.dns, [m.lease.gateway]);
        let nobody = ask(&m.ns, four, "web.vm.", RecordType::A);
        assert_eq!((code(&nobody), nobody.authorities.len()), (ResponseCode::NXDomain, 1), "with the SOA");
        net.set_name(one, Some("web".parse().unwrap())).await.unwrap();
        net.set_name(two, Some("db".parse().unwrap())).await.unwrap();
        let own = ([m.lease.address.to_string()], [m.lease.address6.unwrap().to_string()]);
        for server in [four, six] {
            for ns in [&m.ns, &world.ns] {
                for name in ["web.vm.", "Web.LOCAL.vm."] {
                    assert_eq!(data(&ask(ns, server, name, RecordType::A)), own.0);
                    assert_eq!(data(&ask_tcp(ns, server, name, RecordType::AAAA)), own.1);
                    let other = ask(ns, server, name, RecordType::TXT);
                    assert_eq!((code(&other), other.answers.len()), (ResponseCode::NoError, 0));
                    assert!(other.metadata.authoritative && !other.authorities.is_empty());
                }
            }
        }
        let [a, b, c, d] = m.lease.address.octets();
        let back = format!("{d}.{c}.{b}.{a}.in-addr.arpa.");
        assert_eq!(data(&ask(&m.ns, four, &back, RecordType::PTR)), ["web.vm."]);
        let nobody = format!("200.{c}.{b}.{a}.in-addr.arpa.");
        assert_eq!(code(&ask(&m.ns, four, &nobody, RecordType::PTR)), ResponseCode::NXDomain);

        // Another name, none, and a VM that is gone.
        net.set_name(one, Some("www".parse().unwrap())).await.unwrap();
        assert_eq!(code(&ask(&m.ns, four, "web.vm.", RecordType::A)), ResponseCode::NXDomain);
        assert_eq!(data(&ask(&m.ns, four, "www.vm.", RecordType::A)), own.0);
        net.set_name(one, None).await.unwrap();
        assert_eq!(code(&ask(&m.ns, four, "www.vm.", RecordType::A)), ResponseCode::NXDomain);
        assert!(!data(&ask(&m.ns, four, "db.vm.", RecordType::A)).is_empty());
        // Whoever has asked is counted, until its address is another's.
        ask(&other.ns, six, "db.vm.", RecordType::A);
        ask(&other.ns, four, "db.vm.", RecordType::A);
        let counted = [other.lease.address.to_string(), other.lease.address6.unwrap().to_string()];
        let of_two = || -> Vec<bool> {
            let nft = |set: &str| {
                let out =
                    std::process::Command::new("nft").args(["list", "set", "inet", "bothy0", set]).output();
                String::from_utf8(out.unwrap().stdout).unwrap()
            };
            ["asked4", "asked6"].iter().zip(&counted).map(|(set, at)| nft(set).contains(at)).collect()
        };
        assert_eq!(of_two(), [true, true]);
        net.release(two).await.unwrap();
        assert_eq!(of_two(), [false, false]);
        assert_eq!(code(&ask(&m.ns, four, "db.vm.", RecordType::A)), ResponseCode::NXDomain);
        assert_eq!(resolver.asked(), [] as [&str; 0], "none of it goes anywhere");

        // Somebody who deletes the bridge is repaired, and the names with it.
        net.set_name(one, Some("web".parse().unwrap())).await.unwrap();
        let bridge = links().await.remove("bothy0").unwrap();
        Links::open().unwrap().delete(&bridge).await.unwrap();
        net.check().await.unwrap();
        for server in [four, six] {
            assert_eq!(data(&ask(&world.ns, server, "web.vm.", RecordType::A)), own.0);
        }
    });
}

#[test]
fn the_host_finds_vms_by_its_own_resolver() {
    require_root!();
    let world = &World::new();
    world.with_dns(|net| async move {
        let (vm, m) = machine(world, &net, Egress::None).await;
        net.set_name(vm, Some("web".parse().unwrap())).await.unwrap();
        world.resolvers(&[&m.lease.gateway.to_string()]);
        let file = world.config.net.resolv_conf.display();
        let getent = |what: &str| {
            let line = format!("mount --bind {file} /etc/resolv.conf && exec getent {what}");
            let mut command = std::process::Command::new("unshare");
            command.args(["--mount", "bash", "-ec", &line]).stdout(std::process::Stdio::piped());
            let out = world.ns.spawn(&mut command).unwrap().wait_with_output().unwrap();
            (out.status.success(), String::from_utf8(out.stdout).unwrap())
        };
        let (found, text) = getent("ahostsv4 web.vm");
        assert!(found && text.starts_with(&m.lease.address.to_string()), "{text}");
        let (found, text) = getent("ahostsv6 web.local.vm");
        assert!(found && text.starts_with(&m.lease.address6.unwrap().to_string()), "{text}");
        let (found, text) = getent(&format!("hosts {}", m.lease.address));
        assert!(found && text.contains("web.vm"), "{text}");
        // What `bothy doctor` asks for.
        let (found, text) = getent(&format!("ahostsv4 {NAME_SERVER}"));
        assert!(found && text.starts_with(&m.lease.gateway.to_string()), "{text}");
        // Its other names are not ours to look up: it would be asked about them in turn.
        assert_eq!(
            code(&ask(&world.ns, m.lease.gateway.into(), "a.test.", RecordType::A)),
            ResponseCode::Refused
        );
        assert!(!getent("ahostsv4 a.test").0);
    });
}

#[test]
fn other_names_are_the_host_s_resolvers() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    let resolver = Resolver::default();
    resolver.add("a.test.", 60, "198.51.100.7");
    resolver.add("a.test.", 60, "127.0.0.1");
    resolver.add("a.test.", 60, "192.0.2.1");
    resolver.add("a.test.", 60, "text hello");
    resolver.add("inside.test.", 60, "10.1.2.3");
    resolver.add("bad.test.", 60, "169.254.169.254");
    resolver.add("alias.test.", 60, "a.test.");
    let failing = Resolver { fails: true, ..Resolver::default() };
    let cutting = Resolver { cuts: true, ..resolver.clone() };
    resolver.start(&outside, "192.0.2.2");
    failing.start(&world.ns, "127.0.0.53");
    cutting.start(&world.ns, "127.0.0.54");
    world.resolvers(&["192.0.2.2"]);
    world.with_dns(|net| async move {
        let (vm, m) = machine(world, &net, Egress::Open).await;
        let gateway = IpAddr::from(m.lease.gateway);
        let found = |name: &str, kind| data(&ask(&m.ns, gateway, name, kind));
        for _ in 0..2 {
            assert_eq!(found("A.test.", RecordType::A), ["198.51.100.7"], "not the host's, nor its loopback");
            assert_eq!(code(&ask(&m.ns, gateway, "none.test.", RecordType::A)), ResponseCode::NXDomain);
        }
        assert_eq!(resolver.asked(), ["a.test.", "none.test."], "and then they are known");
        assert_eq!(found("a.test.", RecordType::TXT), ["hello"]);
        assert_eq!(found("inside.test.", RecordType::A), ["10.1.2.3"], "a company's own");
        assert_eq!(found("alias.test.", RecordType::A), ["a.test.", "198.51.100.7"]);
        let bad = ask(&m.ns, gateway, "bad.test.", RecordType::A);
        assert_eq!((code(&bad), bad.answers.len()), (ResponseCode::NoError, 0));
        assert_eq!(code(&ask(&m.ns, gateway, "a.test.", RecordType::ANY)), ResponseCode::NotImp);
        let asked = resolver.asked().len();
        assert!(found("a.test.", RecordType::HTTPS).is_empty() && resolver.asked().len() == asked);

        // Other resolvers: the first does not answer, the second fails, the third wants TCP. What was known is not any more.
        world.resolvers(&["192.0.2.9", "127.0.0.53", "127.0.0.54"]);
        assert_eq!(found("a.test.", RecordType::A), ["198.51.100.7"]);
        assert_eq!((failing.asked().len(), resolver.asked().len()), (1, asked + 2));
        world.resolvers(&["127.0.0.53"]);
        assert_eq!(code(&ask(&m.ns, gateway, "a.test.", RecordType::A)), ResponseCode::ServFail);

        // Without egress there are no other names, and it is known who asked for which.
        net.set_egress(vm, Egress::None).await.unwrap();
        let denied = ask(&m.ns, gateway, "A.test.", RecordType::A);
        assert_eq!(
            (code(&denied), denied.authorities.len()),
            (ResponseCode::NXDomain, 0),
            "to be kept by nobody"
        );
        assert_eq!(
            code(&ask(&m.ns, gateway, "1.2.0.192.in-addr.arpa.", RecordType::PTR)),
            ResponseCode::NXDomain
        );
        let report = net.egress_report(vm).await.unwrap();
        let names: Vec<_> = report.denied.iter().map(|d| (d.name.as_str(), d.count)).collect();
        assert_eq!(names, [("a.test", 1)]);
    });
}

#[test]
fn a_guest_reaches_what_it_may_name() {
    require_root!();
    let world = &World::new();
    let outside = world.neighbour();
    world.neighbour6(&outside);
    serve(&outside, 80);
    let resolver = Resolver::default();
    resolver.add("a.test.", 1, "192.0.2.2");
    resolver.add("a.test.", 1, "fd00:1::2");
    resolver.add("a.test.", 1, "192.0.2.1");
    resolver.add("x.b.test.", 60, "somewhere.else.");
    resolver.add("somewhere.else.", 60, "192.0.2.2");
    resolver.start(&world.ns, "127.0.0.1");
    world.with_dns(|net| async move {
        let (vm, m) = machine(world, &net, allow(&["a.test", "*.b.test"])).await;
        let (gateway, outside6) = (IpAddr::from(m.lease.gateway), "fd00:1::2".parse().unwrap());
        let (_, other) = machine(world, &net, allow(&["a.test"])).await;
        assert!(refused(&connect(&m.ns, OUTSIDE, 80)), "never resolved");
        // The address is there before the answer is.
        assert_eq!(data(&ask(&m.ns, gateway, "a.test.", RecordType::A)), ["192.0.2.2"]);
        assert!(connect(&m.ns, OUTSIDE, 80).is_ok());
        assert!(refused(&connect(&m.ns, outside6, 80)), "that address was not asked for");
        assert_eq!(data(&ask(&m.ns, gateway, "a.test.", RecordType::AAAA)), ["fd00:1::2"]);
        assert!(connect(&m.ns, outside6, 80).is_ok());
        assert!(refused(&connect(&other.ns, OUTSIDE, 80)), "one guest's question is not another's");

        for denied in ["c.test.", "b.test.", "somewhere.else."] {
            assert_eq!(code(&ask(&m.ns, gateway, denied, RecordType::A)), ResponseCode::NXDomain, "{denied}");
        }
        assert!(!resolver.asked().iter().any(|name| name == "c.test."), "nobody hears of it");
        let report = net.egress_report(vm).await.unwrap();
        let allowed: Vec<_> = report.allowed.iter().map(|a| (a.name.as_str(), a.addresses.len())).collect();
        assert_eq!(allowed, [("a.test", 2)]);
        for denied in ["c.test", "b.test", "somewhere.else"] {
            assert!(report.denied.iter().any(|d| d.name == denied && d.count == 1), "{report:?}");
        }

        // The asked name decides, wherever its aliases lead.
        net.set_egress(vm, allow(&["*.b.test"])).await.unwrap();
        assert!(refused(&connect(&m.ns, OUTSIDE, 80)));
        assert_eq!(
            data(&ask_tcp(&m.ns, gateway, "x.b.test.", RecordType::A)),
            ["somewhere.else.", "192.0.2.2"]
        );
        assert!(connect(&m.ns, OUTSIDE, 80).is_ok());
    });
}
