//! One task per VM, its **machine**: it takes what is asked of the VM from a bounded queue, one after the other, and is the
//! only one that begins operations on it; it waits for the end of the VMM (a pidfd, so without polling) and notes it; it
//! puts a VM to rest that nobody has used for long, and has a paused one go on that somebody reaches for. It keeps nothing of its own: before each step it reads the row.

use super::{
    Agent,
    ask::{Ask, StopInput},
    guest::plain_id,
    idle,
};
use crate::store::{self, Vm};
use bothy_contract::{
    Code, Error, OpId, RequestId, VmId, VmName,
    vm::{IdleAction, VmState},
};
use bothy_ops::{Begun, New, Ops};
use bothy_vm_agent::vmm::{holder::Holder, wire::HolderHandle};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::{Instrument, Span};

/// Requests that wait for one VM; more are refused.
const QUEUE: usize = 16;
/// How long the guest of an unused VM may take to power off, in milliseconds.
const IDLE_GRACE_MS: u64 = 10_000;
/// How long an adopted guest may take to tell its boot id.
const BOOT_ID: Duration = Duration::from_secs(60);
/// The pause after something failed that should not.
const PAUSE: Duration = Duration::from_secs(1);

/// The machines of all VMs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Machines(Arc<Mutex<HashMap<VmId, mpsc::Sender<Request>>>>);

/// What comes to a machine.
#[derive(Debug)]
enum Request {
    /// Begin an operation.
    Begin {
        ask: Box<Ask>,
        request: Option<RequestId>,
        span: Span,
        reply: oneshot::Sender<Result<Begun, Error>>,
    },
    /// The row has changed: look at it.
    Look,
}

impl Machines {
    /// Starts the machine of `vm`, whose row is there.
    pub(crate) fn start(&self, agent: &Agent, ops: &Ops, vm: VmId) {
        let (sender, queue) = mpsc::channel(QUEUE);
        self.map().insert(vm, sender);
        let machine = Machine { agent: agent.clone(), ops: ops.clone(), vm };
        tokio::spawn(
            machine.run(queue).instrument(tracing::info_span!(parent: None, "machine", bothy.vm.id = %vm)),
        );
    }

    /// Has the machine of `vm` begin an operation.
    ///
    /// # Errors
    /// There is no such VM, too much waits for it, or its state does not allow it.
    pub(crate) async fn begin(&self, vm: VmId, ask: Ask, request: Option<RequestId>) -> Result<Begun, Error> {
        let machine = self.map().get(&vm).cloned().ok_or_else(|| store::missing(vm))?;
        let (reply, answer) = oneshot::channel();
        let request = Request::Begin { ask: Box::new(ask), request, span: Span::current(), reply };
        match machine.try_send(request) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(store::missing(vm)),
            Err(mpsc::error::TrySendError::Full(_)) => {
                let busy = format!("{QUEUE} requests wait for VM {vm} already");
                return Err(Error::new(Code::ResourceExhausted, busy).hint("try again in a moment"));
            }
        }
        answer.await.unwrap_or_else(|_| Err(store::missing(vm)))
    }

    /// Tells the machine of `vm` that its row has changed.
    pub(crate) fn look(&self, vm: VmId) {
        if let Some(machine) = self.map().get(&vm) {
            // A full queue means that it is about to look anyhow.
            drop(machine.try_send(Request::Look));
        }
    }

    fn map(&self) -> MutexGuard<'_, HashMap<VmId, mpsc::Sender<Request>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the machines of all VMs. To be called once, after the operations were resumed.
pub(crate) async fn start_all(agent: &Agent, ops: &Ops) -> Result<(), Error> {
    for row in agent.db.read(store::all).await? {
        agent.machines.start(agent, ops, row.facts.id);
    }
    Ok(())
}

struct Machine {
    agent: Agent,
    ops: Ops,
    vm: VmId,
}

impl Machine {
    async fn run(self, mut queue: mpsc::Receiver<Request>) {
        loop {
            let row = match self
                .agent
                .db
                .read({
                    let vm = self.vm;
                    move |c| store::find(c, vm)
                })
                .await
            {
                Ok(Some(row)) => row,
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "cannot read a VM's row");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let handle = row.phase.live().map(|live| live.vmm.handle);
            tokio::select! {
                request = queue.recv() => match request {
                    Some(Request::Begin { ask, request, span, reply }) => {
                        let begun = self.begin(&row, *ask, request).instrument(span).await;
                        // Whoever asked may have gone; the operation runs all the same.
                        drop(reply.send(begun));
                    }
                    Some(Request::Look) => {}
                    None => break,
                },
                (action, why) = self.idle(&row) => self.rest(&row, action, why).await,
                () = self.touched(&row) => self.go_on(&row).await,
                ended = gone(handle) => self.note_exit(&row, ended).await,
                () = self.ended(row.facts.busy) => {}
                boot_id = self.boot_id(&row) => self.note_boot_id(boot_id).await,
            }
        }
        self.agent.machines.map().remove(&self.vm);
        self.agent.activity.forget(self.vm);
        self.agent.sampler.forget(self.vm);
    }

    /// Begins an operation, if the row allows it at that moment.
    async fn begin(&self, row: &Vm, ask: Ask, request: Option<RequestId>) -> Result<Begun, Error> {
        let (vm, facts, ask) = (self.vm, &row.facts, ask.of(row));
        let new = new(ask.kind(), vm, &facts.name, facts.owner, request, ask.input(row)?);
        let host = self.agent.clone();
        self.ops
            .begin(new, move |tx, op| {
                // A restart of a running VM gives its memory back first.
                let row = store::get(tx, vm)?;
                if let Ask::Start { force: false, .. } | Ask::Restart { .. } | Ask::Resume { force: false } =
                    &ask
                    && row.phase.live().is_none()
                {
                    host.admit(tx, vm, row.facts.shape.memory_mib)?;
                }
                store::update(tx, vm, |row| ask.grant(row, op.id))
            })
            .await
    }

    /// Returns, with what is to be done and why, once nobody has used a running VM for as long as is allowed.
    async fn idle(&self, row: &Vm) -> (IdleAction, String) {
        match (row.phase.live(), row.facts.state) {
            (Some(live), VmState::Running) if row.facts.busy.is_none() => {
                idle::unused(&self.agent, &row.facts, &live.place.lease.tap).await
            }
            _ => std::future::pending().await,
        }
    }

    async fn rest(&self, row: &Vm, action: IdleAction, why: String) {
        tracing::info!(?action, why, "nobody uses a VM");
        let ask = match action {
            IdleAction::Never => return,
            IdleAction::Pause => Ask::Pause,
            IdleAction::Suspend => Ask::Suspend,
            IdleAction::Stop => Ask::Stop(StopInput { grace_ms: IDLE_GRACE_MS, why: Some(why) }),
        };
        if let Err(error) = self.begin(row, ask, None).await {
            tracing::warn!(?action, %error, "a VM that nobody uses stays as it is");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Returns once something comes for a paused VM by its network.
    async fn touched(&self, row: &Vm) {
        match (row.phase.live(), row.facts.state) {
            (Some(live), VmState::Paused) if row.facts.busy.is_none() => {
                idle::touched(&live.place.lease.tap).await;
            }
            _ => std::future::pending().await,
        }
    }

    async fn go_on(&self, row: &Vm) {
        if let Err(error) = self.begin(row, Ask::Resume { force: false }, None).await {
            tracing::warn!(%error, "a VM does not go on");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Returns once `op` has ended; never where there is none.
    async fn ended(&self, op: Option<OpId>) {
        let Some(op) = op else { return std::future::pending().await };
        let record = self.ops.wait(op).await;
        if !record.is_ok_and(|record| record.state.is_final()) {
            // The engine is shutting down; nothing more will happen to it in this process.
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The boot id of a guest that was adopted without it, once it answers; never where it is known.
    async fn boot_id(&self, row: &Vm) -> String {
        match row.phase.live() {
            Some(live) if row.facts.busy.is_none() && live.vmm.boot_id.is_none() => {
                let guest = live.guest(&self.agent.config, self.vm);
                match timeout(BOOT_ID, guest.first_answer()).await {
                    Ok(answer) => plain_id(&answer.boot_id),
                    // It is asked again when something else happens to it.
                    Err(_) => std::future::pending().await,
                }
            }
            _ => std::future::pending().await,
        }
    }

    async fn note_boot_id(&self, boot_id: String) {
        if let Err(error) = self.agent.note_boot_id(self.vm, boot_id).await {
            tracing::error!(%error, "cannot note a guest's boot id");
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn note_exit(&self, row: &Vm, ended: Result<HolderHandle, Error>) {
        let noted = async {
            let handle = ended?;
            // The holder ends once the exit record is on disk.
            drop(timeout(super::HOLDER_END, Holder::gone(handle.holder)).await);
            self.agent.note_exit(self.vm, handle).await?;
            // An operation at work on it does the rest itself; none begins before this has returned.
            if row.facts.busy.is_none() {
                self.agent.try_remove_cgroup(self.vm).await;
                if let Err(error) = self.agent.unpublish_dns(self.vm).await {
                    tracing::warn!(%error, "the name of a VM that has ended may stay for a while");
                }
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = noted.await {
            tracing::error!(%error, "cannot note the end of a VMM");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Returns once the VMM of `handle` has ended; never where there is none.
async fn gone(handle: Option<HolderHandle>) -> Result<HolderHandle, Error> {
    match handle {
        Some(handle) => Holder::gone(handle.vmm).await.map(|()| handle),
        None => std::future::pending().await,
    }
}

/// An operation to begin on a VM.
pub(crate) fn new(
    kind: &'static str,
    vm: VmId,
    name: &VmName,
    owner: u32,
    request: Option<RequestId>,
    input: serde_json::Value,
) -> New {
    New { kind, subject: name.to_string(), vm: Some(vm), owner, request, input }
}
