//! Operations: work that is slower than a request, journaled so that it survives the death of its service.
//!
//! A service implements [`Kinds`]: for each kind of operation a [`Graph`] of **stages**, what to do with one that a crash
//! left unfinished, and how its own rows settle at the end. The engine, [`Ops`], does the rest:
//!
//! - [`Ops::begin`] writes the operation, and whatever the service reserves for it, in one transaction before it answers.
//!   A repeated request id gets the same operation.
//! - A stage is in the journal, undo and all, *before* its `run` begins. Stages that do not depend on one another run side
//!   by side.
//! - On failure or cancel no new stage begins; those that run are told (their token) and awaited; then every stage that
//!   begun is undone in reverse order of beginning, the failing one too. A failed undo does not keep the others from
//!   running; what it left is told in the operation's error.
//! - After a crash [`Ops::resume`] goes on where the journal ends: with the undos, or with the stages, whose `run` must
//!   therefore be idempotent. So must every `undo`.
//! - Every step is an event, written in the same transaction as the step (an outbox) and published in order by one task,
//!   again and again until the bus has taken it: an outage of the bus loses nothing.
//!
//! ```text
//!              begin               all stages done
//!   (request) ------> Running ---------------------> Succeeded
//!                        |
//!                        | a stage fails, or cancel
//!                        v             every undo ran
//!                     Undoing ---------------------> Failed | Cancelled
//! ```
//!
//! The journal's tables are the service's own database: put [`SCHEMA`] first among its migrations.

mod bounds;
mod engine;
mod graph;
mod journal;
mod outbox;
mod run;
mod stage;

pub use engine::{Begun, Kinds, New, Ops, Resume};
pub use graph::{Graph, Inputs, Output};
pub use outbox::Sink;
pub use run::End;
pub use stage::{StageCx, UndoCx};

use bothy_contract::{OpId, VmId};
use jiff::Timestamp;
use serde_json::Value;

/// The journal's tables, as one migration of the service's database.
pub const SCHEMA: &str = include_str!("schema.sql");

/// An operation, as far as it is fixed when it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Op {
    /// Its id.
    pub id: OpId,
    /// What it does: `vm.create`.
    pub kind: String,
    /// What it does it to, for people.
    pub subject: String,
    /// The VM it belongs to, where it belongs to one.
    pub vm: Option<VmId>,
    /// The user who asked for it.
    pub owner: u32,
    /// All that its graph is made from.
    pub input: Value,
    /// When it was accepted.
    pub accepted: Timestamp,
}

impl Op {
    /// The input as what the service put in.
    ///
    /// # Errors
    /// [`bothy_contract::Code::Internal`] where it is something else: an operation of another build.
    pub fn input<T: serde::de::DeserializeOwned>(&self) -> Result<T, bothy_contract::Error> {
        T::deserialize(&self.input).map_err(|e| {
            bothy_contract::Error::internal(format!("the input of operation {} is not readable", self.id), &e)
        })
    }
}
