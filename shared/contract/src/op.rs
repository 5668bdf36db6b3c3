//! Operations: work that is slower than a request. `begin` answers with an id at once; the rest is told as events.

use crate::{Error, OpId, Service, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What kind of work an operation is: `vm.create`, `image.build`.
pub type OpKind = String;

/// Where an operation stands. `Succeeded`, `Failed` and `Cancelled` are final, and by then every undo has run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpState {
    /// Stages are running.
    Running,
    /// A stage failed or a cancel came; the undos are running.
    Undoing,
    /// All stages are done.
    Succeeded,
    /// A stage failed, everything was undone.
    Failed,
    /// Cancelled on request, everything was undone.
    Cancelled,
}

impl OpState {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// Where one stage stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageState {
    /// Its `run` is going on.
    Running,
    /// Its `run` ended well.
    Done,
    /// Its `run` failed.
    Failed,
    /// Its `undo` has run.
    Undone,
}

/// One stage of an operation, with its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageRecord {
    /// The stage's fixed name: `launch_vmm`.
    pub name: String,
    /// Where it stands.
    pub state: StageState,
    /// When its `run` began, in microseconds since the operation was accepted.
    pub started_us: u64,
    /// How long its `run` took, in microseconds, once it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_us: Option<u64>,
    /// A word on how it went, for people: `work-seed cloned by reflink`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// An operation as `op show` gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpRecord {
    /// Its id.
    pub id: OpId,
    /// The service that runs it.
    pub service: Service,
    /// What it does.
    pub kind: OpKind,
    /// What it does it to, for people: the VM's or image's name.
    pub subject: String,
    /// The VM it belongs to, where it belongs to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// The user who asked for it.
    pub owner: u32,
    /// Where it stands.
    pub state: OpState,
    /// Whether a cancel has been asked for.
    #[serde(default)]
    pub cancel_requested: bool,
    /// When it was accepted.
    pub accepted: Timestamp,
    /// When it reached its final state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Timestamp>,
    /// Its stages in the order in which they began.
    pub stages: Vec<StageRecord>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
    /// The result of a success: for a create, the VM's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
}

/// One thing that happened in an operation, as the event stream carries it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpEvent {
    /// The operation.
    pub op: OpId,
    /// 0, 1, 2, ...: position in the operation's own history. A gap means that an event was lost.
    pub seq: u64,
    /// When, in microseconds since the operation was accepted.
    pub at_us: u64,
    /// What.
    pub what: OpEventKind,
}

/// What an [`OpEvent`] tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OpEventKind {
    /// The first event: the operation exists.
    Accepted {
        /// What it does.
        kind: OpKind,
        /// What it does it to.
        subject: String,
    },
    /// A stage began.
    StageStarted {
        /// Its name.
        stage: String,
    },
    /// A stage got on: for long ones.
    StageProgress {
        /// Its name.
        stage: String,
        /// Units done so far.
        done: u64,
        /// Units in all, where known.
        total: Option<u64>,
        /// `bytes`, `packages`, or a line for people.
        note: String,
    },
    /// A stage ended well.
    StageDone {
        /// Its name.
        stage: String,
        /// How long it took, in microseconds.
        took_us: u64,
        /// A word on how it went.
        note: Option<String>,
    },
    /// A stage failed.
    StageFailed {
        /// Its name.
        stage: String,
        /// How long it took, in microseconds.
        took_us: u64,
        /// Why.
        error: Error,
    },
    /// A stage's undo has run.
    StageUndone {
        /// Its name.
        stage: String,
    },
    /// A cancel was asked for.
    CancelRequested,
    /// The last event.
    Finished {
        /// The final state.
        state: OpState,
        /// Why it failed.
        error: Option<Error>,
        /// The result of a success.
        result: Option<serde_json::Value>,
    },
}

impl OpEventKind {
    /// The last token of the event's subject.
    pub fn token(&self) -> &'static str {
        match self {
            Self::Accepted { .. } => "accepted",
            Self::StageStarted { .. } => "stage_started",
            Self::StageProgress { .. } => "stage_progress",
            Self::StageDone { .. } => "stage_done",
            Self::StageFailed { .. } => "stage_failed",
            Self::StageUndone { .. } => "stage_undone",
            Self::CancelRequested => "cancel_requested",
            Self::Finished { .. } => "finished",
        }
    }
}

/// The answer to every `begin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// The operation to watch.
    pub op: OpId,
    /// The VM that it works on, where it works on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
}

/// Asks for one operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpRef {
    /// Its id.
    pub op: OpId,
}

/// Asks for the newest operations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpList {
    /// How many at most; the service gives at most 200.
    pub limit: u32,
}
