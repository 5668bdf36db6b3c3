//! The names of VMs, both ways: `<vm>.vm` and `<vm>.<host>.vm`, and the guests' addresses. Pure but for a lock.
//!
//! The zone is `vm`, and the reverse zones of the guests' own networks. A name in them is answered from here or is none:
//! no question about them ever goes to another server.

use crate::plan::Plan;
use bothy_contract::{HostToken, VmName, net::NAME_SERVER};
use hickory_proto::rr::{Name, RData, Record, RecordType, rdata};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
};

/// Seconds that others may keep an answer for: a name can go to another VM at any moment.
const TTL: u32 = 0;

/// What the zone knows of a question.
#[derive(Debug, PartialEq)]
pub enum Found {
    /// The records, which are none for a name that has no such ones.
    Records(Vec<Record>),
    /// The name would be in the zone, and is not.
    NoName,
    /// The name is of another zone.
    Elsewhere,
}

#[derive(Debug, Default)]
struct Names {
    by_name: BTreeMap<String, u32>,
    by_slot: BTreeMap<u32, String>,
}

/// The names, changed while questions are answered.
#[derive(Debug)]
pub struct Zone {
    plan: Arc<Plan>,
    host: String,
    names: RwLock<Names>,
    serial: AtomicU32,
}

impl Zone {
    /// A zone without names, on the host called `host`.
    pub fn new(plan: Arc<Plan>, host: &HostToken) -> Self {
        Self { plan, host: host.to_string(), names: RwLock::default(), serial: AtomicU32::new(1) }
    }

    /// From now on the VM in `slot` is known as `name`, or not at all.
    pub fn set(&self, slot: u32, name: Option<&VmName>) {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = names.by_slot.remove(&slot) {
            // Somebody else may have the name since.
            if names.by_name.get(&old) == Some(&slot) {
                names.by_name.remove(&old);
            }
        }
        if let Some(name) = name {
            names.by_name.insert(name.to_string(), slot);
            names.by_slot.insert(slot, name.to_string());
        }
        self.serial.fetch_add(1, Ordering::Relaxed);
    }

    /// The zone's SOA, which goes with every answer that something is not there.
    pub fn soa(&self) -> Option<Record> {
        let (apex, server) = (Name::from_ascii("vm.").ok()?, Name::from_ascii(NAME_SERVER).ok()?);
        let person = Name::from_ascii("hostmaster._bothy.vm.").ok()?;
        let serial = self.serial.load(Ordering::Relaxed);
        let soa = rdata::SOA::new(server, person, serial, 3600, 600, 86_400, TTL);
        Some(Record::from_rdata(apex, TTL, RData::SOA(soa)))
    }

    /// Answers from the zone alone.
    pub fn find(&self, name: &Name, kind: RecordType) -> Found {
        let labels: Vec<String> =
            name.iter().rev().map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect();
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let records = |data: Vec<RData>| {
            let wanted = data.into_iter().filter(|data| data.record_type() == kind);
            Found::Records(wanted.map(|data| Record::from_rdata(name.clone(), TTL, data)).collect())
        };
        match labels.as_slice() {
            ["arpa", "in-addr", rest @ ..] => self.reverse4(rest).map_or(Found::NoName, records),
            ["arpa", "ip6", rest @ ..] => self.reverse6(rest).map_or(Found::NoName, records),
            ["vm"] => {
                let soa = self.soa().map(|record| record.data);
                let server = Name::from_ascii(NAME_SERVER).ok().map(|name| RData::NS(rdata::NS(name)));
                records(soa.into_iter().chain(server).collect())
            }
            ["vm", "_bothy"] => records(Vec::new()),
            ["vm", "_bothy", "ns"] => {
                let six = self.plan.gateway6().map(IpAddr::V6);
                records(std::iter::once(self.plan.gateway().into()).chain(six).map(address).collect())
            }
            ["vm", one] => match self.addresses(one) {
                Some(addresses) => records(addresses),
                None if *one == self.host => records(Vec::new()),
                None => Found::NoName,
            },
            ["vm", host, one] if *host == self.host => self.addresses(one).map_or(Found::NoName, records),
            ["vm", ..] => Found::NoName,
            _ => Found::Elsewhere,
        }
        .unless_elsewhere(|| self.is_elsewhere(&labels))
    }

    fn addresses(&self, name: &str) -> Option<Vec<RData>> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let slot = self.plan.slot(*names.by_name.get(name)?)?;
        let six = self.plan.address6(slot.number).map(IpAddr::V6);
        Some(std::iter::once(slot.address.into()).chain(six).map(address).collect())
    }

    /// The pointer of a guest's address; none where no VM with a name has it.
    fn pointer(&self, address: IpAddr) -> Option<Vec<RData>> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let name = names.by_slot.get(&self.plan.slot_of(address)?)?;
        let name = Name::from_ascii(format!("{name}.vm.")).ok()?;
        Some(vec![RData::PTR(rdata::PTR(name))])
    }

    /// What is at a name of `in-addr.arpa`, its numbers from the right; none for no name.
    fn reverse4(&self, labels: &[&str]) -> Option<Vec<RData>> {
        let (bytes, beyond) = numbers4(labels);
        match (<[u8; 4]>::try_from(bytes), beyond) {
            (_, true) => None,
            (Ok(bytes), _) => self.pointer(Ipv4Addr::from(bytes).into()),
            // What is between the zone and its names is there, and has nothing.
            (Err(_), _) => Some(Vec::new()),
        }
    }

    fn reverse6(&self, labels: &[&str]) -> Option<Vec<RData>> {
        let (value, nibbles, beyond) = numbers6(labels);
        match (nibbles, beyond) {
            (_, true) => None,
            (32, _) => self.pointer(Ipv6Addr::from(value).into()),
            _ => Some(Vec::new()),
        }
    }

    /// Whether a name below `arpa` is not within the guests' networks.
    fn is_elsewhere(&self, labels: &[&str]) -> bool {
        match labels {
            ["arpa", "in-addr", rest @ ..] => {
                let (bytes, _) = numbers4(rest);
                let bits = bytes.len() * 8;
                let mut whole = [0; 4];
                whole.iter_mut().zip(&bytes).for_each(|(to, from)| *to = *from);
                bits < usize::from(self.plan.prefix) || !self.plan.overlaps(whole.into(), 32)
            }
            ["arpa", "ip6", rest @ ..] => {
                let (value, nibbles, _) = numbers6(rest);
                let ours = |p: Ipv6Addr| nibbles >= 16 && value >> 64 == u128::from(p) >> 64;
                !self.plan.prefix6.is_some_and(ours)
            }
            _ => false,
        }
    }
}

impl Found {
    fn unless_elsewhere(self, elsewhere: impl FnOnce() -> bool) -> Self {
        if elsewhere() { Self::Elsewhere } else { self }
    }
}

fn address(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(a) => RData::A(rdata::A(a)),
        IpAddr::V6(a) => RData::AAAA(rdata::AAAA(a)),
    }
}

/// The numbers that the labels begin with, and whether there is more than they say.
fn numbers4(labels: &[&str]) -> (Vec<u8>, bool) {
    let number = |label: &&str| label.parse::<u8>().ok().filter(|n| n.to_string() == **label);
    let bytes: Vec<u8> = labels.iter().take(4).map_while(number).collect();
    let beyond = bytes.len() < labels.len();
    (bytes, beyond)
}

fn numbers6(labels: &[&str]) -> (u128, usize, bool) {
    let nibble = |label: &&str| (label.len() == 1).then(|| u128::from_str_radix(label, 16).ok()).flatten();
    let nibbles: Vec<u128> = labels.iter().take(32).map_while(nibble).collect();
    let count = nibbles.len();
    let value = (0_u32..).zip(&nibbles).fold(0, |value, (n, nibble)| value | nibble << (124 - 4 * n));
    (value, count, count < labels.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_config::Config;

    fn zone() -> Zone {
        let plan =
            Plan::new(&Config::new("/s", "/r")).unwrap().with_prefix6(Some("fd01:2::".parse().unwrap()));
        Zone::new(Arc::new(plan), &"here".parse().unwrap())
    }

    fn find(zone: &Zone, text: &str, kind: RecordType) -> Found {
        zone.find(&Name::from_ascii(text).unwrap(), kind)
    }

    fn data(zone: &Zone, text: &str, kind: RecordType) -> Vec<String> {
        match find(zone, text, kind) {
            Found::Records(records) => records.iter().map(|r| r.data.to_string()).collect(),
            other => panic!("{text}: {other:?}"),
        }
    }

    const BACK6: &str = "3.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.2.0.0.0.1.0.d.f.ip6.arpa.";

    #[test]
    fn names_lead_to_addresses_and_back_until_they_go() {
        let zone = zone();
        zone.set(2, Some(&"web".parse().unwrap()));
        for asked in ["web.vm.", "WEB.Vm.", "web.here.vm."] {
            assert_eq!(data(&zone, asked, RecordType::A), ["10.77.0.3"], "{asked}");
            assert_eq!(data(&zone, asked, RecordType::AAAA), ["fd01:2::3"], "{asked}");
            assert!(data(&zone, asked, RecordType::TXT).is_empty(), "{asked}");
        }
        for back in ["3.0.77.10.in-addr.arpa.", BACK6] {
            assert_eq!(data(&zone, back, RecordType::PTR), ["web.vm."], "{back}");
            assert!(data(&zone, back, RecordType::A).is_empty());
        }
        zone.set(2, None);
        for gone in ["web.vm.", "web.here.vm.", "3.0.77.10.in-addr.arpa.", BACK6] {
            assert_eq!(find(&zone, gone, RecordType::PTR), Found::NoName, "{gone}");
        }
    }

    #[test]
    fn what_is_between_is_there_and_what_is_not_is_not() {
        let zone = zone();
        zone.set(1, Some(&"web".parse().unwrap()));
        for empty in ["vm.", "here.vm.", "_bothy.vm.", "0.77.10.in-addr.arpa.", "0.2.0.0.0.1.0.d.f.ip6.arpa."]
        {
            let found = find(&zone, empty, RecordType::A);
            let expected = if empty.starts_with("0.2") { Found::Elsewhere } else { Found::Records(vec![]) };
            assert_eq!(found, expected, "{empty}");
        }
        for none in [
            "db.vm.",
            "a.web.vm.",
            "web.there.vm.",
            "a.web.here.vm.",
            "9.0.77.10.in-addr.arpa.",
            "1.0.77.10.in-addr.arpa.",
            "x.2.0.77.10.in-addr.arpa.",
            "02.0.77.10.in-addr.arpa.",
        ] {
            assert_eq!(find(&zone, none, RecordType::PTR), Found::NoName, "{none}");
        }
        for other in [
            "web.vm.example.",
            "xvm.",
            "example.",
            ".",
            "1.2.0.192.in-addr.arpa.",
            "77.10.in-addr.arpa.",
            "arpa.",
        ] {
            assert_eq!(find(&zone, other, RecordType::A), Found::Elsewhere, "{other}");
        }
        assert_eq!(data(&zone, "vm.", RecordType::NS), [NAME_SERVER]);
        assert_eq!(data(&zone, NAME_SERVER, RecordType::A), ["10.77.0.1"]);
        assert_eq!(data(&zone, "vm.", RecordType::SOA).len(), 1);
    }

    #[test]
    fn a_name_is_its_latest_owner_s() {
        let (zone, web) = (zone(), "web".parse().unwrap());
        zone.set(1, Some(&web));
        zone.set(2, Some(&web));
        zone.set(1, None);
        assert_eq!(data(&zone, "web.vm.", RecordType::A), ["10.77.0.3"]);
        // A VM that is called as the host is.
        zone.set(3, Some(&"here".parse().unwrap()));
        assert_eq!(data(&zone, "here.vm.", RecordType::A), ["10.77.0.4"]);
        assert_eq!(data(&zone, "web.here.vm.", RecordType::A), ["10.77.0.3"]);
    }
}
