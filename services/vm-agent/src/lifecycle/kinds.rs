//! The kinds of operations on VMs: which stages, what after a crash, and what the end of one means for the VM's row.

use super::{
    Agent,
    ask::{RestartInput, StopInput},
    boot::{self, BootInput, Mode},
    end, rest, set,
    template::{
        self, MAKE,
        make::{self, MakeInput},
        resume,
    },
    vm_of,
};
use crate::store::{self, Vm};
use bothy_contract::{Code, Error, op::OpState, vm::VmState};
use bothy_db::{Error as DbError, rusqlite::Transaction};
use bothy_ops::{End, Graph, Kinds, Op, Resume};

/// Makes a VM.
pub(crate) const CREATE: &str = "vm.create";
/// Starts one that is there.
pub(crate) const START: &str = "vm.start";
/// Powers one off.
pub(crate) const STOP: &str = "vm.stop";
/// Powers one off, where it runs, and starts it.
pub(crate) const RESTART: &str = "vm.restart";
/// Sends the VMM of one a signal.
pub(crate) const KILL: &str = "vm.kill";
/// Changes one.
pub(crate) const SET: &str = "vm.set";
/// Has one stand still.
pub(crate) const PAUSE: &str = "vm.pause";
/// Puts the memory of one on disk.
pub(crate) const SUSPEND: &str = "vm.suspend";
/// Has one go on that rests.
pub(crate) const RESUME: &str = "vm.resume";
/// Removes one.
pub(crate) const DELETE: &str = "vm.delete";

/// The vm-agent's kinds of operations.
#[derive(Debug)]
pub(crate) struct VmKinds {
    agent: Agent,
}

impl VmKinds {
    pub(crate) fn new(agent: Agent) -> Self {
        Self { agent }
    }
}

impl Kinds for VmKinds {
    fn graph(&self, op: &Op) -> Result<Graph, Error> {
        let (agent, vm) = (&self.agent, vm_of(op.vm)?);
        let mut g = Graph::new();
        match op.kind.as_str() {
            CREATE => boot::add(&mut g, agent, vm, op.input::<BootInput>()?, Mode::Create, None),
            START => boot::add(&mut g, agent, vm, op.input::<BootInput>()?, Mode::Start, None),
            RESTART => {
                let RestartInput { stop, boot } = op.input()?;
                let stopped = end::add_stop(&mut g, agent, vm, stop.grace_ms);
                boot::add(&mut g, agent, vm, boot, Mode::Start, Some(stopped));
            }
            STOP => {
                g.not_cancellable();
                end::add_stop(&mut g, agent, vm, op.input::<StopInput>()?.grace_ms);
            }
            KILL => end::add_kill(&mut g, agent, vm, op.input()?),
            SET => set::add(&mut g, agent, vm, op.input()?),
            PAUSE => rest::add_pause(&mut g, agent, vm),
            SUSPEND => rest::add_suspend(&mut g, agent, vm),
            RESUME => rest::add_resume(&mut g, agent, vm, op.input()?),
            DELETE => end::add_delete(&mut g, agent, vm),
            MAKE => make::add(&mut g, agent, vm, op.input::<MakeInput>()?),
            other => {
                return Err(Error::new(Code::Internal, format!("this build knows no operation {other:?}")));
            }
        }
        Ok(g)
    }

    /// All stages are idempotent, and a launched VMM has not noticed that the agent was away. Only a template is a matter of one
    /// moment.
    fn resume(&self, op: &Op) -> Resume {
        if op.kind == MAKE { Resume::Undo } else { Resume::Continue }
    }

    fn settle(&self, tx: &Transaction<'_>, op: &Op, end: &mut End) -> Result<(), DbError> {
        let Some(id) = op.vm else { return Ok(()) };
        let Some(mut vm) = store::find(tx, id)? else { return Ok(()) };
        let after = settled(&mut vm, op, end);
        if end.state == OpState::Succeeded {
            self.settle_templates(tx, op, end)?;
        }
        if vm.facts.busy == Some(op.id) {
            vm.facts.busy = None;
            vm.facts.resting = false;
        }
        match after {
            After::Gone => store::remove(tx, id),
            After::Kept => {
                if op.kind != DELETE && end.state == OpState::Succeeded {
                    end.result = Some(result(&vm, end.result.take())?);
                }
                store::update(tx, id, |row| {
                    *row = vm;
                    Ok(())
                })
            }
        }
    }
}

impl VmKinds {
    /// What a success means for the templates.
    fn settle_templates(&self, tx: &Transaction<'_>, op: &Op, end: &End) -> Result<(), DbError> {
        match op.kind.as_str() {
            MAKE => {
                let made = serde_json::from_value(end.result.clone().unwrap_or_default())?;
                template::settle(tx, &self.agent, &op.input()?, &made)
            }
            CREATE => {
                if let Some(want) = resume::wanted(&op.input()?) {
                    self.agent.templates.want(want);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum After {
    Gone,
    Kept,
}

/// The result of a success: the VM's record, and for a boot the guest's own times beside its fields, as `boot`.
fn result(vm: &Vm, steps: Option<serde_json::Value>) -> Result<serde_json::Value, DbError> {
    let mut result = serde_json::to_value(vm.record())?;
    if let (Some(object), Some(steps)) = (result.as_object_mut(), steps.filter(serde_json::Value::is_array)) {
        object.insert("boot".to_owned(), steps);
    }
    Ok(result)
}

/// What the end of an operation makes of its VM.
fn settled(vm: &mut Vm, op: &Op, end: &End) -> After {
    let why = end.error.as_ref().map(|e| e.message.clone());
    let failed = |what: &str| Some(format!("{what}: {}", why.clone().unwrap_or_default()));
    let succeeded = end.state == OpState::Succeeded;
    let live = vm.phase.live().is_some();
    match (op.kind.as_str(), succeeded) {
        (CREATE | START | RESTART, true) if live => {
            vm.facts.started = Some(jiff::Timestamp::now());
            store::set_state(vm, VmState::Running, None);
        }
        // The VMM ended between the last stage and now, and its machine saw it.
        (PAUSE, true) if live => store::set_state(vm, VmState::Paused, None),
        (RESUME, true) if live => store::set_state(vm, VmState::Running, None),
        (SUSPEND, true) => store::set_state(vm, VmState::Suspended, None),
        (CREATE | START | RESTART | PAUSE | RESUME, true) => {
            let how = vm.facts.last_exit.as_ref().map_or("ended".to_owned(), super::state::how);
            store::set_state(vm, VmState::Error, Some(format!("the VMM {how} meanwhile")));
        }
        (CREATE, false) if !end.leftovers => return After::Gone,
        (CREATE, false) => {
            store::set_state(vm, VmState::Error, failed("its create failed and left something behind"))
        }
        (START | RESTART, false) if end.leftovers => {
            store::set_state(vm, VmState::Error, failed("its start failed and left something behind"));
        }
        (START, false) => store::set_state(vm, VmState::Stopped, failed("its last start failed")),
        // It was not powered off yet, so it runs as before.
        (RESTART, false) if live => {
            store::set_state(vm, VmState::Running, failed("its last restart failed"));
        }
        (RESTART, false) => store::set_state(vm, VmState::Stopped, failed("its last restart failed")),
        (STOP, true) => {
            let why = op.input::<StopInput>().ok().and_then(|stop| stop.why);
            store::set_state(vm, VmState::Stopped, why);
        }
        (KILL, true) => store::set_state(vm, VmState::Stopped, None),
        (STOP | KILL, false) if live => {
            store::set_state(vm, VmState::Running, failed("its last stop failed"));
        }
        (PAUSE | SUSPEND, false) if live => {
            store::set_state(vm, VmState::Running, failed("it could not be put to rest"));
        }
        (RESUME, false) if live => store::set_state(vm, VmState::Paused, failed("its last resume failed")),
        (SUSPEND | RESUME, false) if vm.facts.asleep.is_some() => {
            store::set_state(vm, VmState::Suspended, failed("its last resume failed"));
        }
        (PAUSE | SUSPEND | RESUME, false) => {
            store::set_state(vm, VmState::Error, failed("what it had in memory is lost"));
        }
        (STOP | KILL, false) => store::set_state(vm, VmState::Stopped, failed("its stop failed")),
        (DELETE | MAKE, true) => return After::Gone,
        (MAKE, false) if !end.leftovers => return After::Gone,
        (MAKE, false) => {
            store::set_state(vm, VmState::Error, failed("making a template of it left something behind"));
            // It is shown from now on, to be deleted.
            vm.facts.template = None;
        }
        (DELETE, false) => store::set_state(vm, VmState::Error, failed("its delete failed; delete it again")),
        // A change moves nothing.
        _ => {}
    }
    After::Kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lifecycle::ask::Ask,
        phase::{Phase, Vmm},
        store::Facts,
    };
    use bothy_contract::{
        ImageName, OpId, VmId,
        net::Lease,
        vm::{ExitRecord, Shape, VmRecord},
    };
    use bothy_vm_agent::vmm::wire::{HolderHandle, Process};

    fn vm(state: VmState, alive: bool) -> Vm {
        vm_of(state, alive, "x")
    }

    fn vm_of(state: VmState, alive: bool, vmm: &str) -> Vm {
        let process = Process { pid: 1, start_time: 1 };
        let lease: Lease = serde_json::from_value(serde_json::json!({
            "slot": 0, "tap": "t0", "uid": 780_000, "address": "10.77.0.2", "prefix": 24, "gateway": "10.77.0.1",
            "mac": "52:54:00:00:00:02", "dns": [],
        }))
        .unwrap();
        let mut phase = Phase::Reserved;
        phase.place(lease);
        if alive {
            let handle = HolderHandle { holder: process, vmm: process };
            phase.launch(Vmm { handle, name: vmm.into(), booted: Shape::default(), boot_id: None }).unwrap();
        }
        let image = ImageName::default_image();
        let facts = Facts::new(VmId::new(), "a".parse().unwrap(), 1000, image, Shape::default());
        Vm { facts: Facts { state, ..facts }, phase }
    }

    #[test]
    fn a_vm_whose_vmm_saves_no_guest_is_not_suspended_and_stays_as_it_is() {
        let mut jailed = vm_of(VmState::Running, true, "firecracker 1.16.1 jailed (kvm)");
        let e = Ask::Suspend.grant(&mut jailed, OpId::new()).unwrap_err();
        assert!(e.message.contains("firecracker 1.16.1 jailed (kvm) cannot save a guest"), "{e}");
        assert!(e.hint.as_deref().unwrap().contains("vm pause"), "{e}");
        assert!(jailed.facts.state == VmState::Running && jailed.facts.busy.is_none());
        Ask::Pause.grant(&mut jailed, OpId::new()).unwrap();
        let mut other = vm_of(VmState::Running, true, "qemu-microvm 10.0.2 (tcg)");
        Ask::Suspend.grant(&mut other, OpId::new()).unwrap();
    }

    fn op(kind: &str) -> Op {
        let input = serde_json::json!({ "grace_ms": 1, "why": "nobody used it" });
        Op {
            id: OpId::new(),
            kind: kind.to_owned(),
            subject: "a".into(),
            vm: None,
            owner: 0,
            input,
            accepted: jiff::Timestamp::UNIX_EPOCH,
        }
    }

    fn end(state: OpState, leftovers: bool) -> End {
        let error = (state != OpState::Succeeded).then(|| Error::new(Code::StageFailed, "it broke"));
        End { state, error, leftovers, result: None }
    }

    #[test]
    fn every_end_of_every_operation_settles_the_row() {
        use OpState::{Cancelled, Failed, Succeeded};
        use VmState::{
            Creating, Deleting, Error as Broken, Paused, Running, Starting, Stopped, Stopping, Suspended,
        };
        let cases = [
            (CREATE, Creating, true, Succeeded, false, Some(Running)),
            (CREATE, Creating, false, Succeeded, false, Some(Broken)),
            (CREATE, Creating, false, Failed, false, None),
            (CREATE, Creating, false, Cancelled, false, None),
            (CREATE, Creating, false, Failed, true, Some(Broken)),
            (START, Starting, true, Succeeded, false, Some(Running)),
            (START, Starting, false, Failed, false, Some(Stopped)),
            (START, Starting, false, Cancelled, false, Some(Stopped)),
            (START, Starting, true, Failed, true, Some(Broken)),
            (RESTART, Starting, true, Succeeded, false, Some(Running)),
            (RESTART, Starting, true, Cancelled, false, Some(Running)),
            (RESTART, Starting, false, Failed, false, Some(Stopped)),
            (RESTART, Starting, true, Failed, true, Some(Broken)),
            (STOP, Stopping, false, Succeeded, false, Some(Stopped)),
            (STOP, Stopping, true, Failed, false, Some(Running)),
            (STOP, Stopping, false, Failed, false, Some(Stopped)),
            (KILL, Stopping, false, Succeeded, false, Some(Stopped)),
            (KILL, Stopping, true, Failed, false, Some(Running)),
            (PAUSE, Running, true, Succeeded, false, Some(Paused)),
            (PAUSE, Running, false, Succeeded, false, Some(Broken)),
            (PAUSE, Running, true, Failed, false, Some(Running)),
            (PAUSE, Running, false, Failed, false, Some(Broken)),
            (SUSPEND, Stopping, false, Succeeded, false, Some(Suspended)),
            (SUSPEND, Stopping, true, Failed, false, Some(Running)),
            (SUSPEND, Stopping, false, Failed, false, Some(Broken)),
            (RESUME, Paused, true, Succeeded, false, Some(Running)),
            (RESUME, Paused, true, Failed, false, Some(Paused)),
            (RESUME, Starting, false, Failed, false, Some(Broken)),
            (SET, Stopped, false, Failed, false, Some(Stopped)),
            (SET, Running, true, Succeeded, false, Some(Running)),
            (DELETE, Deleting, false, Succeeded, false, None),
            (DELETE, Deleting, false, Failed, false, Some(Broken)),
            (MAKE, Creating, false, Succeeded, false, None),
            (MAKE, Creating, true, Failed, false, None),
            (MAKE, Creating, false, Failed, true, Some(Broken)),
        ];
        for (kind, from, alive, state, leftovers, to) in cases {
            let mut row = vm(from, alive);
            let after = settled(&mut row, &op(kind), &end(state, leftovers));
            let what = format!("{kind} {state:?} leftovers={leftovers}");
            assert_eq!(after == After::Gone, to.is_none(), "{what}");
            if let Some(to) = to {
                assert_eq!(row.facts.state, to, "{what}");
                let told = kind != SET && (state != Succeeded || kind == STOP || to == Broken);
                assert_eq!(row.facts.reason.is_some(), told, "{what}");
            }
        }
    }

    #[test]
    fn memory_that_is_on_disk_is_not_lost_by_a_failure() {
        for (kind, from) in [(RESUME, VmState::Starting), (SUSPEND, VmState::Stopping)] {
            let mut row = vm(from, false);
            row.facts.asleep =
                Some(crate::store::Asleep { shape: Shape::default(), vmm: "x".into(), bytes: 1 });
            settled(&mut row, &op(kind), &end(OpState::Failed, false));
            assert_eq!(row.facts.state, VmState::Suspended);
            assert!(row.facts.reason.is_some());
        }
    }

    #[test]
    fn a_vmm_that_died_at_the_last_moment_is_told_with_its_exit() {
        let mut row = vm(VmState::Creating, true);
        row.ended(Some(ExitRecord { at: jiff::Timestamp::UNIX_EPOCH, status: None, signal: Some(11) }));
        settled(&mut row, &op(CREATE), &end(OpState::Succeeded, false));
        assert_eq!(row.facts.state, VmState::Error);
        assert!(row.facts.reason.unwrap().contains("signal 11"));
    }

    #[test]
    fn a_result_is_the_record_and_the_boots_steps() {
        let row = vm(VmState::Running, true);
        let value = result(&row, Some(serde_json::json!([{"name": "kernel"}]))).unwrap();
        assert_eq!(value["boot"][0]["name"], "kernel");
        let back: VmRecord = serde_json::from_value(value).unwrap();
        assert_eq!(back, row.record());
    }
}
