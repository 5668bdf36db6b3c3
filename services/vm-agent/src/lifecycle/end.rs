//! The stages of a stop, of a kill and of a delete. None can be cancelled: half of it would help nobody. A stop goes from
//! the gentle to the certain: the guest's agent, the machine's power button, the VMM's own way out, SIGKILL.

use super::{Agent, KILL, ask::KillInput, files};
use crate::phase::Live;
use bothy_contract::{
    Code, Error, VmId,
    image::ReleaseDisks,
    methods::{ImageDisksRelease, NetLeaseRelease},
    net::ReleaseLease,
};
use bothy_ops::{Graph, Output, StageCx};
use bothy_vm_agent::vmm::{Driver, Verb};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long a VMM may take to flush its disks and end when it is told to.
const QUIT: Duration = Duration::from_secs(10);
/// The longest grace that a stop may give, in milliseconds.
pub(crate) const MAX_GRACE_MS: u64 = 10 * 60 * 1000;

/// Adds the stages of a stop to `g`: the guest writes everything out and powers off; one that does not within the grace is
/// ended.
pub(crate) fn add_stop(g: &mut Graph, agent: &Agent, vm: VmId, grace_ms: u64) -> Output<()> {
    let grace = Duration::from_millis(grace_ms.min(MAX_GRACE_MS));
    add_unpublish(g, agent, vm);
    let a = agent.clone();
    let left = g.stage("shut_down_guest", (), move |cx, ()| shut_down(a, cx, vm, grace));
    let a = agent.clone();
    g.stage("wait_exit", left, move |cx, left_ms| wait_exit(a, cx, vm, left_ms.map(Duration::from_millis)))
}

/// Nobody is to find by its name what is about to go. A net-agent that does not answer keeps no VM from ending.
fn add_unpublish(g: &mut Graph, agent: &Agent, vm: VmId) {
    let a = agent.clone();
    g.stage("unpublish_dns", (), move |cx, ()| async move {
        if let Err(e) = a.unpublish_dns(vm).await {
            cx.note(format!("its name may stay for a while: {e}"));
        }
        Ok(())
    });
}

/// Asks the guest to power off. What is left of the grace then, in milliseconds; `None` where nothing took the wish. A guest
/// that does not answer is no failure of the stop.
async fn shut_down(agent: Agent, cx: StageCx, vm: VmId, grace: Duration) -> Result<Option<u64>, Error> {
    let Some(live) = agent.living(vm).await? else {
        cx.note("it had ended by itself");
        return Ok(Some(0));
    };
    // One that was paused cannot hear it. Doing this to one that runs does nothing.
    perform(&agent, vm, &live, |driver| driver.resume()).await;
    let begun = Instant::now();
    let left = || {
        let left = grace.saturating_sub(begun.elapsed());
        Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    };
    let why = match timeout(grace, live.guest(&agent.config, vm).shut_down()).await {
        Ok(Ok(())) => return Ok(left()),
        Ok(Err(e)) => format!("the guest did not take it: {e}"),
        Err(_) => format!("the guest did not answer within {} ms", grace.as_millis()),
    };
    // A guest without a working agent may still listen to its power button, while there is time.
    let pressed = match left() {
        Some(1..) => perform(&agent, vm, &live, |driver| driver.powerdown()).await,
        _ => false,
    };
    cx.note(if pressed { format!("{why}; its power button was pressed") } else { why });
    Ok(if pressed { left() } else { None })
}

/// Whether the VMM took the verb.
async fn perform(agent: &Agent, vm: VmId, live: &Live, verb: impl Fn(&dyn Driver) -> Verb) -> bool {
    let done = async {
        let verb = verb(&*live.driver()?);
        live.place.holder(&agent.config, vm).perform(&verb).await
    };
    match done.await {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!(bothy.vm.id = %vm, %error, "the VMM does not take it");
            false
        }
    }
}

async fn wait_exit(agent: Agent, cx: StageCx, vm: VmId, left: Option<Duration>) -> Result<(), Error> {
    let Some(live) = agent.living(vm).await? else { return note_end(&agent, vm).await };
    let handle = live.vmm.handle;
    if let Some(left) = left
        && agent.await_end(vm, handle, left).await?
    {
        return Ok(());
    }
    // The VMM's own way out writes what its disks still hold; a signal is the last resort.
    cx.note("the guest did not power off in time, so its VMM was ended");
    perform(&agent, vm, &live, |driver| driver.quit()).await;
    if agent.await_end(vm, handle, QUIT).await? {
        return Ok(());
    }
    agent.kill(vm).await?;
    dead(&agent, vm).await
}

/// Its end may not be in the row yet, and its control group may be there still.
async fn note_end(agent: &Agent, vm: VmId) -> Result<(), Error> {
    if let Some(live) = agent.vm(vm).await?.phase.live() {
        agent.await_end(vm, live.vmm.handle, QUIT).await?;
    }
    // Its machine leaves that to the operation that is at work.
    agent.try_remove_cgroup(vm).await;
    Ok(())
}

/// An error where the VMM of `vm` lives.
pub(super) async fn dead(agent: &Agent, vm: VmId) -> Result<(), Error> {
    let Some(live) = agent.living(vm).await? else { return Ok(()) };
    let process = format!(
        "process {} of the VMM does not end {} s after it was killed",
        live.vmm.handle.vmm.pid,
        KILL.as_secs()
    );
    Err(Error::new(Code::DeadlineExceeded, process)
        .hint("it hangs in the kernel; look at it with `ps`, then try again"))
}

/// Adds the stages of a kill to `g`.
pub(crate) fn add_kill(g: &mut Graph, agent: &Agent, vm: VmId, KillInput { signal }: KillInput) {
    g.not_cancellable();
    add_unpublish(g, agent, vm);
    let a = agent.clone();
    let sent = g.stage("signal_vmm", (), move |cx, ()| async move {
        let Some(live) = a.living(vm).await? else {
            cx.note("it had ended by itself");
            return Ok(());
        };
        let sent = live.place.holder(&a.config, vm).kill(signal).await;
        // It may end between the look and the signal.
        if live.vmm.handle.vmm.is_alive() { sent } else { Ok(()) }
    });
    let a = agent.clone();
    let ended = g.stage("wait_exit", sent, move |_, ()| async move {
        let Some(live) = a.living(vm).await? else { return note_end(&a, vm).await };
        if a.await_end(vm, live.vmm.handle, QUIT).await? {
            return Ok(());
        }
        let name = a.vm(vm).await?.facts.name;
        let ignored = format!("the VMM of {name} lives {} s after signal {signal}", QUIT.as_secs());
        Err(Error::new(Code::DeadlineExceeded, ignored).hint(format!("`bothy vm kill {name}` sends SIGKILL")))
    });
    let a = agent.clone();
    g.stage("forget_memory", ended, move |_, ()| async move { a.forget_memory(vm).await });
}

/// Adds the stages of a delete to `g`: nothing of the VM is left.
pub(crate) fn add_delete(g: &mut Graph, agent: &Agent, vm: VmId) {
    g.not_cancellable();
    let a = agent.clone();
    let dead = g.stage("kill_vmm", (), move |_, ()| async move {
        a.kill(vm).await?;
        dead(&a, vm).await
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
}
