//! Keeps the kernel's rules equal to a [`State`]: each change is one small transaction; where that fails, because somebody
//! flushed or edited our tables, one that replaces them whole.

use crate::{
    nft::Nft,
    plan::Plan,
    ruleset::{self, Change, State, Transaction},
};
use bothy_contract::{Code, Error};
use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

/// The rules in the kernel and what they should be.
#[derive(Debug)]
pub struct Firewall {
    plan: Arc<Plan>,
    nft: Arc<Mutex<Nft>>,
    /// Held across a transaction, so that state and kernel change in the same order.
    state: tokio::sync::Mutex<State>,
}

impl Firewall {
    /// Loads libnftables. Changes nothing yet.
    pub fn open(plan: Arc<Plan>) -> Result<Self, Error> {
        let nft = Arc::new(Mutex::new(Nft::open()?));
        Ok(Self { plan, nft, state: tokio::sync::Mutex::default() })
    }

    /// Replaces our tables, or makes them.
    pub async fn replace(&self, wanted: State) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        self.apply(ruleset::ruleset(&self.plan, &wanted)).await.map_err(|why| self.failed(&why))?;
        *state = wanted;
        Ok(())
    }

    /// These slots may send from now on.
    pub async fn add_slots(&self, slots: impl IntoIterator<Item = u32>) -> Result<(), Error> {
        let slots: BTreeSet<u32> = slots.into_iter().collect();
        let plan = |state: &mut State| {
            let new: BTreeSet<u32> = slots.difference(&state.slots).copied().collect();
            state.slots.extend(&new);
            (!new.is_empty()).then_some(Change::AddSlots(new))
        };
        self.change(plan).await
    }

    /// This slot may not send any more.
    pub async fn remove_slot(&self, slot: u32) -> Result<(), Error> {
        self.change(|state| state.slots.remove(&slot).then(|| Change::RemoveSlots([slot].into()))).await
    }

    /// Whether the traffic of `address` may leave.
    pub async fn set_nat(&self, address: Ipv4Addr, enabled: bool) -> Result<(), Error> {
        self.change(|state| match enabled {
            true => state.nat.insert(address).then_some(Change::AddNat(address)),
            false => state.nat.remove(&address).then_some(Change::RemoveNat(address)),
        })
        .await
    }

    /// The interfaces on which we turned forwarding on.
    pub async fn set_uplinks(&self, uplinks: &BTreeSet<String>) -> Result<(), Error> {
        self.change(|state| {
            let new: BTreeSet<String> = uplinks.difference(&state.uplinks).cloned().collect();
            state.uplinks.extend(new.iter().cloned());
            (!new.is_empty()).then_some(Change::AddUplinks(new))
        })
        .await?;
        self.change(|state| {
            let old: BTreeSet<String> = state.uplinks.difference(uplinks).cloned().collect();
            state.uplinks.retain(|name| !old.contains(name));
            (!old.is_empty()).then_some(Change::RemoveUplinks(old))
        })
        .await
    }

    /// Puts our tables back where they are not there any more; says whether it had to.
    pub async fn repair(&self) -> Result<bool, Error> {
        let state = self.state.lock().await;
        let tables = self.run(r#"{"nftables":[{"list":{"tables":null}}]}"#.to_owned()).await;
        let tables: serde_json::Value =
            tables.ok().and_then(|t| serde_json::from_str(&t).ok()).unwrap_or_default();
        let name = |object: &serde_json::Value| {
            Some(object.get("table")?.get("name")?.as_str()? == self.plan.bridge)
        };
        let all = tables.get("nftables").and_then(serde_json::Value::as_array);
        if all.is_some_and(|all| all.iter().filter_map(name).filter(|ours| *ours).count() == 2) {
            return Ok(false);
        }
        self.apply(ruleset::ruleset(&self.plan, &state)).await.map_err(|why| self.failed(&why))?;
        Ok(true)
    }

    /// Removes our tables.
    pub async fn remove(&self) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        self.apply(ruleset::removal(&self.plan)).await.map_err(|why| self.failed(&why))?;
        *state = State::default();
        Ok(())
    }

    async fn change(&self, plan: impl FnOnce(&mut State) -> Option<Change>) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        let mut wanted = state.clone();
        let Some(change) = plan(&mut wanted) else { return Ok(()) };
        if let Err(why) = self.apply(ruleset::change(&self.plan, &change)).await {
            tracing::warn!(table = %self.plan.bridge, %why, "somebody changed our nftables tables; replacing them");
            self.apply(ruleset::ruleset(&self.plan, &wanted)).await.map_err(|why| self.failed(&why))?;
        }
        *state = wanted;
        Ok(())
    }

    async fn apply(&self, transaction: Transaction) -> Result<(), String> {
        let json = serde_json::to_string(&transaction).map_err(|e| e.to_string())?;
        self.run(json).await.map(drop)
    }

    async fn run(&self, json: String) -> Result<String, String> {
        let nft = Arc::clone(&self.nft);
        // A panic inside leaves a context that works: it is C's state, not ours.
        let run = move || nft.lock().unwrap_or_else(PoisonError::into_inner).run(&json);
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
