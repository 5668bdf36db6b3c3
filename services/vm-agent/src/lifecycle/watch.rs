//! Watchers: one task per VMM that waits for its end (a pidfd, so without polling) and notes it. And what a start of the
//! agent does with the VMs it knows.

use super::{Agent, HOLDER_END, state};
use crate::store;
use bothy_contract::{Error, VmId};
use bothy_vm_agent::vmm::{holder::Holder, wire::HolderHandle};

/// Waits in a task of its own for the end of a VMM, and notes it.
pub(crate) fn watch(agent: &Agent, vm: VmId, handle: HolderHandle) {
    let agent = agent.clone();
    tokio::spawn(async move {
        if let Err(e) = Holder::gone(handle.vmm).await {
            tracing::error!(bothy.vm.id = %vm, error = %e, "cannot watch a VMM; its end shows at the next start of the agent");
            return;
        }
        // The holder ends once the exit record is on disk.
        drop(tokio::time::timeout(HOLDER_END, Holder::gone(handle.holder)).await);
        if let Err(e) = note_exit(&agent, vm, handle).await {
            tracing::error!(bothy.vm.id = %vm, error = %e, "cannot note the end of a VMM");
        }
    });
}

/// Puts the end of a VMM into its VM's row, once; a row that is gone or has another VMM by now stays as it is.
pub(crate) async fn note_exit(agent: &Agent, vm: VmId, handle: HolderHandle) -> Result<(), Error> {
    let Some(row) = agent.db.read(move |c| store::find(c, vm)).await? else { return Ok(()) };
    let exit = match row.record.lease.as_ref().map(|lease| agent.holder(vm, lease).exit()) {
        Some(Ok(exit)) => exit,
        Some(Err(e)) => {
            tracing::warn!(bothy.vm.id = %vm, error = %e, "the exit record is of no use");
            None
        }
        None => None,
    };
    agent
        .db
        .write(move |tx| {
            if store::find(tx, vm)?.is_none() {
                return Ok(());
            }
            store::update(tx, vm, |row| {
                // Without a handle in the row the launch was cut off: the end is noted all the same.
                if row.handle.is_some_and(|h| h != handle) {
                    return Ok(());
                }
                if let Some((to, reason)) = state::after_exit(row.record.state, exit.as_ref()) {
                    tracing::info!(bothy.vm.id = %vm, name = %row.record.name, state = ?to, reason, "a VMM has ended");
                    store::set_state(row, to, Some(reason));
                }
                row.ended(exit);
                Ok(())
            })
        })
        .await?;
    Ok(())
}

/// Checks every VM that should have a VMM against its holder: living ones are watched again, of the others the end is
/// noted. To be called before operations are resumed, which rely on the rows.
pub(crate) async fn recover(agent: &Agent) -> Result<(), Error> {
    for vm in agent.db.read(store::all).await? {
        let (Some(handle), Some(lease)) = (vm.handle, vm.record.lease.as_ref()) else { continue };
        let id = vm.record.id;
        if agent.holder(id, lease).is_alive(&handle).await {
            tracing::info!(bothy.vm.id = %id, name = %vm.record.name, "adopting a VM");
            watch(agent, id, handle);
        } else if handle.vmm.is_alive() {
            // The process is there and its holder does not answer for it: it is not ours to believe. It dies with its
            // holder (PR_SET_PDEATHSIG), so wait for that in the background.
            tracing::warn!(bothy.vm.id = %id, name = %vm.record.name, "a VMM lives, but its holder does not answer");
            watch(agent, id, handle);
        } else {
            note_exit(agent, id, handle).await?;
        }
    }
    Ok(())
}
