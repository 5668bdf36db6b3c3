//! `bothy vm ports`: on which ports machines listen, and how to get at them.

use super::{
    many::{self, Failures, Targets},
    path,
};
use crate::{Context, Status, printer::table};
use bothy_contract::{
    Error,
    net::Publish,
    usage::{GuestPort, PortList},
    vm::VmRecord,
};
use futures::StreamExt;
use serde::Serialize;
use std::{
    net::{IpAddr, Ipv4Addr, ToSocketAddrs},
    time::Duration,
};

/// How long the host's resolver may think about a name of ours.
const RESOLVE: Duration = Duration::from_secs(1);

/// What is printed of one machine.
#[derive(Serialize)]
struct Ports<'a> {
    vm: &'a bothy_contract::VmId,
    name: &'a str,
    /// The name that it has on the host's network.
    host: String,
    address: Option<Ipv4Addr>,
    /// Whether this host resolves `host` to `address`.
    resolves: bool,
    ports: Vec<GuestPort>,
    /// Those that the host answers for.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    published: &'a [Publish],
}

pub(super) async fn main(context: &Context, refs: &[String]) -> Result<Status, Error> {
    let targets = Targets::named(context, refs).await?;
    let printer = context.printer;
    let mut failures = Failures::of(&targets, |failure| printer.failure(failure));
    let fetch = async |vm: &VmRecord| {
        let list: PortList = context.gateway.get(&path(&vm.id.to_string(), "/ports")).await?;
        Ok(list.ports)
    };
    let mut found = Vec::with_capacity(targets.vms.len());
    let mut answers = std::pin::pin!(many::ask(&targets.vms, &fetch));
    while let Some((vm, ports)) = answers.next().await {
        match ports {
            Ok(ports) => {
                let host = format!("{}.vm", vm.name);
                let address = vm.lease.as_ref().map(|lease| lease.address);
                let resolves = match address {
                    Some(address) => resolves(&host, address).await,
                    None => false,
                };
                let (name, published) = (vm.name.as_str(), vm.publish.as_slice());
                found.push(Ports { vm: &vm.id, name, host, address, resolves, ports, published });
            }
            Err(e) => failures.add(vm.name.as_str(), e, |failure| printer.failure(failure)),
        }
    }
    if !found.is_empty() {
        printer.records(&found, listing)?;
        if found.iter().any(|vm| !vm.resolves && vm.address.is_some() && !vm.ports.is_empty()) {
            printer.note("this host does not resolve names below `.vm`; the addresses work as well");
        }
    }
    failures.end()
}

/// Whether this host takes `host` for `address`.
pub(crate) async fn resolves(host: &str, address: Ipv4Addr) -> bool {
    let host = host.to_owned();
    // The resolver blocks, and may do so for long where no name server answers.
    let lookup = tokio::task::spawn_blocking(move || {
        (host.as_str(), 0)
            .to_socket_addrs()
            .is_ok_and(|mut found| found.any(|a| a.ip() == IpAddr::V4(address)))
    });
    matches!(tokio::time::timeout(RESOLVE, lookup).await, Ok(Ok(true)))
}

fn listing(vms: &[Ports<'_>]) -> String {
    if vms.iter().all(|vm| vm.ports.is_empty()) {
        return "nothing listens".to_owned();
    }
    table(
        &["NAME", "PROTOCOL", "PORT", "LISTENS ON", "PROCESS", "USE"],
        &["PORT"],
        vms.iter().flat_map(|vm| vm.ports.iter().map(move |port| (vm, port))).map(|(vm, port)| {
            vec![
                vm.name.to_owned(),
                port.protocol.clone(),
                port.port.to_string(),
                port.address.clone(),
                port.process.clone().unwrap_or_else(|| "-".to_owned()),
                usable(vm, port),
            ]
        }),
    )
}

/// How a port can be used from this host.
fn usable(vm: &Ports<'_>, port: &GuestPort) -> String {
    let number = port.port;
    let inside = port.address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if inside && port.protocol.starts_with("tcp") {
        // The guest's agent connects, so the guest's own loopback is good.
        return format!("`bothy vm proxy {} {number}`", vm.name);
    }
    let mut uses: Vec<_> = vm
        .published
        .iter()
        .filter(|publish| !inside && publish.guest_port == number && port.protocol.starts_with("tcp"))
        .map(|publish| publish.listen.to_string())
        .collect();
    uses.extend(match vm.address {
        _ if inside => vec!["only in the machine".to_owned()],
        None => vec!["-".to_owned()],
        Some(_) if vm.resolves => vec![format!("{}:{number}", vm.host)],
        Some(address) => vec![format!("{}:{number}", vm.host), format!("{address}:{number}")],
    });
    uses.join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_says_how_to_use_it() {
        let id = bothy_contract::VmId::new();
        let port = |protocol: &str, address: &str, port, process: Option<&str>| GuestPort {
            protocol: protocol.to_owned(),
            address: address.to_owned(),
            port,
            process: process.map(str::to_owned),
        };
        let published = ["8022:22".parse().unwrap(), "631:631".parse().unwrap()];
        let vm = |name: &'static str, resolves| Ports {
            published: if resolves { &published } else { &[] },
            vm: &id,
            name,
            host: format!("{name}.vm"),
            address: Some("10.77.0.2".parse().unwrap()),
            resolves,
            ports: vec![
                port("tcp", "0.0.0.0", 22, Some("sshd")),
                port("tcp6", "::1", 631, Some("cups\x1b[2J")),
                port("udp", "127.0.0.1", 323, None),
            ],
        };
        insta::assert_snapshot!(listing(&[vm("web", true), vm("db", false)]), @r"
        NAME  PROTOCOL  PORT  LISTENS ON  PROCESS        USE
        web   tcp         22  0.0.0.0     sshd           127.0.0.1:8022 or web.vm:22
        web   tcp6       631  ::1         cups\u{1b}[2J  `bothy vm proxy web 631`
        web   udp        323  127.0.0.1   -              only in the machine
        db    tcp         22  0.0.0.0     sshd           db.vm:22 or 10.77.0.2:22
        db    tcp6       631  ::1         cups\u{1b}[2J  `bothy vm proxy db 631`
        db    udp        323  127.0.0.1   -              only in the machine
        ");
        let none = Ports { ports: Vec::new(), ..vm("web", true) };
        assert_eq!(listing(&[none]), "nothing listens");
    }
}
