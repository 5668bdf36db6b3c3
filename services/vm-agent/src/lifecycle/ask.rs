//! What can be asked of a VM that is there, and the operation that it becomes.

use super::{
    boot::BootInput,
    kinds::{DELETE, KILL, PAUSE, RESTART, RESUME, SET, START, STOP, SUSPEND},
    rest,
    set::{self, Change},
    state::{self, Wish},
};
use crate::store::{self, Vm};
use bothy_contract::{
    Error, OpId,
    net::Egress,
    vm::{VmSpec, VmState},
    workspace::Identity,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Something that a user, or the agent itself, wants done to a VM.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    /// Boots it.
    Start {
        /// Whose it is.
        identity: Identity,
        /// Even if the host's memory does not hold it.
        force: bool,
    },
    /// Powers it off, if it runs, and boots it.
    Restart {
        /// How to power it off.
        stop: StopInput,
        /// Whose it is.
        identity: Identity,
    },
    /// Powers it off.
    Stop(StopInput),
    /// Sends its VMM a signal.
    Kill(KillInput),
    /// Changes it.
    Set(Change),
    /// Has its guest stand still.
    Pause,
    /// Puts its guest's memory on disk.
    Suspend,
    /// Has it go on from either.
    Resume {
        /// Even if the host's memory does not hold it.
        force: bool,
    },
    /// Removes it.
    Delete {
        /// Even while it runs.
        force: bool,
    },
}

/// What a stop is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StopInput {
    /// How long the guest may take, in milliseconds.
    pub(crate) grace_ms: u64,
    /// Why, where no user asked for it.
    #[serde(default)]
    pub(crate) why: Option<String>,
}

/// What a kill is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KillInput {
    /// The signal's number.
    pub(crate) signal: i32,
}

/// What a restart is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RestartInput {
    /// How it is powered off.
    pub(crate) stop: StopInput,
    /// How it is booted.
    pub(crate) boot: BootInput,
}

/// What a resume is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ResumeInput {
    /// The VMM is there.
    Paused,
    /// It has to be started, as it was when the memory was saved.
    Suspended(Box<BootInput>),
}

impl Ask {
    /// The same, asked of `vm` as it is: one that rests is not started, it goes on.
    pub(crate) fn of(self, vm: &Vm) -> Self {
        match (self, vm.facts.state) {
            (Ask::Start { force, .. }, VmState::Paused | VmState::Suspended) => Ask::Resume { force },
            (ask, _) => ask,
        }
    }

    /// The kind of its operation.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Ask::Start { .. } => START,
            Ask::Restart { .. } => RESTART,
            Ask::Stop(_) => STOP,
            Ask::Kill(_) => KILL,
            Ask::Set(_) => SET,
            Ask::Pause => PAUSE,
            Ask::Suspend => SUSPEND,
            Ask::Resume { .. } => RESUME,
            Ask::Delete { .. } => DELETE,
        }
    }

    fn wish(&self) -> Wish {
        match *self {
            Ask::Start { .. } => Wish::Start,
            Ask::Restart { .. } => Wish::Restart,
            Ask::Stop(_) => Wish::Stop,
            Ask::Kill(_) => Wish::Kill,
            Ask::Set(_) => Wish::Set,
            Ask::Pause => Wish::Pause,
            Ask::Suspend => Wish::Suspend,
            Ask::Resume { .. } => Wish::Resume,
            Ask::Delete { force } => Wish::Delete { force },
        }
    }

    /// All that the operation's stages are made from.
    pub(crate) fn input(&self, vm: &Vm) -> Result<Value, Error> {
        let kept = match self {
            Ask::Start { identity, .. } => serde_json::to_value(boot_input(vm, identity)),
            Ask::Restart { stop, identity } => {
                serde_json::to_value(RestartInput { stop: stop.clone(), boot: boot_input(vm, identity) })
            }
            Ask::Stop(stop) => serde_json::to_value(stop),
            Ask::Kill(kill) => serde_json::to_value(kill),
            Ask::Set(change) => serde_json::to_value(change),
            Ask::Resume { .. } => serde_json::to_value(resume_input(vm)),
            Ask::Pause | Ask::Suspend | Ask::Delete { .. } => Ok(Value::Null),
        };
        kept.map_err(|e| Error::internal("cannot keep the request", &e))
    }

    /// Puts `vm` under operation `op`, if its state allows that.
    pub(crate) fn grant(&self, vm: &mut Vm, op: OpId) -> Result<(), Error> {
        let to = state::grant(vm, self.wish())?;
        if let Ask::Set(change) = self {
            set::check(vm, change)?;
        }
        if let Ask::Suspend = self {
            rest::check(vm)?;
        }
        vm.facts.busy = Some(op);
        vm.facts.resting = matches!(self, Ask::Pause | Ask::Suspend | Ask::Resume { .. });
        // A change moves nothing, so the reason of the state stays too.
        if to != vm.facts.state {
            store::set_state(vm, to, None);
        }
        Ok(())
    }
}

fn resume_input(vm: &Vm) -> ResumeInput {
    match &vm.facts.asleep {
        None => ResumeInput::Paused,
        Some(asleep) => {
            let mut boot = boot_input(vm, &Identity::default());
            boot.spec.shape = asleep.shape.clone();
            ResumeInput::Suspended(Box::new(boot))
        }
    }
}

fn boot_input(vm: &Vm, identity: &Identity) -> BootInput {
    let facts = vm.facts.clone();
    let spec = VmSpec {
        name: Some(facts.name.clone()),
        image: facts.image,
        shape: facts.shape,
        nat: facts.egress == Egress::Open,
        egress: Some(facts.egress),
        publish: facts.publish,
        groups: facts.groups,
        identity: identity.clone(),
        idle: facts.idle,
    };
    BootInput { name: facts.name, spec, machine_id: facts.machine_id, cold: false }
}
