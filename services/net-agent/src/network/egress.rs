//! What VMs may reach: the policy as asked for, kept and applied, the addresses that the DNS server lets through, and what
//! was denied.

use super::{Inner, Network, ensure_up};
use crate::{firewall::MAX_GRANTED, leases::Held};
use bothy_contract::{
    Error, VmId,
    net::{AcquireLease, Allowed, Denied, Egress, EgressReport},
};
use jiff::{Timestamp, ToSpan};
use std::{collections::BTreeMap, net::IpAddr, sync::atomic::Ordering, time::Duration};

/// How many denied names are kept for a VM; beyond, the one that was asked for longest ago goes.
const MAX_DENIED: usize = 256;

/// Names that VMs asked for and did not get, by slot. In memory only.
#[derive(Debug, Default)]
pub struct Denials(BTreeMap<u32, BTreeMap<String, (u64, Timestamp)>>);

impl Denials {
    /// Counts one.
    pub fn note(&mut self, slot: u32, name: &str, now: Timestamp) {
        let names = self.0.entry(slot).or_default();
        if !names.contains_key(name) && names.len() >= MAX_DENIED {
            let oldest = names.iter().min_by_key(|(_, (_, last))| *last).map(|(name, _)| name.clone());
            names.retain(|name, _| Some(name) != oldest.as_ref());
        }
        let (count, last) = names.entry(name.to_owned()).or_insert((0, now));
        (*count, *last) = (count.saturating_add(1), now);
    }

    /// Forgets a slot's.
    pub fn forget(&mut self, slot: u32) {
        self.0.remove(&slot);
    }

    fn of(&self, slot: u32) -> Vec<Denied> {
        let denied = |(name, (count, last)): (&String, &(u64, Timestamp))| Denied {
            name: name.clone(),
            count: *count,
            last: *last,
        };
        self.0.get(&slot).into_iter().flatten().map(denied).collect()
    }
}

/// What a request for a lease wants, where the lease has `known`: its own word, else NAT as asked for; names stay unless
/// something else is said.
pub fn wanted(request: &AcquireLease, known: Option<&Egress>) -> Result<Egress, Error> {
    match (&request.egress, request.nat, known) {
        (Some(egress), _, _) => egress.clone().checked(),
        (None, true, _) => Ok(Egress::Open),
        (None, false, Some(names @ Egress::Allow { .. })) => Ok(names.clone()),
        (None, false, _) => Ok(Egress::None),
    }
}

impl Network {
    /// What `vm` may reach, has reached and was denied.
    pub async fn egress_report(&self, vm: VmId) -> Result<EgressReport, Error> {
        let held = self.0.held(vm)?;
        let firewall = &self.0.devices.firewall;
        let reached = firewall.reached(held.slot).await;
        let mut denied: BTreeMap<String, Denied> =
            self.0.denials().of(held.slot).into_iter().map(|d| (d.name.clone(), d)).collect();
        let now = Timestamp::now();
        for packets in firewall.denied().await? {
            if self.0.plan.slot_of(packets.guest) != Some(held.slot) {
                continue;
            }
            let ago = i64::try_from(packets.ago.as_secs()).unwrap_or(i64::MAX);
            let last = now.checked_sub(ago.seconds()).unwrap_or(now);
            let name = packets.to.to_string();
            denied.insert(name.clone(), Denied { name, count: packets.packets, last });
        }
        let mut denied: Vec<Denied> = denied.into_values().collect();
        denied.sort_by(|a, b| b.last.cmp(&a.last).then_with(|| a.name.cmp(&b.name)));
        let allowed = reached
            .into_iter()
            .map(|(name, addresses)| Allowed { name, addresses: addresses.into_iter().collect() })
            .collect();
        Ok(EgressReport { policy: held.egress, allowed, denied })
    }

    /// The policy of the VM with that address; none for an address that no lease has.
    pub fn policy_of(&self, guest: IpAddr) -> Option<Egress> {
        let slot = self.0.plan.slot_of(guest)?;
        self.0.vms().values().find(|held| held.slot == slot).map(|held| held.egress.clone())
    }

    /// Lets the VM with address `guest` reach the addresses of `name`, each for its time to live. Returns once the kernel
    /// knows, so that an answer can go out. Does nothing for a VM that is not under names.
    pub async fn allow(
        &self,
        guest: IpAddr,
        name: &str,
        addresses: &[(IpAddr, Duration)],
    ) -> Result<(), Error> {
        let none = || Error::not_found(format!("{guest} is no guest's address"));
        let net = &self.0;
        let slot = net.plan.slot_of(guest).ok_or_else(none)?;
        let holder = net.vms().iter().find(|(_, held)| held.slot == slot).map(|(vm, _)| *vm);
        let vm = holder.ok_or_else(none)?;
        // Held while the policy is looked at and the kernel told, so that no other one comes between. It also lets one
        // guest wait for one transaction at a time, however many names it asks for.
        let _one = net.vm_lock(vm).lock().await;
        let policy = net.vms().get(&vm).filter(|held| held.slot == slot).map(|held| held.egress.clone());
        if !policy.is_some_and(|policy| policy.covers(name)) {
            return Err(Error::not_found(format!("{guest} may not reach {name}")));
        }
        let (firewall, name) = (&net.devices.firewall, plain(name));
        // Written down first: what the kernel has and nobody can name ends with the next change of the policy.
        if !firewall.knows(slot, &name, addresses).await {
            let all = addresses.iter().map(|(address, _)| *address).collect();
            if net.leases.note_granted(slot, &name, all).await? > MAX_GRANTED {
                // Some are of addresses that it reaches no more.
                net.leases.keep_granted(slot, firewall.reached(slot).await).await?;
            }
        }
        firewall.allow(slot, &name, addresses).await
    }

    /// Notes that the VM with address `guest` asked for a name that its policy does not cover.
    pub fn denied(&self, guest: IpAddr, name: &str) {
        if let Some(slot) = self.0.plan.slot_of(guest) {
            self.0.denials().note(slot, &plain(name), Timestamp::now());
        }
    }
}

impl Inner {
    pub(super) async fn set_egress(&self, vm: VmId, egress: Egress) -> Result<(), Error> {
        let up = self.gate.read().await;
        ensure_up(*up)?;
        let _one = self.vm_lock(vm).lock().await;
        let held = self.held(vm)?;
        self.apply_egress(vm, &held, &egress).await
    }

    /// Changes the policy of a lease in the kernel and in the table. The firewall knows by itself what is no change.
    pub(super) async fn apply_egress(&self, vm: VmId, held: &Held, egress: &Egress) -> Result<(), Error> {
        let firewall = &self.devices.firewall;
        if *egress != Egress::None && !self.forwarding.load(Ordering::Acquire) {
            self.enable_forwarding().await?;
        }
        firewall.set_egress(held.slot, egress).await?;
        if held.egress == *egress {
            return Ok(());
        }
        if let Err(e) = self.leases.set_egress(vm, egress).await {
            // Back to what the table says.
            return Err(match firewall.set_egress(held.slot, &held.egress).await {
                Ok(()) => e,
                Err(undo) => Error { message: format!("{}; and then: {}", e.message, undo.message), ..e },
            });
        }
        let now = self.held(vm)?;
        self.vms().insert(vm, Held { egress: egress.clone(), ..now });
        // What stays too long does no harm: a name that the policy does not cover counts for nothing.
        let names = firewall.reached(held.slot).await;
        if let Err(error) = self.leases.keep_granted(held.slot, names).await {
            tracing::warn!(%vm, %error, "names that a VM does not reach any more are not struck out");
        }
        Ok(())
    }
}

fn plain(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allow(names: &[&str]) -> Egress {
        Egress::Allow { names: names.iter().map(|n| (*n).to_owned()).collect() }
    }

    #[test]
    fn names_are_checked_and_written_one_way() {
        let good = allow(&["Crates.IO.", "*.crates.io", "crates.io", "_dns.a-b.c"]).checked().unwrap();
        assert_eq!(good, allow(&["*.crates.io", "_dns.a-b.c", "crates.io"]));
        for bad in ["", "*", "a..b", "*.*.a", "a.*", "-a.b", "a b", "10.0.0.1", "a/b", &"a".repeat(64)] {
            assert!(allow(&[bad]).checked().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_request_for_a_lease_says_what_it_wants() {
        let ask = |nat, egress| AcquireLease { nat, egress, ..AcquireLease::new(VmId::new()) };
        let names = allow(&["a.b"]);
        for (request, known, expected) in [
            (ask(false, None), None, Egress::None),
            (ask(true, None), None, Egress::Open),
            (ask(false, None), Some(&Egress::Open), Egress::None),
            (ask(false, None), Some(&names), names.clone()),
            (ask(true, None), Some(&names), Egress::Open),
            (ask(false, Some(Egress::None)), Some(&names), Egress::None),
            (ask(true, Some(names.clone())), None, names.clone()),
        ] {
            assert_eq!(wanted(&request, known).unwrap(), expected, "{request:?} {known:?}");
        }
    }

    #[test]
    fn denials_are_counted_and_bounded() {
        let mut denials = Denials::default();
        let at = |s| Timestamp::from_second(s).unwrap();
        for n in 0..300 {
            denials.note(1, &format!("n{n}"), at(n));
        }
        denials.note(1, "n299", at(400));
        let kept = denials.of(1);
        assert_eq!(kept.len(), MAX_DENIED);
        assert!(kept.iter().all(|d| d.name != "n43") && kept.iter().any(|d| d.name == "n44"));
        assert_eq!(kept.iter().find(|d| d.name == "n299").map(|d| (d.count, d.last)), Some((2, at(400))));
        denials.forget(1);
        assert!(denials.of(1).is_empty());
    }
}
