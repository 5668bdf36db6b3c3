//! What a lease of a warm slot costs its client: a request over the bus to the real net-agent, and its reply.

use bothy_bus::Client;
use bothy_contract::{
    Service, VmId,
    methods::{NetHostShow, NetLeaseAcquire, NetLeaseRelease},
    net::{AcquireLease, GetNetHost, ReleaseLease},
};
use bothy_e2e::host::Host;
use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

/// Clients at once.
const CLIENTS: usize = 20;

/// Two runs over a pool that is warm for all of them: one client at a time, then twenty at once.
pub(crate) fn run(leases: usize) {
    let host = Host::start_bare(&[], |config| {
        config.net.prefix = 22;
        config.net.tap_pool_size = u32::try_from(leases).expect("a number of leases");
    });
    host.block_on(async {
        let vm_agent = Client::connect(&host.config, Service::Vm).await.expect("the bus");
        let gateway = Client::connect(&host.config, Service::Gateway).await.expect("the bus");
        let vm_agent = Arc::new(vm_agent);
        for (clients, bar) in [(1, 3.0), (CLIENTS, 10.0)] {
            warm(&gateway, leases).await;
            let mut all = tokio::task::JoinSet::new();
            for client in 0..clients {
                let bus = Arc::clone(&vm_agent);
                let share = leases / clients + usize::from(client < leases % clients);
                all.spawn(async move { acquire(&bus, share).await });
            }
            let (mut times, mut vms, mut taps) = (Vec::new(), Vec::new(), BTreeSet::new());
            for (took, vm, tap) in all.join_all().await.into_iter().flatten() {
                times.push(took);
                vms.push(vm);
                assert!(taps.insert(tap), "one slot, one VM");
            }
            times.sort_by(f64::total_cmp);
            let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
            println!(
                "{leases} leases of a warm pool, {clients:>2} client(s) at once: p50 {:.2} ms, p99 {:.2} ms (bar: {bar} ms), slowest {:.2} ms",
                at(0.5),
                at(0.99),
                at(1.0)
            );
            for vm in vms {
                vm_agent.call::<NetLeaseRelease>(&ReleaseLease { vm }).await.expect("a release");
            }
        }
    });
    host.finish();
}

/// Waits until that many slots are free and ready.
async fn warm(gateway: &Client, leases: usize) {
    for _ in 0..1200 {
        let net = gateway.call::<NetHostShow>(&GetNetHost {}).await.expect("the net-agent");
        if net.warm as usize >= leases {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the pool does not fill up");
}

async fn acquire(bus: &Client, leases: usize) -> Vec<(f64, VmId, String)> {
    let mut done = Vec::with_capacity(leases);
    for _ in 0..leases {
        let vm = VmId::new();
        let request = AcquireLease::new(vm);
        let began = Instant::now();
        let lease = bus.call::<NetLeaseAcquire>(&request).await.expect("a lease");
        done.push((began.elapsed().as_secs_f64() * 1e3, vm, lease.tap));
    }
    done
}
