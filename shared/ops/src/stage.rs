//! What a stage's `run` and `undo` are given.

use crate::bounds;
use bothy_contract::{Code, Error, OpId, VmId};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How far a stage has come, on its way to the journal.
#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) stage: &'static str,
    pub(crate) done: u64,
    pub(crate) total: Option<u64>,
    pub(crate) note: String,
}

/// What a running stage knows of its operation, and how it tells how it goes. Clones are the same stage.
#[derive(Debug, Clone)]
pub struct StageCx {
    pub(crate) op: OpId,
    pub(crate) vm: Option<VmId>,
    pub(crate) stage: &'static str,
    pub(crate) stop: CancellationToken,
    pub(crate) note: Arc<Mutex<Option<String>>>,
    pub(crate) progress: mpsc::Sender<Progress>,
}

impl StageCx {
    /// The operation.
    pub fn op(&self) -> OpId {
        self.op
    }

    /// The VM it belongs to, where it belongs to one.
    pub fn vm(&self) -> Option<VmId> {
        self.vm
    }

    /// Cancelled when the operation is to stop: the user asked for it, or another stage failed. A stage that may wait long
    /// must watch it, for the undos wait until every running stage has ended.
    pub fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// `future`'s result, or [`Code::Cancelled`] if the operation is to stop before. For waits that leave nothing behind
    /// when they are dropped.
    ///
    /// # Errors
    /// Those of `future`, and [`Code::Cancelled`].
    pub async fn unless_stopped<T>(
        &self,
        future: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match self.stop.run_until_cancelled(future).await {
            Some(result) => result,
            None => Err(Error::new(Code::Cancelled, format!("stage {} was told to stop", self.stage))),
        }
    }

    /// Says in a word how the stage went, for people.
    pub fn note(&self, note: impl Into<String>) {
        *self.note.lock().unwrap_or_else(PoisonError::into_inner) = Some(bounds::note(note.into()));
    }

    /// Says how far the stage has come. May be called often: where the journal is behind, a report is left out.
    pub fn progress(&self, done: u64, total: Option<u64>, note: impl Into<String>) {
        // A full queue means that newer reports will follow.
        let note = bounds::note(note.into());
        drop(self.progress.try_send(Progress { stage: self.stage, done, total, note }));
    }

    pub(crate) fn take_note(&self) -> Option<String> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What an `undo` knows.
#[derive(Debug, Clone, Copy)]
pub struct UndoCx {
    pub(crate) op: OpId,
    pub(crate) vm: Option<VmId>,
}

impl UndoCx {
    /// The operation.
    pub fn op(&self) -> OpId {
        self.op
    }

    /// The VM it belongs to, where it belongs to one.
    pub fn vm(&self) -> Option<VmId> {
        self.vm
    }
}
