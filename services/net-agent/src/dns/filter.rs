//! Addresses that no answer from upstream may lead a guest to (DNS rebinding).

use std::net::{IpAddr, Ipv6Addr};

/// The metadata service that one cloud has on IPv6; the others' are link-local.
const METADATA6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// Whether an address means the host itself, its link or its cloud, whoever asks.
pub fn is_forbidden(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(a) => {
            a.octets().starts_with(&[0])
                || a.is_loopback()
                || a.is_link_local()
                || a.is_multicast()
                || a.is_broadcast()
        }
        IpAddr::V6(a) => {
            let [first, ..] = a.segments();
            a.is_unspecified()
                || a.is_loopback()
                || a.is_multicast()
                || first & 0xffc0 == 0xfe80
                || a == METADATA6
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_host_and_its_cloud_are_forbidden() {
        for bad in [
            "127.0.0.53",
            "169.254.169.254",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "fd00:ec2::254",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
        ] {
            assert!(is_forbidden(bad.parse().unwrap()), "{bad}");
        }
        for good in ["1.1.1.1", "10.0.0.1", "192.168.1.1", "2606:4700::1", "fd00::1", "::ffff:8.8.8.8"] {
            assert!(!is_forbidden(good.parse().unwrap()), "{good}");
        }
    }
}
