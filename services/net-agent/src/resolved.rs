//! The host's own names: where systemd-resolved runs, it is told over D-Bus to ask the bridge for `vm` and for the way back
//! from guests' addresses, and for nothing else; at the agent's end it is told to forget that.
//!
//! ```text
//!   system bus? --no--> absent, tried again
//!      | yes
//!   resolved has its name? --no--> absent, until NameOwnerChanged says otherwise
//!      | yes
//!   tell (told / refused) -- again when it restarts, the bridge is another one, or names are answered at other addresses
//! ```
//! Nothing here is ever the reason that a lease or a name in a guest fails.

use crate::{dns::server::Dns, network::Network, plan::Plan};
use bothy_config::Net;
use bothy_contract::net::Resolved;
use futures::StreamExt;
use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use zbus::{Connection, fdo::DBusProxy, names::BusName};

/// The name that systemd-resolved has on the system bus (org.freedesktop.resolve1(5)), and where its methods are.
const NAME: &str = "org.freedesktop.resolve1";
const PATH: &str = "/org/freedesktop/resolve1";
const MANAGER: &str = "org.freedesktop.resolve1.Manager";

/// What the bridge does not speak, set to `no`.
const LEFT_OUT: [&str; 4] = ["SetLinkLLMNR", "SetLinkMulticastDNS", "SetLinkDNSOverTLS", "SetLinkDNSSEC"];
/// What it is told, in this order: a link that has name servers and no domains is asked for everything.
const TOLD: [&str; 3] = ["SetLinkDefaultRoute", "SetLinkDomains", "SetLinkDNS"];

/// How often the bridge is looked at, and a bus that is not there is tried.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// How often one that refuses is asked again.
const RETRY: Duration = Duration::from_secs(60);
/// How long an answer may take; at the agent's end, all of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// What resolved is told about the bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    link: i32,
    servers: Vec<IpAddr>,
}

/// What has become of it, for those who ask.
#[derive(Debug, Clone)]
pub struct State(Arc<Mutex<Resolved>>);

impl State {
    /// As it is now.
    pub fn get(&self) -> Resolved {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says so in the log, once.
    fn note(&self, now: Resolved) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *state == now {
            return;
        }
        match &now {
            Resolved::Told => tracing::info!("systemd-resolved asks the bridge for the names of VMs"),
            Resolved::Refused(why) => {
                tracing::warn!(%why, "systemd-resolved does not ask the bridge for the names of VMs");
            }
            Resolved::Absent => tracing::info!("systemd-resolved is gone"),
            Resolved::Off => {}
        }
        *state = now;
    }
}

/// Keeps systemd-resolved told.
#[derive(Debug)]
pub struct HostResolver {
    state: State,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl HostResolver {
    /// Tells resolved of the addresses that `dns` answers at, from now to [`HostResolver::stop`]; nothing where the
    /// configuration says so.
    pub fn start(config: &Net, network: Network, dns: Arc<Dns>) -> Self {
        let first = if config.resolved { Resolved::Absent } else { Resolved::Off };
        let state = State(Arc::new(Mutex::new(first)));
        let stop = CancellationToken::new();
        let teller = Teller { network, dns, state: state.clone(), stop: stop.clone() };
        let on = config.resolved;
        let task = tokio::spawn(async move {
            if on {
                teller.run().await;
            }
        });
        Self { state, stop, task }
    }

    /// What has become of it.
    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Has resolved forget what it was told.
    pub async fn stop(self) {
        self.stop.cancel();
        if timeout(PATIENCE, self.task).await.is_err() {
            tracing::warn!("systemd-resolved does not answer; it may go on asking the bridge for `vm`");
        }
    }
}

struct Teller {
    network: Network,
    dns: Arc<Dns>,
    state: State,
    stop: CancellationToken,
}

impl Teller {
    async fn run(self) {
        let mut said = false;
        while !self.stop.is_cancelled() {
            match self.follow(&mut said).await {
                Ok(()) => return,
                Err(error) => {
                    if !said {
                        tracing::info!(%error, "no system bus, so no systemd-resolved is told of the names of VMs");
                        said = true;
                    }
                    self.state.note(Resolved::Absent);
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = sleep(CHECK_EVERY) => {}
            }
        }
    }

    /// Until the agent stops, or the bus is gone.
    async fn follow(&self, said: &mut bool) -> zbus::Result<()> {
        let builder = zbus::connection::Builder::system().method_timeout(PATIENCE);
        let bus = timeout(PATIENCE, builder.build())
            .await
            .map_err(|_| zbus::Error::from(io::Error::from(io::ErrorKind::TimedOut)))??;
        let driver = DBusProxy::new(&bus).await?;
        // Before it is asked who there is, so that nothing is missed between.
        let mut changes = driver.receive_name_owner_changed_with_args(&[(0, NAME)]).await?;
        let mut owner = match driver.get_name_owner(BusName::try_from(NAME)?).await {
            Ok(owner) => Some(owner.to_string()),
            Err(zbus::fdo::Error::NameHasNoOwner(_)) => None,
            Err(e) => return Err(e.into()),
        };
        if owner.is_none() && !*said {
            tracing::info!(
                "systemd-resolved does not run; `bothy doctor` says how this host resolves the names of VMs"
            );
        }
        *said = true;
        let mut told: Option<Wanted> = None;
        let mut again = Instant::now();
        let mut tick = interval(CHECK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => {
                    if let (Some(owner), Some(told)) = (&owner, &told) {
                        call(&bus, owner, "RevertLink", &told.link).await?;
                        tracing::info!("systemd-resolved forgets the bridge");
                    }
                    return Ok(());
                }
                change = changes.next() => {
                    let Some(change) = change else {
                        return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into());
                    };
                    owner = change.args()?.new_owner().as_ref().map(ToString::to_string);
                    (told, again) = (None, Instant::now());
                }
                _ = tick.tick() => {}
            }
            let Some(owner) = &owner else {
                self.state.note(Resolved::Absent);
                continue;
            };
            let wanted = self.wanted().await;
            if wanted == told || Instant::now() < again {
                continue;
            }
            let Some(wanted) = wanted else {
                told = None;
                continue;
            };
            match self.tell(&bus, &driver, owner, &wanted).await {
                Ok(()) => {
                    self.state.note(Resolved::Told);
                    told = Some(wanted);
                }
                Err(why) => {
                    self.state.note(Resolved::Refused(why));
                    (told, again) = (None, Instant::now() + RETRY);
                }
            }
        }
    }

    /// None as long as there is nobody to ask.
    async fn wanted(&self) -> Option<Wanted> {
        let link = i32::try_from(self.network.bridge_index().await?).ok()?;
        let servers = self.dns.status().listens;
        (!servers.is_empty()).then_some(Wanted { link, servers })
    }

    async fn tell(
        &self,
        bus: &Connection,
        driver: &DBusProxy<'_>,
        owner: &str,
        wanted: &Wanted,
    ) -> Result<(), String> {
        let plan = self.network.plan();
        let pid = driver.get_connection_unix_process_id(BusName::try_from(owner).map_err(text)?).await;
        if !shares_network(pid.map_err(text)?) {
            return Err("it is of another network namespace, whose links have other numbers".to_owned());
        }
        let others = servers_of(bus, owner, wanted.link).await?;
        let own = |a: &IpAddr| *a == plan.gateway() || plan.gateway6().is_some_and(|g| *a == g);
        if !others.iter().all(own) {
            let others: Vec<String> = others.iter().map(ToString::to_string).collect();
            let (bridge, others) = (&plan.bridge, others.join(" and "));
            return Err(format!("somebody has set {others} as name servers of {bridge}; they stay"));
        }
        // A resolved that was built without one of these is as good.
        for method in LEFT_OUT {
            if let Err(error) = call(bus, owner, method, &(wanted.link, "no")).await {
                tracing::debug!(%error, method, "systemd-resolved leaves a setting of the bridge");
            }
        }
        let domains: Vec<(String, bool)> = domains(&plan).into_iter().map(|domain| (domain, true)).collect();
        let servers: Vec<(i32, Vec<u8>)> = wanted.servers.iter().map(|a| address(*a)).collect();
        let [route, domain, dns] = TOLD;
        let told = async {
            call(bus, owner, route, &(wanted.link, false)).await?;
            call(bus, owner, domain, &(wanted.link, domains)).await?;
            call(bus, owner, dns, &(wanted.link, servers)).await
        };
        if let Err(error) = told.await {
            if let Err(undo) = call(bus, owner, "RevertLink", &wanted.link).await {
                tracing::debug!(%undo, "systemd-resolved keeps what it took");
            }
            return Err(why(&error));
        }
        Ok(())
    }
}

async fn call<B>(bus: &Connection, owner: &str, method: &str, body: &B) -> zbus::Result<()>
where
    B: serde::Serialize + zbus::Type,
{
    bus.call_method(Some(owner), PATH, Some(MANAGER), method, body).await.map(drop)
}

/// The name servers that a link has been given.
async fn servers_of(bus: &Connection, owner: &str, link: i32) -> Result<Vec<IpAddr>, String> {
    let reply = bus.call_method(Some(owner), PATH, Some(MANAGER), "GetLink", &link).await;
    let reply = reply.map_err(|e| why(&e))?;
    let path: zbus::OwnedObjectPath = reply.body().deserialize().map_err(text)?;
    let asked = ("org.freedesktop.resolve1.Link", "DNS");
    let properties = Some("org.freedesktop.DBus.Properties");
    let reply = bus.call_method(Some(owner), path.as_ref(), properties, "Get", &asked).await;
    let reply = reply.map_err(|e| why(&e))?;
    let body = reply.body();
    let value: zbus::Variant<'_> = body.deserialize().map_err(text)?;
    let servers: Vec<(i32, Vec<u8>)> = value.try_into().map_err(text)?;
    Ok(servers.iter().filter_map(|(_, bytes)| bytes_of(bytes)).collect())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The reason, and what to do about one that has to do with permissions.
fn why(error: &zbus::Error) -> String {
    let said = match error {
        zbus::Error::MethodError(name, text, _) => {
            format!("{}: {}", name.as_str(), text.as_deref().unwrap_or("no reason given"))
        }
        other => other.to_string(),
    };
    let denied = ["AccessDenied", "InteractiveAuthorizationRequired"].iter().any(|name| said.contains(name));
    if denied {
        format!("{said}; polkit has to let the net-agent's user: install `50-bothy.rules`")
    } else {
        said
    }
}

/// Whether process `pid` is of our network namespace, or may be, where we are not allowed to know.
fn shares_network(pid: u32) -> bool {
    let of = |process: &str| fs_err::read_link(format!("/proc/{process}/ns/net"));
    match (of("thread-self"), of(&pid.to_string())) {
        (Ok(ours), Ok(theirs)) => ours == theirs,
        (_, Err(e)) => e.kind() == io::ErrorKind::PermissionDenied,
        (Err(_), _) => true,
    }
}

/// An address as resolved has it: AF_INET or AF_INET6 (socket.h), and its bytes.
fn address(address: IpAddr) -> (i32, Vec<u8>) {
    match address {
        IpAddr::V4(a) => (2, a.octets().to_vec()),
        IpAddr::V6(a) => (10, a.octets().to_vec()),
    }
}

fn bytes_of(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// The domains that are the bridge's: `vm`, and the reverse zones that hold the guests' addresses and no others. A zone
/// with others' would bring questions here that go back to where they came from.
fn domains(plan: &Plan) -> Vec<String> {
    let mut domains = vec!["vm".to_owned()];
    let first = u32::from(plan.subnet);
    // Zones end at whole bytes: a subnet between two is as many of the longer ones.
    let bytes = usize::from(plan.prefix.div_ceil(8));
    let step = 1_u32.checked_shl(32 - 8 * bytes as u32).unwrap_or(0).max(1);
    let count = 1_u32 << (8 * bytes as u32 - u32::from(plan.prefix));
    for n in 0..count {
        let address = Ipv4Addr::from(first.wrapping_add(n * step));
        let labels: Vec<String> = address.octets().iter().take(bytes).rev().map(u8::to_string).collect();
        domains.push(format!("{}.in-addr.arpa", labels.join(".")));
    }
    if let Some(prefix) = plan.prefix6 {
        let network = u128::from(prefix) >> 64;
        let nibbles: Vec<String> = (0..16).map(|n| format!("{:x}", network >> (4 * n) & 15)).collect();
        domains.push(format!("{}.ip6.arpa", nibbles.join(".")));
    }
    domains
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_config::Config;

    fn of(subnet: [u8; 4], prefix: u8) -> Vec<String> {
        let mut config = Config::new("/s", "/r");
        (config.net.subnet, config.net.prefix) = (subnet.into(), prefix);
        domains(&Plan::new(&config).unwrap())
    }

    #[test]
    fn the_domains_are_the_guests_and_nobody_else_s() {
        assert_eq!(of([10, 77, 0, 0], 24), ["vm", "0.77.10.in-addr.arpa"]);
        assert_eq!(of([10, 77, 0, 0], 16), ["vm", "77.10.in-addr.arpa"]);
        assert_eq!(of([10, 77, 254, 0], 23), ["vm", "254.77.10.in-addr.arpa", "255.77.10.in-addr.arpa"]);
        let narrow = of([10, 77, 0, 8], 29);
        assert_eq!((narrow.len(), &*narrow[1]), (9, "8.0.77.10.in-addr.arpa"));
        assert_eq!(narrow[8], "15.0.77.10.in-addr.arpa");
        let plan = Plan::new(&Config::new("/s", "/r")).unwrap();
        let plan = plan.with_prefix6(Some("fd01:2::".parse().unwrap()));
        assert_eq!(domains(&plan)[2], "0.0.0.0.0.0.0.0.2.0.0.0.1.0.d.f.ip6.arpa");
    }

    /// Each method is an action of polkit's of almost the same name; the rule names these and no others.
    #[test]
    fn the_polkit_rule_names_what_is_called() {
        let rule = include_str!("../../../deploy/systemd/polkit-1/rules.d/50-bothy.rules");
        let named: Vec<&str> =
            rule.split('"').filter_map(|word| word.strip_prefix("org.freedesktop.resolve1.")).collect();
        let mut called: Vec<String> = LEFT_OUT.iter().chain(&TOLD).map(|method| action(method)).collect();
        called.push("revert".to_owned());
        called.sort();
        let mut sorted = named.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, called);
        assert!(rule.contains("subject.user == \"bothy-net-agent\""), "{rule}");
    }

    fn action(method: &str) -> String {
        let what = match method.strip_prefix("SetLink").unwrap() {
            "DNS" => "dns-servers",
            "Domains" => "domains",
            "DefaultRoute" => "default-route",
            "LLMNR" => "llmnr",
            "MulticastDNS" => "mdns",
            "DNSOverTLS" => "dns-over-tls",
            "DNSSEC" => "dnssec",
            other => panic!("{other}"),
        };
        format!("set-{what}")
    }

    #[test]
    fn addresses_go_and_come_back() {
        for a in ["10.77.0.1", "fd01:2::1"] {
            let a: IpAddr = a.parse().unwrap();
            assert_eq!(bytes_of(&address(a).1), Some(a));
        }
        assert_eq!(bytes_of(&[1, 2]), None);
    }
}
