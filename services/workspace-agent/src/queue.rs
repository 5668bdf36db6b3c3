//! One job per VM at a time, first come, first served: two imports at once would only take each other's disk and time. It
//! is a queue of this agent's alone, so a stalled import never keeps the vm-agent from stopping or deleting the VM.

use bothy_contract::{Code, Error, VmId};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tokio::sync::{Mutex as Turn, OwnedMutexGuard};

/// How many jobs of one VM may wait.
pub const MAX_WAITING: usize = 8;

/// The queues of all VMs. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Queues(Arc<Mutex<HashMap<VmId, Weak<Turn<()>>>>>);

impl Queues {
    /// Waits for this VM's turn, which lasts as long as the guard.
    ///
    /// # Errors
    /// [`Code::ResourceExhausted`] where too many wait already.
    pub async fn turn(&self, vm: VmId) -> Result<OwnedMutexGuard<()>, Error> {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| turn.strong_count() > 0);
            let turn = turns.get(&vm).and_then(Weak::upgrade).unwrap_or_default();
            turns.insert(vm, Arc::downgrade(&turn));
            turn
        };
        // The one that runs, those that wait, and this one.
        if Arc::strong_count(&turn) > MAX_WAITING + 1 {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("{MAX_WAITING} imports and exports of this VM wait already"),
            )
            .hint("wait for them to end"));
        }
        Ok(turn.lock_owned().await)
    }

    /// How many VMs have a job that runs or waits.
    pub fn busy(&self) -> u32 {
        let turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = turns.values().filter(|turn| turn.strong_count() > 0).count();
        u32::try_from(busy).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn one_at_a_time_per_vm_and_never_too_many() {
        let (queues, vm) = (Queues::default(), VmId::new());
        let first = queues.turn(vm).await.unwrap();
        assert!(queues.turn(VmId::new()).now_or_never().is_some(), "another VM does not wait");
        let mut waiting: Vec<_> = (0..MAX_WAITING).map(|_| Box::pin(queues.turn(vm))).collect();
        for turn in &mut waiting {
            assert!(turn.as_mut().now_or_never().is_none());
        }
        assert_eq!(queues.turn(vm).await.unwrap_err().code, Code::ResourceExhausted);
        assert_eq!(queues.busy(), 1);
        drop(first);
        let second = waiting.remove(0).now_or_never().unwrap().unwrap();
        assert!(waiting[0].as_mut().now_or_never().is_none());
        drop((second, waiting));
        assert_eq!(queues.busy(), 0);
        assert!(queues.turn(vm).now_or_never().is_some());
        assert_eq!(queues.0.lock().unwrap().len(), 1, "queues of VMs that nobody works on are forgotten");
    }
}
