//! A change of a VM. Disks grow at once, under a running guest too, and never shrink; what the guest may reach, its published ports
//! and its groups change at once; processors and memory wait for the next start, since neither VMM can give them to a running guest.
//!
//! ```text
//!   grow_disks -> resize_vmm -> grow_guest -> set_egress -> publish_ports -> set_groups -> save
//! ```
//! What a stage has done is in the row when it ends; a growth that a later stage's failure leaves behind is a larger disk,
//! told as such, for no disk can shrink.

use super::Agent;
use crate::{
    phase::{Live, Phase},
    store::Vm,
};
use bothy_contract::{
    Error, GroupName, VmId,
    image::{GetDiskUsage, GrowDisks},
    methods::{ImageDisksGrow, ImageDisksUsage, NetEgressSet, NetGroupsSet, NetPortsPublish},
    net::{Egress, Publish, PublishPorts, SetEgress},
    net_group::{Membership, SetGroups, check_groups},
    vm::{Idle, SetVm, Shape},
};
use bothy_ops::Graph;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What is to be other than it is; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Change {
    cpus: Option<u32>,
    memory_mib: Option<u64>,
    work_mib: Option<u64>,
    system_mib: Option<u64>,
    egress: Option<Egress>,
    publish: Option<Vec<Publish>>,
    #[serde(default)]
    groups: Option<BTreeSet<GroupName>>,
    #[serde(default)]
    idle: Option<Idle>,
}

impl From<SetVm> for Change {
    fn from(ask: SetVm) -> Self {
        let SetVm { vm: _, cpus, memory_mib, work_mib, system_mib, nat, egress, publish, groups, idle } = ask;
        let egress = egress.or(nat.map(|nat| if nat { Egress::Open } else { Egress::None }));
        Self { cpus, memory_mib, work_mib, system_mib, egress, publish, groups, idle }
    }
}

impl Change {
    /// What `shape` becomes.
    fn of(&self, shape: &Shape) -> Shape {
        Shape {
            cpus: self.cpus.unwrap_or(shape.cpus),
            memory_mib: self.memory_mib.unwrap_or(shape.memory_mib),
            work_mib: self.work_mib.unwrap_or(shape.work_mib),
            system_mib: self.system_mib.unwrap_or(shape.system_mib),
        }
    }

    fn grows(&self) -> bool {
        self.work_mib.is_some() || self.system_mib.is_some()
    }
}

/// Whether `vm` can become that.
///
/// # Errors
/// Nothing is to be changed, a disk would shrink, or the shape is none that a VM can have.
pub(crate) fn check(vm: &Vm, change: &Change) -> Result<(), Error> {
    let (name, shape) = (&vm.facts.name, &vm.facts.shape);
    if *change == Change::default() {
        return Err(Error::invalid(format!("nothing of VM {name} is to be changed")).hint(
            "name what: `--cpus`, `--memory`, `--disk`, `--system-disk`, `--egress`, `--publish`, `--group` or `--idle`",
        ));
    }
    change.idle.map_or(Ok(()), |idle| idle.check())?;
    change.groups.as_ref().map_or(Ok(()), check_groups)?;
    let to = change.of(shape);
    to.check()?;
    for (what, has, wants) in
        [("work disk", shape.work_mib, to.work_mib), ("system disk", shape.system_mib, to.system_mib)]
    {
        if wants < has {
            return Err(Error::invalid(format!(
                "the {what} of VM {name} has {has} MiB and cannot shrink to {wants} MiB"
            ))
            .hint("disks only grow; a smaller one takes a new VM"));
        }
    }
    Ok(())
}

/// Adds the stages of a change to `g`.
pub(crate) fn add(g: &mut Graph, agent: &Agent, vm: VmId, change: Change) {
    g.not_cancellable();
    let (a, c) = (agent.clone(), change.clone());
    let grown = g.stage("grow_disks", (), move |_, ()| async move {
        let Shape { work_mib, system_mib, .. } = c.of(&a.vm(vm).await?.facts.shape);
        if c.grows() && a.placed(vm).await?.is_some() {
            a.bus.call::<ImageDisksGrow>(&GrowDisks { vm, work_mib, system_mib }).await?;
        }
        a.update(vm, move |row| {
            row.facts.shape = Shape { work_mib, system_mib, ..row.facts.shape.clone() };
            Ok(())
        })
        .await
    });
    let (a, grows) = (agent.clone(), change.grows());
    let resized = g.stage("resize_vmm", grown, move |cx, ()| async move {
        let Some(live) = living_if(&a, vm, grows).await? else { return Ok(()) };
        let shape = a.vm(vm).await?.facts.shape;
        let of = GetDiskUsage { vms: vec![vm] };
        let disks = a.bus.call::<ImageDisksUsage>(&of).await?.disks;
        let own_root = disks.get(&vm).is_some_and(|disks| disks.own_root);
        let root = if own_root { "rootfs" } else { "system" };
        for (serial, mib) in [("work", shape.work_mib), (root, shape.system_mib)] {
            let verb = live.driver()?.resize_disk(serial, mib << 20);
            live.place.holder(&a.config, vm).perform(&verb).await?;
        }
        cx.note("the guest sees the new sizes");
        Ok(())
    });
    let a = agent.clone();
    let used = g.stage("grow_guest", resized, move |cx, ()| async move {
        let Some(live) = living_if(&a, vm, grows).await? else { return Ok(()) };
        let Shape { work_mib, system_mib, .. } = a.vm(vm).await?.facts.shape;
        live.guest(&a.config, vm).grow_disks(work_mib, system_mib).await?;
        a.update(vm, move |row| {
            let Shape { work_mib, system_mib, .. } = row.facts.shape;
            if let Phase::Live(live) = &mut row.phase {
                live.vmm.booted = Shape { work_mib, system_mib, ..live.vmm.booted.clone() };
            }
            Ok(())
        })
        .await?;
        cx.note("the guest's file systems have grown");
        Ok(())
    });
    let (a, egress) = (agent.clone(), change.egress.clone());
    let routed = g.stage("set_egress", used, move |_, ()| async move {
        let Some(egress) = egress else { return Ok(()) };
        if a.placed(vm).await?.is_some() {
            a.bus.call::<NetEgressSet>(&SetEgress { vm, egress: egress.clone() }).await?;
        }
        a.update(vm, move |row| {
            row.facts.egress = egress;
            Ok(())
        })
        .await
    });
    let (a, ports) = (agent.clone(), change.publish.clone());
    let published = g.stage("publish_ports", routed, move |_, ()| async move {
        let Some(ports) = ports else { return Ok(()) };
        if a.placed(vm).await?.is_some() {
            a.bus.call::<NetPortsPublish>(&PublishPorts { vm, ports: ports.clone() }).await?;
        }
        a.update(vm, move |row| {
            row.facts.publish = ports;
            Ok(())
        })
        .await
    });
    let (a, names) = (agent.clone(), change.groups.clone());
    let grouped = g.stage("set_groups", published, move |_, ()| async move {
        let Some(names) = names else { return Ok(()) };
        if a.placed(vm).await?.is_some() {
            let owner = a.vm(vm).await?.facts.owner;
            let groups = Membership { owner, names: names.clone() };
            a.bus.call::<NetGroupsSet>(&SetGroups { vm, groups }).await?;
        }
        a.update(vm, move |row| {
            row.facts.groups = names;
            Ok(())
        })
        .await
    });
    let a = agent.clone();
    g.stage("save", grouped, move |cx, ()| async move {
        let waits = a
            .update(vm, move |row| {
                row.facts.shape = change.of(&row.facts.shape);
                row.facts.idle = change.idle.or(row.facts.idle);
                let wants = &row.facts.shape;
                Ok(row.phase.live().is_some_and(|live| {
                    let has = &live.vmm.booted;
                    (has.cpus, has.memory_mib) != (wants.cpus, wants.memory_mib)
                }))
            })
            .await?;
        if waits {
            cx.note("processors and memory take effect at the next start");
        }
        Ok(())
    });
}

/// The VM with its VMM, where a change `reaches` that.
async fn living_if(agent: &Agent, vm: VmId, reaches: bool) -> Result<Option<Live>, Error> {
    if reaches { agent.living(vm).await } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Facts;
    use bothy_contract::{Code, ImageName};

    fn change(json: serde_json::Value) -> Change {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn disks_only_grow_and_nothing_is_no_change() {
        let shape = Shape { cpus: 2, memory_mib: 1024, work_mib: 2048, system_mib: 1024 };
        let image = ImageName::default_image();
        let facts = Facts::new(VmId::new(), "a".parse().unwrap(), 0, image, shape);
        let vm = Vm { facts, phase: Phase::Reserved };
        for bad in [
            serde_json::json!({}),
            serde_json::json!({ "work_mib": 2047 }),
            serde_json::json!({ "system_mib": 512, "cpus": 1 }),
            serde_json::json!({ "cpus": 65 }),
            serde_json::json!({ "memory_mib": 1 }),
        ] {
            let e = check(&vm, &change(bad)).unwrap_err();
            assert_eq!(e.code, Code::InvalidArgument);
            assert!(e.hint.is_some(), "{e}");
        }
        for good in [
            serde_json::json!({ "work_mib": 2048 }),
            serde_json::json!({ "work_mib": 4096, "memory_mib": 512 }),
            serde_json::json!({ "egress": { "policy": "open" } }),
            serde_json::json!({ "egress": { "policy": "allow", "names": ["crates.io"] } }),
        ] {
            check(&vm, &change(good)).unwrap();
        }
    }
}
