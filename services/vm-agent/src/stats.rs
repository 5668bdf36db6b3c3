//! How much VMs use, and what their guests serve.

use crate::{lifecycle::Agent, phase::Phase, store};
use bothy_contract::{
    Error, VmId,
    image::{DiskUsage, GetDiskUsage},
    methods::ImageDisksUsage,
    usage::{GetVmStats, PortList, VmStats, VmStatsList},
    vm::VmState,
};
use bothy_vm_agent::host::usage::{self, ProcessUsage, Traffic};
use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};
use tokio::time::timeout;

/// The most VMs that one question may be about.
const MOST: usize = 200;
/// How long a guest may take to say how it stands; one that is slower is left out.
const GUEST: Duration = Duration::from_secs(3);

/// How much the VMs of `ask` use. Each is asked at the same time; what cannot be had in time is absent.
///
/// # Errors
/// Too many are asked for.
pub(crate) async fn show(agent: &Agent, ask: GetVmStats) -> Result<VmStatsList, Error> {
    if ask.vms.len() > MOST {
        return Err(Error::invalid(format!("{} VMs are too many for one question", ask.vms.len()))
            .hint(format!("ask for at most {MOST}")));
    }
    let disks = agent.bus.call::<ImageDisksUsage>(&GetDiskUsage { vms: ask.vms.clone() }).await;
    let disks = disks.map(|list| list.disks).unwrap_or_else(|error| {
        tracing::debug!(%error, "the disks' usage is not known");
        BTreeMap::new()
    });
    let traffic = usage::traffic();
    let stats = ask.vms.into_iter().map(|vm| one(agent, vm, &traffic, disks.get(&vm).copied()));
    Ok(VmStatsList { stats: futures::future::join_all(stats).await.into_iter().flatten().collect() })
}

async fn one(
    agent: &Agent,
    vm: VmId,
    traffic: &HashMap<String, Traffic>,
    disks: Option<DiskUsage>,
) -> Option<VmStats> {
    let row = agent.db.read(move |c| store::find(c, vm)).await.ok().flatten()?;
    let mut stats = VmStats {
        vm,
        at: jiff::Timestamp::now(),
        uptime_s: None,
        cpu_us: None,
        cpu_percent: None,
        memory_bytes: None,
        disks,
        received_bytes: None,
        sent_bytes: None,
        guest: None,
    };
    if let Phase::Live(live) = &row.phase {
        if let Some(usage) = ProcessUsage::read(live.vmm.handle.vmm) {
            stats.uptime_s = Some(usage.uptime.as_secs());
            stats.cpu_us = u64::try_from(usage.cpu.as_micros()).ok();
            stats.cpu_percent = agent.sampler.percent(vm, usage.cpu);
            stats.memory_bytes = Some(usage.resident);
        }
        if let Some(traffic) = traffic.get(&live.place.lease.tap) {
            stats.received_bytes = Some(traffic.received);
            stats.sent_bytes = Some(traffic.sent);
        }
        if row.facts.state == VmState::Paused {
            return Some(stats);
        }
        let guest = live.guest(&agent.config, vm);
        match timeout(GUEST, guest.metrics()).await {
            Ok(Ok(told)) => stats.guest = Some(told),
            Ok(Err(error)) => {
                tracing::debug!(bothy.vm.id = %vm, %error, "the guest does not tell how it stands")
            }
            Err(_) => tracing::debug!(bothy.vm.id = %vm, "the guest is slow to tell how it stands"),
        }
    }
    Some(stats)
}

/// The sockets on which the guest of `vm` listens.
///
/// # Errors
/// It does not run, or does not answer.
pub(crate) async fn ports(agent: &Agent, vm: VmId) -> Result<PortList, Error> {
    let guest = agent.running(vm).await?.guest(&agent.config, vm);
    Ok(PortList { ports: guest.ports().await? })
}
