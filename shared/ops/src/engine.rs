//! The engine: begins operations, keeps track of those that run, resumes those that a crash cut off.

use crate::{
    End, Graph, Op, Sink, bounds, journal, outbox,
    run::{self, Past, Run},
};
use bothy_contract::{
    Code, Error, OpId, RequestId, Service, VmId,
    op::{OpList, OpRecord, OpRef, OpState},
};
use bothy_db::{Db, rusqlite::Transaction};
use jiff::Timestamp;
use serde_json::Value;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

/// Finished operations that are kept, unless the service says otherwise.
const KEEP: u32 = 1000;
/// The most that one list shows.
const MAX_LIST: u32 = 200;

/// What to do with an operation that a crash cut off before its undos began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Go on with its stages.
    Continue,
    /// Undo what it did.
    Undo,
}

/// What a service knows about its operations.
pub trait Kinds: Send + Sync + 'static {
    /// The stages of `op`, made from its kind and input alone, so that after a crash the same graph comes out.
    ///
    /// # Errors
    /// Where there is no such kind, or the input is not one of this build; the operation fails with it.
    fn graph(&self, op: &Op) -> Result<Graph, Error>;

    /// What to do with `op`, which was running when the process died. A cancelled one is undone without asking.
    fn resume(&self, op: &Op) -> Resume;

    /// Settles the service's own rows for the end of `op`, in the transaction that ends it: then no crash can come between
    /// the two. May put something else into `end.result`.
    ///
    /// # Errors
    /// Rolls the end back; it is tried again until it works.
    fn settle(&self, tx: &Transaction<'_>, op: &Op, end: &mut End) -> Result<(), bothy_db::Error>;
}

/// An operation to begin.
#[derive(Debug, Clone)]
pub struct New {
    /// What it does: `vm.create`.
    pub kind: &'static str,
    /// What it does it to, for people.
    pub subject: String,
    /// The VM it belongs to, where it belongs to one.
    pub vm: Option<VmId>,
    /// The user who asks for it.
    pub owner: u32,
    /// The request that asks for it: a repeat gets the first one's operation.
    pub request: Option<RequestId>,
    /// All that the graph is made from.
    pub input: Value,
}

/// What [`Ops::begin`] answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Begun {
    /// The operation.
    pub op: Op,
    /// Whether an earlier request began it.
    pub repeated: bool,
}

impl From<Begun> for bothy_contract::op::Begun {
    fn from(b: Begun) -> Self {
        Self { op: b.op.id, vm: b.op.vm }
    }
}

/// The operations of one service. Clones are the same engine.
#[derive(Clone)]
pub struct Ops {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) db: Db,
    pub(crate) service: Service,
    pub(crate) kinds: Arc<dyn Kinds>,
    pub(crate) keep: u32,
    pub(crate) wake: Arc<Notify>,
    pub(crate) halt: CancellationToken,
    running: Mutex<HashMap<OpId, Handle>>,
    tasks: TaskTracker,
}

struct Handle {
    cancel: CancellationToken,
    cancellable: bool,
    /// Its sender goes when the run has ended.
    ended: watch::Receiver<()>,
}

impl std::fmt::Debug for Ops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ops").field("service", &self.inner.service).finish_non_exhaustive()
    }
}

impl Ops {
    /// An engine on the service's database, whose migrations include [`crate::SCHEMA`]. It keeps the newest 1000 finished
    /// operations. Nothing runs before [`Ops::resume`] or [`Ops::begin`].
    pub fn new(db: Db, service: Service, kinds: Arc<dyn Kinds>) -> Self {
        Self::keeping(db, service, kinds, KEEP)
    }

    /// Like [`Ops::new`], with the number of finished operations to keep.
    pub fn keeping(db: Db, service: Service, kinds: Arc<dyn Kinds>, keep: u32) -> Self {
        Self {
            inner: Arc::new(Inner {
                db,
                service,
                kinds,
                keep,
                wake: Arc::default(),
                halt: CancellationToken::new(),
                running: Mutex::default(),
                tasks: TaskTracker::new(),
            }),
        }
    }

    /// Starts the task that publishes events to `sink`, those of earlier processes first. To be called once.
    pub fn publish_to(&self, sink: Arc<dyn Sink>) {
        let inner = &self.inner;
        inner.tasks.spawn(outbox::publish(
            inner.db.clone(),
            sink,
            Arc::clone(&inner.wake),
            inner.halt.clone(),
        ));
    }

    /// Begins an operation. `reserve` runs in the transaction that writes it: what it refuses never begins, what it writes
    /// is there exactly if the operation is. A repeated request does not run it again.
    ///
    /// # Errors
    /// What `reserve` refuses, and those of the database. Then nothing was written.
    pub async fn begin<F>(&self, new: New, reserve: F) -> Result<Begun, Error>
    where
        F: FnOnce(&Transaction<'_>, &Op) -> Result<(), bothy_db::Error> + Send + 'static,
    {
        let op = Op {
            id: OpId::new(),
            kind: new.kind.to_owned(),
            subject: new.subject,
            vm: new.vm,
            owner: new.owner,
            input: new.input,
            accepted: Timestamp::now(),
        };
        let trace = bothy_telemetry::current().map(|t| (t.traceparent, t.tracestate));
        let (id, row, request) = (op.id, op.clone(), new.request.map(|r| r.to_string()));
        let span = run::span(&op, None);
        // From here to the spawn nothing may be dropped half way: a journaled operation must be run.
        let engine = self.clone();
        let task = tokio::spawn(async move {
            let begun = engine
                .inner
                .db
                .write(move |tx| {
                    if let Some(first) =
                        request.as_deref().map(|r| journal::by_request(tx, r)).transpose()?.flatten()
                    {
                        return Ok(Begun { op: first, repeated: true });
                    }
                    journal::insert(tx, &row, request.as_deref(), trace.as_ref())?;
                    reserve(tx, &row)?;
                    Ok(Begun { op: row, repeated: false })
                })
                .await?;
            if !begun.repeated {
                engine.inner.wake.notify_one();
                engine.start(begun.op.clone(), Past::default(), span);
            }
            Ok(begun)
        });
        task.await.unwrap_or_else(|e| Err(Error::internal(format!("operation {id} could not begin"), &e)))
    }

    /// Goes on with every operation that an earlier process left unfinished; says how many. To be called once, before the
    /// first [`Ops::begin`].
    ///
    /// # Errors
    /// Where the journal cannot be read.
    pub async fn resume(&self) -> Result<usize, Error> {
        let found = self.inner.db.read(journal::unfinished).await?;
        let count = found.len();
        for left in found {
            let span = run::span(&left.op, left.trace.as_ref());
            let forward = left.state == OpState::Running
                && !left.cancelled
                && self.inner.kinds.resume(&left.op) == Resume::Continue;
            tracing::info!(op = %left.op.id, kind = left.op.kind, forward, "resuming an operation");
            let why = (!forward).then(|| match left.error {
                Some(error) => error,
                None if left.cancelled => run::cancelled(),
                None => Error::new(
                    Code::Unavailable,
                    format!(
                        "{} was interrupted by a restart of {}",
                        left.op.kind,
                        self.inner.service.binary()
                    ),
                )
                .hint("it has been undone and may be begun again"),
            });
            self.start(left.op, Past { stages: left.stages, undo: why }, span);
        }
        Ok(count)
    }

    /// One operation.
    ///
    /// # Errors
    /// [`Code::NotFound`] where there is none of that id, or no more.
    pub async fn show(&self, request: OpRef) -> Result<OpRecord, Error> {
        let service = self.inner.service;
        let found = self.inner.db.read(move |c| journal::records(c, service, Some(request.op), 1)).await?;
        found.into_iter().next().ok_or_else(|| {
            Error::not_found(format!("{} has no operation {}", service.binary(), request.op))
                .hint("`bothy op list` shows those that are kept")
        })
    }

    /// The newest operations first: as many as were asked for and fit into one message of the bus.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn list(&self, request: OpList) -> Result<Vec<OpRecord>, Error> {
        let (service, limit) = (self.inner.service, request.limit.min(MAX_LIST));
        let mut found = self.inner.db.read(move |c| journal::records(c, service, None, limit)).await?;
        let mut room = bounds::MAX_LISTED;
        let fits = found.iter().take_while(|record| {
            let size = serde_json::to_vec(record).map_or(0, |json| json.len());
            let left = room.checked_sub(size);
            room = left.unwrap_or_default();
            left.is_some()
        });
        let fits = fits.count();
        found.truncate(fits);
        Ok(found)
    }

    /// Asks an operation to stop and undo itself, and gives its record as it is now. One that has finished stays as it is.
    ///
    /// # Errors
    /// [`Code::NotFound`], or [`Code::FailedPrecondition`] where its kind is not to be stopped half way.
    pub async fn cancel(&self, request: OpRef) -> Result<OpRecord, Error> {
        let record = self.show(request.clone()).await?;
        let handle = self.running().get(&record.id).map(|h| (h.cancel.clone(), h.cancellable));
        if let (Some((cancel, cancellable)), false) = (handle, record.state.is_final()) {
            if !cancellable {
                return Err(Error::new(
                    Code::FailedPrecondition,
                    format!("operation {} ({}) cannot be cancelled", record.id, record.kind),
                )
                .hint("wait for it: it ends by itself"));
            }
            self.inner.db.write(move |tx| journal::cancel(tx, request.op, Timestamp::now())).await?;
            self.inner.wake.notify_one();
            cancel.cancel();
        }
        self.show(OpRef { op: record.id }).await
    }

    /// Waits for the end of an operation of this process, and gives its record.
    ///
    /// # Errors
    /// As for [`Ops::show`].
    pub async fn wait(&self, op: OpId) -> Result<OpRecord, Error> {
        let ended = self.running().get(&op).map(|h| h.ended.clone());
        if let Some(mut ended) = ended {
            while ended.changed().await.is_ok() {}
        }
        self.show(OpRef { op }).await
    }

    /// Stops the engine where it is, as a crash would: what is unfinished stays in the journal for the next process. Waits
    /// until nothing of this one runs any more.
    pub async fn shutdown(&self) {
        self.inner.halt.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn running(&self) -> MutexGuard<'_, HashMap<OpId, Handle>> {
        self.inner.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, op: Op, past: Past, span: tracing::Span) {
        let cancel = CancellationToken::new();
        let (alive, ended) = watch::channel(());
        let graph = self.inner.kinds.graph(&op);
        let cancellable = graph.as_ref().map_or(true, |g| g.cancellable);
        let id = op.id;
        self.running().insert(id, Handle { cancel: cancel.clone(), cancellable, ended });
        let engine = self.clone();
        self.inner.tasks.spawn(
            async move {
                let halt = engine.inner.halt.clone();
                let run = Run::new(Arc::clone(&engine.inner), op, cancel);
                halt.run_until_cancelled(run.drive(graph, past)).await;
                engine.running().remove(&id);
                drop(alive);
            }
            .instrument(span),
        );
    }
}
