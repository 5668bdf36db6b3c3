//! Whether guests can resolve names, and this host the names of its machines.

use super::{Check, Verdict, check};
use bothy_contract::net::{NAME_SERVER, NameServer, NetHost, Resolved};
use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    time::Duration,
};

/// How long the host's resolver may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Nothing where the net-agent is one that has no name server.
pub(super) async fn checks(net: &NetHost) -> Vec<Check> {
    let Some(server) = &net.dns else { return Vec::new() };
    let mut checks = vec![guests(server)];
    if let Some(at) = server.listens.first() {
        let seen = Seen {
            found: resolve().await,
            resolv_conf: fs_err::read_to_string("/etc/resolv.conf").unwrap_or_default(),
            // Without a port that has one, the kernel says that the bridge has no carrier.
            carrier: fs_err::read_to_string(format!("/sys/class/net/{}/carrier", net.bridge))
                .is_ok_and(|text| text.trim() == "1"),
        };
        checks.push(host(&net.bridge, *at, server.resolved.as_ref(), &seen));
    }
    checks
}

fn guests(server: &NameServer) -> Check {
    let todo = "stop what listens there, or have it leave the bridge alone (dnsmasq: `bind-interfaces`); it is tried again by itself";
    if !server.failures.is_empty() {
        return check("guests' names", Verdict::Fail, server.failures.join("; "), Some(todo));
    }
    let at: Vec<_> = server.listens.iter().map(IpAddr::to_string).collect();
    if server.resolvers.is_empty() {
        let found = format!("answered at {}, but for none outside: no resolver is named", at.join(" and "));
        return check("guests' names", Verdict::Warn, found, Some("name one in /etc/resolv.conf"));
    }
    let by: Vec<_> = server.resolvers.iter().map(SocketAddr::to_string).collect();
    let found = format!("answered at {}, others by {}", at.join(" and "), by.join(" and "));
    check("guests' names", Verdict::Ok, found, None)
}

/// What this host's own resolver, asked as every program asks it, has for a name that is always there.
async fn resolve() -> Result<Vec<IpAddr>, String> {
    let found = tokio::task::spawn_blocking(|| (NAME_SERVER, 53).to_socket_addrs());
    match tokio::time::timeout(PATIENCE, found).await {
        Ok(Ok(Ok(found))) => Ok(found.map(|address| address.ip()).collect()),
        Ok(Ok(Err(e))) => Err(e.to_string()),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

/// What this host shows of itself.
struct Seen {
    found: Result<Vec<IpAddr>, String>,
    resolv_conf: String,
    /// Whether the bridge has a machine that runs.
    carrier: bool,
}

fn host(bridge: &str, server: IpAddr, resolved: Option<&Resolved>, seen: &Seen) -> Check {
    let name = "names here";
    let told = resolved == Some(&Resolved::Told);
    let why = match &seen.found {
        Ok(found) if found.contains(&server) => {
            let by = if told { ", by systemd-resolved" } else { "" };
            return check(name, Verdict::Ok, format!("this host resolves `<machine>.vm`{by}"), None);
        }
        // Resolved leaves out links without a carrier.
        Err(_) if told && !seen.carrier => {
            let found =
                "systemd-resolved asks the bridge for `<machine>.vm` as long as a machine runs; none does";
            return check(name, Verdict::Ok, found.to_owned(), None);
        }
        Ok(found) => {
            let found: Vec<_> = found.iter().map(IpAddr::to_string).collect();
            format!("{NAME_SERVER} is {}, not {server}", found.join(" and "))
        }
        Err(why) => why.trim().to_owned(),
    };
    let mut todo = todo(&seen.resolv_conf, bridge, server);
    let why = match resolved {
        Some(Resolved::Told) => {
            todo = if names(&seen.resolv_conf, "127.0.0.53") {
                format!("see what it says: `resolvectl query {}`", NAME_SERVER.trim_end_matches('.'))
            } else {
                "have programs ask it: `ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf`"
                    .to_owned()
            };
            format!("systemd-resolved is told, and yet: {why}")
        }
        Some(Resolved::Refused(reason)) => format!("systemd-resolved does not take it: {reason}"),
        Some(Resolved::Off) => {
            todo = format!(
                "`resolved = true` in the configuration's [net], where systemd-resolved runs; else {todo}"
            );
            why
        }
        Some(Resolved::Absent) => format!("{why} (systemd-resolved is not on the system bus)"),
        None => why,
    };
    check(name, Verdict::Warn, format!("this host does not resolve `<machine>.vm`: {why}"), Some(&todo))
}

fn names(resolv_conf: &str, address: &str) -> bool {
    resolv_conf.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver") && words.next() == Some(address)
    })
}

/// What to add where, by the host's resolv.conf.
fn todo(resolv_conf: &str, bridge: &str, server: IpAddr) -> String {
    if names(resolv_conf, "127.0.0.53") {
        return format!(
            "as root, `resolvectl dns {bridge} {server}; resolvectl domain {bridge} '~vm'`; it lasts until the bridge goes"
        );
    }
    format!(
        "`nameserver {server}` as the first such line of /etc/resolv.conf, which leaves all other names to the next; or have \
         your resolver ask it for `vm` (dnsmasq: `server=/vm/{server}`)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::line;

    fn seen(found: Result<Vec<IpAddr>, String>, resolv_conf: &str, carrier: bool) -> Seen {
        Seen { found, resolv_conf: resolv_conf.to_owned(), carrier }
    }

    #[test]
    fn each_state_says_what_to_do() {
        let server: IpAddr = "10.77.0.1".parse().unwrap();
        let stub = "nameserver 127.0.0.53\n";
        let gone = || Err("Name or service not known".to_owned());
        let state = |failures: &[&str], resolvers: &[&str]| NameServer {
            listens: vec![server],
            failures: failures.iter().map(|&f| f.to_owned()).collect(),
            resolvers: resolvers.iter().map(|r| r.parse().unwrap()).collect(),
            resolved: None,
        };
        let lines = [
            line(&guests(&state(&[], &["127.0.0.53:53"]))),
            line(&guests(&state(&[], &[]))),
            line(&guests(&state(&["cannot listen at 10.77.0.1:53: Address already in use"], &[]))),
            line(&host("bothy0", server, None, &seen(Ok(vec![server]), "", true))),
            line(&host("bothy0", server, Some(&Resolved::Told), &seen(Ok(vec![server]), "", true))),
            line(&host("bothy0", server, Some(&Resolved::Told), &seen(gone(), stub, false))),
            line(&host("bothy0", server, Some(&Resolved::Told), &seen(gone(), stub, true))),
            line(&host("bothy0", server, Some(&Resolved::Told), &seen(gone(), "", true))),
            line(&host(
                "bothy0",
                server,
                Some(&Resolved::Refused("access denied".into())),
                &seen(gone(), stub, true),
            )),
            line(&host("bothy0", server, Some(&Resolved::Off), &seen(gone(), stub, true))),
            line(&host("bothy0", server, Some(&Resolved::Absent), &seen(gone(), "", true))),
            todo("search x\nnameserver 127.0.0.53\n", "bothy0", server),
            todo("# nameserver 127.0.0.53\nnameserver 192.0.2.1\n", "bothy0", server),
        ];
        insta::assert_snapshot!(lines.join("\n"), @r"
        ok    guests' names    answered at 10.77.0.1, others by 127.0.0.53:53
        warn  guests' names    answered at 10.77.0.1, but for none outside: no resolver is named
                               -> name one in /etc/resolv.conf
        fail  guests' names    cannot listen at 10.77.0.1:53: Address already in use
                               -> stop what listens there, or have it leave the bridge alone (dnsmasq: `bind-interfaces`); it is tried again by itself
        ok    names here       this host resolves `<machine>.vm`
        ok    names here       this host resolves `<machine>.vm`, by systemd-resolved
        ok    names here       systemd-resolved asks the bridge for `<machine>.vm` as long as a machine runs; none does
        warn  names here       this host does not resolve `<machine>.vm`: systemd-resolved is told, and yet: Name or service not known
                               -> see what it says: `resolvectl query ns._bothy.vm`
        warn  names here       this host does not resolve `<machine>.vm`: systemd-resolved is told, and yet: Name or service not known
                               -> have programs ask it: `ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf`
        warn  names here       this host does not resolve `<machine>.vm`: systemd-resolved does not take it: access denied
                               -> as root, `resolvectl dns bothy0 10.77.0.1; resolvectl domain bothy0 '~vm'`; it lasts until the bridge goes
        warn  names here       this host does not resolve `<machine>.vm`: Name or service not known
                               -> `resolved = true` in the configuration's [net], where systemd-resolved runs; else as root, `resolvectl dns bothy0 10.77.0.1; resolvectl domain bothy0 '~vm'`; it lasts until the bridge goes
        warn  names here       this host does not resolve `<machine>.vm`: Name or service not known (systemd-resolved is not on the system bus)
                               -> `nameserver 10.77.0.1` as the first such line of /etc/resolv.conf, which leaves all other names to the next; or have your resolver ask it for `vm` (dnsmasq: `server=/vm/10.77.0.1`)
        as root, `resolvectl dns bothy0 10.77.0.1; resolvectl domain bothy0 '~vm'`; it lasts until the bridge goes
        `nameserver 10.77.0.1` as the first such line of /etc/resolv.conf, which leaves all other names to the next; or have your resolver ask it for `vm` (dnsmasq: `server=/vm/10.77.0.1`)
        ");
    }

    #[test]
    fn another_answer_is_no_answer() {
        let server = "10.77.0.1".parse().unwrap();
        for found in [Err("Name or service not known".to_owned()), Ok(vec!["192.0.2.1".parse().unwrap()])] {
            let check = host("bothy0", server, None, &seen(found, "", true));
            assert!(check.verdict == Verdict::Warn && check.todo.is_some(), "{}", check.found);
        }
    }
}
