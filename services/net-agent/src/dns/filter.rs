//! Addresses that no answer from upstream may hold: those of the host, of its link, of its cloud and of other guests (DNS
//! rebinding). Private ranges may be answers: a company's own names lead there.

use crate::plan::Plan;
use nix::ifaddrs::getifaddrs;
use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How old the list of the host's addresses may be.
const FRESH: Duration = Duration::from_secs(2);

/// Metadata services outside the link-local ranges.
const METADATA4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(192, 0, 0, 192)];
const METADATA6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// Knows which addresses those are.
#[derive(Debug)]
pub struct Filter {
    plan: Arc<Plan>,
    host: Mutex<(Option<Instant>, Arc<HashSet<IpAddr>>)>,
}

impl Filter {
    /// For the guests of `plan`.
    pub fn new(plan: Arc<Plan>) -> Self {
        Self { plan, host: Mutex::default() }
    }

    /// Whether no answer may hold `address`.
    pub fn forbids(&self, address: IpAddr) -> bool {
        is_special(address) || self.is_guests(address) || self.host().contains(&address)
    }

    fn is_guests(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.plan.overlaps(a, 32),
            IpAddr::V6(a) => self.plan.prefix6.is_some_and(|p| u128::from(p) >> 64 == u128::from(a) >> 64),
        }
    }

    fn host(&self) -> Arc<HashSet<IpAddr>> {
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if host.0.is_none_or(|read| now.saturating_duration_since(read) > FRESH) {
            match own_addresses() {
                Ok(addresses) => *host = (Some(now), Arc::new(addresses)),
                Err(error) => tracing::warn!(%error, "cannot list the host's addresses"),
            }
        }
        Arc::clone(&host.1)
    }
}

fn own_addresses() -> nix::Result<HashSet<IpAddr>> {
    let ip = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    Ok(getifaddrs()?.filter_map(ip).collect())
}

/// Addresses that mean the asking host, its link or its cloud wherever they are used, and IPv4 addresses in the clothes of
/// IPv6, which lead to any of them.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            let [first, ..] = a.octets();
            first == 0 || first >= 224 || a.is_loopback() || a.is_link_local() || METADATA4.contains(&a)
        }
        IpAddr::V6(a) => {
            let [first, second, third, ..] = a.segments();
            // ::/96 has the unspecified address, loopback and IPv4-compatible ones; then IPv4-mapped ones.
            u128::from(a) >> 32 == 0
                || a.to_ipv4_mapped().is_some()
                || a == METADATA6
                || first == 0x64 && second == 0xff9b && third <= 1 // NAT64, RFC 6052 and 8215
                || first == 0x2002 // 6to4
                || first == 0x2001 && second == 0 // Teredo
                || first & 0xff80 == 0xfe80 // link-local and site-local
                || first & 0xff00 == 0xff00 // multicast
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_config::Config;

    #[test]
    fn addresses_of_the_host_and_its_cloud_are_forbidden() {
        let plan =
            Plan::new(&Config::new("/s", "/r")).unwrap().with_prefix6(Some("fd01:2::".parse().unwrap()));
        let filter = Filter::new(Arc::new(plan));
        for bad in [
            "127.0.0.53",
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "10.77.0.1",
            "10.77.0.9",
            "fd01:2::9",
            "::",
            "::1",
            "::10.0.0.1",
            "::ffff:8.8.8.8",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "2002:a9fe:a9fe::1",
            "2001:0:1::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "fd00:ec2::254",
        ] {
            assert!(filter.forbids(bad.parse().unwrap()), "{bad}");
        }
        for good in
            ["1.1.1.1", "10.0.0.1", "192.168.1.1", "100.64.0.1", "2606:4700::1", "fd00::1", "2001:db8::1"]
        {
            assert!(!filter.forbids(good.parse().unwrap()), "{good}");
        }
    }
}
