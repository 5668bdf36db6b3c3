//! When a VM was last used, and whether that is so long ago that it is put to rest: by its own policy, else by the host's
//! (`vm.auto_stop_stale_after_s`). Used is a VM
//! to whose guest a stream is open (an exec, a shell, ssh, a workspace on its way), or whose TAP moves more than what a
//! guest says by itself (ARP, neighbour discovery, a lost packet now and then).

use super::Agent;
use crate::store::Facts;
use bothy_contract::{
    VmId,
    vm::{Idle, IdleAction},
};
use bothy_vm_agent::host::usage::{self, Traffic};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// How often traffic is looked at, at the most and at the least.
const LOOK: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// How often a paused VM's traffic is looked at.
const TOUCH: Duration = Duration::from_millis(100);
/// Bytes per second, over one look, that an unused guest does not reach.
const NOISE: u64 = 512;

/// When each VM was last used. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Activity(Arc<Mutex<HashMap<VmId, Uses>>>);

#[derive(Debug, Clone, Copy)]
struct Uses {
    streams: u32,
    last: Instant,
}

/// An open stream: as long as it lives, its VM is used.
#[derive(Debug)]
pub(crate) struct Stream {
    activity: Activity,
    vm: VmId,
}

impl Activity {
    /// A stream to the guest of `vm` is open until the result is dropped.
    pub(crate) fn stream(&self, vm: VmId) -> Stream {
        self.map().entry(vm).or_insert(Uses { streams: 0, last: Instant::now() }).streams += 1;
        Stream { activity: self.clone(), vm }
    }

    /// `vm` is used now.
    fn touch(&self, vm: VmId) {
        let now = Instant::now();
        self.map().entry(vm).or_insert(Uses { streams: 0, last: now }).last = now;
    }

    /// How long `vm` has not been used; zero while a stream is open.
    fn unused_for(&self, vm: VmId) -> Duration {
        match self.map().get(&vm) {
            Some(Uses { streams: 0, last }) => last.elapsed(),
            _ => Duration::ZERO,
        }
    }

    /// Forgets a VM that is gone.
    pub(crate) fn forget(&self, vm: VmId) {
        self.map().remove(&vm);
    }

    fn map(&self) -> MutexGuard<'_, HashMap<VmId, Uses>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(uses) = self.activity.map().get_mut(&self.vm) {
            uses.streams = uses.streams.saturating_sub(1);
            uses.last = Instant::now();
        }
    }
}

/// What is done with the VM of `facts` when nobody uses it, and why that: its own policy, else the host's.
fn policy(facts: &Facts, host_s: u64) -> Option<(Idle, &'static str)> {
    let policy = match facts.idle {
        Some(own) => (own, "its idle policy"),
        None => (Idle { action: IdleAction::Stop, after_s: host_s }, "`vm.auto_stop_stale_after_s`"),
    };
    Some(policy).filter(|(idle, _)| idle.action != IdleAction::Never && idle.after_s > 0)
}

/// Returns, with what is to be done and why, once the VM of `facts` has been unused for as long as its policy or the host
/// allows, counted from now; never where that is for ever.
pub(crate) async fn unused(agent: &Agent, facts: &Facts, tap: &str) -> (IdleAction, String) {
    let Some((Idle { action, after_s }, whose)) = policy(facts, agent.config.vm.auto_stop_stale_after_s)
    else {
        return std::future::pending().await;
    };
    agent.activity.touch(facts.id);
    let traffic = || usage::traffic().get(tap).copied().unwrap_or_default();
    wait(&agent.activity, facts.id, Duration::from_secs(after_s), traffic).await;
    (action, format!("nobody used it for {after_s} s ({whose})"))
}

/// Returns once anything is sent to a guest by its TAP. A guest that stands still says nothing, and its neighbours' noise does
/// not reach it: what comes is for it.
pub(crate) async fn touched(tap: &str) {
    let before = usage::traffic().get(tap).copied().unwrap_or_default().received;
    loop {
        sleep(TOUCH).await;
        if usage::traffic().get(tap).is_some_and(|now| now.received > before) {
            return;
        }
    }
}

async fn wait(activity: &Activity, vm: VmId, limit: Duration, traffic: impl Fn() -> Traffic) {
    let look = (limit / 8).clamp(LOOK.0, LOOK.1);
    let mut before = traffic();
    while activity.unused_for(vm) < limit {
        sleep(look).await;
        let now = traffic();
        if busy(before, now, look) {
            activity.touch(vm);
        }
        before = now;
    }
}

/// Whether what moved between two looks is more than noise.
fn busy(before: Traffic, now: Traffic, look: Duration) -> bool {
    let moved = now.received.saturating_sub(before.received) + now.sent.saturating_sub(before.sent);
    moved > NOISE.saturating_mul(look.as_secs().max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn an_unused_vm_is_told_after_the_limit() {
        let (activity, vm, start) = (Activity::default(), VmId::new(), Instant::now());
        activity.touch(vm);
        wait(&activity, vm, LIMIT, Traffic::default).await;
        let waited = start.elapsed();
        assert!(waited >= LIMIT && waited < LIMIT + LIMIT / 4, "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_stream_is_a_use_for_as_long_as_it_is_open() {
        let (activity, vm, start) = (Activity::default(), VmId::new(), Instant::now());
        activity.touch(vm);
        let stream = activity.stream(vm);
        tokio::spawn(async move {
            sleep(10 * LIMIT).await;
            drop(stream);
        });
        wait(&activity, vm, LIMIT, Traffic::default).await;
        assert!(start.elapsed() >= 11 * LIMIT, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn traffic_is_a_use_and_noise_is_none() {
        let (activity, vm, start) = (Activity::default(), VmId::new(), Instant::now());
        activity.touch(vm);
        let bytes = Cell::new(0);
        wait(&activity, vm, LIMIT, || {
            // Much for five minutes, then what a guest says by itself.
            bytes.set(bytes.get() + if start.elapsed() < 5 * LIMIT { 1_000_000 } else { 90 });
            Traffic { received: bytes.get(), sent: 0 }
        })
        .await;
        assert!(start.elapsed() > 5 * LIMIT + LIMIT / 2, "{:?}", start.elapsed());
    }
}
