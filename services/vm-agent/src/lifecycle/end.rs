//! The stages of a stop and of a delete. Neither can be cancelled: half of it would help nobody.

use super::{Agent, KILL, files, guest::Guest, vm_of};
use bothy_contract::{
    Code, Error, VmId,
    image::ReleaseDisks,
    methods::{ImageDisksRelease, NetLeaseRelease},
    net::ReleaseLease,
    vm::StopVm,
};
use bothy_ops::{Graph, Op, StageCx};
use bothy_vm_agent::vmm::{Driver, holder::Holder, wire::HolderHandle};
use std::time::Duration;
use tokio::time::timeout;

/// How long a VMM may take to flush its disks and end when it is told to.
const QUIT: Duration = Duration::from_secs(10);
/// The longest grace that a stop may give, in milliseconds.
pub(crate) const MAX_GRACE_MS: u64 = 10 * 60 * 1000;

/// The graph of a stop: the guest writes everything out and powers off; one that does not within the grace is ended.
pub(crate) fn stop(agent: &Agent, op: &Op) -> Result<Graph, Error> {
    let vm = vm_of(op.vm)?;
    let StopVm { grace_ms, .. } = op.input()?;
    let grace = Duration::from_millis(grace_ms.min(MAX_GRACE_MS));
    let mut g = Graph::new();
    g.not_cancellable();
    let a = agent.clone();
    let asked = g.stage("shut_down_guest", (), move |cx, ()| shut_down(a, cx, vm, grace));
    let a = agent.clone();
    g.stage("wait_exit", asked, move |cx, answered| wait_exit(a, cx, vm, grace, answered));
    Ok(g)
}

/// The living VMM of `vm`, if there is one.
async fn living(agent: &Agent, vm: VmId) -> Result<Option<(Holder, HolderHandle)>, Error> {
    let row = agent.vm(vm).await?;
    Ok(match (row.handle, row.record.lease) {
        (Some(handle), Some(lease)) if handle.vmm.is_alive() => Some((agent.holder(vm, &lease), handle)),
        _ => None,
    })
}

/// Asks the guest to power off; whether it answered that it will. A guest that does not answer is no failure of the stop.
async fn shut_down(agent: Agent, cx: StageCx, vm: VmId, grace: Duration) -> Result<bool, Error> {
    let Some((holder, handle)) = living(&agent, vm).await? else {
        cx.note("it had ended by itself");
        return Ok(true);
    };
    let guest = Guest::new(holder, handle);
    match timeout(grace, guest.shut_down()).await {
        Ok(Ok(())) => Ok(true),
        Ok(Err(e)) => {
            cx.note(format!("the guest did not take it: {e}"));
            Ok(false)
        }
        Err(_) => {
            cx.note(format!("the guest did not answer within {} ms", grace.as_millis()));
            Ok(false)
        }
    }
}

async fn wait_exit(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    grace: Duration,
    answered: bool,
) -> Result<(), Error> {
    let Some((holder, handle)) = living(&agent, vm).await? else {
        // Its end may not be in the row yet.
        if let Some(handle) = agent.vm(vm).await?.handle {
            agent.await_end(vm, handle, QUIT).await?;
        }
        return Ok(());
    };
    if answered && agent.await_end(vm, handle, grace).await? {
        return Ok(());
    }
    // The VMM's own way out writes what its disks still hold; a signal is the last resort.
    cx.note("the guest did not power off in time, so its VMM was ended");
    if let Err(e) = holder.perform(&agent.driver.quit()).await {
        tracing::warn!(bothy.vm.id = %vm, error = %e, "the VMM does not take `quit`");
    }
    if agent.await_end(vm, handle, QUIT).await? {
        return Ok(());
    }
    agent.kill(vm).await?;
    if handle.vmm.is_alive() {
        return Err(Error::new(
            Code::DeadlineExceeded,
            format!(
                "process {} of the VMM does not end {} s after it was killed",
                handle.vmm.pid,
                KILL.as_secs()
            ),
        )
        .hint("it hangs in the kernel; look at it with `ps`, then try again"));
    }
    Ok(())
}

/// The graph of a delete: nothing of the VM is left.
pub(crate) fn delete(agent: &Agent, op: &Op) -> Result<Graph, Error> {
    let vm = vm_of(op.vm)?;
    let mut g = Graph::new();
    g.not_cancellable();
    let a = agent.clone();
    let dead = g.stage("kill_vmm", (), move |_, ()| async move {
        a.kill(vm).await?;
        match living(&a, vm).await? {
            None => Ok(()),
            Some((_, handle)) => Err(Error::new(
                Code::DeadlineExceeded,
                format!("process {} of the VMM does not end although it was killed", handle.vmm.pid),
            )),
        }
    });
    let a = agent.clone();
    g.stage("release_disks", dead, move |_, ()| async move {
        a.bus.call::<ImageDisksRelease>(&ReleaseDisks { vm }).await
    });
    let a = agent.clone();
    g.stage("release_network", dead, move |_, ()| async move {
        a.bus.call::<NetLeaseRelease>(&ReleaseLease { vm }).await
    });
    let a = agent.clone();
    g.stage("remove_files", dead, move |_, ()| async move {
        a.remove_holder(vm).await?;
        files::remove_vm(&a.state_dir(), vm)
    });
    Ok(g)
}
