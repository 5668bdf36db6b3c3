//! What is drawn while operations run.

use crate::{
    printer::{Printer, duration, visible},
    terminal::Still,
};
use bothy_contract::{Code, Error};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::{collections::BTreeMap, time::Duration};

/// Where lines go that stay, and spinners below them where there is a terminal.
pub(crate) struct Screen {
    printer: Printer,
    bars: Option<MultiProgress>,
    _still: Option<Still>,
}

impl Screen {
    /// One for `printer`.
    pub(crate) fn new(printer: Printer) -> Self {
        let bars = printer.draws().then(MultiProgress::new);
        let still = bars.as_ref().and_then(|_| Still::enter());
        Self { printer, bars, _still: still }
    }

    /// A remark above the spinners, which would otherwise draw over it or be left behind.
    pub(super) fn say(&self, line: impl AsRef<str>) {
        self.print(|printer| printer.note(line));
    }

    /// Prints something while no spinner is drawn.
    pub(crate) fn print<T>(&self, print: impl FnOnce(Printer) -> T) -> T {
        match &self.bars {
            // `println` would pad the line to the terminal's width, which shows after a resize and in what is copied.
            Some(bars) => bars.suspend(|| print(self.printer)),
            None => print(self.printer),
        }
    }

    /// A spinner for `prefix`, with what its message says; none where nothing is drawn.
    pub(crate) fn spinner(&self, prefix: &str) -> Option<ProgressBar> {
        let bar = self.bars.as_ref()?.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {prefix:<18} {elapsed:>7} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(visible(prefix));
        bar.enable_steady_tick(Duration::from_millis(100));
        Some(bar)
    }
}

/// One operation on the screen.
pub(super) struct View<'a> {
    screen: &'a Screen,
    kind: Kind,
}

enum Kind {
    /// A spinner for each stage that runs, a line for each that ended.
    Stages(BTreeMap<String, ProgressBar>),
    /// A spinner that names the stages that run.
    Line { bar: Option<ProgressBar>, running: Vec<String> },
}

impl<'a> View<'a> {
    /// A view of all stages, or one line for `name`.
    pub(super) fn new(screen: &'a Screen, name: Option<&str>) -> Self {
        let kind = match name {
            Some(name) => Kind::Line { bar: screen.spinner(name), running: Vec::new() },
            None => Kind::Stages(BTreeMap::new()),
        };
        Self { screen, kind }
    }

    pub(super) fn started(&mut self, stage: &str) {
        match &mut self.kind {
            Kind::Stages(bars) => {
                let bar = self.screen.spinner(stage);
                bars.extend(bar.map(|bar| (stage.to_owned(), bar)));
            }
            Kind::Line { bar, running } => {
                running.push(stage.to_owned());
                name(bar.as_ref(), running);
            }
        }
    }

    pub(super) fn progress(&mut self, stage: &str, done: u64, total: Option<u64>, note: &str) {
        let Kind::Stages(bars) = &self.kind else { return };
        if let Some(bar) = bars.get(stage) {
            let count = match (done, total) {
                (0, None) => String::new(),
                (done, None) => format!("{done} "),
                (done, Some(total)) => format!("{done}/{total} "),
            };
            bar.set_message(format!("{count}{}", visible(note).replace('\n', " ")));
        }
    }

    /// The end of a stage, and whether it gets a line.
    fn end(&mut self, stage: &str) -> bool {
        match &mut self.kind {
            Kind::Stages(bars) => {
                if let Some(bar) = bars.remove(stage) {
                    bar.finish_and_clear();
                }
                true
            }
            Kind::Line { bar, running } => {
                running.retain(|name| name != stage);
                name(bar.as_ref(), running);
                false
            }
        }
    }

    pub(super) fn done(&mut self, stage: &str, took_us: u64, note: Option<&str>) {
        if self.end(stage) {
            let note = note.map(|n| format!("  {}", visible(n))).unwrap_or_default();
            self.screen.say(format!("  {:<18} {:>8}{note}", visible(stage), duration(took_us)));
        }
    }

    pub(super) fn failed(&mut self, stage: &str, took_us: u64, error: &Error) {
        if self.end(stage) {
            let how = match error.code {
                Code::Cancelled => "cancelled".to_owned(),
                _ => format!("failed: {}", visible(&error.message)),
            };
            self.screen.say(format!("  {:<18} {:>8}  {how}", visible(stage), duration(took_us)));
        }
    }

    pub(super) fn undone(&mut self, stage: &str) {
        match &self.kind {
            Kind::Stages(_) => self.screen.say(format!("  {:<18}   undone", visible(stage))),
            Kind::Line { bar, .. } => {
                if let Some(bar) = bar {
                    bar.set_message(format!("undone: {}", visible(stage)));
                }
            }
        }
    }

    pub(super) fn finish(&mut self) {
        match &mut self.kind {
            Kind::Stages(bars) => {
                for (_, bar) in std::mem::take(bars) {
                    bar.finish_and_clear();
                }
            }
            Kind::Line { bar, .. } => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                }
            }
        }
    }
}

/// Says on a line which stages run.
fn name(bar: Option<&ProgressBar>, running: &[String]) {
    if let Some(bar) = bar {
        bar.set_message(visible(&running.join(", ")));
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}
