//! Keeps the kernel's rules equal to what they should be: each change is one small transaction; where that fails, because
//! somebody flushed or edited our tables, one that replaces them whole.
//!
//! Under `allow`, memory knows which name an address was handed out for, so that a policy that changes keeps what it still
//! covers; the kernel knows until when. A new agent takes over the addresses that it finds in the kernel, and their names
//! from the lease table; one whose name is not there ends with the next change of the policy.

pub mod groups;
pub mod listing;

use crate::{
    nft::Nft,
    plan::Plan,
    ruleset::{self, Change, Gate, MAX_ADDRESSES, State},
};
use bothy_contract::{Code, Error, net::Egress};
use listing::DeniedPackets;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Shortest and longest time that an address can be connected to after its name was resolved. Shorter than the shortest
/// is of no use to a client that resolves first and connects then; a resolver of ours hands out no longer TTL.
pub const GRANT_TIMES: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// How many names are known of one address; one more is let through all the same, and forgotten.
const MAX_NAMES: usize = 8;
/// How many names a slot can have in all, one that several addresses have counted for each.
pub const MAX_GRANTED: usize = MAX_ADDRESSES * MAX_NAMES;

/// The names that addresses were handed out for, by slot and address.
pub type Granted = BTreeMap<u32, BTreeMap<IpAddr, BTreeSet<String>>>;

/// The rules in the kernel and what they should be.
#[derive(Debug)]
pub struct Firewall {
    plan: Arc<Plan>,
    nft: Arc<Mutex<Nft>>,
    /// Held across a transaction, so that state and kernel change in the same order.
    wanted: tokio::sync::Mutex<Wanted>,
}

/// An address that a slot under `allow` may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Grant {
    /// Until when it may be connected to; none for open connections only.
    until: Option<Instant>,
    /// What it was asked for as.
    names: BTreeSet<String>,
}

/// What a slot may reach, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Policy {
    Open,
    Allow(Arc<BTreeMap<IpAddr, Grant>>),
}

impl Policy {
    fn gate(&self) -> Gate {
        let now = Instant::now();
        let left = |g: &Grant| g.until.map_or(0, |u| u.saturating_duration_since(now).as_secs());
        match self {
            Self::Open => Gate::Open,
            Self::Allow(grants) => Gate::Allow(grants.iter().map(|(a, g)| (*a, left(g))).collect()),
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Wanted {
    slots: BTreeSet<u32>,
    policies: BTreeMap<u32, Policy>,
    peers: BTreeSet<(u32, u32)>,
    uplinks: BTreeSet<String>,
    uplinks6: BTreeSet<String>,
    guard6: bool,
    inside: BTreeSet<String>,
}

impl Wanted {
    fn state(&self) -> State {
        State {
            slots: self.slots.clone(),
            gates: self.policies.iter().map(|(n, p)| (*n, p.gate())).collect(),
            peers: self.peers.clone(),
            uplinks: self.uplinks.clone(),
            uplinks6: self.uplinks6.clone(),
            guard6: self.guard6,
            inside: self.inside.clone(),
        }
    }
}

impl Firewall {
    /// Loads libnftables. Changes nothing yet.
    pub fn open(plan: Arc<Plan>) -> Result<Self, Error> {
        let nft = Arc::new(Mutex::new(Nft::open()?));
        Ok(Self { plan, nft, wanted: tokio::sync::Mutex::default() })
    }

    /// Replaces our tables, or makes them, for the slots of leases and what they may reach. Addresses that slots under
    /// `allow` had stay, as the `granted` names. `peers` reach each other.
    pub async fn start(
        &self,
        held: &BTreeMap<u32, Egress>,
        granted: &Granted,
        peers: BTreeSet<(u32, u32)>,
        (uplinks, uplinks6): (BTreeSet<String>, BTreeSet<String>),
        guard6: bool,
    ) -> Result<(), Error> {
        let mut wanted = self.wanted.lock().await;
        let mut found = self.list().await.map(|text| listing::addresses(&text)).unwrap_or_default();
        let now = Instant::now();
        let policies = held.iter().filter_map(|(slot, egress)| {
            let grants = found.remove(slot).unwrap_or_default().into_iter().map(|(address, left)| {
                let known = granted.get(slot).and_then(|of| of.get(&address)).into_iter().flatten();
                let names = known.filter(|name| egress.covers(name)).cloned().collect();
                (address, Grant { until: left.map(|left| now + left), names })
            });
            let policy = match egress {
                Egress::None => return None,
                Egress::Open => Policy::Open,
                Egress::Allow { .. } => Policy::Allow(Arc::new(grants.collect())),
            };
            Some((*slot, policy))
        });
        let new = Wanted {
            policies: policies.collect(),
            slots: held.keys().copied().collect(),
            peers,
            uplinks,
            uplinks6,
            guard6,
            inside: BTreeSet::new(),
        };
        self.replace(&new).await?;
        *wanted = new;
        Ok(())
    }

    /// These slots may send from now on.
    pub async fn add_slots(&self, slots: impl IntoIterator<Item = u32>) -> Result<(), Error> {
        let slots: BTreeSet<u32> = slots.into_iter().collect();
        let plan = |wanted: &mut Wanted| {
            let new: BTreeSet<u32> = slots.difference(&wanted.slots).copied().collect();
            wanted.slots.extend(&new);
            (!new.is_empty()).then_some(Change::AddSlots(new))
        };
        self.change(plan).await
    }

    /// This slot may not send any more, and reaches nobody.
    pub async fn remove_slot(&self, slot: u32) -> Result<(), Error> {
        self.set_egress(slot, &Egress::None).await?;
        self.set_peers(slot, &BTreeSet::new()).await?;
        self.change(|wanted| wanted.slots.remove(&slot).then(|| Change::RemoveSlots([slot].into()))).await
    }

    /// What a slot may reach, from now on, in one transaction. Between two policies of names, addresses stay whose names
    /// the new one covers.
    pub async fn set_egress(&self, slot: u32, egress: &Egress) -> Result<(), Error> {
        self.change(|wanted| {
            let old = wanted.policies.get(&slot).cloned();
            let new = match egress {
                Egress::None => None,
                Egress::Open => Some(Policy::Open),
                Egress::Allow { .. } => {
                    let mut grants = match &old {
                        Some(Policy::Allow(grants)) => (**grants).clone(),
                        _ => BTreeMap::new(),
                    };
                    for grant in grants.values_mut() {
                        grant.names.retain(|name| egress.covers(name));
                    }
                    grants.retain(|_, grant| !grant.names.is_empty());
                    Some(Policy::Allow(Arc::new(grants)))
                }
            };
            if old == new {
                return None;
            }
            match &new {
                Some(policy) => wanted.policies.insert(slot, policy.clone()),
                None => wanted.policies.remove(&slot),
            };
            let gate = |policy: Option<Policy>| policy.map(|p| p.gate());
            Some(Change::Gate { slot, from: gate(old), to: gate(new) })
        })
        .await
    }

    /// Whether all of the addresses are known as `name`'s, or as so many others' that one more is not kept.
    pub async fn knows(&self, slot: u32, name: &str, addresses: &[(IpAddr, Duration)]) -> bool {
        let wanted = self.wanted.lock().await;
        let Some(Policy::Allow(grants)) = wanted.policies.get(&slot) else { return false };
        addresses.iter().all(|(address, _)| {
            grants.get(address).is_some_and(|g| g.names.contains(name) || g.names.len() >= MAX_NAMES)
        })
    }

    /// Lets a slot reach the addresses of `name`, each for its time to live. Returns once the kernel knows. A slot that
    /// is not under `allow` is fine: it reaches everything, or nothing by names.
    ///
    /// # Errors
    /// `resource_exhausted` for a slot that reaches [`MAX_ADDRESSES`] already.
    pub async fn allow(&self, slot: u32, name: &str, addresses: &[(IpAddr, Duration)]) -> Result<(), Error> {
        let now = Instant::now();
        let mut full = false;
        self.change(|wanted| {
            let Some(Policy::Allow(grants)) = wanted.policies.get_mut(&slot) else { return None };
            let grants = Arc::make_mut(grants);
            let mut new = BTreeMap::new();
            for (address, ttl) in addresses {
                let ttl = (*ttl).clamp(GRANT_TIMES.0, GRANT_TIMES.1);
                if !grants.contains_key(address) && grants.len() >= MAX_ADDRESSES {
                    grants.retain(|_, g| g.until.is_some_and(|until| until > now));
                    if grants.len() >= MAX_ADDRESSES {
                        full = true;
                        break;
                    }
                }
                let grant = grants.entry(*address).or_default();
                if grant.names.len() < MAX_NAMES {
                    grant.names.insert(name.to_owned());
                }
                // One that runs on as long as is asked for, but for a second, needs no transaction.
                if grant.until.is_none_or(|until| until + Duration::from_secs(1) < now + ttl) {
                    grant.until = Some(now + ttl);
                    new.insert(*address, ttl.as_secs());
                }
            }
            (!new.is_empty()).then_some(Change::Allow(slot, new))
        })
        .await?;
        if full {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("slot {slot} reaches {MAX_ADDRESSES} addresses already, which is the most"),
            ));
        }
        Ok(())
    }

    /// The names that a slot under `allow` has resolved, and their addresses.
    pub async fn reached(&self, slot: u32) -> BTreeMap<String, BTreeSet<IpAddr>> {
        let wanted = self.wanted.lock().await;
        let mut names: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        if let Some(Policy::Allow(grants)) = wanted.policies.get(&slot) {
            for (address, grant) in grants.iter() {
                for name in &grant.names {
                    names.entry(name.clone()).or_default().insert(*address);
                }
            }
        }
        names
    }

    /// What guests sent and the policy refused, as the kernel counted it.
    pub async fn denied(&self) -> Result<Vec<DeniedPackets>, Error> {
        let _alone = self.wanted.lock().await;
        self.list().await.map(|text| listing::denied(&text)).map_err(|why| self.failed(&why))
    }

    /// Takes away what was counted of the guest of `slot`, which is another's soon: what it was denied, and its questions.
    pub async fn forget_counts(&self, slot: u32) -> Result<(), Error> {
        let _alone = self.wanted.lock().await;
        let text = self.list().await.map_err(|why| self.failed(&why))?;
        let of_slot = |denied: &DeniedPackets| self.plan.slot_of(denied.guest) == Some(slot);
        for DeniedPackets { guest, to, .. } in listing::denied(&text).into_iter().filter(of_slot) {
            // One that has expired since the listing is not there any more, which is all that is wanted.
            if let Err(why) = self.run(ruleset::forget_denied(&self.plan, guest, to)).await {
                tracing::debug!(%guest, %to, %why, "a denial has gone by itself");
            }
        }
        let place = self.plan.slot(slot).into_iter().map(|slot| IpAddr::V4(slot.address));
        for guest in place.chain(self.plan.address6(slot).map(IpAddr::V6)) {
            if let Err(why) = self.run(ruleset::forget_asked(&self.plan, guest)).await {
                tracing::debug!(%guest, %why, "it has not asked for a name in the last minute");
            }
        }
        Ok(())
    }

    /// The interfaces on which we turned IPv4 forwarding on.
    pub async fn set_uplinks(&self, uplinks: &BTreeSet<String>) -> Result<(), Error> {
        self.names(uplinks, |w| &mut w.uplinks, Change::AddUplinks, Change::RemoveUplinks).await
    }

    /// The interfaces on which we turned IPv6 forwarding on.
    pub async fn set_uplinks6(&self, uplinks: &BTreeSet<String>) -> Result<(), Error> {
        self.names(uplinks, |w| &mut w.uplinks6, Change::AddUplinks6, Change::RemoveUplinks6).await
    }

    /// The interfaces to networks inside the host.
    pub async fn set_inside(&self, inside: &BTreeSet<String>) -> Result<(), Error> {
        self.names(inside, |w| &mut w.inside, Change::AddInside, Change::RemoveInside).await
    }

    /// Whether IPv6 forwarding of the whole host is on by us, and so kept to guests.
    pub async fn set_guard6(&self, guard6: bool) -> Result<(), Error> {
        let mut wanted = self.wanted.lock().await;
        if wanted.guard6 == guard6 {
            return Ok(());
        }
        let new = Wanted { guard6, ..wanted.clone() };
        // A rule, not an element; it happens once or twice in the life of a host.
        self.replace(&new).await?;
        *wanted = new;
        Ok(())
    }

    async fn names(
        &self,
        wanted: &BTreeSet<String>,
        of: impl Fn(&mut Wanted) -> &mut BTreeSet<String>,
        add: impl FnOnce(BTreeSet<String>) -> Change,
        remove: impl FnOnce(BTreeSet<String>) -> Change,
    ) -> Result<(), Error> {
        let wanted: BTreeSet<String> = wanted.iter().filter(|n| ruleset::is_plain(n)).cloned().collect();
        self.change(|state| {
            let new: BTreeSet<String> = wanted.difference(of(state)).cloned().collect();
            of(state).extend(new.iter().cloned());
            (!new.is_empty()).then(|| add(new))
        })
        .await?;
        self.change(|state| {
            let old: BTreeSet<String> = of(state).difference(&wanted).cloned().collect();
            of(state).retain(|name| !old.contains(name));
            (!old.is_empty()).then(|| remove(old))
        })
        .await
    }

    /// Puts our tables back where they are not there any more; says whether it had to.
    pub async fn repair(&self) -> Result<bool, Error> {
        let wanted = self.wanted.lock().await;
        let tables = self.run("list tables".to_owned()).await.unwrap_or_default();
        if listing::tables_named(&tables, &self.plan.bridge) == 2 {
            return Ok(false);
        }
        self.replace(&wanted).await?;
        Ok(true)
    }

    /// Removes our tables.
    pub async fn remove(&self) -> Result<(), Error> {
        let mut wanted = self.wanted.lock().await;
        self.run(ruleset::removal(&self.plan)).await.map_err(|why| self.failed(&why))?;
        *wanted = Wanted::default();
        Ok(())
    }

    async fn change(&self, plan: impl FnOnce(&mut Wanted) -> Option<Change>) -> Result<(), Error> {
        let mut wanted = self.wanted.lock().await;
        let mut new = wanted.clone();
        let Some(change) = plan(&mut new) else {
            // What memory alone keeps, such as one more name of an address.
            *wanted = new;
            return Ok(());
        };
        if let Err(why) = self.run(ruleset::change(&self.plan, &change)).await {
            tracing::warn!(table = %self.plan.bridge, %why, "somebody changed our nftables tables; replacing them");
            self.replace(&new).await?;
        }
        *wanted = new;
        Ok(())
    }

    async fn replace(&self, wanted: &Wanted) -> Result<(), Error> {
        let text = ruleset::ruleset(&self.plan, &wanted.state());
        self.run(text).await.map(drop).map_err(|why| self.failed(&why))
    }

    async fn list(&self) -> Result<String, String> {
        self.run(format!("list table inet {}", self.plan.bridge)).await
    }

    async fn run(&self, commands: String) -> Result<String, String> {
        let nft = Arc::clone(&self.nft);
        // A panic inside leaves a context that works: it is C's state, not ours.
        let run = move || nft.lock().unwrap_or_else(PoisonError::into_inner).run(&commands);
        tokio::task::spawn_blocking(run).await.map_err(|e| e.to_string())?
    }

    fn failed(&self, why: &str) -> Error {
        let error = Error::new(
            Code::Internal,
            format!("cannot change the nftables tables {}: {why}", self.plan.bridge),
        );
        match why.contains("Operation not permitted") {
            true => error.hint("the net-agent needs CAP_NET_ADMIN: start it as root or by its unit"),
            false => error,
        }
    }
}
