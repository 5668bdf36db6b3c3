//! Groups: which VMs reach each other, as asked for, kept and applied.

use super::{Inner, Network, ensure_up};
use crate::{firewall::groups::pair, forwarding, forwarding6, leases::Held};
use bothy_contract::{
    Code, Error, GroupName, VmId,
    net_group::{MAX_MEMBERS, Membership, check_groups},
};
use std::collections::{BTreeMap, BTreeSet};

/// All pairs of slots whose VMs share a group.
pub(super) fn pairs(vms: &BTreeMap<VmId, Held>) -> BTreeSet<(u32, u32)> {
    let mut members: BTreeMap<(u32, &GroupName), Vec<u32>> = BTreeMap::new();
    for held in vms.values() {
        for name in &held.groups.names {
            members.entry((held.groups.owner, name)).or_default().push(held.slot);
        }
    }
    let each = |slots: &Vec<u32>| -> Vec<(u32, u32)> {
        let with = |(n, a): (usize, &u32)| -> Vec<(u32, u32)> {
            slots.iter().skip(n + 1).map(|b| pair(*a, *b)).collect()
        };
        slots.iter().enumerate().flat_map(with).collect()
    };
    members.values().flat_map(each).collect()
}

impl Network {
    /// Puts `vm` into these groups and no others.
    ///
    /// # Errors
    /// `resource_exhausted` where they are too many, or one of them is full.
    pub async fn set_groups(&self, vm: VmId, groups: Membership) -> Result<(), Error> {
        self.whole(move |net| async move { net.0.set_groups(vm, groups).await }).await
    }
}

impl Inner {
    async fn set_groups(&self, vm: VmId, groups: Membership) -> Result<(), Error> {
        let up = self.gate.read().await;
        ensure_up(*up)?;
        let _one = self.vm_lock(vm).lock().await;
        let held = self.held(vm)?;
        self.apply_groups(vm, &held, &groups).await
    }

    /// Changes the groups of a lease in the kernel and in the table.
    pub(super) async fn apply_groups(&self, vm: VmId, held: &Held, groups: &Membership) -> Result<(), Error> {
        check_groups(&groups.names)?;
        // One change at a time: two VMs that join at once see each other.
        let _alone = self.grouping.lock().await;
        let others: BTreeMap<VmId, Held> =
            self.vms().iter().filter(|(id, _)| **id != vm).map(|(id, held)| (*id, held.clone())).collect();
        if held.groups != *groups {
            room_for(&held.groups, groups, &others)?;
        }
        if !groups.names.is_empty() {
            self.enable_between().await?;
        }
        let peers = |of: &Membership| -> BTreeSet<u32> {
            others.values().filter(|other| of.meets(&other.groups)).map(|other| other.slot).collect()
        };
        let firewall = &self.devices.firewall;
        firewall.set_peers(held.slot, &peers(groups)).await?;
        if held.groups == *groups {
            return Ok(());
        }
        if let Err(e) = self.leases.set_groups(vm, groups).await {
            // Back to what the table says.
            return Err(match firewall.set_peers(held.slot, &peers(&held.groups)).await {
                Ok(()) => e,
                Err(undo) => Error { message: format!("{}; and then: {}", e.message, undo.message), ..e },
            });
        }
        let now = self.held(vm)?;
        self.vms().insert(vm, Held { groups: groups.clone(), ..now });
        Ok(())
    }

    pub(super) fn anybody_has_peers(&self) -> bool {
        self.vms().values().any(|held| !held.groups.names.is_empty())
    }

    /// Lets the host stand in for guests on the bridge, whose ports do not see each other, and forward between them. What
    /// is forwarded the rules say.
    pub(super) async fn enable_between(&self) -> Result<(), Error> {
        forwarding::between(&self.plan.bridge)?;
        forwarding6::between(&self.plan, &self.devices.links, &self.leases, &self.devices.firewall).await
    }

    /// Sees to the forwarding that the leases need.
    pub(super) async fn keep_forwarding(&self) -> Result<(), Error> {
        if self.anybody_goes_out() {
            self.enable_forwarding().await?;
        }
        if self.anybody_has_peers() {
            self.enable_between().await?;
        }
        Ok(())
    }
}

/// Whether the groups that a VM of `was` joins have room for it.
fn room_for(was: &Membership, groups: &Membership, others: &BTreeMap<VmId, Held>) -> Result<(), Error> {
    for name in &groups.names {
        if was.owner == groups.owner && was.names.contains(name) {
            continue;
        }
        let one = Membership { owner: groups.owner, names: [name.clone()].into() };
        if others.values().filter(|other| other.groups.meets(&one)).count() >= MAX_MEMBERS {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("group {name} has {MAX_MEMBERS} VMs, which is the most"),
            )
            .hint("have one leave it with `bothy vm set <vm> --no-group`, or use another group"));
        }
    }
    Ok(())
}
