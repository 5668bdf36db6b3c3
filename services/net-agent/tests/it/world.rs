//! A host of its own: a namespace, a state directory, and what the kernel shows in it.

use bothy_config::Config;
use bothy_contract::{VmId, net::AcquireLease};
use bothy_net_agent::{
    dns::server::Dns,
    link::{Link, Links},
    network::Network,
    nft::Nft,
};
use bothy_testkit::{Netns, TempDir};
use rtnetlink::{LinkUnspec, LinkVeth};
use std::{collections::BTreeMap, net::IpAddr, os::fd::AsRawFd};

pub(crate) struct World {
    pub(crate) ns: Netns,
    pub(crate) config: Config,
    _dir: TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = bothy_testkit::temp_dir();
        let mut config = Config::new(dir.path().join("state"), dir.path().join("run"));
        // The machine's own resolvers are none of this world.
        config.net.resolv_conf = dir.path().join("resolv.conf");
        Self { ns: Netns::new(), config, _dir: dir }
    }

    /// Runs `f` in the namespace, with an agent that has just started.
    pub(crate) fn with_agent<T: Send, F: Future<Output = T> + Send>(
        &self,
        f: impl FnOnce(Network) -> F + Send,
    ) -> T {
        self.ns.block_on(async { f(Network::start(&self.config).await.unwrap()).await })
    }

    /// Runs `f` in the namespace, with an agent and its name server.
    pub(crate) fn with_dns<T: Send, F: Future<Output = T> + Send>(
        &self,
        f: impl FnOnce(Network) -> F + Send,
    ) -> T {
        self.with_agent(|net| async {
            let dns = Dns::start(net.clone(), self.config.net.resolv_conf.clone()).await;
            assert_eq!((dns.status().listens.len(), dns.status().failures), (2, vec![]));
            let done = f(net).await;
            drop(dns);
            done
        })
    }

    /// From now on the host's resolvers are these.
    pub(crate) fn resolvers(&self, servers: &[&str]) {
        let text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        fs_err::write(&self.config.net.resolv_conf, text).unwrap();
    }

    /// A namespace that is this one's neighbour: 192.0.2.1 here on `up0`, 192.0.2.2 there.
    pub(crate) fn neighbour(&self) -> Netns {
        let other = Netns::new();
        self.ns.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            handle.link().add(LinkVeth::new("up0", "out0").build()).execute().await.unwrap();
            let links = Links::open().unwrap();
            let out = links.find("out0").await.unwrap().unwrap();
            let to_other = LinkUnspec::new_with_index(out.index).setns_by_fd(other.fd().as_raw_fd()).build();
            handle.link().set(to_other).execute().await.unwrap();
        });
        configure(&self.ns, "up0", [192, 0, 2, 1].into(), 24);
        configure(&other, "out0", [192, 0, 2, 2].into(), 24);
        other
    }

    /// Gives both IPv6: fd00:1::1 here, fd00:1::2 there.
    pub(crate) fn neighbour6(&self, other: &Netns) {
        configure(&self.ns, "up0", "fd00:1::1".parse().unwrap(), 64);
        configure(other, "out0", "fd00:1::2".parse().unwrap(), 64);
    }

    pub(crate) fn forwarding(&self, link: &str) -> String {
        let path = format!("/proc/sys/net/ipv4/conf/{link}/forwarding");
        self.ns.run(|| fs_err::read_to_string(path)).unwrap().trim().to_owned()
    }
}

fn configure(ns: &Netns, link: &str, address: IpAddr, prefix: u8) {
    // An address that is there at once: nobody else can have it.
    ns.run(|| fs_err::write(format!("/proc/sys/net/ipv6/conf/{link}/accept_dad"), "0")).unwrap();
    ns.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let index = Links::open().unwrap().find(link).await.unwrap().unwrap().index;
        handle.address().add(index, address, prefix).execute().await.unwrap();
        handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.unwrap();
    });
}

/// A request for a lease that says no more than NAT or none.
pub(crate) fn ask(vm: VmId, nat: bool) -> AcquireLease {
    AcquireLease { nat, ..AcquireLease::new(vm) }
}

/// The links of the namespace of the running task.
pub(crate) async fn links() -> BTreeMap<String, Link> {
    Links::open().unwrap().list().await.unwrap()
}

/// The TAPs among them.
pub(crate) async fn taps() -> BTreeMap<String, Link> {
    links().await.into_iter().filter(|(name, _)| name.starts_with("bothy-tap-")).collect()
}

/// The whole nftables ruleset of the namespace of the calling thread, as JSON.
pub(crate) fn ruleset() -> String {
    Nft::open().unwrap().run(r#"{"nftables":[{"list":{"ruleset":null}}]}"#).unwrap()
}
