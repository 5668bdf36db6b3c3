//! What a start of the agent does with the VMs it knows: the row says what there should be, the holder what there is.

use super::Agent;
use crate::{
    phase::Vmm,
    store::{self, Vm},
};
use bothy_contract::{Error, VmId, vm::VmState};
use bothy_vm_agent::vmm::wire::{State, Status};

/// Checks every VM that has a place on the network against its holder. One that lives is adopted, whatever the row knows
/// of it: lost, damaged or stale, that is made anew from what the holder says. Of one that has ended the end is noted. To be
/// called before operations are resumed, which rely on the rows.
pub(crate) async fn recover(agent: &Agent) -> Result<(), Error> {
    for row in agent.db.read(store::all).await? {
        look_at(agent, row).await?;
    }
    Ok(())
}

async fn look_at(agent: &Agent, row: Vm) -> Result<(), Error> {
    let (id, name) = (row.facts.id, &row.facts.name);
    let Some(placed) = row.phase.placed() else { return Ok(()) };
    let holder = placed.holder(&agent.config, id);
    let known = row.phase.live().map(|live| live.vmm.handle);
    let found =
        holder.status().await.ok().filter(|status| {
            status.vm == id && status.state == State::Running && status.handle.vmm.is_alive()
        });
    match (known, found) {
        (Some(known), Some(found)) if known == found.handle => {
            tracing::info!(bothy.vm.id = %id, %name, "adopting a VM");
            adopt(agent, id, None).await
        }
        (_, Some(found)) => {
            tracing::warn!(bothy.vm.id = %id, %name, "adopting a VM whose VMM the row did not know");
            adopt(agent, id, Some((&row, found))).await
        }
        // The process is there and its holder does not answer for it: it is not ours to believe. It dies with its holder
        // (PR_SET_PDEATHSIG), and its machine waits for that.
        (Some(known), None) if known.vmm.is_alive() => {
            tracing::warn!(bothy.vm.id = %id, %name, "a VMM lives, but its holder does not answer");
            Ok(())
        }
        (Some(known), None) => agent.note_exit(id, known).await,
        // A VM that is said to run and of whose VMM nothing is known, nor found.
        (None, None) if row.facts.state == VmState::Running => {
            let exit = holder.exit().unwrap_or_default();
            agent
                .update(id, move |row| {
                    if let Some((to, reason)) = super::state::after_exit(row.facts.state, exit.as_ref()) {
                        store::set_state(row, to, Some(reason));
                    }
                    row.ended(exit);
                    Ok(())
                })
                .await
        }
        (None, None) => Ok(()),
    }
}

/// Takes `vm` for running again: with the VMM in its row, or with the one that was `found`.
async fn adopt(agent: &Agent, vm: VmId, found: Option<(&Vm, Status)>) -> Result<(), Error> {
    let lost = found.is_some();
    let vmm = found.map(|(row, status)| Vmm {
        handle: status.handle,
        name: status.vmm_version,
        // Nobody else knows it; a change that waits for the next start would show as done.
        booted: row.facts.shape.clone(),
        boot_id: None,
    });
    agent
        .update(vm, move |row| {
            if let Some(vmm) = vmm {
                row.phase.launch(vmm)?;
            }
            // Where an operation is at work, that decides.
            if lost && row.facts.busy.is_none() && row.facts.state != VmState::Running {
                store::set_state(row, VmState::Running, Some("it was found running".to_owned()));
            }
            Ok(())
        })
        .await
}
