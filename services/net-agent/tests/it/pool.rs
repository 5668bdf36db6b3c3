//! Bring-up, teardown, restart and repair.

use crate::world::{World, ask, links, ruleset, taps};
use bothy_contract::{Code, VmId, net::Egress};
use bothy_net_agent::{firewall::Firewall, link::Links, network::Network, nft::Nft, plan::Plan, tun};
use bothy_testkit::require_root;
use rtnetlink::LinkBridge;

const FOREIGN: &str = r#"{"nftables":[
    {"add":{"table":{"family":"inet","name":"theirs"}}},
    {"add":{"chain":{"family":"inet","table":"theirs","name":"c"}}},
    {"add":{"rule":{"family":"inet","table":"theirs","chain":"c","expr":[{"drop":null}]}}},
    {"add":{"table":{"family":"bridge","name":"theirs"}}}]}"#;

#[test]
fn it_comes_up_warm_and_goes_without_a_trace() {
    require_root!();
    let world = &World::new();
    let _outside = world.neighbour();
    let before = world.ns.run(|| {
        Nft::open().unwrap().run(FOREIGN).unwrap();
        ruleset()
    });
    let links_before: Vec<String> = world.ns.block_on(async { links().await.into_keys().collect() });
    assert_eq!(world.forwarding("up0"), "0");

    world.with_agent(|net| async move {
        let plan = Plan::new(&world.config).unwrap();
        let host = net.show();
        assert_eq!((host.warm, host.leased, host.capacity), (4, 0, 253));
        assert_eq!((host.bridge.as_str(), host.subnet.as_str()), ("bothy0", "10.77.0.0/24"));
        let taps = taps().await;
        assert_eq!(taps.len(), 4);
        let bridge = links().await["bothy0"].index;
        for (name, tap) in &taps {
            let slot = plan.slot(plan.number_of_tap(name).unwrap()).unwrap();
            assert!(tap.belongs_to(&slot) && tap.is_port_of(bridge), "{tap:?}");
        }
        assert!(ruleset().contains("theirs") && ruleset().contains("masquerade"));

        let vm = VmId::new();
        let lease = net.acquire(ask(vm, true)).await.unwrap();
        assert_eq!(world.forwarding("up0"), "1", "the answers come in there");
        assert_eq!(world.forwarding("bothy0"), "1");

        let user = tun::open(&lease.tap).unwrap();
        let refused = net.teardown().await.unwrap_err();
        assert_eq!(refused.code, Code::FailedPrecondition);
        assert!(
            refused.message.contains(&lease.tap) && refused.message.contains(&vm.to_string()),
            "{refused}"
        );
        assert!(
            links().await.contains_key(&lease.tap) && ruleset().contains("masquerade"),
            "nothing was changed"
        );
        drop(user);

        net.teardown().await.unwrap();
        net.teardown().await.unwrap();
        assert_eq!(world.forwarding("up0"), "0", "put back");
        assert_eq!(ruleset(), before, "no rule of ours, and theirs as they were");
        assert_eq!(links().await.into_keys().collect::<Vec<_>>(), links_before);
        assert_eq!(net.acquire(ask(VmId::new(), false)).await.unwrap_err().code, Code::FailedPrecondition);

        let again = Network::start(&world.config).await.unwrap();
        assert_eq!(again.list().leases[0].lease.tap, lease.tap, "leases outlive the devices");
        assert!(links().await.contains_key(&lease.tap));
        again.teardown().await.unwrap();
    });
}

#[test]
fn a_new_agent_adopts_what_it_finds() {
    require_root!();
    let world = &World::new();
    let (vms, leases, before) = world.with_agent(|net| async move {
        let vms = [VmId::new(), VmId::new(), VmId::new()];
        let mut leases = Vec::new();
        for (n, vm) in vms.iter().enumerate() {
            leases.push(net.acquire(ask(*vm, n == 0)).await.unwrap());
        }
        net.check().await.unwrap();
        (vms, leases, taps().await)
    });
    let (after, host, list) = world.ns.block_on(async {
        // A VMM runs on; one device was lost; two are there that belong to no slot or to somebody else.
        let running = tun::open(&leases[0].tap).unwrap();
        let raw = Links::open().unwrap();
        raw.delete(&taps().await[&leases[1].tap]).await.unwrap();
        tun::create("bothy-tap-200", 1).unwrap();
        tun::create("bothy-tap-999", 1).unwrap();
        let net = Network::start(&world.config).await.unwrap();
        assert!(tun::in_use(&leases[0].tap).unwrap(), "not cut off");
        drop(running);
        for (vm, lease) in vms.iter().zip(&leases) {
            let again = net.acquire(ask(*vm, false)).await.unwrap();
            assert_eq!((again.slot, &again.tap, again.address), (lease.slot, &lease.tap, lease.address));
        }
        (taps().await, net.show(), net.list())
    });
    assert_eq!((host.warm, host.leased), (4, 3));
    assert_eq!(list.leases.len(), 3);
    assert!(!after.contains_key("bothy-tap-200") && !after.contains_key("bothy-tap-999"));
    assert!(after.contains_key(&leases[1].tap), "made again");
    for (name, tap) in before.iter().filter(|(name, _)| **name != leases[1].tap) {
        assert_eq!(after[name].index, tap.index, "{name} is the same device");
    }
    assert_eq!(after.len(), 7);
}

#[test]
fn what_others_break_is_mended() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let lease = net.acquire(ask(VmId::new(), true)).await.unwrap();
        let raw = Links::open().unwrap();
        raw.delete(&links().await["bothy0"]).await.unwrap();
        Nft::open().unwrap().run(r#"{"nftables":[{"flush":{"ruleset":null}}]}"#).unwrap();
        net.check().await.unwrap();
        let bridge = links().await["bothy0"].index;
        let taps = taps().await;
        assert!(taps.len() >= 4 && taps.values().all(|tap| tap.is_port_of(bridge)), "{taps:?}");
        assert!(ruleset().contains(&lease.tap) && ruleset().contains("masquerade"));
        // Without the check, the next change notices, too.
        Nft::open().unwrap().run(r#"{"nftables":[{"flush":{"ruleset":null}}]}"#).unwrap();
        net.set_egress(net.list().leases[0].vm, Egress::None).await.unwrap();
        assert!(ruleset().contains(&lease.tap));
        net.teardown().await.unwrap();
    });
}

#[test]
fn a_network_of_somebody_else_is_refused() {
    require_root!();
    let mut world = World::new();
    let _outside = world.neighbour();
    world.config.net.subnet = [192, 0, 2, 128].into();
    world.config.net.prefix = 25;
    let refused = world.ns.block_on(async { Network::start(&world.config).await.unwrap_err() });
    assert_eq!(refused.code, Code::FailedPrecondition);
    assert!(refused.message.contains("192.0.2.0/24") && refused.message.contains("up0"), "{refused}");
    assert!(refused.hint.is_some());

    world.config.net.subnet = [10, 77, 0, 0].into();
    world.config.net.bridge = "up0".into();
    let refused = world.ns.block_on(async { Network::start(&world.config).await.unwrap_err() });
    assert_eq!(refused.code, Code::AlreadyExists);
    assert_eq!(world.ns.block_on(taps()).len(), 0, "nothing was made");
}

#[test]
fn a_subnet_changed_under_leases_is_refused() {
    require_root!();
    let mut world = World::new();
    world.with_agent(|net| async move {
        net.acquire(ask(VmId::new(), false)).await.unwrap();
        net.teardown().await.unwrap();
    });
    world.config.net.subnet = [10, 78, 0, 0].into();
    let refused = world.ns.block_on(async { Network::start(&world.config).await.unwrap_err() });
    assert_eq!(refused.code, Code::FailedPrecondition);
    assert!(refused.message.contains("10.77.0.2"), "{refused}");
}

#[test]
fn the_default_subnet_makes_way_and_then_stays() {
    require_root!();
    let world = &World::new();
    world.ns.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        handle.link().add(LinkBridge::new("theirs0").up().build()).execute().await.unwrap();
        let index = links().await["theirs0"].index;
        for theirs in [[10, 77, 3, 1], [10, 78, 3, 1]] {
            handle.address().add(index, theirs.into(), 16).execute().await.unwrap();
        }
    });
    let subnet6 = world.with_agent(|net| async move {
        let host = net.show();
        assert_eq!(host.subnet, "10.79.0.0/24");
        let lease = net.acquire(ask(VmId::new(), false)).await.unwrap();
        assert_eq!(lease.address.octets()[..3], [10, 79, 0]);
        net.teardown().await.unwrap();
        let raw = Links::open().unwrap();
        raw.delete(&links().await["theirs0"]).await.unwrap();
        host.subnet6
    });
    assert!(subnet6.as_ref().is_some_and(|s| s.starts_with("fd") && s.ends_with("::/64")), "{subnet6:?}");
    let host = world.with_agent(|net| async move { net.show() });
    assert_eq!((host.subnet.as_str(), host.subnet6), ("10.79.0.0/24", subnet6), "kept");
}

#[test]
fn a_lost_neighbour_entry_is_mended() {
    require_root!();
    let world = &World::new();
    world.with_agent(|net| async move {
        let lease = net.acquire(ask(VmId::new(), false)).await.unwrap();
        let raw = Links::open().unwrap();
        let bridge = links().await["bothy0"].index;
        let plan = Plan::new(&world.config).unwrap();
        let before = raw.fixed_neighbours(bridge).await.unwrap();
        assert_eq!(before.len(), 8, "four slots, two families: {before:?}");
        raw.forget_neighbours(&plan, &plan.slot(lease.slot).unwrap(), bridge).await.unwrap();
        assert_eq!(raw.fixed_neighbours(bridge).await.unwrap().len(), 7);
        net.check().await.unwrap();
        assert_eq!(raw.fixed_neighbours(bridge).await.unwrap(), before);
    });
}

/// Kernels before 6.17 forward IPv6 for the whole host or not at all; this one cannot be made to, so the guard that such
/// a host gets is looked at by itself.
#[test]
fn a_host_that_forwards_ipv6_by_us_forwards_for_guests_only() {
    require_root!();
    let world = &World::new();
    world.ns.block_on(async {
        let plan = Plan::new(&world.config).unwrap().with_prefix6(Some("fd00::".parse().unwrap()));
        let firewall = Firewall::open(std::sync::Arc::new(plan)).unwrap();
        let guard = r#"{"key": "nfproto"}}, "right": "ipv6"}}, {"drop": null}]"#;
        firewall
            .start(&[(1, Egress::Open)].into(), &Default::default(), [].into(), Default::default(), false)
            .await
            .unwrap();
        assert!(!ruleset().contains(guard));
        firewall.set_guard6(true).await.unwrap();
        assert!(ruleset().contains(guard) && ruleset().contains("fd00::2"), "{}", ruleset());
        firewall.set_guard6(false).await.unwrap();
        assert!(!ruleset().contains(guard));
        firewall.remove().await.unwrap();
    });
}
