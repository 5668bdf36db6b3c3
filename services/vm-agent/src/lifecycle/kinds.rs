//! The kinds of operations on VMs: which stages, what after a crash, and what the end of one means for the VM's row.

use super::{Agent, boot, boot::Mode, end};
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
        match op.kind.as_str() {
            CREATE => boot::graph(&self.agent, op, Mode::Create),
            START => boot::graph(&self.agent, op, Mode::Start),
            STOP => end::stop(&self.agent, op),
            DELETE => end::delete(&self.agent, op),
            other => Err(Error::new(Code::Internal, format!("this build knows no operation {other:?}"))),
        }
    }

    /// All stages are idempotent, and a launched VMM has not noticed that the agent was away.
    fn resume(&self, _: &Op) -> Resume {
        Resume::Continue
    }

    fn settle(&self, tx: &Transaction<'_>, op: &Op, end: &mut End) -> Result<(), DbError> {
        let Some(id) = op.vm else { return Ok(()) };
        let Some(mut vm) = store::find(tx, id)? else { return Ok(()) };
        match settled(&mut vm, &op.kind, end) {
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

#[derive(Debug, PartialEq, Eq)]
enum After {
    Gone,
    Kept,
}

/// The result of a success: the VM's record, and for a boot the guest's own times beside its fields, as `boot`.
fn result(vm: &Vm, steps: Option<serde_json::Value>) -> Result<serde_json::Value, DbError> {
    let mut result = serde_json::to_value(&vm.record)?;
    if let (Some(object), Some(steps)) = (result.as_object_mut(), steps.filter(serde_json::Value::is_array)) {
        object.insert("boot".to_owned(), steps);
    }
    Ok(result)
}

/// What the end of an operation makes of its VM.
fn settled(vm: &mut Vm, kind: &str, end: &End) -> After {
    let why = end.error.as_ref().map(|e| e.message.clone());
    let failed = |what: &str| Some(format!("{what}: {}", why.clone().unwrap_or_default()));
    let succeeded = end.state == OpState::Succeeded;
    match (kind, succeeded) {
        (CREATE | START, true) if vm.handle.is_some() => {
            vm.record.started = Some(jiff::Timestamp::now());
            store::set_state(vm, VmState::Running, None);
        }
        // The VMM ended between the last stage and now, and its watcher saw it.
        (CREATE | START, true) => {
            let how = vm.record.last_exit.as_ref().map_or("ended".to_owned(), super::state::how);
            store::set_state(vm, VmState::Error, Some(format!("the VMM {how} as the VM became ready")));
        }
        (CREATE, false) if !end.leftovers => return After::Gone,
        (CREATE, false) => {
            store::set_state(vm, VmState::Error, failed("its create failed and left something behind"))
        }
        (START, false) if end.leftovers => {
            store::set_state(vm, VmState::Error, failed("its start failed and left something behind"));
        }
        (START, false) => store::set_state(vm, VmState::Stopped, failed("its last start failed")),
        (STOP, true) => store::set_state(vm, VmState::Stopped, None),
        (STOP, false) if vm.handle.is_some() => {
            store::set_state(vm, VmState::Running, failed("its last stop failed"));
        }
        (STOP, false) => store::set_state(vm, VmState::Stopped, failed("its stop failed")),
        (DELETE, true) => return After::Gone,
        (DELETE, false) => store::set_state(vm, VmState::Error, failed("its delete failed; delete it again")),
        _ => {}
    }
    After::Kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{
        VmId,
        vm::{ExitRecord, VmRecord},
    };
    use bothy_vm_agent::vmm::wire::{HolderHandle, Process};

    fn vm(state: VmState, alive: bool) -> Vm {
        let process = Process { pid: 1, start_time: 1 };
        Vm {
            record: VmRecord {
                state,
                ..VmRecord::new(
                    VmId::new(),
                    "a".parse().unwrap(),
                    1000,
                    "debian".parse().unwrap(),
                    bothy_contract::vm::Shape::default(),
                )
            },
            machine_id: "0".repeat(32),
            handle: alive.then_some(HolderHandle { holder: process, vmm: process }),
        }
    }

    fn end(state: OpState, leftovers: bool) -> End {
        let error = (state != OpState::Succeeded).then(|| Error::new(Code::StageFailed, "it broke"));
        End { state, error, leftovers, result: None }
    }

    #[test]
    fn every_end_of_every_operation_settles_the_row() {
        use OpState::{Cancelled, Failed, Succeeded};
        use VmState::{Creating, Deleting, Error as Broken, Running, Starting, Stopped, Stopping};
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
            (STOP, Stopping, false, Succeeded, false, Some(Stopped)),
            (STOP, Stopping, true, Failed, false, Some(Running)),
            (STOP, Stopping, false, Failed, false, Some(Stopped)),
            (DELETE, Deleting, false, Succeeded, false, None),
            (DELETE, Deleting, false, Failed, false, Some(Broken)),
        ];
        for (kind, from, alive, state, leftovers, to) in cases {
            let mut row = vm(from, alive);
            let after = settled(&mut row, kind, &end(state, leftovers));
            let what = format!("{kind} {state:?} leftovers={leftovers}");
            assert_eq!(after == After::Gone, to.is_none(), "{what}");
            if let Some(to) = to {
                assert_eq!(row.record.state, to, "{what}");
                assert_eq!(
                    row.record.reason.is_some(),
                    state != Succeeded || (to != Running && kind != STOP),
                    "{what}"
                );
            }
        }
    }

    #[test]
    fn a_vmm_that_died_at_the_last_moment_is_told_with_its_exit() {
        let mut row = vm(VmState::Creating, true);
        row.ended(Some(ExitRecord { at: jiff::Timestamp::UNIX_EPOCH, status: None, signal: Some(11) }));
        settled(&mut row, CREATE, &end(OpState::Succeeded, false));
        assert_eq!(row.record.state, VmState::Error);
        assert!(row.record.reason.unwrap().contains("signal 11"));
    }

    #[test]
    fn a_result_is_the_record_and_the_boots_steps() {
        let row = vm(VmState::Running, true);
        let value = result(&row, Some(serde_json::json!([{"name": "kernel"}]))).unwrap();
        assert_eq!(value["boot"][0]["name"], "kernel");
        let back: VmRecord = serde_json::from_value(value).unwrap();
        assert_eq!(back, row.record);
    }
}
