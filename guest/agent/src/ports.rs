//! Listening sockets, from `/proc/net` (proc_net(5)), and who has them open.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use bothy_guest_proto::v1;
use tokio::net::TcpStream;

/// One listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Socket {
    address: IpAddr,
    port: u16,
    inode: u64,
}

/// The most sockets that are told of.
const MOST: usize = 256;

/// The listening TCP and bound UDP sockets of the guest, by protocol and port; the first [`MOST`].
pub(crate) fn list() -> Vec<v1::Port> {
    let mut found = Vec::new();
    for protocol in ["tcp", "tcp6", "udp", "udp6"] {
        // IPv6 may be absent.
        let text = fs_err::read_to_string(format!("/proc/net/{protocol}")).unwrap_or_default();
        let sockets = parse(&text, protocol.starts_with("tcp"));
        found.extend(sockets.into_iter().map(|socket| (protocol, socket)));
    }
    found.sort_by_key(|(protocol, socket)| (*protocol, socket.port, socket.address));
    found.truncate(MOST);
    let owners = owners(found.iter().map(|(_, socket)| socket.inode).collect());
    let mut names = HashMap::new();
    found
        .into_iter()
        .map(|(protocol, socket)| {
            let pid = owners.get(&socket.inode).copied().unwrap_or(0);
            let name = names.entry(pid).or_insert_with(|| {
                let name = fs_err::read(format!("/proc/{pid}/comm")).unwrap_or_default();
                String::from_utf8_lossy(&name).trim_end().to_owned()
            });
            v1::Port {
                protocol: protocol.to_owned(),
                address: socket.address.to_string(),
                port: u32::from(socket.port),
                pid,
                process: name.clone(),
            }
        })
        .collect()
}

/// Sockets in state LISTEN (0A), or for UDP, bound and unconnected (07).
fn parse(table: &str, tcp: bool) -> Vec<Socket> {
    let wanted = if tcp { "0A" } else { "07" };
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            if *words.get(3)? != wanted {
                return None;
            }
            let (address, port) = words.get(1)?.split_once(':')?;
            Some(Socket {
                address: parse_address(address)?,
                port: u16::from_str_radix(port, 16).ok()?,
                inode: words.get(9)?.parse().ok()?,
            })
        })
        .collect()
}

/// Addresses are printed as 32-bit words in the machine's byte order.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let word = |index: usize| -> Option<[u8; 4]> {
        let text = hex.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(text, 16).ok()?.to_ne_bytes())
    };
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let bytes: Vec<u8> = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into())
        }
        _ => None,
    }
}

/// Which process has which socket: the links in `/proc/<pid>/fd`, until every socket's is found. Processes that end
/// meanwhile are passed over.
fn owners(mut wanted: HashSet<u64>) -> HashMap<u64, u32> {
    let mut owners = HashMap::new();
    let Ok(processes) = fs_err::read_dir("/proc") else { return owners };
    for pid in processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if wanted.is_empty() {
            break;
        }
        let Ok(files) = fs_err::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for file in files.flatten() {
            if let Some(inode) = fs_err::read_link(file.path()).ok().and_then(|link| socket_inode(&link))
                && wanted.remove(&inode)
            {
                owners.insert(inode, pid);
            }
        }
    }
    owners
}

fn socket_inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Waits until something accepts connections on `port` of loopback or of `nic`. Returns whether it did in time.
pub(crate) async fn wait(port: u16, nic: Option<Ipv4Addr>, timeout: Duration) -> bool {
    let until = Instant::now() + timeout;
    loop {
        for address in [Some(Ipv4Addr::LOCALHOST), nic].into_iter().flatten() {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(20));
            // A socket whose queue is full drops the attempt: the limit must hold for that too.
            if matches!(tokio::time::timeout(left, TcpStream::connect((address, port))).await, Ok(Ok(_))) {
                return true;
            }
        }
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    #[test]
    fn listening_sockets_are_told_from_others() {
        let table = format!(
            "{HEAD}   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0\n   \
             1: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0 0 10 0\n   junk\n"
        );
        let socket = Socket { address: Ipv4Addr::LOCALHOST.into(), port: 8080, inode: 4711 };
        assert_eq!(parse(&table, true), [socket]);
        assert_eq!(parse(&table, false), []);
        assert_eq!(parse_address("00000000000000000000000001000000"), Some(Ipv6Addr::LOCALHOST.into()));
        assert_eq!(parse_address("0100"), None);
    }

    #[tokio::test]
    async fn this_process_is_found_by_its_socket() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = list();
        let ours =
            found.iter().find(|found| found.port == u32::from(port) && found.protocol == "tcp").unwrap();
        assert_eq!((ours.address.as_str(), ours.pid), ("127.0.0.1", std::process::id()));
        assert!(!ours.process.is_empty());
        assert!(wait(port, None, Duration::from_secs(5)).await);
        drop(listener);
        assert!(!wait(port, None, Duration::ZERO).await);
    }
}
