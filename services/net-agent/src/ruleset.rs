//! The firewall as a pure function: state in, one nftables transaction out, in the language of nft(8). `firewall` applies
//! it.
//!
//! Two tables, both named after the bridge, and nothing outside them:
//!
//! - `bridge`: what a TAP may *send*. Only ARP, IPv4 and IPv6, only with the slot's own MAC and one of its own addresses.
//!   Anything else is dropped before the bridge learns from it, and so are router advertisements, redirects and neighbour
//!   advertisements: the host never asks who a guest is, since it has a fixed neighbour entry for each. Frames from TAP to
//!   TAP are dropped, too, should the isolation of the ports ever be off. TAPs are matched by prefix, so one whose slot is
//!   in no set sends nothing at all.
//! - `inet`: where a guest's packets may *go*. Not to the host (only answers to what the host began, questions to the DNS
//!   server, as many as one may ask, and neighbour discovery), to other guests only by consent (`peers`), not to link-local,
//!   metadata and other addresses that no guest needs (`never`), not to networks inside the host (`inside`), and out only
//!   as its policy says. What leaves is masqueraded. From outside, only answers reach a guest, and only while its policy holds.
//!
//! A slot under `allow` has a chain of its own and four sets: `a` the addresses that the DNS server handed out, for as long
//! as it said, and `f` those with which it has talked, for [`FLOW_TIMEOUT_S`] after the last packet, for 4 and 6. A new
//! connection needs `a`; one that is open needs `f`, so that it outlives the name's TTL, and none outlives the policy.
//!
//! Guests that share a group reach each other by way of the host: their pairs of addresses are in `peers4` and `peers6`, both
//! ways. What goes between guests is decided there alone, by no state of a connection: a pair that goes ends what is open.
//! The host tells no guest of a shorter way (redirects), for there is none, and says nothing of the multicast that it wants.
//!
//! Slots and policies are set elements: taking a warm slot changes nothing here.

use crate::plan::{Plan, Slot};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::IpAddr,
};

/// How long an open connection may say nothing before it counts as new again, under `allow`.
pub const FLOW_TIMEOUT_S: u64 = 3600;

/// How many addresses a slot under `allow` may have at once, per set.
pub const MAX_ADDRESSES: usize = 4096;

/// How long a denied destination is remembered after its last packet.
pub const DENIED_TIMEOUT_S: u64 = 3600;

/// How many packets with questions one address may send per second: more than the name server answers, and few enough that
/// a flood does not fill its socket, which it shares with the other guests.
pub const QUESTIONS: u64 = 1000;

/// Destinations that are refused whatever the policy: "this network", loopback, link-local and with it the metadata
/// services (AWS, GCP, Azure at 169.254.169.254, Alibaba, Oracle), multicast, and what is reserved (RFC 6890).
const NEVER4: &str = "0.0.0.0/8, 100.100.100.200, 127.0.0.0/8, 169.254.0.0/16, 192.0.0.192, 224.0.0.0/3";

/// The same for IPv6, and IPv4 addresses in the clothes of IPv6: mapped ones, and link-local ones behind NAT64.
const NEVER6: &str = "::/96, ::ffff:0:0/96, 64:ff9b::a9fe:0/112, fd00:ec2::254, fe80::/10, ff00::/8";

/// What a slot may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// Everything but `never` and `inside`.
    Open,
    /// These addresses, each for so many seconds more; 0 for those with which open connections may go on.
    Allow(BTreeMap<IpAddr, u64>),
}

/// What the rules depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// The slots whose devices exist or are about to.
    pub slots: BTreeSet<u32>,
    /// What slots may reach; those that are not here reach nothing.
    pub gates: BTreeMap<u32, Gate>,
    /// Slots that reach each other; of each pair the lower one first.
    pub peers: BTreeSet<(u32, u32)>,
    /// Interfaces on which we, and nobody else, turned IPv4 forwarding on: from these nothing is forwarded but to the bridge,
    /// so that the host is not made a router for its neighbours.
    pub uplinks: BTreeSet<String>,
    /// The same for IPv6.
    pub uplinks6: BTreeSet<String>,
    /// Whether we turned IPv6 forwarding on for the whole host: then nothing is forwarded in IPv6 but for guests.
    pub guard6: bool,
    /// Interfaces to networks inside the host, such as another bridge's: closed to guests.
    pub inside: BTreeSet<String>,
}

/// One change to the sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// These slots may send.
    AddSlots(BTreeSet<u32>),
    /// These may not any more.
    RemoveSlots(BTreeSet<u32>),
    /// What a slot may reach, instead of what it might.
    Gate {
        /// The slot.
        slot: u32,
        /// What it might; none for nothing.
        from: Option<Gate>,
        /// What it may.
        to: Option<Gate>,
    },
    /// A slot under `allow` may reach these addresses, too, each for so many seconds.
    Allow(u32, BTreeMap<IpAddr, u64>),
    /// Which slots reach each other.
    Peers {
        /// These do from now on.
        add: BTreeSet<(u32, u32)>,
        /// These do not any more.
        remove: BTreeSet<(u32, u32)>,
    },
    /// We turned on forwarding on these interfaces.
    AddUplinks(BTreeSet<String>),
    /// These forward without us.
    RemoveUplinks(BTreeSet<String>),
    /// The same for IPv6.
    AddUplinks6(BTreeSet<String>),
    /// The same for IPv6.
    RemoveUplinks6(BTreeSet<String>),
    /// These lead to networks inside the host.
    AddInside(BTreeSet<String>),
    /// These do not any more.
    RemoveInside(BTreeSet<String>),
}

/// Whether a link's name can stand in the rules. Names come from the kernel, which lets root choose nearly any.
pub fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:@".contains(c))
}

/// The transaction that replaces both tables by what `state` wants, whatever was there before.
pub fn ruleset(plan: &Plan, state: &State) -> String {
    let mut text = removal(plan);
    text += &bridge_table(plan);
    text += &inet_table(plan, state.guard6);
    let gate = |(slot, gate): (&u32, &Gate)| Change::Gate { slot: *slot, from: None, to: Some(gate.clone()) };
    let changes = [
        Change::AddSlots(state.slots.clone()),
        Change::Peers { add: state.peers.clone(), remove: BTreeSet::new() },
        Change::AddUplinks(state.uplinks.clone()),
        Change::AddUplinks6(state.uplinks6.clone()),
        Change::AddInside(state.inside.clone()),
    ];
    for wanted in changes.into_iter().chain(state.gates.iter().map(gate)) {
        text += &change(plan, &wanted);
    }
    text
}

/// The transaction that removes both tables; right also where they are not there.
pub fn removal(plan: &Plan) -> String {
    // Deleting a table that is not there fails, adding one that is there does not.
    ["bridge", "inet"]
        .into_iter()
        .flat_map(|family| ["add", "delete"].map(|verb| format!("{verb} table {family} {}\n", plan.bridge)))
        .collect()
}

/// The command that takes away what was counted of `guest`'s packets to `to`.
pub fn forget_denied(plan: &Plan, guest: IpAddr, to: IpAddr) -> String {
    let version = if guest.is_ipv4() { 4 } else { 6 };
    format!("delete element inet {} denied{version} {{ {guest} . {to} }}\n", plan.bridge)
}

/// The command that takes away the count of `guest`'s questions.
pub fn forget_asked(plan: &Plan, guest: IpAddr) -> String {
    let version = if guest.is_ipv4() { 4 } else { 6 };
    format!("delete element inet {} asked{version} {{ {guest} }}\n", plan.bridge)
}

/// The transaction that makes one change; empty where there is nothing to do.
pub fn change(plan: &Plan, change: &Change) -> String {
    let names = |names: &BTreeSet<String>| -> Vec<String> {
        names.iter().filter(|n| is_plain(n)).map(|n| format!("\"{n}\"")).collect()
    };
    match change {
        Change::AddSlots(numbers) => slots(plan, "add", numbers),
        Change::RemoveSlots(numbers) => slots(plan, "delete", numbers),
        Change::AddUplinks(links) => element(plan, "add", "inet", "uplinks", &names(links)),
        Change::RemoveUplinks(links) => element(plan, "delete", "inet", "uplinks", &names(links)),
        Change::AddUplinks6(links) => element(plan, "add", "inet", "uplinks6", &names(links)),
        Change::RemoveUplinks6(links) => element(plan, "delete", "inet", "uplinks6", &names(links)),
        Change::AddInside(links) => element(plan, "add", "inet", "inside", &names(links)),
        Change::RemoveInside(links) => element(plan, "delete", "inet", "inside", &names(links)),
        Change::Gate { slot, from, to } => {
            let Some(slot) = plan.slot(*slot) else { return String::new() };
            regate(plan, &slot, from.as_ref(), to.as_ref())
        }
        Change::Peers { add, remove } => pairs(plan, "delete", remove) + &pairs(plan, "add", add),
        Change::Allow(slot, addresses) => allow(plan, *slot, addresses, true),
    }
}

fn bridge_table(plan: &Plan) -> String {
    let (name, taps) = (&plan.bridge, format!("\"{}*\"", plan.tap_prefix));
    // Before everything else at this hook, and before the bridge learns the sender's address.
    format!(
        r"table bridge {name} {{
	set guests {{ type ifname . ether_addr . ipv4_addr; }}
	set guests6 {{ type ifname . ether_addr . ipv6_addr; }}
	chain prerouting {{
		type filter hook prerouting priority -300; policy accept;
		iifname {taps} goto from_guest
	}}
	chain forward {{
		type filter hook forward priority -200; policy accept;
		iifname {taps} oifname {taps} drop
	}}
	chain from_guest {{
		iifname . ether saddr . ip saddr @guests accept
		iifname . ether saddr . arp saddr ip @guests iifname . arp saddr ether . arp saddr ip @guests accept
		icmpv6 type {{ nd-neighbor-advert, nd-router-advert, nd-redirect }} drop
		iifname . ether saddr . ip6 saddr @guests6 accept
		drop
	}}
}}
"
    )
}

fn inet_table(plan: &Plan, guard6: bool) -> String {
    let (name, bridge) = (&plan.bridge, format!("\"{}\"", plan.bridge));
    let (subnet, gateway) = (plan.cidr(), plan.gateway());
    let mut own6 = String::new();
    let mut dns6 = String::new();
    let mut solicit6 = "";
    let mut masquerade6 = String::new();
    if let (Some(subnet6), Some(gateway6)) = (plan.cidr6(), plan.gateway6()) {
        own6 = format!("		ip6 daddr {subnet6} goto denied\n");
        dns6 = format!("		ip6 daddr {gateway6} accept\n");
        solicit6 = "		icmpv6 type nd-neighbor-solicit accept\n";
        masquerade6 = format!("		ip6 saddr {subnet6} oifname != {{ {bridge}, lo }} masquerade\n");
    }
    let guard = if guard6 { "		meta nfproto ipv6 drop\n" } else { "" };
    let mut denied = String::new();
    let mut sets = String::new();
    for (ip, v) in [("ip", 4), ("ip6", 6)] {
        let kind = if v == 4 { "ipv4_addr" } else { "ipv6_addr" };
        write_to(
            &mut sets,
            format_args!(
                "	set open{v} {{ type {kind}; }}
	map allow{v} {{ type {kind} : verdict; }}
	map answers{v} {{ type {kind} : verdict; }}
	set asked{v} {{ type {kind}; flags dynamic,timeout; timeout 60s; size 65536; }}
	set peers{v} {{ type {kind} . {kind}; }}
	set denied{v} {{ type {kind} . {kind}; flags dynamic,timeout; timeout {DENIED_TIMEOUT_S}s; size 16384; counter; }}
"
            ),
        );
        write_to(&mut denied, format_args!("		update @denied{v} {{ {ip} saddr . {ip} daddr counter }}\n"));
    }
    format!(
        r"table inet {name} {{
	set uplinks {{ type ifname; }}
	set uplinks6 {{ type ifname; }}
	set inside {{ type ifname; }}
{sets}	chain input {{
		type filter hook input priority 0; policy accept;
		iifname {bridge} goto to_host
	}}
	chain to_host {{
		udp dport 53 goto question
		ct state established,related accept
		tcp dport 53 goto question
{solicit6}		drop
	}}
	chain question {{
		update @asked4 {{ ip saddr limit rate over {QUESTIONS}/second burst {QUESTIONS} packets }} drop
		update @asked6 {{ ip6 saddr limit rate over {QUESTIONS}/second burst {QUESTIONS} packets }} drop
		ip daddr {gateway} accept
{dns6}		ct state established,related accept
		drop
	}}
	chain forward {{
		type filter hook forward priority 0; policy accept;
		iifname {bridge} oifname {bridge} goto between
		iifname {bridge} goto from_guest
		oifname {bridge} goto to_guest
		meta nfproto ipv4 iifname @uplinks drop
		meta nfproto ipv6 iifname @uplinks6 drop
{guard}	}}
	chain postrouting {{
		type nat hook postrouting priority 100; policy accept;
		ip saddr {subnet} oifname != {{ {bridge}, lo }} masquerade
{masquerade6}	}}
	chain between {{
		ip saddr . ip daddr @peers4 accept
		ip6 saddr . ip6 daddr @peers6 accept
		goto denied
	}}
	chain output {{
		type filter hook output priority 0; policy accept;
		oifname {bridge} icmp type redirect drop
		oifname {bridge} icmpv6 type {{ nd-redirect, mld-listener-report, mld2-listener-report }} drop
	}}
	chain from_guest {{
		ip daddr {{ {NEVER4} }} goto denied
		ip6 daddr {{ {NEVER6} }} goto denied
		ip daddr {subnet} goto denied
{own6}		oifname @inside goto denied
		ip saddr @open4 accept
		ip6 saddr @open6 accept
		ip saddr vmap @allow4
		ip6 saddr vmap @allow6
		goto denied
	}}
	chain denied {{
{denied}		meta l4proto tcp reject with tcp reset
		reject with icmpx type admin-prohibited
	}}
	chain to_guest {{
		ct state != {{ established, related }} drop
		ip daddr @open4 accept
		ip6 daddr @open6 accept
		ip daddr vmap @answers4
		ip6 daddr vmap @answers6
		drop
	}}
}}
"
    )
}

/// From one policy to another in one transaction, whatever the two are.
fn regate(plan: &Plan, slot: &Slot, from: Option<&Gate>, to: Option<&Gate>) -> String {
    let mut text = String::new();
    let number = slot.number;
    let addresses: Vec<(IpAddr, u8)> = std::iter::once((IpAddr::V4(slot.address), 4))
        .chain(plan.address6(number).map(|a| (IpAddr::V6(a), 6)))
        .collect();
    match (from, to) {
        (Some(Gate::Allow(_)), Some(Gate::Allow(wanted))) => {
            for (set, v) in sets() {
                write_to(&mut text, format_args!("flush set inet {} {set}{v}_{number}\n", plan.bridge));
            }
            text += &allow(plan, number, wanted, false);
            return text;
        }
        (Some(Gate::Allow(_)), _) => {
            for (address, v) in &addresses {
                for map in ["allow", "answers"] {
                    text += &element(
                        plan,
                        "delete",
                        "inet",
                        &format!("{map}{v}"),
                        &[verdict(map, address, number)],
                    );
                }
            }
            for chain in ["allow", "answers"] {
                write_to(&mut text, format_args!("flush chain inet {} {chain}_{number}\n", plan.bridge));
                write_to(&mut text, format_args!("delete chain inet {} {chain}_{number}\n", plan.bridge));
            }
            for (set, v) in sets() {
                write_to(&mut text, format_args!("delete set inet {} {set}{v}_{number}\n", plan.bridge));
            }
        }
        (Some(Gate::Open), to) if to != Some(&Gate::Open) => {
            for (address, v) in &addresses {
                text += &element(plan, "delete", "inet", &format!("open{v}"), &[address.to_string()]);
            }
        }
        _ => {}
    }
    match to {
        Some(Gate::Open) if from != Some(&Gate::Open) => {
            for (address, v) in &addresses {
                text += &element(plan, "add", "inet", &format!("open{v}"), &[address.to_string()]);
            }
        }
        Some(Gate::Allow(wanted)) => {
            text += &allow_chains(plan, number);
            for (address, v) in &addresses {
                for map in ["allow", "answers"] {
                    text +=
                        &element(plan, "add", "inet", &format!("{map}{v}"), &[verdict(map, address, number)]);
                }
            }
            text += &allow(plan, number, wanted, false);
        }
        _ => {}
    }
    text
}

fn sets() -> impl Iterator<Item = (&'static str, u8)> {
    ["a", "f"].into_iter().flat_map(|set| [(set, 4), (set, 6)])
}

fn verdict(chain: &str, address: &IpAddr, number: u32) -> String {
    format!("{address} : goto {chain}_{number}")
}

/// The sets and chains of a slot under `allow`.
fn allow_chains(plan: &Plan, n: u32) -> String {
    let mut text = format!("table inet {} {{\n", plan.bridge);
    for (set, v) in sets() {
        let kind = if v == 4 { "ipv4_addr" } else { "ipv6_addr" };
        let flags = if set == "f" { "dynamic,timeout" } else { "timeout" };
        write_to(
            &mut text,
            format_args!("	set {set}{v}_{n} {{ type {kind}; flags {flags}; size {MAX_ADDRESSES}; }}\n"),
        );
    }
    // DNS elsewhere would hand out addresses that nobody has seen, so it is refused even at an address that is allowed.
    write_to(
        &mut text,
        format_args!(
            "	chain allow_{n} {{\n		meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} goto denied\n"
        ),
    );
    for (ip, v) in [("ip", 4), ("ip6", 6)] {
        let keep = format!("update @f{v}_{n} {{ {ip} daddr timeout {FLOW_TIMEOUT_S}s }}");
        write_to(
            &mut text,
            format_args!(
                "		ct state established,related {ip} daddr @f{v}_{n} {keep} accept\n		{ip} daddr @a{v}_{n} {keep} accept\n"
            ),
        );
    }
    text += "		goto denied\n	}\n";
    // Answers, and errors by routers on the way.
    write_to(&mut text, format_args!("	chain answers_{n} {{\n		ct state related accept\n"));
    for (ip, v) in [("ip", 4), ("ip6", 6)] {
        write_to(&mut text, format_args!("		{ip} saddr @f{v}_{n} accept\n"));
    }
    text + "		drop\n	}\n}\n"
}

/// Lets a slot under `allow` reach addresses, each for its seconds; with `renew`, also where it may already.
fn allow(plan: &Plan, number: u32, addresses: &BTreeMap<IpAddr, u64>, renew: bool) -> String {
    let mut text = String::new();
    for v in [4, 6] {
        let ours = || addresses.iter().filter(move |(a, _)| a.is_ipv4() == (v == 4));
        let set = format!("a{v}_{number}");
        let plain: Vec<String> = ours().filter(|(_, s)| **s > 0).map(|(a, _)| a.to_string()).collect();
        let timed: Vec<String> =
            ours().filter(|(_, s)| **s > 0).map(|(a, s)| format!("{a} timeout {s}s")).collect();
        if renew {
            // Adding what is there changes no timeout, and deleting what is not there fails.
            text += &element(plan, "add", "inet", &set, &timed);
            text += &element(plan, "delete", "inet", &set, &plain);
        }
        text += &element(plan, "add", "inet", &set, &timed);
        if !renew {
            let flows: Vec<String> = ours().map(|(a, _)| format!("{a} timeout {FLOW_TIMEOUT_S}s")).collect();
            text += &element(plan, "add", "inet", &format!("f{v}_{number}"), &flows);
        }
    }
    text
}

fn slots(plan: &Plan, verb: &str, numbers: &BTreeSet<u32>) -> String {
    let all: Vec<Slot> = numbers.iter().filter_map(|n| plan.slot(*n)).collect();
    let guests: Vec<String> =
        all.iter().map(|s| format!("\"{}\" . {} . {}", s.tap, s.mac, s.address)).collect();
    let mut text = element(plan, verb, "bridge", "guests", &guests);
    let guests6: Vec<String> = all
        .iter()
        .filter_map(|s| Some((s, plan.address6(s.number)?)))
        .flat_map(|(s, address)| {
            [address, s.mac.link_local()].map(|a| format!("\"{}\" . {} . {a}", s.tap, s.mac))
        })
        .collect();
    text += &element(plan, verb, "bridge", "guests6", &guests6);
    text
}

/// Each pair both ways, in both families.
fn pairs(plan: &Plan, verb: &str, pairs: &BTreeSet<(u32, u32)>) -> String {
    let both = |addresses: Option<(IpAddr, IpAddr)>| -> Vec<String> {
        addresses.map_or_else(Vec::new, |(a, b)| vec![format!("{a} . {b}"), format!("{b} . {a}")])
    };
    let v4 = |n: u32| Some(IpAddr::V4(plan.slot(n)?.address));
    let v6 = |n: u32| plan.slot(n).and_then(|_| plan.address6(n)).map(IpAddr::V6);
    let of = |address: &dyn Fn(u32) -> Option<IpAddr>| -> Vec<String> {
        pairs.iter().flat_map(|(a, b)| both(address(*a).zip(address(*b)))).collect()
    };
    element(plan, verb, "inet", "peers4", &of(&v4)) + &element(plan, verb, "inet", "peers6", &of(&v6))
}

fn element(plan: &Plan, verb: &str, family: &str, set: &str, elements: &[String]) -> String {
    if elements.is_empty() {
        return String::new();
    }
    format!("{verb} element {family} {} {set} {{ {} }}\n", plan.bridge, elements.join(", "))
}

fn write_to(text: &mut String, args: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = text.write_fmt(args);
}

#[cfg(test)]
mod tests;
