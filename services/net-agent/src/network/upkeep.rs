//! The pool filled, the kernel compared with what should be there and mended, and all of it taken down.

use super::Inner;
use crate::{
    devices::Devices,
    forwarding, forwarding6,
    link::{Link, Links, neighbours_of},
    plan::{Plan, Slot},
    slots::Slots,
};
use bothy_contract::{Code, Error};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

/// How long nobody must take a slot before the pool is filled up again, and how often that is waited for.
const QUIET: Duration = Duration::from_millis(30);
const QUIET_TRIES: u32 = 10;

impl Inner {
    /// Waits until nobody has taken a slot for a moment, or none is left: to make devices keeps the kernel's locks busy, and whoever
    /// takes a warm slot would wait for them.
    pub(super) async fn quiet(&self) {
        for _ in 0..QUIET_TRIES {
            let dry = self.slots().warm() == 0;
            if dry || tokio::time::timeout(QUIET, self.wanted.notified()).await.is_err() {
                return;
            }
        }
    }

    pub(super) async fn refill(&self) -> Result<(), Error> {
        let _one = self.refilling.lock().await;
        let up = self.gate.read().await;
        if !*up {
            return Ok(());
        }
        let missing = self.slots().reserve_missing(self.plan.pool_size);
        if missing.is_empty() {
            return Ok(());
        }
        let mut failure = Ok(());
        for (number, made) in self.devices.make(&missing).await {
            match made {
                Ok(()) => self.slots().made(number),
                Err(e) => {
                    self.slots().unmake(number);
                    failure = Err(e);
                }
            }
        }
        failure
    }

    pub(super) async fn check(&self) -> Result<(), Error> {
        let shared = self.gate.read().await;
        if !*shared {
            return Ok(());
        }
        if self.devices.firewall.repair().await? {
            tracing::warn!(table = %self.plan.bridge, "somebody removed our nftables tables; they are back");
        }
        forwarding::refresh(&self.leases, &self.devices.firewall).await?;
        self.keep_forwarding().await?;
        self.restore_ports();
        if self.wrong().await?.is_empty() {
            return Ok(());
        }
        drop(shared);
        // Alone, what is wrong is not just being made or removed.
        let up = self.gate.write().await;
        if !*up {
            return Ok(());
        }
        let wrong = self.wrong().await?;
        let bridge = self.devices.bridge().await?;
        self.keep_forwarding().await?;
        for number in wrong {
            tracing::warn!(slot = number, "somebody changed a device of ours; mending it");
            let found = self.devices.list().await?.into_iter().find(|(n, _)| *n == number);
            self.devices.mend(number, found.as_ref().map(|(_, link)| link), bridge).await?;
        }
        Ok(())
    }

    /// The slots whose device is not as it should be. Without a bridge, that is all of them.
    async fn wrong(&self) -> Result<Vec<u32>, Error> {
        let links = self.devices.links.list().await?;
        let bridge = links.get(&self.plan.bridge).map(|link| link.index);
        let (fixed, proxied) = match bridge {
            Some(bridge) => (
                self.devices.links.fixed_neighbours(bridge).await?,
                self.devices.links.proxied_neighbours(bridge).await?,
            ),
            None => Default::default(),
        };
        let present = self.slots().present();
        let known = |slot: &Slot| {
            neighbours_of(&self.plan, slot).all(|a| fixed.get(&a).is_some_and(|mac| *mac == slot.mac.0))
                && self.plan.address6(slot.number).is_none_or(|a| proxied.contains(&a.into()))
        };
        let right = |slot: &Slot| {
            links
                .get(&slot.tap)
                .zip(bridge)
                .is_some_and(|(l, bridge)| l.belongs_to(slot) && l.is_port_of(bridge) && known(slot))
        };
        Ok(present.into_iter().filter(|n| self.plan.slot(*n).is_none_or(|slot| !right(&slot))).collect())
    }

    pub(super) async fn teardown(&self) -> Result<(), Error> {
        let mut up = self.gate.write().await;
        let vms = self.vms().clone();
        for (vm, held) in &vms {
            if self.devices.in_use(held.slot).await? {
                return Err(Error::new(
                    Code::FailedPrecondition,
                    format!("VM {vm} is running: a process has its TAP {} open", self.lease(held)?.tap),
                )
                .hint("stop all VMs first, with `bothy vm stop`"));
            }
        }
        // From here on the network counts as down, so that nothing is mended or made while it goes.
        *up = false;
        let mut failures: Vec<String> = Vec::new();
        let mut note = |done: Result<(), Error>| failures.extend(done.err().map(|e| e.message));
        let links = &self.devices.links;
        for (_, link) in self.devices.list().await? {
            note(links.delete(&link).await);
        }
        if let Some(bridge) = links.find(&self.plan.bridge).await? {
            note(links.delete(&bridge).await);
        }
        note(forwarding::restore(&self.leases).await);
        note(forwarding6::restore(&self.leases).await);
        for held in vms.values() {
            self.publisher.clear(held.slot);
        }
        note(self.devices.firewall.remove().await);
        *self.slots() = Slots::new(self.plan.capacity(), vms.values().map(|held| held.slot), []);
        if failures.is_empty() {
            return Ok(());
        }
        // Asking again tries the rest.
        Err(Error::new(Code::Internal, format!("cannot remove all of the network: {}", failures.join("; "))))
    }
}

/// Sorts out the TAPs of an earlier agent: held ones are mended, free ones whole and open to nobody are warm, all others
/// are removed. Gives back the warm ones.
pub(super) async fn adopt(devices: &Devices, held: &BTreeSet<u32>, bridge: u32) -> Result<Vec<u32>, Error> {
    let mut found: BTreeMap<u32, Link> = devices.list().await?.into_iter().collect();
    for number in held {
        let link = found.remove(number);
        devices.mend(*number, link.as_ref(), bridge).await?;
    }
    let mut warm = Vec::new();
    let most = usize::try_from(devices.plan.pool_size).unwrap_or(usize::MAX);
    for (number, link) in found {
        let whole =
            devices.plan.slot(number).is_some_and(|slot| link.belongs_to(&slot)) && link.is_port_of(bridge);
        if whole && warm.len() < most && !devices.in_use(number).await? {
            devices.mend(number, Some(&link), bridge).await?;
            warm.push(number);
        } else {
            tracing::info!(tap = %link.name, "removing a TAP that belongs to no VM");
            devices.links.delete(&link).await?;
        }
    }
    devices.firewall.add_slots(warm.iter().copied()).await?;
    Ok(warm)
}

/// The route of the host that overlaps a plan's subnet, as text: its own traffic there would go to the bridge.
pub(super) async fn overlap(plan: &Plan, links: &Links) -> Result<Option<String>, Error> {
    let names: BTreeMap<u32, String> = links.list().await?.into_values().map(|l| (l.index, l.name)).collect();
    for route in links.routes().await? {
        let (IpAddr::V4(address), prefix) = route.destination else { continue };
        let by: Vec<&str> = route.links.iter().filter_map(|i| names.get(i)).map(String::as_str).collect();
        if prefix == 0 || by.contains(&plan.bridge.as_str()) || !plan.overlaps(address, prefix) {
            continue;
        }
        return Ok(Some(format!("{address}/{prefix} by {}", by.join(", "))));
    }
    Ok(None)
}
