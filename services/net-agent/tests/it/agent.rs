//! The real binary on a real bus.

use crate::{
    resolver::{ask, data},
    world::{ruleset, taps},
};
use bothy_bus::{Client, testing::TestBus};
use bothy_contract::{
    Code, Error, Service, VmId,
    methods::{
        NetEgressSet, NetEgressShow, NetGroupsSet, NetHostShow, NetHostTeardown, NetLeaseAcquire,
        NetLeaseList, NetLeaseRelease, NetNameSet, NetNameUnset, NetPortsPublish,
    },
    net::{
        AcquireLease, Egress, GetEgress, GetNetHost, Lease, ListLeases, NameVm, Publish, PublishPorts,
        ReleaseLease, SetEgress, TeardownNet, UnnameVm,
    },
    net_group::{Membership, SetGroups},
};
use bothy_net_agent::tun;
use bothy_testkit::{ChildGuard, Netns, require_root};
use hickory_proto::rr::RecordType;
use nix::sys::signal::Signal;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
    sync::Arc,
    time::Duration,
};

/// The agent with no more than two capabilities. As root, since not every machine's `/dev/net/tun` is open to all.
fn start_with_least(ns: &Netns, config: &Path) -> ChildGuard {
    let mut command = Command::new("setpriv");
    command.arg("--no-new-privs");
    for set in ["--inh-caps", "--bounding-set"] {
        command.args([set, "-all,+net_admin,+net_bind_service"]);
    }
    command.arg(env!("CARGO_BIN_EXE_bothy-net-agent")).arg("--config").arg(config);
    ChildGuard::new(ns.spawn(&mut command).unwrap())
}

fn start(ns: &Netns, config: &Path) -> ChildGuard {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bothy-net-agent"));
    command.arg("--config").arg(config);
    ChildGuard::new(ns.spawn(&mut command).unwrap())
}

/// How many VMs hold a lease, as soon as an agent answers.
async fn leased(gateway: &Client) -> u32 {
    for _ in 0..50 {
        match gateway.call::<NetHostShow>(&GetNetHost {}).await {
            Ok(host) => return host.leased,
            Err(e) if matches!(e.code, Code::Unavailable | Code::DeadlineExceeded) => {
                tokio::time::sleep(Duration::from_millis(100)).await
            }
            Err(e) => panic!("{e}"),
        }
    }
    panic!("the agent does not answer");
}

#[test]
fn agents_come_and_go_under_their_leases() {
    require_root!();
    let ns = &Netns::new();
    let bus = &ns.run(TestBus::start);
    let file = &bus.config.state_dir.join("bothy.toml");
    fs_err::write(file, bus.config.to_toml().unwrap()).unwrap();

    ns.block_on(async {
        let vm_agent = Client::connect(&bus.config, Service::Vm).await.unwrap();
        let gateway = Client::connect(&bus.config, Service::Gateway).await.unwrap();
        let first = start(ns, file);
        assert_eq!(leased(&gateway).await, 0);
        let vm = VmId::new();
        let lease = vm_agent.call::<NetLeaseAcquire>(&AcquireLease::new(vm)).await.unwrap();
        let vmm = tun::open(&lease.tap).unwrap();
        assert!(first.stop(Signal::SIGTERM, Duration::from_secs(30)).success());
        assert!(tun::in_use(&lease.tap).unwrap() && ruleset().contains(&lease.tap), "left as it was");

        let mut second = start(ns, file);
        assert_eq!(leased(&gateway).await, 1);
        vm_agent.call::<NetEgressSet>(&SetEgress { vm, egress: Egress::Open }).await.unwrap();
        second.signal(Signal::SIGKILL);
        drop(second);

        let third = start(ns, file);
        assert_eq!(leased(&gateway).await, 1);
        let rows = gateway.call::<NetLeaseList>(&ListLeases {}).await.unwrap().leases;
        assert_eq!((rows.len(), rows[0].vm, rows[0].nat, &rows[0].lease.tap), (1, vm, true, &lease.tap));
        assert!(tun::in_use(&lease.tap).unwrap(), "never cut off");
        let refused = gateway.call::<NetHostTeardown>(&TeardownNet {}).await.unwrap_err();
        assert_eq!(refused.code, Code::FailedPrecondition);
        drop(vmm);
        vm_agent.call::<NetLeaseRelease>(&ReleaseLease { vm }).await.unwrap();
        vm_agent.call::<NetLeaseRelease>(&ReleaseLease { vm }).await.unwrap();
        gateway.call::<NetHostTeardown>(&TeardownNet {}).await.unwrap();
        assert!(taps().await.is_empty() && !ruleset().contains("bothy0"));
        assert!(third.stop(Signal::SIGTERM, Duration::from_secs(30)).success());
    });
}

#[test]
fn a_wrong_configuration_ends_the_agent() {
    require_root!();
    let ns = Netns::new();
    let dir = bothy_testkit::temp_dir();
    let file = dir.path().join("bothy.toml");
    fs_err::write(&file, "state_dir = '/tmp/x'\nrun_dir = '/tmp/x'\n[net]\nsubnet = '10.77.0.1'\n").unwrap();
    let ended = start(&ns, &file).stop(Signal::SIGCONT, Duration::from_secs(30));
    assert_eq!(ended.code(), Some(1));
    assert!(ns.block_on(taps()).is_empty());
}

/// What the kernel shows and the lease table says are the same thing.
async fn agrees(ns: &Netns, gateway: &Client, held: &BTreeMap<VmId, Lease>) {
    let rows = gateway.call::<NetLeaseList>(&ListLeases {}).await.unwrap().leases;
    for row in &rows {
        let [a, b, c, d] = row.lease.address.octets();
        let pointer =
            ask(ns, row.lease.gateway.into(), &format!("{d}.{c}.{b}.{a}.in-addr.arpa."), RecordType::PTR);
        let expected: Vec<String> = row.name.iter().map(|name| format!("{name}.vm.")).collect();
        assert_eq!(data(&pointer), expected, "what DNS says of {}", row.lease.address);
        for name in expected {
            let found = ask(ns, row.lease.gateway.into(), &name, RecordType::A);
            assert_eq!(data(&found), [row.lease.address.to_string()]);
        }
    }
    // The pool is filled in the background.
    for _ in 0..100 {
        let rows = gateway.call::<NetLeaseList>(&ListLeases {}).await.unwrap().leases;
        let listed: BTreeMap<VmId, Lease> = rows.iter().map(|r| (r.vm, r.lease.clone())).collect();
        assert!(held.iter().all(|(vm, lease)| listed[vm].tap == lease.tap), "{held:?} {listed:?}");
        let addresses = |is: fn(&Egress) -> bool| -> BTreeSet<String> {
            rows.iter().filter(|r| is(&r.egress)).map(|r| r.lease.address.to_string()).collect()
        };
        let wanted = (addresses(|e| *e == Egress::Open), addresses(|e| matches!(e, Egress::Allow { .. })));
        let host = gateway.call::<NetHostShow>(&GetNetHost {}).await.unwrap();
        let taps = taps().await;
        let rules = ruleset();
        let guests: BTreeSet<&str> =
            rules.split('"').filter(|word| word.starts_with("bothy-tap-") && !word.contains('*')).collect();
        let names: BTreeSet<&str> = taps.keys().map(String::as_str).collect();
        let whole = taps.len() == (host.warm + host.leased) as usize
            && guests == names
            && rows.iter().all(|row| names.contains(row.lease.tap.as_str()))
            && out(&rules) == wanted;
        if whole {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("taps {:?}, out {:?}", taps().await.keys(), out(&ruleset()));
}

/// The IPv4 addresses that the rules let out, everywhere and by names.
fn out(rules: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let rules: serde_json::Value = serde_json::from_str(rules).unwrap();
    let mut out = (BTreeSet::new(), BTreeSet::new());
    for object in rules["nftables"].as_array().unwrap() {
        let elements = |kind: &str| object[kind]["elem"].as_array().cloned().unwrap_or_default();
        if object["set"]["name"] == "open4" {
            out.0.extend(elements("set").iter().map(|e| e.as_str().unwrap().to_owned()));
        }
        if object["map"]["name"] == "allow4" {
            out.1.extend(elements("map").iter().map(|e| e[0].as_str().unwrap().to_owned()));
        }
    }
    out
}

/// The answer, unless it is late or an error: nobody answers for one who was killed.
async fn soon<T>(call: impl Future<Output = Result<T, Error>>) -> Option<T> {
    tokio::time::timeout(Duration::from_secs(1), call).await.ok()?.ok()
}

#[test]
fn killed_at_any_moment_it_comes_back_as_it_was() {
    require_root!();
    let ns = &Netns::new();
    let bus = &ns.run(TestBus::start);
    let file = &bus.config.state_dir.join("bothy.toml");
    fs_err::write(file, bus.config.to_toml().unwrap()).unwrap();
    let kills: u64 = std::env::var("BOTHY_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);

    ns.block_on(async {
        let vm_agent = Arc::new(Client::connect(&bus.config, Service::Vm).await.unwrap());
        let gateway = Client::connect(&bus.config, Service::Gateway).await.unwrap();
        // What an answer has confirmed.
        let mut held: BTreeMap<VmId, Lease> = BTreeMap::new();
        for round in 0..kills {
            let mut agent = start(ns, file);
            leased(&gateway).await;
            agrees(ns, &gateway, &held).await;
            let before = held.clone();
            let calls = Arc::clone(&vm_agent);
            let churn = tokio::spawn(async move {
                let mut held = before;
                let mut unsure = BTreeSet::new();
                for n in 0..1000_u32 {
                    let done = if held.len() < 3 || n % 2 == 0 {
                        let vm = VmId::new();
                        unsure.insert(vm);
                        let egress = match n % 3 {
                            0 => Egress::Open,
                            1 => Egress::None,
                            _ => Egress::Allow { names: vec!["a.test".to_owned()] },
                        };
                        let request = AcquireLease { egress: Some(egress), ..AcquireLease::new(vm) };
                        let leased = soon(calls.call::<NetLeaseAcquire>(&request)).await.map(|lease| {
                            held.insert(vm, lease);
                            unsure.remove(&vm);
                        });
                        let name = NameVm { vm, name: format!("v{vm}").parse().unwrap() };
                        match leased {
                            // Whether it has its name or not, the table and DNS say the same.
                            Some(()) => soon(calls.call::<NetNameSet>(&name)).await.map(drop),
                            None => None,
                        }
                    } else {
                        let vm = *held.keys().next().unwrap();
                        held.remove(&vm);
                        unsure.insert(vm);
                        soon(calls.call::<NetLeaseRelease>(&ReleaseLease { vm })).await.map(|_| {
                            unsure.remove(&vm);
                        })
                    };
                    if done.is_none() {
                        break;
                    }
                }
                (held, unsure)
            });
            // At another point of the work each time; what is asserted does not depend on which.
            tokio::time::sleep(Duration::from_millis(3 + round * 37 % 200)).await;
            agent.signal(Signal::SIGKILL);
            drop(agent);
            let (kept, unsure) = tokio::time::timeout(Duration::from_secs(60), churn).await.unwrap().unwrap();
            held = kept;
            // As a vm-agent does after a failure: what is unsure is released.
            let mut next = start(ns, file);
            leased(&gateway).await;
            for vm in unsure {
                vm_agent.call::<NetLeaseRelease>(&ReleaseLease { vm }).await.unwrap();
            }
            agrees(ns, &gateway, &held).await;
            next.signal(Signal::SIGKILL);
        }
    });
}

#[test]
fn two_capabilities_are_enough() {
    require_root!();
    let ns = &Netns::new();
    let bus = &ns.run(TestBus::start);
    let file = &bus.config.state_dir.join("bothy.toml");
    fs_err::write(file, bus.config.to_toml().unwrap()).unwrap();
    ns.block_on(async {
        let vm_agent = Client::connect(&bus.config, Service::Vm).await.unwrap();
        let gateway = Client::connect(&bus.config, Service::Gateway).await.unwrap();
        let agent = start_with_least(ns, file);
        assert_eq!(leased(&gateway).await, 0);
        let status = fs_err::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
        // CAP_NET_BIND_SERVICE is 10, CAP_NET_ADMIN 12 (linux/capability.h).
        let expected = format!("CapEff:\t{:016x}", (1 << 10) | (1 << 12));
        assert!(status.lines().any(|line| line == expected), "{status}");
        let (vm, listen) = (VmId::new(), "127.0.0.1:80".parse().unwrap());
        let request = AcquireLease {
            egress: Some(Egress::Allow { names: vec!["a.test".to_owned()] }),
            publish: Some(vec![Publish { listen, guest_port: 80 }]),
            ..AcquireLease::new(vm)
        };
        let lease = vm_agent.call::<NetLeaseAcquire>(&request).await.unwrap();
        assert!(lease.address6.is_some() && ruleset().contains(&lease.tap));
        assert!(std::net::TcpStream::connect(listen).is_ok(), "a port below 1024");
        vm_agent.call::<NetEgressSet>(&SetEgress { vm, egress: Egress::Open }).await.unwrap();
        let report = gateway.call::<NetEgressShow>(&GetEgress { vm }).await.unwrap();
        assert_eq!(report.policy, Egress::Open);
        vm_agent.call::<NetNameSet>(&NameVm { vm, name: "a".parse().unwrap() }).await.unwrap();
        let found = ask(ns, lease.gateway.into(), "a.vm.", RecordType::A);
        assert_eq!(data(&found), [lease.address.to_string()], "port 53");
        vm_agent.call::<NetNameUnset>(&UnnameVm { vm }).await.unwrap();
        let groups = Membership { owner: 1000, names: ["web".parse().unwrap()].into() };
        vm_agent.call::<NetGroupsSet>(&SetGroups { vm, groups: groups.clone() }).await.unwrap();
        let rows = gateway.call::<NetLeaseList>(&ListLeases {}).await.unwrap().leases;
        assert_eq!(rows.iter().map(|row| &row.groups).collect::<Vec<_>>(), [&groups]);
        vm_agent.call::<NetPortsPublish>(&PublishPorts { vm, ports: vec![] }).await.unwrap();
        vm_agent.call::<NetLeaseRelease>(&ReleaseLease { vm }).await.unwrap();
        gateway.call::<NetHostTeardown>(&TeardownNet {}).await.unwrap();
        assert!(taps().await.is_empty());
        assert!(agent.stop(Signal::SIGTERM, Duration::from_secs(30)).success());
    });
}
