//! The names of VMs: `<vm>.vm` and `<vm>.<host>.vm`, and their addresses, both ways.

use bothy_contract::VmId;
use hickory_proto::rr::{Name, RData, Record, RecordType, rdata};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{PoisonError, RwLock},
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

/// The names, changed while questions are answered.
#[derive(Debug)]
pub struct Zone {
    host: String,
    vms: RwLock<BTreeMap<VmId, (String, Vec<IpAddr>)>>,
}

impl Zone {
    /// A zone without names, on the host called `host`.
    pub fn new(host: &str) -> Self {
        Self { host: host.to_ascii_lowercase(), vms: RwLock::default() }
    }

    /// From now on `vm` is known as `name`, with these addresses and no others.
    pub fn set(&self, vm: VmId, name: &str, addresses: &[IpAddr]) {
        let known = (name.to_ascii_lowercase(), addresses.to_vec());
        self.vms.write().unwrap_or_else(PoisonError::into_inner).insert(vm, known);
    }

    /// From now on `vm` is not known.
    pub fn remove(&self, vm: VmId) {
        self.vms.write().unwrap_or_else(PoisonError::into_inner).remove(&vm);
    }

    /// Answers from the zone alone.
    pub fn find(&self, name: &Name, kind: RecordType) -> Found {
        let text = name.to_ascii().to_ascii_lowercase();
        let text = text.strip_suffix('.').unwrap_or(&text);
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        if let Ok(net) = name.parse_arpa_name() {
            let by = |(_, addresses): &&(String, Vec<IpAddr>)| addresses.contains(&net.addr());
            let full = net.prefix_len() == net.max_prefix_len();
            let Some((vm, _)) = vms.values().find(by).filter(|_| full) else { return Found::Elsewhere };
            let target = Name::from_ascii(format!("{vm}.vm.")).ok();
            let wanted = kind == RecordType::PTR || kind == RecordType::ANY;
            let record = |t| Record::from_rdata(name.clone(), TTL, RData::PTR(rdata::PTR(t)));
            return Found::Records(target.filter(|_| wanted).map(record).into_iter().collect());
        }
        if text == "vm" {
            return Found::Records(Vec::new());
        }
        let Some(below) = text.strip_suffix(".vm") else { return Found::Elsewhere };
        let suffix = format!(".{}", self.host);
        let vm = below.strip_suffix(&suffix).unwrap_or(below);
        let Some((_, addresses)) = vms.values().find(|(known, _)| known == vm) else { return Found::NoName };
        let record = |address: &IpAddr| {
            let data = match address {
                IpAddr::V4(a) => RData::A(rdata::A(*a)),
                IpAddr::V6(a) => RData::AAAA(rdata::AAAA(*a)),
            };
            let wanted = kind == data.record_type() || kind == RecordType::ANY;
            wanted.then(|| Record::from_rdata(name.clone(), TTL, data))
        };
        Found::Records(addresses.iter().filter_map(record).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    #[test]
    fn names_lead_to_addresses_and_back_until_removed() {
        let (zone, vm) = (Zone::new("Here"), VmId::new());
        let addresses: [IpAddr; 2] = ["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        zone.set(vm, "web", &addresses);
        for asked in ["web.vm.", "WEB.Vm.", "web.here.vm."] {
            for (kind, expected) in [(RecordType::A, addresses[0]), (RecordType::AAAA, addresses[1])] {
                let Found::Records(records) = zone.find(&name(asked), kind) else { panic!("{asked}") };
                let found: Vec<IpAddr> = records.iter().filter_map(|r| r.data.ip_addr()).collect();
                assert_eq!(found, [expected], "{asked} {kind}");
            }
        }
        assert_eq!(zone.find(&name("web.vm."), RecordType::TXT), Found::Records(Vec::new()));
        for gone in ["db.vm.", "a.web.vm.", "web.there.vm."] {
            assert_eq!(zone.find(&name(gone), RecordType::A), Found::NoName, "{gone}");
        }
        assert_eq!(zone.find(&name("web.vm.example."), RecordType::A), Found::Elsewhere);
        let back = name("2.0.1.10.in-addr.arpa.");
        let Found::Records(records) = zone.find(&back, RecordType::PTR) else { panic!("no PTR") };
        assert_eq!(records[0].data, RData::PTR(rdata::PTR(name("web.vm."))));
        zone.remove(vm);
        assert_eq!(zone.find(&name("web.vm."), RecordType::A), Found::NoName);
        assert_eq!(zone.find(&back, RecordType::PTR), Found::Elsewhere);
    }
}
