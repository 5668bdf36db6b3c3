//! The real binary on a real bus.

use crate::world::{ruleset, taps};
use bothy_bus::{Client, testing::TestBus};
use bothy_contract::{
    Code, Service, VmId,
    methods::{NetHostShow, NetHostTeardown, NetLeaseAcquire, NetLeaseList, NetLeaseRelease, NetNatSet},
    net::{AcquireLease, GetNetHost, ListLeases, ReleaseLease, SetNat, TeardownNet},
};
use bothy_net_agent::tun;
use bothy_testkit::{ChildGuard, Netns, require_root};
use nix::sys::signal::Signal;
use std::{path::Path, process::Command, time::Duration};

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
            Err(e) if e.code == Code::Unavailable => tokio::time::sleep(Duration::from_millis(100)).await,
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
        vm_agent.call::<NetNatSet>(&SetNat { vm, enabled: true }).await.unwrap();
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
