//! One operation from its first stage to its end.

use crate::{
    Graph, Op, StageCx, UndoCx, bounds,
    engine::Inner,
    graph::{Undo, Values},
    journal::{self, Ran},
    stage::Progress,
};
use bothy_contract::{
    Code, Error,
    op::{OpEventKind, OpState, StageState},
};
use bothy_db::{Error as DbError, rusqlite::Transaction};
use jiff::Timestamp;
use serde_json::Value;
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::{
    sync::mpsc,
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

/// How often an undo is tried while its error says that trying again may help, and the pauses between.
const UNDO_TRIES: u32 = 6;
const UNDO_PAUSE: Duration = Duration::from_millis(250);
/// The pause after the end of an operation could not be written.
const WRITE_PAUSE: Duration = Duration::from_secs(1);

/// How an operation ended.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    /// `Succeeded`, `Failed` or `Cancelled`.
    pub state: OpState,
    /// Why not well, with the undos that failed.
    pub error: Option<Error>,
    /// Whether an undo failed, so that something may be left behind.
    pub leftovers: bool,
    /// The result of a success.
    pub result: Option<Value>,
}

/// What an earlier process has done of an operation.
#[derive(Default)]
pub(crate) struct Past {
    /// In the order of beginning.
    pub(crate) stages: Vec<(String, StageState, Option<Value>)>,
    /// Why the rest is to be undone, if it is.
    pub(crate) undo: Option<Error>,
}

/// The span of an operation: a child of the request that began it, or of what the journal remembers of that.
pub(crate) fn span(op: &Op, trace: Option<&journal::Trace>) -> Span {
    let span = tracing::info_span!(
        "op",
        otel.name = format!("op.{}", op.kind),
        bothy.op.id = %op.id,
        bothy.vm.id = op.vm.map(tracing::field::display),
    );
    if let Some((parent, state)) = trace {
        bothy_telemetry::set_parent(&span, Some(parent), state.as_deref());
    }
    span
}

pub(crate) fn cancelled() -> Error {
    Error::new(Code::Cancelled, "cancelled on request")
}

pub(crate) struct Run {
    inner: Arc<Inner>,
    op: Op,
    cancel: CancellationToken,
    /// When this process took the operation up, and how old it was then.
    base: Instant,
    age_us: u64,
}

/// A stage that this process knows, as far as it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Waiting,
    Running,
    Done,
}

struct Running {
    index: usize,
    begun: Instant,
    cx: StageCx,
}

impl Run {
    pub(crate) fn new(inner: Arc<Inner>, op: Op, cancel: CancellationToken) -> Self {
        let age = Timestamp::now().as_microsecond().saturating_sub(op.accepted.as_microsecond()).max(0);
        Self { inner, op, cancel, base: Instant::now(), age_us: age.unsigned_abs() }
    }

    fn at_us(&self) -> u64 {
        self.age_us.saturating_add(micros(self.base.elapsed()))
    }

    /// Runs or undoes the operation until its end is in the journal.
    pub(crate) async fn drive(self, graph: Result<Graph, Error>, past: Past) {
        let mut begun: Vec<String> = past
            .stages
            .iter()
            .filter(|(_, state, _)| *state != StageState::Undone)
            .map(|(name, ..)| name.clone())
            .collect();
        let (undos, outcome) = match graph {
            Err(e) => (HashMap::new(), Err(past.undo.unwrap_or(e))),
            Ok(graph) => {
                let undos = graph.nodes.iter().map(|n| (n.name, n.undo.clone())).collect();
                let outcome = match past.undo {
                    Some(why) => Err(why),
                    None => self.forward(graph, past.stages, &mut begun).await,
                };
                (undos, outcome)
            }
        };
        let end = match outcome.map_err(bounds::error) {
            Ok(result) => End { state: OpState::Succeeded, error: None, leftovers: false, result },
            Err(why) => self.backward(why, &undos, begun).await,
        };
        if let Some(e) = &end.error {
            bothy_telemetry::record_error(&Span::current(), e.code, &e.message);
            tracing::warn!(op = %self.op.id, kind = self.op.kind, state = ?end.state, "{e}");
        } else {
            tracing::info!(op = %self.op.id, kind = self.op.kind, took_us = self.at_us(), "done");
        }
        self.finish(end).await;
    }

    /// Runs the stages that are not done yet. `begun` gets every stage that began, in order.
    async fn forward(
        &self,
        mut graph: Graph,
        past: Vec<(String, StageState, Option<Value>)>,
        begun: &mut Vec<String>,
    ) -> Result<Option<Value>, Error> {
        let mut marks = vec![Mark::Waiting; graph.nodes.len()];
        let mut values = Values(vec![None; graph.nodes.len()]);
        for (name, state, output) in past {
            // A stage that a crash cut off runs again; one that this build does not have cannot be gone on from.
            let Some(index) = graph.position(&name) else {
                return Err(unknown_stage(&name));
            };
            if let (StageState::Done, Some(mark), Some(slot)) =
                (state, marks.get_mut(index), values.0.get_mut(index))
            {
                *mark = Mark::Done;
                *slot = output;
            }
        }
        let stop = CancellationToken::new();
        let (progress_to, mut progress) = mpsc::channel::<Progress>(8);
        let mut tasks: JoinSet<Result<Value, Error>> = JoinSet::new();
        let mut running: HashMap<Id, Running> = HashMap::new();
        let mut failure: Option<Error> = None;
        loop {
            if failure.is_none() {
                let ready = ready(&graph, &marks);
                let started = self.begin_stages(&mut graph, &ready, &values, begun).await;
                match started {
                    Ok(runs) => {
                        for (index, run) in runs {
                            if let Some(mark) = marks.get_mut(index) {
                                *mark = Mark::Running;
                            }
                            let cx = self.cx(&graph, index, &stop, &progress_to);
                            let span = self.stage_span(cx.stage);
                            let task = tasks.spawn(run(cx.clone()).instrument(span));
                            running.insert(task.id(), Running { index, begun: Instant::now(), cx });
                        }
                    }
                    Err(e) => failure = Some(self.fail(e, &stop).await),
                }
            }
            if tasks.is_empty() {
                break;
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled(), if failure.is_none() => {
                    failure = Some(self.fail(cancelled(), &stop).await);
                }
                Some(p) = progress.recv() => self.tell_progress(p).await,
                Some(ended) = tasks.join_next_with_id() => {
                    let (id, outcome) = flatten(ended);
                    let Some(stage) = running.remove(&id) else { continue };
                    let outcome = self.ran(&stage, outcome).await;
                    match outcome {
                        Ok(value) => {
                            if let (Some(mark), Some(slot)) = (marks.get_mut(stage.index), values.0.get_mut(stage.index)) {
                                *mark = Mark::Done;
                                *slot = Some(value);
                            }
                        }
                        // What a stage says after it was told to stop is not the reason for the stop.
                        Err(_) if failure.is_some() => {}
                        Err(e) => failure = Some(self.fail(named(stage.cx.stage, e), &stop).await),
                    }
                }
            }
        }
        match failure {
            Some(e) => Err(e),
            None => Ok(graph.result.and_then(|i| values.0.get_mut(i).and_then(Option::take))),
        }
    }

    /// Writes that the stages at `ready` begin, and gives what to run.
    async fn begin_stages(
        &self,
        graph: &mut Graph,
        ready: &[usize],
        values: &Values,
        begun: &mut Vec<String>,
    ) -> Result<Vec<(usize, crate::graph::Run)>, Error> {
        let mut runs = Vec::new();
        let mut names = Vec::new();
        for index in ready {
            if let Some(node) = graph.nodes.get_mut(*index)
                && let Some(prepare) = node.prepare.take()
            {
                names.push(node.name);
                runs.push((*index, prepare(values).map_err(|e| named(node.name, e))?));
            }
        }
        if names.is_empty() {
            return Ok(runs);
        }
        let (op, at, list) = (self.op.id, self.at_us(), names.clone());
        self.write(move |tx| journal::stages_begin(tx, op, &list, at)).await?;
        for name in names {
            if !begun.iter().any(|b| b == name) {
                begun.push(name.to_owned());
            }
        }
        Ok(runs)
    }

    fn cx(
        &self,
        graph: &Graph,
        index: usize,
        stop: &CancellationToken,
        progress: &mpsc::Sender<Progress>,
    ) -> StageCx {
        StageCx {
            op: self.op.id,
            vm: self.op.vm,
            stage: graph.nodes.get(index).map_or("", |n| n.name),
            stop: stop.clone(),
            note: Arc::default(),
            progress: progress.clone(),
        }
    }

    fn stage_span(&self, stage: &str) -> Span {
        tracing::info_span!(
            "stage",
            otel.name = format!("stage.{stage}"),
            bothy.op.id = %self.op.id,
            bothy.vm.id = self.op.vm.map(tracing::field::display),
        )
    }

    /// Writes how a stage ended. A success that cannot be written is a failure.
    async fn ran(&self, stage: &Running, outcome: Result<Value, Error>) -> Result<Value, Error> {
        let outcome = outcome.map_err(bounds::error);
        let ran = Ran {
            stage: stage.cx.stage,
            at_us: self.at_us(),
            took_us: micros(stage.begun.elapsed()),
            note: stage.cx.take_note(),
            outcome: outcome.clone(),
        };
        let op = self.op.id;
        self.write(move |tx| journal::stage_ran(tx, op, &ran)).await?;
        outcome
    }

    /// Tells the running stages to stop and writes that the operation turns back.
    async fn fail(&self, why: Error, stop: &CancellationToken) -> Error {
        stop.cancel();
        let (op, reason) = (self.op.id, why.clone());
        if let Err(e) = self.write(move |tx| journal::undoing(tx, op, &reason)).await {
            // The journal still says `Running`: after a crash now the service decides again. The undos run all the same.
            tracing::error!(op = %self.op.id, error = %e, "cannot write that an operation failed");
        }
        why
    }

    async fn tell_progress(&self, p: Progress) {
        let what = OpEventKind::StageProgress {
            stage: p.stage.to_owned(),
            done: p.done,
            total: p.total,
            note: p.note,
        };
        let (op, at) = (self.op.id, self.at_us());
        if let Err(e) = self.write(move |tx| journal::event(tx, op, at, what)).await {
            tracing::warn!(op = %self.op.id, error = %e, "cannot write the progress of a stage");
        }
    }

    /// Undoes the stages of `begun`, the last first.
    async fn backward(&self, why: Error, undos: &HashMap<&str, Option<Undo>>, begun: Vec<String>) -> End {
        // Again for a resumed one: its reason may be new.
        let why = self.fail(why, &CancellationToken::new()).await;
        let mut left = Vec::new();
        for stage in begun.iter().rev() {
            let undone = match undos.get(stage.as_str()) {
                Some(Some(undo)) => self.undo(stage, undo).await.map(|()| true),
                Some(None) => Ok(false),
                None => Err(unknown_stage(stage)),
            };
            match undone {
                Ok(tell) => {
                    let (op, at, name) = (self.op.id, self.at_us(), stage.clone());
                    if let Err(e) = self.write(move |tx| journal::stage_undone(tx, op, &name, tell, at)).await
                    {
                        tracing::error!(op = %self.op.id, stage, error = %e, "cannot write that a stage was undone");
                    }
                }
                Err(e) => {
                    tracing::error!(op = %self.op.id, stage, error = %e, "cannot undo a stage");
                    left.push(format!("undoing {stage} failed: {}", bounds::error(e).message));
                }
            }
        }
        let state = if why.code == Code::Cancelled { OpState::Cancelled } else { OpState::Failed };
        let leftovers = !left.is_empty();
        let mut error = why;
        if leftovers {
            error.message = format!("{}; moreover, {}", error.message, left.join("; "));
        }
        End { state, error: Some(bounds::error(error)), leftovers, result: None }
    }

    async fn undo(&self, stage: &str, undo: &Undo) -> Result<(), Error> {
        let cx = UndoCx { op: self.op.id, vm: self.op.vm };
        let span = tracing::info_span!(
            "undo",
            otel.name = format!("undo.{stage}"),
            bothy.op.id = %self.op.id,
            bothy.vm.id = self.op.vm.map(tracing::field::display),
        );
        async {
            let mut pause = UNDO_PAUSE;
            for _ in 1..UNDO_TRIES {
                match undo_once(undo, cx).await {
                    Err(e) if e.retryable => {
                        tracing::warn!(stage, error = %e, "undo will be tried again");
                        sleep(pause).await;
                        pause *= 2;
                    }
                    done => return done,
                }
            }
            undo_once(undo, cx).await
        }
        .instrument(span)
        .await
    }

    /// Writes the end, for as long as it takes.
    async fn finish(self, end: End) {
        loop {
            let (op, at, keep) = (self.op.clone(), self.at_us(), self.inner.keep);
            let (kinds, mut end) = (Arc::clone(&self.inner.kinds), end.clone());
            let written = self
                .write(move |tx| {
                    kinds.settle(tx, &op, &mut end)?;
                    end.result = end.result.and_then(bounds::result);
                    journal::finish(tx, op.id, &end, Timestamp::now(), at, keep)
                })
                .await;
            match written {
                Ok(()) => return,
                Err(e) => {
                    tracing::error!(op = %self.op.id, error = %e, "cannot write the end of an operation; will try again");
                    sleep(WRITE_PAUSE).await;
                }
            }
        }
    }

    async fn write<F>(&self, f: F) -> Result<(), Error>
    where
        F: FnOnce(&Transaction<'_>) -> Result<(), DbError> + Send + 'static,
    {
        self.inner.db.write(f).await?;
        self.inner.wake.notify_one();
        Ok(())
    }
}

/// The stages that wait for nothing any more.
fn ready(graph: &Graph, marks: &[Mark]) -> Vec<usize> {
    let is = |i: &usize, mark| marks.get(*i) == Some(&mark);
    (0..graph.nodes.len())
        .filter(|i| is(i, Mark::Waiting))
        .filter(|i| graph.nodes.get(*i).is_some_and(|n| n.needs.iter().all(|need| is(need, Mark::Done))))
        .collect()
}

/// Runs an undo in a task of its own, so that its panic is an error like any other.
async fn undo_once(undo: &Undo, cx: UndoCx) -> Result<(), Error> {
    let mut task = JoinSet::new();
    task.spawn(undo(cx).instrument(Span::current()));
    match task.join_next().await {
        Some(Ok(done)) => done,
        Some(Err(e)) => Err(Error::internal("an undo panicked", &e)),
        None => Ok(()),
    }
}

fn flatten(ended: Result<(Id, Result<Value, Error>), JoinError>) -> (Id, Result<Value, Error>) {
    match ended {
        Ok(ended) => ended,
        Err(e) => (e.id(), Err(Error::internal("a stage panicked", &e))),
    }
}

/// The operation's error for a stage's: it names the stage, and keeps the code where that says more.
fn named(stage: &str, mut e: Error) -> Error {
    if matches!(e.code, Code::Internal | Code::Unknown) {
        e.code = Code::StageFailed;
    }
    e.context(format!("stage {stage} failed"))
}

fn unknown_stage(name: &str) -> Error {
    Error::new(Code::Internal, format!("this build has no stage {name}, which an earlier one began"))
}

fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}
