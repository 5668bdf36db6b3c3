//! The agent's methods on the bus.

use crate::network::Network;
use bothy_bus::{Client, Server};
use bothy_contract::{
    Error,
    methods::{
        NetEgressSet, NetEgressShow, NetGroupsSet, NetHostShow, NetHostTeardown, NetLeaseAcquire,
        NetLeaseList, NetLeaseRelease, NetNameSet, NetNameUnset, NetPortsPublish,
    },
    net::{Done, NameServer, NetHost},
};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Requests that are executed at once; the others wait.
const CONCURRENCY: usize = 64;

/// Answers on the bus until `shutdown`, keeping the pool filled meanwhile. `names` says how guests' questions are answered;
/// `ready` is called once the methods are there.
///
/// The kernel's state is left as it is at the end: VMs run on, and the next agent finds it again.
///
/// # Errors
/// Where the methods cannot be registered on the bus.
pub async fn run(
    client: Client,
    network: Network,
    names: impl Fn() -> NameServer + Send + Sync + 'static,
    shutdown: CancellationToken,
    ready: impl FnOnce() + Send + 'static,
) -> Result<(), Error> {
    let server = Server::new(client, CONCURRENCY).on_ready(ready);
    let net = network.clone();
    let server = server.serve::<NetLeaseAcquire, _, _>(move |_, request| {
        let net = net.clone();
        async move { net.acquire(request).await }
    });
    let net = network.clone();
    let server = server.serve::<NetLeaseRelease, _, _>(move |_, request| {
        let net = net.clone();
        async move { net.release(request.vm).await.map(|()| Done {}) }
    });
    let net = network.clone();
    let server = server.serve::<NetEgressSet, _, _>(move |_, request| {
        let net = net.clone();
        async move { net.set_egress(request.vm, request.egress).await.map(|()| Done {}) }
    });
    let net = network.clone();
    let server = server.serve::<NetEgressShow, _, _>(move |_, request| {
        let net = net.clone();
        async move { net.egress_report(request.vm).await }
    });
    let net = network.clone();
    let server = server.serve::<NetPortsPublish, _, _>(move |_, request| {
        let net = net.clone();
        async move { net.publish(request.vm, request.ports).await.map(|()| Done {}) }
    });
    let net = network.clone();
    let server = server.serve::<NetGroupsSet, _, _>(move |_, request| {
        let net = net.clone();
        async move { net.set_groups(request.vm, request.groups).await.map(|()| Done {}) }
    });
    let net = network.clone();
    let server = server.serve::<NetNameSet, _, _>(move |_, request| {
        let net = net.clone();
        async move { net.set_name(request.vm, Some(request.name)).await.map(|()| Done {}) }
    });
    let net = network.clone();
    let server = server.serve::<NetNameUnset, _, _>(move |_, request| {
        let net = net.clone();
        async move { net.set_name(request.vm, None).await.map(|()| Done {}) }
    });
    let net = network.clone();
    let server = server.serve::<NetLeaseList, _, _>(move |_, _| {
        let net = net.clone();
        async move { Ok(net.list()) }
    });
    let (net, names) = (network.clone(), Arc::new(names));
    let server = server.serve::<NetHostShow, _, _>(move |_, _| {
        let (net, names) = (net.clone(), Arc::clone(&names));
        async move { Ok(NetHost { dns: Some(names()), ..net.show() }) }
    });
    let net = network.clone();
    let server = server.serve::<NetHostTeardown, _, _>(move |_, _| {
        let net = net.clone();
        async move { net.teardown().await.map(|()| Done {}) }
    });
    tokio::select! {
        done = server.run(shutdown) => done,
        () = network.keep() => Ok(()),
    }
}
