//! Whether the host's memory holds one more VM: asked in the transaction that would promise it, so that two creates at once
//! are not promised the same.

use super::Agent;
use crate::store::{self, Vm};
use bothy_contract::{VmId, vm::VmState};
use bothy_db::{Error as DbError, rusqlite::Transaction};
use bothy_vm_agent::{
    host::{
        memory::{self, Claim, HostMemory},
        usage::ProcessUsage,
    },
    vmm::Accel,
};

impl Agent {
    /// Whether `vm` may have `asked_mib` of memory.
    ///
    /// # Errors
    /// The host has not that much left.
    pub(crate) fn admit(&self, tx: &Transaction<'_>, vm: VmId, asked_mib: u64) -> Result<(), DbError> {
        let accel = self.known_choice().finding.as_ref().map_or(Accel::Tcg, |finding| finding.accel);
        let with_vmm = |mib: u64| mib.saturating_add(memory::overhead_mib(accel));
        let claims: Vec<Claim> = store::all(tx)?
            .iter()
            .filter(|other| other.facts.id != vm)
            .filter_map(|other| {
                Some(Claim { promised_mib: with_vmm(promised_mib(other)?), resident: resident(other) })
            })
            .collect();
        memory::admit(HostMemory::read()?, self.config.vm.memory_reserve_mib, &claims, with_vmm(asked_mib))?;
        Ok(())
    }
}

/// What `vm` was promised: it has a VMM, or an operation is about to give it one.
fn promised_mib(vm: &Vm) -> Option<u64> {
    match (vm.phase.live(), vm.facts.state) {
        (Some(live), _) => Some(live.vmm.booted.memory_mib),
        (None, VmState::Creating | VmState::Starting) => Some(vm.facts.shape.memory_mib),
        (None, _) => None,
    }
}

fn resident(vm: &Vm) -> u64 {
    let vmm = vm.phase.live().and_then(|live| ProcessUsage::read(live.vmm.handle.vmm));
    vmm.map_or(0, |usage| usage.resident)
}
