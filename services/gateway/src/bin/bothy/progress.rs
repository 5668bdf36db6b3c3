//! Operations as they happen: their stages on stderr, drawn over on a terminal, a line each elsewhere.

use crate::{
    http::Gateway,
    printer::{Printer, duration, table, visible},
    terminal::Still,
};
use bothy_contract::{
    Code, Error, OpId,
    op::{OpEvent, OpEventKind, OpRecord, OpState},
};
use http::Method;
use http_body_util::BodyExt;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::{collections::BTreeMap, time::Duration};

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

/// Watches `op` to its end and shows its stages. Ctrl-C cancels it and waits for the undo; a second one leaves.
///
/// # Errors
/// The operation's own error, or that it can no longer be watched.
pub(crate) async fn watch(gateway: &Gateway, printer: Printer, op: OpId) -> Result<Outcome, Error> {
    let mut view = View::new(printer);
    let screen = view.screen.clone();
    let mut seen = Seen::default();
    let watching = follow(gateway, op, &mut view, &mut seen);
    tokio::pin!(watching);
    tokio::select! {
        end = &mut watching => return end,
        _ = tokio::signal::ctrl_c() => {}
    }
    screen.say("cancelling; what was done is being undone (Ctrl-C again to leave it to that)");
    let cancelled: Result<OpRecord, Error> =
        gateway.change(Method::POST, &format!("/v1/ops/{op}/cancel"), &serde_json::json!({})).await;
    if let Err(e) = cancelled {
        screen.say(format!("cannot cancel: {}", visible(&e.message)));
    }
    tokio::select! {
        end = &mut watching => end,
        _ = tokio::signal::ctrl_c() => Err(Error::new(
            Code::Cancelled,
            format!("no longer waiting for operation {op}, which is being undone"),
        ).hint(format!("`bothy op show {op}` shows how it went"))),
    }
}

/// What was seen of an operation, over several connections.
#[derive(Default)]
struct Seen {
    next: u64,
    started: BTreeMap<String, u64>,
    outcome: Outcome,
}

async fn follow(gateway: &Gateway, op: OpId, view: &mut View, seen: &mut Seen) -> Result<Outcome, Error> {
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

async fn once(gateway: &Gateway, op: OpId, view: &mut View, seen: &mut Seen) -> Result<Outcome, End> {
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

fn take(event: OpEvent, view: &mut View, seen: &mut Seen) -> Option<Result<Outcome, Error>> {
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

/// One server-sent event.
struct SseMessage {
    event: String,
    data: String,
}

/// Takes server-sent events out of pieces that end anywhere.
#[derive(Default)]
struct SseLines {
    rest: Vec<u8>,
    event: String,
    data: String,
}

impl SseLines {
    fn feed(&mut self, piece: &[u8]) -> Vec<SseMessage> {
        self.rest.extend_from_slice(piece);
        let mut out = Vec::new();
        while let Some(end) = self.rest.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                let (event, data) = (std::mem::take(&mut self.event), std::mem::take(&mut self.data));
                if !data.is_empty() {
                    out.push(SseMessage { event, data });
                }
            } else if let Some((field, value)) = line.split_once(':') {
                let value = value.strip_prefix(' ').unwrap_or(value);
                match field {
                    "event" => value.clone_into(&mut self.event),
                    "data" => {
                        if !self.data.is_empty() {
                            self.data.push('\n');
                        }
                        self.data.push_str(value);
                    }
                    _ => {}
                }
            }
        }
        out
    }
}

/// Where lines go that stay. Clones write to the same place.
#[derive(Clone)]
struct Screen {
    printer: Printer,
    bars: Option<MultiProgress>,
}

impl Screen {
    /// A line above the spinners, which would otherwise draw over it or be left behind.
    fn say(&self, line: impl AsRef<str>) {
        match &self.bars {
            // `println` would pad the line to the terminal's width, which shows after a resize and in what is copied.
            Some(bars) => bars.suspend(|| self.printer.note(line)),
            None => self.printer.note(line),
        }
    }
}

/// The stages on the screen.
struct View {
    screen: Screen,
    running: BTreeMap<String, ProgressBar>,
    _still: Option<Still>,
}

impl View {
    fn new(printer: Printer) -> Self {
        let bars = printer.draws().then(MultiProgress::new);
        let still = bars.as_ref().and_then(|_| Still::enter());
        Self { screen: Screen { printer, bars }, running: BTreeMap::new(), _still: still }
    }

    fn started(&mut self, stage: &str) {
        if let Some(bars) = &self.screen.bars {
            let bar = bars.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {prefix:<18} {elapsed:>7} {msg}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(visible(stage));
            bar.enable_steady_tick(Duration::from_millis(100));
            self.running.insert(stage.to_owned(), bar);
        }
    }

    fn progress(&mut self, stage: &str, done: u64, total: Option<u64>, note: &str) {
        if let Some(bar) = self.running.get(stage) {
            let count = match (done, total) {
                (0, None) => String::new(),
                (done, None) => format!("{done} "),
                (done, Some(total)) => format!("{done}/{total} "),
            };
            bar.set_message(format!("{count}{}", visible(note).replace('\n', " ")));
        }
    }

    fn end(&mut self, stage: &str) {
        if let Some(bar) = self.running.remove(stage) {
            bar.finish_and_clear();
        }
    }

    fn done(&mut self, stage: &str, took_us: u64, note: Option<&str>) {
        self.end(stage);
        let note = note.map(|n| format!("  {}", visible(n))).unwrap_or_default();
        self.screen.say(format!("  {:<18} {:>8}{note}", visible(stage), duration(took_us)));
    }

    fn failed(&mut self, stage: &str, took_us: u64, error: &Error) {
        self.end(stage);
        let how = match error.code {
            Code::Cancelled => "cancelled".to_owned(),
            _ => format!("failed: {}", visible(&error.message)),
        };
        self.screen.say(format!("  {:<18} {:>8}  {how}", visible(stage), duration(took_us)));
    }

    fn undone(&mut self, stage: &str) {
        self.screen.say(format!("  {:<18}   undone", visible(stage)));
    }

    fn finish(&mut self) {
        for (_, bar) in std::mem::take(&mut self.running) {
            bar.finish_and_clear();
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_sent_events_in_pieces_of_any_size() {
        let text = b": hello\n\nid: 0\nevent: accepted\ndata: {\"a\":1}\n\n:\n\nevent: error\r\ndata: x\r\ndata: y\r\n\r\ndata: cut";
        for size in 1..text.len() {
            let mut lines = SseLines::default();
            let all: Vec<_> = text.chunks(size).flat_map(|piece| lines.feed(piece)).collect();
            let all: Vec<_> = all.iter().map(|m| (m.event.as_str(), m.data.as_str())).collect();
            assert_eq!(all, [("accepted", "{\"a\":1}"), ("error", "x\ny")], "{size}");
        }
    }
}
