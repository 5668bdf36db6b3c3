//! The decisions about a VM's state, as pure functions. The diagram is in [`super`].

use crate::store::Vm;
use bothy_contract::{
    Code, Error,
    vm::{ExitRecord, VmState},
};

/// What a user wants done to a VM that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Start,
    Restart,
    Stop,
    Kill,
    Set,
    Pause,
    Suspend,
    Resume,
    Delete { force: bool },
}

/// The state that `wish` brings `vm` into, or why it cannot be granted now.
pub(crate) fn grant(vm: &Vm, wish: Wish) -> Result<VmState, Error> {
    use VmState::{
        Creating, Deleting, Error as Broken, Paused, Running, Starting, Stopped, Stopping, Suspended,
    };
    let (name, state) = (&vm.facts.name, vm.facts.state);
    let refused = |what: String, hint: String| Err(Error::new(Code::FailedPrecondition, what).hint(hint));
    match (wish, state) {
        (_, Creating | Starting) => refused(
            format!("VM {name} is {}", word(state)),
            "wait for that operation, or stop it with `bothy op cancel`; `bothy op list` shows it".into(),
        ),
        (_, Stopping | Deleting) => refused(
            format!("VM {name} is {}", word(state)),
            "wait for that operation; `bothy op list` shows it".into(),
        ),
        (_, Running | Paused | Suspended | Stopped | Broken) if vm.facts.busy.is_some() => refused(
            format!("VM {name} is being changed"),
            "wait for that operation; `bothy op list` shows it".into(),
        ),
        (Wish::Start, Stopped | Broken) | (Wish::Restart, Running | Paused | Stopped | Broken) => {
            Ok(Starting)
        }
        (Wish::Start | Wish::Resume, Paused) => Ok(Paused),
        (Wish::Start | Wish::Resume, Suspended) => Ok(Starting),
        (Wish::Start, Running) => refused(
            format!("VM {name} is running already"),
            format!("`bothy vm restart {name}` starts it anew"),
        ),
        (Wish::Resume, Running) => {
            refused(format!("VM {name} is running already"), "nothing is to be done".into())
        }
        (Wish::Pause, Running) => Ok(Running),
        (Wish::Pause, Paused) | (Wish::Suspend, Suspended) => {
            refused(format!("VM {name} is {} already", word(state)), "nothing is to be done".into())
        }
        (Wish::Suspend, Running | Paused) => Ok(Stopping),
        (Wish::Stop | Wish::Kill, Running | Paused) | (Wish::Kill, Suspended) => Ok(Stopping),
        (Wish::Stop | Wish::Restart, Suspended) => refused(
            format!("VM {name} is suspended: what it has in memory would be lost"),
            format!("`bothy vm resume {name}` first, or `bothy vm kill {name}` to lose it"),
        ),
        (Wish::Pause, Suspended) => refused(
            format!("VM {name} is suspended"),
            format!("it rests already; `bothy vm resume {name}` lets it go on"),
        ),
        (Wish::Set, Paused | Suspended) => refused(
            format!("VM {name} is {}", word(state)),
            format!("`bothy vm resume {name}` lets it go on; then it can be changed"),
        ),
        (Wish::Stop | Wish::Kill | Wish::Pause | Wish::Suspend | Wish::Resume, Stopped | Broken) => {
            refused(format!("VM {name} is not running"), format!("`bothy vm start {name}` starts it"))
        }
        (Wish::Set, Running | Stopped | Broken) => Ok(state),
        (Wish::Delete { .. }, Stopped | Suspended | Broken)
        | (Wish::Delete { force: true }, Running | Paused) => Ok(Deleting),
        (Wish::Delete { force: false }, Running | Paused) => refused(
            format!("VM {name} is {}", word(state)),
            format!("stop it first with `bothy vm stop {name}`, or use `--force` to kill it"),
        ),
    }
}

/// A state as people read it.
pub(crate) fn word(state: VmState) -> &'static str {
    match state {
        VmState::Creating => "being created",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Suspended => "suspended",
        VmState::Stopping => "stopping",
        VmState::Stopped => "stopped",
        VmState::Deleting => "being deleted",
        VmState::Error => "in error",
    }
}

/// Where a VM stands once its VMM is found to have ended: `None` where an operation is at work on it, which decides.
pub(crate) fn after_exit(state: VmState, exit: Option<&ExitRecord>) -> Option<(VmState, String)> {
    if !matches!(state, VmState::Running | VmState::Paused) {
        return None;
    }
    Some(match exit {
        Some(ExitRecord { status: Some(0), signal: None, .. }) => {
            (VmState::Stopped, "the guest powered itself off".to_owned())
        }
        Some(exit) => (VmState::Error, format!("the VMM {}", how(exit))),
        None => (
            VmState::Error,
            "the VMM ended without a record: its holder was killed, or the host went down".to_owned(),
        ),
    })
}

/// How a VMM ended, in words.
pub(crate) fn how(exit: &ExitRecord) -> String {
    match (exit.signal, exit.status) {
        (Some(signal), _) => format!("was ended by signal {signal}"),
        (None, Some(status)) => format!("exited with status {status}"),
        (None, None) => "ended in an unknown way".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{phase::Phase, store::Facts};
    use VmState::{
        Creating, Deleting, Error as Broken, Paused, Running, Starting, Stopped, Stopping, Suspended,
    };
    use bothy_contract::{ImageName, OpId, VmId, vm::Shape};

    fn vm(state: VmState) -> Vm {
        let name = "a".parse().unwrap();
        let facts = Facts::new(VmId::new(), name, 1000, ImageName::default_image(), Shape::default());
        Vm { facts: Facts { state, ..facts }, phase: Phase::Reserved }
    }

    #[test]
    fn every_wish_in_every_state_has_its_answer() {
        let all = [Creating, Starting, Running, Paused, Suspended, Stopping, Stopped, Deleting, Broken];
        let granted = |wish| {
            all.into_iter().filter_map(|s| grant(&vm(s), wish).ok().map(|to| (s, to))).collect::<Vec<_>>()
        };
        assert_eq!(
            granted(Wish::Start),
            [(Paused, Paused), (Suspended, Starting), (Stopped, Starting), (Broken, Starting)]
        );
        assert_eq!(
            granted(Wish::Restart),
            [(Running, Starting), (Paused, Starting), (Stopped, Starting), (Broken, Starting)]
        );
        assert_eq!(granted(Wish::Stop), [(Running, Stopping), (Paused, Stopping)]);
        assert_eq!(granted(Wish::Kill), [(Running, Stopping), (Paused, Stopping), (Suspended, Stopping)]);
        assert_eq!(granted(Wish::Pause), [(Running, Running)]);
        assert_eq!(granted(Wish::Suspend), [(Running, Stopping), (Paused, Stopping)]);
        assert_eq!(granted(Wish::Resume), [(Paused, Paused), (Suspended, Starting)]);
        assert_eq!(granted(Wish::Set), [(Running, Running), (Stopped, Stopped), (Broken, Broken)]);
        assert_eq!(
            granted(Wish::Delete { force: false }),
            [(Suspended, Deleting), (Stopped, Deleting), (Broken, Deleting)]
        );
        assert_eq!(
            granted(Wish::Delete { force: true }),
            [
                (Running, Deleting),
                (Paused, Deleting),
                (Suspended, Deleting),
                (Stopped, Deleting),
                (Broken, Deleting)
            ]
        );
        let wishes = [
            Wish::Start,
            Wish::Restart,
            Wish::Stop,
            Wish::Kill,
            Wish::Set,
            Wish::Pause,
            Wish::Suspend,
            Wish::Resume,
            Wish::Delete { force: false },
        ];
        for state in all {
            for wish in wishes {
                if let Err(e) = grant(&vm(state), wish) {
                    assert_eq!(e.code, Code::FailedPrecondition);
                    assert!(e.hint.is_some() && e.message.contains("VM a is"), "{e}");
                }
                let mut busy = vm(state);
                busy.facts.busy = Some(OpId::new());
                assert!(grant(&busy, wish).is_err(), "{state:?} {wish:?}: one operation at a time");
            }
        }
    }

    #[test]
    fn an_exit_moves_only_a_running_vm() {
        let exit = |status, signal| ExitRecord { at: jiff::Timestamp::UNIX_EPOCH, status, signal };
        assert_eq!(after_exit(Running, Some(&exit(Some(0), None))).unwrap().0, Stopped);
        for bad in [exit(Some(1), None), exit(None, Some(9)), exit(None, None)] {
            assert_eq!(after_exit(Running, Some(&bad)).unwrap().0, Broken);
        }
        assert_eq!(after_exit(Running, None).unwrap().0, Broken);
        assert_eq!(after_exit(Paused, None).unwrap().0, Broken);
        for state in [Creating, Starting, Stopping, Suspended, Stopped, Deleting, Broken] {
            assert_eq!(after_exit(state, None), None, "{state:?}");
        }
        assert_eq!(how(&exit(None, Some(9))), "was ended by signal 9");
    }
}
