//! The devices of slots: made, checked, repaired and removed, each together with its right to send.

use crate::{
    firewall::Firewall,
    forwarding,
    link::{Link, Links},
    plan::{Plan, Slot},
    tun,
};
use bothy_contract::{Code, Error};
use futures::future::join_all;
use rtnetlink::packet_route::link::InfoKind;
use std::sync::Arc;

/// Makes and removes TAPs.
#[derive(Debug, Clone)]
pub struct Devices {
    /// The plan that they follow.
    pub plan: Arc<Plan>,
    /// The netlink socket.
    pub links: Links,
    /// The rules.
    pub firewall: Arc<Firewall>,
}

impl Devices {
    /// Makes the bridge, or adopts ours.
    pub async fn bridge(&self) -> Result<u32, Error> {
        self.links.ensure_bridge(&self.plan).await
    }

    /// All TAPs that are ours by name, with their numbers.
    pub async fn list(&self) -> Result<Vec<(u32, Link)>, Error> {
        let links = self.links.list().await?;
        let ours = |link: Link| match link.kind {
            Some(InfoKind::Tun) => Some((self.plan.number_of_tap(&link.name)?, link)),
            _ => None,
        };
        Ok(links.into_values().filter_map(ours).collect())
    }

    /// Makes the TAPs of slots that have none, side by side; a result for each. One that could not be made whole is
    /// removed again.
    pub async fn make(&self, slots: &[u32]) -> Vec<(u32, Result<(), Error>)> {
        // The rules come first: from its first frame, a TAP can send as its slot only.
        if let Err(e) = self.firewall.add_slots(slots.iter().copied()).await {
            return slots.iter().map(|n| (*n, Err(e.clone()))).collect();
        }
        join_all(slots.iter().map(async |n| (*n, self.make_one(*n).await))).await
    }

    async fn make_one(&self, number: u32) -> Result<(), Error> {
        let slot = self.slot(number)?;
        let (tap, uid) = (slot.tap.clone(), slot.uid);
        blocking(move || {
            tun::create(&tap, uid).map_err(|e| Error::internal(format!("cannot make TAP {tap}"), &e))?;
            forwarding::no_ipv6(&tap)
        })
        .await?;
        let attached = async {
            let bridge = self.bridge_index().await?;
            self.links.fix_neighbours(&self.plan, &slot, bridge).await?;
            self.links.attach(&self.tap(&slot).await?, bridge).await
        };
        match attached.await {
            Ok(()) => Ok(()),
            Err(e) => match self.remove(number).await {
                Ok(()) => Err(e),
                Err(undo) => {
                    Err(Error { message: format!("{}; and then: {}", e.message, undo.message), ..e })
                }
            },
        }
    }

    /// Makes the device of a held slot right, whatever state it is in, without cutting off a VMM that has it open.
    pub async fn mend(&self, number: u32, found: Option<&Link>, bridge: u32) -> Result<(), Error> {
        let slot = self.slot(number)?;
        match found {
            Some(link) if link.belongs_to(&slot) => {
                self.firewall.add_slots([number]).await?;
                self.links.fix_neighbours(&self.plan, &slot, bridge).await?;
                if link.is_port_of(bridge) { Ok(()) } else { self.links.attach(link, bridge).await }
            }
            // A TAP of that name but another user's: no VMM of ours can have opened it.
            Some(link) => {
                self.links.delete(link).await?;
                self.make(&[number]).await.into_iter().try_for_each(|(_, made)| made)
            }
            None => self.make(&[number]).await.into_iter().try_for_each(|(_, made)| made),
        }
    }

    /// Removes a slot's TAP. A process that has it open is cut off for good: its descriptor stays with the removed
    /// device, whatever is made later under the same name. So the next TAP of the slot starts clean, with no queued
    /// frame, filter, offload setting or listener of the last VM.
    pub async fn remove(&self, number: u32) -> Result<(), Error> {
        let slot = self.slot(number)?;
        if let Some(link) = self.links.find(&slot.tap).await? {
            self.links.delete(&link).await?;
        }
        if let Some(bridge) = self.links.find(&self.plan.bridge).await? {
            self.links.forget_neighbours(&self.plan, &slot, bridge.index).await?;
        }
        self.firewall.remove_slot(number).await
    }

    /// Whether a process has the slot's TAP open. One that is not there is not in use.
    pub async fn in_use(&self, number: u32) -> Result<bool, Error> {
        let slot = self.slot(number)?;
        if self.links.find(&slot.tap).await?.is_none() {
            return Ok(false);
        }
        blocking(move || {
            tun::in_use(&slot.tap)
                .map_err(|e| Error::internal(format!("cannot look at TAP {}", slot.tap), &e))
        })
        .await
    }

    async fn bridge_index(&self) -> Result<u32, Error> {
        match self.links.find(&self.plan.bridge).await? {
            Some(link) => Ok(link.index),
            // Somebody has deleted it this instant.
            None => self.bridge().await,
        }
    }

    async fn tap(&self, slot: &Slot) -> Result<Link, Error> {
        let found = self.links.find(&slot.tap).await?;
        found.ok_or_else(|| {
            Error::new(Code::Unavailable, format!("TAP {} went away as soon as it was made", slot.tap))
        })
    }

    fn slot(&self, number: u32) -> Result<Slot, Error> {
        let none = || Error::new(Code::Internal, format!("subnet {} has no slot {number}", self.plan.cidr()));
        self.plan.slot(number).ok_or_else(none)
    }
}

async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(f).await.map_err(|e| Error::internal("a worker thread failed", &e))?
}
