//! What a start of the agent does with the VMs it knows: the row says what there should be, the holder what there is.

use super::Agent;
use crate::{
    phase::Vmm,
    store::{self, Vm},
};
use bothy_contract::{Error, vm::VmState};
use bothy_vm_agent::vmm::liveness::{self, Found, Liveness};

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
    let found = match liveness::look(&holder, known.as_ref()).await {
        Liveness::Alive(status) if known == Some(status.handle) => {
            tracing::info!(bothy.vm.id = %id, %name, "adopting a VM");
            return Ok(());
        }
        Liveness::Alive(status) | Liveness::Other(status) => {
            Some(Found { handle: status.handle, status: Some(status) })
        }
        // It is not ours to believe. It dies with its holder (PR_SET_PDEATHSIG), and its machine waits for that.
        Liveness::Mute { why } => {
            tracing::warn!(bothy.vm.id = %id, %name, %why, "a VMM lives, but its holder does not answer");
            return Ok(());
        }
        // Looked for among all processes only where there should be one: that takes a while for each VM.
        Liveness::Dead { .. } if row.facts.state != VmState::Stopped => liveness::rediscover(&holder).await?,
        Liveness::Dead { .. } => None,
    };
    match (found, known) {
        (Some(found), _) if found.status.as_ref().is_none_or(|status| status.vm == id) => {
            tracing::warn!(bothy.vm.id = %id, %name, "adopting a VM whose VMM the row did not know");
            adopt(agent, &row, found).await
        }
        (_, Some(known)) => {
            agent.note_exit(id, known).await?;
            agent.try_remove_cgroup(id).await;
            Ok(())
        }
        // A VM that is said to run, and of whose VMM nothing is known, nor found.
        (_, None) => {
            let exit = holder.exit().unwrap_or_default();
            agent
                .update(id, move |row| {
                    if let Some((to, reason)) = super::state::after_exit(row.facts.state, exit.as_ref()) {
                        store::set_state(row, to, Some(reason));
                        row.ended(exit);
                    }
                    Ok(())
                })
                .await
        }
    }
}

/// Takes the VM of `row` for running again, with the VMM that was `found`.
async fn adopt(agent: &Agent, row: &Vm, found: Found) -> Result<(), Error> {
    let driver = &agent.known_choice().driver;
    let vmm = Vmm {
        handle: found.handle,
        name: found
            .status
            .map_or_else(|| format!("{} {}", driver.name(), driver.version()), |status| status.vmm_version),
        // Nobody else knows it; a change that waits for the next start shows as done.
        booted: row.facts.shape.clone(),
        boot_id: None,
    };
    agent
        .update(row.facts.id, move |row| {
            row.phase.launch(vmm)?;
            // Where an operation is at work, that decides.
            if row.facts.busy.is_none() && !matches!(row.facts.state, VmState::Running | VmState::Paused) {
                store::set_state(row, VmState::Running, Some("it was found running".to_owned()));
            }
            Ok(())
        })
        .await
}
