//! Operations as they happen: the stages of one on stderr, drawn over on a terminal, a line each elsewhere; of several at
//! once a line each on a terminal, which says where it stands.

mod screen;
mod sse;

pub(crate) use screen::Screen;

use crate::{
    http::Gateway,
    interrupt::Interrupts,
    printer::{Printer, duration, table, visible},
};
use bothy_contract::{
    Code, Error, OpId,
    op::{OpEvent, OpEventKind, OpRecord, OpState},
};
use http::Method;
use http_body_util::BodyExt;
use screen::View;
use sse::SseLines;
use std::{collections::BTreeMap, future::Future, time::Duration};

/// How an operation ended well.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    /// Its result.
    pub(crate) result: Option<serde_json::Value>,
    /// Its stages.
    pub(crate) stages: Vec<Stage>,
    /// From accepted to finished, in microseconds.
    pub(crate) took_us: u64,
}

/// The time of one stage, in microseconds.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    pub(crate) name: String,
    pub(crate) started_us: u64,
    pub(crate) took_us: u64,
}

impl Outcome {
    /// All stages as a table.
    pub(crate) fn table(&self) -> String {
        table(
            &["STAGE", "BEGAN", "TOOK"],
            &["BEGAN", "TOOK"],
            self.stages
                .iter()
                .map(|s| vec![s.name.clone(), format!("+{}", duration(s.started_us)), duration(s.took_us)]),
        )
    }
}

/// The operations that one command begins, and the screen that they are shown on.
pub(crate) struct Watcher<'a> {
    gateway: &'a Gateway,
    screen: Screen,
    interrupts: Interrupts,
    several: bool,
}

impl<'a> Watcher<'a> {
    /// For one operation, whose stages are shown, or for `several`, with a line for each. From now on Ctrl-C does not end
    /// this process.
    ///
    /// # Errors
    /// When signals cannot be caught.
    pub(crate) fn new(gateway: &'a Gateway, printer: Printer, several: bool) -> Result<Self, Error> {
        Ok(Self { gateway, screen: Screen::new(printer), interrupts: Interrupts::new()?, several })
    }

    /// The screen.
    pub(crate) fn screen(&self) -> &Screen {
        &self.screen
    }

    /// Begins an operation, unless the user has pressed Ctrl-C by now. A second one ends the wait for the answer.
    ///
    /// # Errors
    /// When it was not begun, or that is not known.
    pub(crate) async fn begin<T>(&self, ask: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        if self.interrupts.any() {
            return Err(Error::new(Code::Cancelled, "not begun: interrupted before"));
        }
        tokio::select! {
            begun = ask => begun,
            () = self.interrupts.at_least(2) => Err(Error::new(
                Code::Cancelled,
                "no longer waiting for the gateway, which may still do what it was asked",
            ).hint("`bothy op list` shows whether it does")),
        }
    }

    /// Watches `op`, which works on `name`, to its end. Ctrl-C cancels it and waits for the undo; a second one leaves. What
    /// cannot be cancelled is left at the first, and goes on.
    ///
    /// # Errors
    /// The operation's own error, or that it is no longer watched.
    pub(crate) async fn watch(&self, op: OpId, name: &str) -> Result<Outcome, Error> {
        let mut view = View::new(&self.screen, self.several.then_some(name));
        let mut seen = Seen::default();
        let watching = follow(self.gateway, op, &mut view, &mut seen);
        tokio::pin!(watching);
        tokio::select! {
            end = &mut watching => return end,
            () = self.interrupts.at_least(1) => {}
        }
        let path = format!("/v1/ops/{op}/cancel");
        let body = serde_json::json!({});
        let cancel = self.gateway.change::<OpRecord>(Method::POST, &path, &body);
        let answer = tokio::select! {
            end = &mut watching => return end,
            answer = cancel => answer,
            () = self.interrupts.at_least(2) => return Err(left(op, "may go on")),
        };
        let which = if self.several { format!(" {}", visible(name)) } else { String::new() };
        match answer {
            Ok(_) => self.screen.say(format!(
                "cancelling{which}; what was done is being undone (Ctrl-C again to leave it to that)"
            )),
            Err(e) if e.code == Code::FailedPrecondition => {
                return Err(left(op, "cannot be cancelled and goes on"));
            }
            Err(e) => self.screen.say(format!("cannot cancel{which}: {}", visible(&e.message))),
        }
        tokio::select! {
            end = &mut watching => end,
            () = self.interrupts.at_least(2) => Err(left(op, "is being undone")),
        }
    }

    /// Watches `op` to its end, without any say in it: Ctrl-C only leaves.
    ///
    /// # Errors
    /// As for [`Self::watch`].
    pub(crate) async fn look_on(&self, op: OpId) -> Result<Outcome, Error> {
        let mut view = View::new(&self.screen, None);
        let mut seen = Seen::default();
        tokio::select! {
            end = follow(self.gateway, op, &mut view, &mut seen) => end,
            () = self.interrupts.at_least(1) => Err(left(op, "goes on")),
        }
    }
}

/// The user does not wait for an operation any longer.
fn left(op: OpId, state: &str) -> Error {
    Error::new(Code::Cancelled, format!("no longer waiting for operation {op}, which {state}"))
        .hint(format!("`bothy op show --watch {op}` shows how it goes"))
}

/// What was seen of an operation, over several connections.
#[derive(Default)]
struct Seen {
    next: u64,
    started: BTreeMap<String, u64>,
    outcome: Outcome,
}

async fn follow(gateway: &Gateway, op: OpId, view: &mut View<'_>, seen: &mut Seen) -> Result<Outcome, Error> {
    let mut failures = 0u32;
    loop {
        let before = seen.next;
        let error = match once(gateway, op, view, seen).await {
            Ok(outcome) => return Ok(outcome),
            Err(End::Op(error)) => return Err(error),
            Err(End::Stream(error)) => error,
        };
        failures = if seen.next > before { 0 } else { failures + 1 };
        // The operation goes on whatever happens to the gateway, so a restart of that is waited for: about 30 s.
        if failures > 12 || !error.retryable {
            return Err(error
                .context(format!("cannot watch operation {op} any longer"))
                .hint(format!("it goes on; `bothy op show {op} --watch` watches it again")));
        }
        tokio::time::sleep(Duration::from_millis(100 << failures.min(5))).await;
    }
}

/// Why a connection ended.
enum End {
    /// The operation failed.
    Op(Error),
    /// The stream broke.
    Stream(Error),
}

fn broke(message: String) -> End {
    let mut error = Error::new(Code::Unavailable, message);
    error.retryable = true;
    End::Stream(error)
}

async fn once(gateway: &Gateway, op: OpId, view: &mut View<'_>, seen: &mut Seen) -> Result<Outcome, End> {
    let mut body = gateway.stream(&format!("/v1/ops/{op}/events")).await.map_err(End::Stream)?;
    let mut lines = SseLines::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| broke(format!("the event stream broke: {e}")))?;
        let Some(data) = frame.data_ref() else { continue };
        for message in lines.feed(data) {
            if message.event == "error" {
                let error = serde_json::from_str(&message.data)
                    .map_err(|e| broke(format!("an unknown event: {e}")))?;
                return Err(End::Stream(error));
            }
            let event: OpEvent = serde_json::from_str(&message.data).map_err(|e| {
                End::Stream(Error::internal("the gateway sent an event that makes no sense", &e))
            })?;
            // After a new connection the history comes again from its start.
            if event.seq < seen.next {
                continue;
            }
            seen.next = event.seq + 1;
            if let Some(end) = take(event, view, seen) {
                return end.map_err(End::Op);
            }
        }
    }
    Err(broke("the event stream ended too soon".to_owned()))
}

fn take(event: OpEvent, view: &mut View<'_>, seen: &mut Seen) -> Option<Result<Outcome, Error>> {
    match event.what {
        OpEventKind::Accepted { .. } => {}
        OpEventKind::StageStarted { stage } => {
            seen.started.insert(stage.clone(), event.at_us);
            view.started(&stage);
        }
        OpEventKind::StageProgress { stage, done, total, note } => view.progress(&stage, done, total, &note),
        OpEventKind::StageDone { stage, took_us, note } => {
            let started_us =
                seen.started.get(&stage).copied().unwrap_or_else(|| event.at_us.saturating_sub(took_us));
            view.done(&stage, took_us, note.as_deref());
            seen.outcome.stages.push(Stage { name: stage, started_us, took_us });
        }
        OpEventKind::StageFailed { stage, took_us, error } => view.failed(&stage, took_us, &error),
        OpEventKind::StageUndone { stage } => view.undone(&stage),
        OpEventKind::CancelRequested => {}
        OpEventKind::Finished { state, error, result } => {
            view.finish();
            if state == OpState::Succeeded {
                let mut outcome = std::mem::take(&mut seen.outcome);
                outcome.stages.sort_by_key(|s| s.started_us);
                outcome.result = result;
                outcome.took_us = event.at_us;
                return Some(Ok(outcome));
            }
            return Some(Err(match (state, error) {
                (OpState::Cancelled, _) => Error::new(Code::Cancelled, "cancelled; what was done is undone"),
                (_, Some(error)) => error,
                (_, None) => Error::new(Code::StageFailed, "the operation failed without saying why"),
            }));
        }
    }
    None
}
