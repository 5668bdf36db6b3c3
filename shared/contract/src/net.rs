//! The network as other processes see it: leases, what a VM may reach, its published ports and its name, and how the pool
//! stands.

use crate::{Error, VmId, VmName, net_group::Membership};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// How many ports a VM may publish.
const MAX_PORTS: usize = 256;
/// How many names a policy may have, and how long each may be (RFC 1035).
const MAX_NAMES: usize = 256;
const MAX_NAME: usize = 253;

/// A VM's place on the network. It is the VM's from create to delete, stopped or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The pool slot; TAP, address, MAC and the VMM's user all follow from it.
    pub slot: u32,
    /// The TAP device, made for user `uid` and attached to the bridge.
    pub tap: String,
    /// The user (and group) id that the VMM of this slot runs as.
    pub uid: u32,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The prefix length of the subnet.
    pub prefix: u8,
    /// The bridge's address: the guest's default route.
    pub gateway: Ipv4Addr,
    /// The guest's MAC address, `52:54:00:xx:xx:xx`.
    pub mac: String,
    /// Name servers for the guest.
    pub dns: Vec<Ipv4Addr>,
    /// The guest's IPv6 address, unique-local; none where the host has no IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<Ipv6Addr>,
    /// The prefix length that goes with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix6: Option<u8>,
    /// The bridge's IPv6 address: the guest's default route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway6: Option<Ipv6Addr>,
}

/// What a VM's packets may reach beyond the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "policy", rename_all = "snake_case")]
pub enum Egress {
    /// Nothing.
    #[default]
    None,
    /// Everything that the host reaches, but for link-local and metadata addresses.
    Open,
    /// The addresses that these names have, once the VM has asked for them.
    Allow {
        /// `crates.io` is that name alone; `*.crates.io` is every name below it, and not the name itself.
        names: Vec<String>,
    },
}

impl Egress {
    /// Whether the policy lets a VM reach what `name` stands for.
    pub fn covers(&self, name: &str) -> bool {
        match self {
            Self::None => false,
            Self::Open => true,
            Self::Allow { names } => names.iter().any(|pattern| pattern_covers(pattern, name)),
        }
    }

    /// The policy in one form: names in lower case, without a dot at the end, each once.
    ///
    /// # Errors
    /// [`crate::Code::InvalidArgument`] where there are too many names, none at all, or one that is no name.
    pub fn checked(self) -> Result<Self, Error> {
        let Self::Allow { names } = self else { return Ok(self) };
        let names = names.iter().map(|name| checked_name(name)).collect::<Result<BTreeSet<_>, _>>()?;
        match names.len() {
            0 => Err(Error::invalid("there is no name to allow").hint("the policy `none` allows nothing")),
            1..=MAX_NAMES => Ok(Self::Allow { names: names.into_iter().collect() }),
            many => Err(Error::invalid(format!("{many} names; a policy can have {MAX_NAMES}"))
                .hint("a wildcard such as `*.crates.io` stands for all names below one")),
        }
    }
}

/// As people write and read it: `none`, `open`, `allow a, b`.
impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Open => f.write_str("open"),
            Self::Allow { names } => write!(f, "allow {}", names.join(", ")),
        }
    }
}

/// A name or wildcard of [`Egress::Allow`] in its one form.
///
/// # Errors
/// [`crate::Code::InvalidArgument`] where it is neither.
pub fn checked_name(name: &str) -> Result<String, Error> {
    let lower = name.to_ascii_lowercase();
    let lower = lower.strip_suffix('.').unwrap_or(&lower);
    let rest = lower.strip_prefix("*.").unwrap_or(lower);
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if lower == "*" {
        return Err(Error::invalid("`*` is every name").hint("use the policy `open` for that"));
    }
    if rest.len() > MAX_NAME || !rest.split('.').all(label) || rest.parse::<IpAddr>().is_ok() {
        return Err(Error::invalid(format!("{name:?} is no name to allow"))
            .hint("write `crates.io` for one name, `*.crates.io` for all names below it"));
    }
    Ok(lower.to_owned())
}

/// Whether a pattern of [`Egress::Allow`] covers `name`. Case and a dot at the end do not matter.
pub fn pattern_covers(pattern: &str, name: &str) -> bool {
    let plain = |text: &str| text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let (pattern, name) = (plain(pattern), plain(name));
    match pattern.strip_prefix("*.") {
        Some(parent) => {
            name.strip_suffix(parent).is_some_and(|below| below.len() > 1 && below.ends_with('.'))
        }
        None => pattern == name,
    }
}

/// A port of a VM that the host answers for: TCP connections to `listen` go to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Publish {
    /// Where the host listens.
    pub listen: SocketAddr,
    /// The port in the guest.
    pub guest_port: u16,
}

impl Publish {
    /// Whether a VM can publish all of `ports`: not too many, no port is 0, and no two are at one address.
    ///
    /// # Errors
    /// [`crate::Code::InvalidArgument`] where it cannot.
    pub fn check(ports: &[Self]) -> Result<(), Error> {
        if ports.len() > MAX_PORTS {
            return Err(Error::invalid(format!(
                "{} published ports; a VM can have {MAX_PORTS}",
                ports.len()
            )));
        }
        let mut seen = BTreeSet::new();
        for publish in ports {
            if publish.listen.port() == 0 || publish.guest_port == 0 {
                return Err(Error::invalid(format!("{publish}: 0 is no port")).hint("give 1 to 65535"));
            }
            if !seen.insert(publish.listen) {
                return Err(Error::invalid(format!("{} is published twice", publish.listen)));
            }
        }
        Ok(())
    }

    /// Where the host listens, from `[ADDR:]PORT`: on its loopback where no address is given.
    ///
    /// # Errors
    /// [`crate::Code::InvalidArgument`] for what is neither.
    pub fn parse_listen(text: &str) -> Result<SocketAddr, Error> {
        let port = || text.parse().ok().map(|port: u16| (Ipv4Addr::LOCALHOST, port).into());
        port().or_else(|| text.parse().ok()).ok_or_else(|| {
            Error::invalid(format!("{text:?} is no port of this host"))
                .hint("write `8080`, `192.0.2.1:8080` or `[::1]:8080`")
        })
    }
}

/// From `[ADDR:]HOSTPORT:GUESTPORT`.
impl FromStr for Publish {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::invalid(format!("{text:?} is not of the form [ADDR:]HOSTPORT:GUESTPORT"))
                .hint("write `8080:80`, `192.0.2.1:8080:80` or `[::1]:8080:80`")
        };
        let (listen, guest) = text.rsplit_once(':').ok_or_else(wrong)?;
        let listen = Self::parse_listen(listen).map_err(|_| wrong())?;
        let publish = Self { listen, guest_port: guest.parse().map_err(|_| wrong())? };
        Self::check(&[publish])?;
        Ok(publish)
    }
}

/// In the form that [`Publish::from_str`] reads.
impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.listen, self.guest_port)
    }
}

/// Takes a slot for a VM. A VM that has one gets the same one again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcquireLease {
    /// The VM.
    pub vm: VmId,
    /// Whether its traffic may leave through the host: short for [`Egress::Open`], where `egress` says nothing.
    pub nat: bool,
    /// What it may reach. Without a word, `nat` decides; a VM that has a lease with names keeps them then, unless `nat`
    /// is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// The ports to publish; without a word, those that its lease has, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<Vec<Publish>>,
    /// The groups that it is in; without a word, those that its lease has, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<Membership>,
}

impl AcquireLease {
    /// A lease for `vm` that reaches nothing, without published ports.
    pub fn new(vm: VmId) -> Self {
        Self { vm, nat: false, egress: None, publish: None, groups: None }
    }
}

/// Gives a VM's slot back. A VM that has none is not an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseLease {
    /// The VM.
    pub vm: VmId,
}

/// Changes what a VM may reach, at once. Connections to what it may not reach any more end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetEgress {
    /// The VM.
    pub vm: VmId,
    /// What it may reach from now on.
    pub egress: Egress,
}

/// Asks what a VM may reach, has reached and was denied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetEgress {
    /// The VM.
    pub vm: VmId,
}

/// What a VM may reach, has reached and was denied, since its lease or the net-agent's start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressReport {
    /// Its policy.
    pub policy: Egress,
    /// Under [`Egress::Allow`]: the names that were asked for and let through, in their order.
    pub allowed: Vec<Allowed>,
    /// What was denied, the latest first.
    pub denied: Vec<Denied>,
}

/// A name that was let through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowed {
    /// The name.
    pub name: String,
    /// The addresses that it stood for.
    pub addresses: Vec<IpAddr>,
}

/// Something that was denied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denied {
    /// The name that was asked for, or the address that a packet was for, where it was never resolved.
    pub name: String,
    /// How many questions or packets.
    pub count: u64,
    /// When the last one came.
    pub last: Timestamp,
}

/// Publishes a VM's ports in place of those published before. Refused as a whole, with nothing changed, where the host
/// cannot listen at one of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishPorts {
    /// The VM.
    pub vm: VmId,
    /// All of its published ports.
    pub ports: Vec<Publish>,
}

/// Makes a VM known by a name, `<name>.vm` and `<name>.<host>.vm`, from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameVm {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
}

/// A VM is not known by name any more. One that has no name, or no lease, is not an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnnameVm {
    /// The VM.
    pub vm: VmId,
}

/// Asks for all leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListLeases {}

/// One row of the lease table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRow {
    /// The VM.
    pub vm: VmId,
    /// Its place.
    pub lease: Lease,
    /// Whether NAT is on: whether it may reach everything.
    pub nat: bool,
    /// What it may reach.
    #[serde(default)]
    pub egress: Egress,
    /// Its published ports.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// The groups that it is in.
    #[serde(default)]
    pub groups: Membership,
    /// The name it is known by, while it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VmName>,
}

/// All leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseList {
    /// In the order of their slots.
    pub leases: Vec<LeaseRow>,
}

/// Asks how the network stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetNetHost {}

/// How the network stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetHost {
    /// The bridge device.
    pub bridge: String,
    /// The subnet, `10.77.0.0/24`.
    pub subnet: String,
    /// Slots made and free.
    pub warm: u32,
    /// Slots that VMs hold.
    pub leased: u32,
    /// Slots that the subnet has room for.
    pub capacity: u32,
    /// The IPv6 subnet, `fd12:3456:789a::/64`; none where the host has no IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet6: Option<String>,
    /// The name server for guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<NameServer>,
}

/// A name that the name server for guests always knows: its own. No VM can have one with `_`.
pub const NAME_SERVER: &str = "ns._bothy.vm.";

/// The name server for guests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameServer {
    /// The bridge's addresses at which it answers, on port 53.
    pub listens: Vec<IpAddr>,
    /// Why it does not answer at others.
    #[serde(default)]
    pub failures: Vec<String>,
    /// The host's own resolvers, which it asks for names other than VMs'.
    #[serde(default)]
    pub resolvers: Vec<SocketAddr>,
    /// What has become of telling the host's own resolver; none where the net-agent does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved: Option<Resolved>,
}

/// Whether the host's systemd-resolved asks the name server for guests for the names of VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resolved {
    /// It is not told: `net.resolved` is false.
    Off,
    /// It does not run, as far as the system bus knows.
    Absent,
    /// It has been told: what is below `vm`, and the way back from guests' addresses, goes to the bridge.
    Told,
    /// It runs and does not take it, with the reason.
    Refused(String),
}

/// Removes the bridge, the TAPs and the rules from the kernel, for `host down`. Leases are kept; the next start makes
/// their devices again. Refused while the device of a lease is in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TeardownNet {}

/// The empty reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_policy_is_written_plainly() {
        let text = |egress: &Egress| serde_json::to_string(egress).unwrap();
        assert_eq!(text(&Egress::None), r#"{"policy":"none"}"#);
        assert_eq!(text(&Egress::Open), r#"{"policy":"open"}"#);
        let allow = Egress::Allow { names: vec!["crates.io".to_owned()] };
        assert_eq!(text(&allow), r#"{"policy":"allow","names":["crates.io"]}"#);
        assert_eq!(serde_json::from_str::<Egress>(&text(&allow)).unwrap(), allow);
    }

    #[test]
    fn an_older_caller_is_understood() {
        let vm = VmId::new();
        let request: AcquireLease =
            serde_json::from_value(serde_json::json!({"vm": vm, "nat": false})).unwrap();
        assert_eq!(request, AcquireLease::new(vm));
    }

    #[test]
    fn policies_have_one_form() {
        let allow = |names: &[&str]| {
            let names = names.iter().map(|&n| n.to_owned()).collect();
            Egress::Allow { names }.checked().map(|egress| egress.to_string())
        };
        assert_eq!(allow(&["*.Crates.io", "b.c.", "B.c"]).unwrap(), "allow *.crates.io, b.c");
        let long = ["a"; 200].join(".");
        for bad in
            ["", "*", "a..b", "-a", "a-", "a b", "a*.b", "*.*.b", "10.0.0.1", "a/b", "é", "$(a)", &long]
        {
            assert!(allow(&[bad]).is_err(), "{bad}");
        }
        assert!(allow(&[]).is_err());
        let many: Vec<_> = (0..=MAX_NAMES).map(|n| format!("a{n}")).collect();
        assert!(Egress::Allow { names: many }.checked().is_err());
    }

    #[test]
    fn published_ports_are_read_as_they_are_written() {
        for (text, form) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080:80"),
            ("[::1]:8080:80", "[::1]:8080:80"),
        ] {
            let publish: Publish = text.parse().unwrap();
            assert_eq!(publish.to_string(), form);
            assert_eq!(form.parse::<Publish>().unwrap(), publish);
        }
        for bad in
            ["", "80", ":80", "80:", "0:80", "80:0", "::1:80:80", "a:80:80", "65536:80", "80:65536", "-1:80"]
        {
            assert!(bad.parse::<Publish>().is_err(), "{bad}");
        }
        let one: Publish = "80:80".parse().unwrap();
        assert!(Publish::check(&[one, "81:80".parse().unwrap()]).is_ok());
        assert!(Publish::check(&[one, "80:81".parse().unwrap()]).is_err());
    }

    #[test]
    fn patterns_cover_what_they_say() {
        for (pattern, name, covers) in [
            ("crates.io", "crates.io", true),
            ("crates.io", "Crates.IO.", true),
            ("crates.io", "static.crates.io", false),
            ("crates.io", "evilcrates.io", false),
            ("*.crates.io", "static.crates.io", true),
            ("*.crates.io", "a.b.crates.io", true),
            ("*.crates.io", "crates.io", false),
            ("*.crates.io", ".crates.io", false),
            ("*.crates.io", "evilcrates.io", false),
            ("*.crates.io", "static.crates.io.evil.net", false),
        ] {
            assert_eq!(pattern_covers(pattern, name), covers, "{pattern} {name}");
        }
    }

    proptest! {
        /// By labels from the right, which is what a wildcard means.
        #[test]
        fn matching_is_by_whole_labels(
            pattern in prop::collection::vec("[a-c]{1,2}", 1..4),
            name in prop::collection::vec("[a-c]{1,2}", 1..5),
            wild: bool,
        ) {
            let below = name.len() > pattern.len() && name.ends_with(&pattern);
            let text = format!("{}{}", if wild { "*." } else { "" }, pattern.join("."));
            let expected = if wild { below } else { name == pattern };
            prop_assert_eq!(pattern_covers(&text, &name.join(".")), expected);
        }
    }
}
