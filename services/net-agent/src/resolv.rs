//! The host's name servers, for guests with NAT.

use std::net::Ipv4Addr;

/// Where they are written down, the best first: systemd-resolved's list of upstream servers where `resolv.conf` only
/// points at its stub on loopback, which a guest cannot reach.
const FILES: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The IPv4 name servers of the first file that names one outside loopback; none where no file does.
pub fn name_servers() -> Vec<Ipv4Addr> {
    FILES
        .iter()
        .filter_map(|path| fs_err::read_to_string(path).ok())
        .map(|text| parse(&text))
        .find(|servers| !servers.is_empty())
        .unwrap_or_default()
}

/// The `nameserver` lines of resolv.conf(5) that a guest could use: IPv4, not loopback, not unspecified; three at most,
/// as many as a resolver asks.
fn parse(text: &str) -> Vec<Ipv4Addr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let server = match (words.next(), words.next()) {
            (Some("nameserver"), Some(server)) => server.parse::<Ipv4Addr>(),
            _ => continue,
        };
        match server {
            Ok(ip) if !ip.is_loopback() && !ip.is_unspecified() && !servers.contains(&ip) => servers.push(ip),
            _ => {}
        }
    }
    servers.truncate(3);
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_servers_are_found() {
        let text = "# nameserver 9.9.9.9\nsearch a b\nnameserver 127.0.0.53\n nameserver\t10.0.0.2 # x\n\
                    nameserver 10.0.0.2\nnameserver fe80::1%eth0\nnameserver 0.0.0.0\nnameserver\nnameserver 1.1.1.1\n";
        assert_eq!(parse(text), [Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(1, 1, 1, 1)]);
        assert_eq!(parse("nameserver 127.0.0.1\n"), [] as [Ipv4Addr; 0]);
    }
}
