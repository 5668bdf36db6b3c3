//! The host's own resolvers, from its resolv.conf, read again when the file is another.

use nix::net::if_::if_nametoindex;
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// As many as the C library asks (resolv.conf(5)).
const MAX_SERVERS: usize = 3;

/// What a file is known by: one that was replaced or written to has another.
type Stamp = (u64, u64, i64, i64, u64);

/// The resolvers. Whoever has a cache of their answers drops it with each new `generation`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Servers {
    /// Their addresses, in the file's order.
    pub addresses: Arc<[SocketAddr]>,
    /// How many times they were found to be other ones.
    pub generation: u64,
}

/// The file.
#[derive(Debug)]
pub struct Resolv {
    path: PathBuf,
    /// Our own addresses, which would have us ask ourselves.
    own: Vec<IpAddr>,
    known: Mutex<(Option<Stamp>, Servers)>,
}

impl Resolv {
    /// The file at `path`, for a server that listens at `own`.
    pub fn new(path: PathBuf, own: Vec<IpAddr>) -> Self {
        Self { path, own, known: Mutex::default() }
    }

    /// The resolvers as the file has them now. A file that is not there or names nobody stands for the local machine
    /// (resolv.conf(5)); one that names nobody but us is nobody.
    pub fn servers(&self) -> Servers {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = fs_err::metadata(&self.path)
            .map_or((0, 0, 0, 0, 0), |m| (m.dev(), m.ino(), m.mtime(), m.mtime_nsec(), m.size()));
        if known.0 != Some(stamp) {
            let text = fs_err::read_to_string(&self.path).unwrap_or_default();
            let addresses: Arc<[SocketAddr]> = parse(&text, &self.own).into();
            if addresses != known.1.addresses || known.1.generation == 0 {
                tracing::debug!(file = %self.path.display(), servers = ?addresses, "the host's resolvers");
                known.1 = Servers { addresses, generation: known.1.generation + 1 };
            }
            known.0 = Some(stamp);
        }
        known.1.clone()
    }
}

/// The `nameserver` lines of resolv.conf(5), but for `own`.
fn parse(text: &str, own: &[IpAddr]) -> Vec<SocketAddr> {
    let mut named = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let ("nameserver", Some(server)) = (words.next().unwrap_or_default(), words.next()) else { continue };
        if let Some(server) = address(server)
            && !named.contains(&server)
        {
            named.push(server);
        }
    }
    if named.is_empty() {
        named.push((Ipv4Addr::LOCALHOST, 53).into());
    }
    named.retain(|server| !own.contains(&server.ip()));
    named.truncate(MAX_SERVERS);
    named
}

fn address(text: &str) -> Option<SocketAddr> {
    if let Some((address, link)) = text.split_once('%') {
        let index = link.parse().ok().or_else(|| if_nametoindex(link).ok())?;
        return Some(SocketAddrV6::new(address.parse().ok()?, 53, 0, index).into());
    }
    let address: IpAddr = text.parse().ok()?;
    // As a server, the unspecified address is the local machine.
    let address = if address.is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { address };
    Some((address, 53).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_s_resolvers_are_found() {
        let own = ["10.77.0.1".parse().unwrap()];
        let found = |text| parse(text, &own).iter().map(ToString::to_string).collect::<Vec<_>>();
        let text = "# nameserver 9.9.9.9\nsearch a b\nnameserver 127.0.0.53\n nameserver\t10.0.0.2 # x\n\
                    nameserver 10.0.0.2\nnameserver 10.77.0.1\nnameserver ::1\nnameserver\nnameserver 1.1.1.1\n";
        assert_eq!(found(text), ["127.0.0.53:53", "10.0.0.2:53", "[::1]:53"]);
        assert_eq!(found("nameserver fe80::1%7\nnameserver 0.0.0.0"), ["[fe80::1%7]:53", "127.0.0.1:53"]);
        assert_eq!(found("options edns0\nnameserver what\n"), ["127.0.0.1:53"]);
        assert_eq!(found("nameserver 10.77.0.1\n"), [] as [&str; 0]);
    }

    #[test]
    fn a_file_that_changes_is_read_again() {
        let dir = bothy_testkit::temp_dir();
        let path = dir.path().join("resolv.conf");
        let resolv = Resolv::new(path.clone(), Vec::new());
        let local = resolv.servers();
        assert_eq!((local.addresses.len(), local.generation), (1, 1), "no file stands for the local machine");
        fs_err::write(&path, "nameserver 192.0.2.1\n").unwrap();
        let first = resolv.servers();
        assert_eq!((first.addresses[0].to_string().as_str(), first.generation), ("192.0.2.1:53", 2));
        // The same servers in another file are no change.
        fs_err::write(dir.path().join("new"), "search x\nnameserver 192.0.2.1\n").unwrap();
        fs_err::rename(dir.path().join("new"), &path).unwrap();
        assert_eq!(resolv.servers(), first);
        fs_err::write(&path, "nameserver 192.0.2.22\n").unwrap();
        assert_eq!(resolv.servers().generation, 3);
    }
}
