//! Which slots reach each other.

use super::Firewall;
use crate::ruleset::Change;
use bothy_contract::Error;
use std::collections::BTreeSet;

/// Two slots that reach each other, the lower one first: a pair is in a set once.
pub fn pair(a: u32, b: u32) -> (u32, u32) {
    (a.min(b), a.max(b))
}

impl Firewall {
    /// `slot` and each of `peers` reach each other from now on, and it and no others, in one transaction.
    pub async fn set_peers(&self, slot: u32, peers: &BTreeSet<u32>) -> Result<(), Error> {
        self.change(|wanted| {
            let of_slot = |(a, b): &&(u32, u32)| *a == slot || *b == slot;
            let now: BTreeSet<(u32, u32)> = wanted.peers.iter().filter(of_slot).copied().collect();
            let then = peers.iter().filter(|peer| **peer != slot).map(|peer| pair(slot, *peer)).collect();
            let add: BTreeSet<(u32, u32)> = &then - &now;
            let remove: BTreeSet<(u32, u32)> = &now - &then;
            wanted.peers.retain(|pair| !remove.contains(pair));
            wanted.peers.extend(&add);
            (!add.is_empty() || !remove.is_empty()).then_some(Change::Peers { add, remove })
        })
        .await
    }
}
