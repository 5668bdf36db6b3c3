//! All output of the command line goes through here: results to stdout, everything else to stderr.

use crate::vm::Failure;
use bothy_contract::Error;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::io::{IsTerminal, Write};

/// How and where to print.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    /// Records as JSON on stdout, errors as JSON on stderr.
    pub(crate) json: bool,
    /// No progress.
    pub(crate) quiet: bool,
}

impl Printer {
    /// A result for people, on stdout. A reader that has gone is no error of ours.
    pub(crate) fn line(self, text: impl AsRef<str>) {
        let _ = writeln!(std::io::stdout().lock(), "{}", text.as_ref());
    }

    /// Text on stdout, as it is. Returns whether there is still somebody who reads it.
    pub(crate) fn write(self, text: &str) -> bool {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
    }

    /// A record: JSON where that was asked for, else what `human` makes of it (nothing where that is empty).
    pub(crate) fn record<T: Serialize>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), Error> {
        if self.json {
            // Scripts get a document a line, people one that they can read.
            let text = if std::io::stdout().is_terminal() {
                serde_json::to_string_pretty(value)
            } else {
                serde_json::to_string(value)
            };
            self.line(text.map_err(|e| Error::internal("cannot print the record", &e))?);
        } else {
            let text = human(value);
            if !text.is_empty() {
                self.line(text);
            }
        }
        Ok(())
    }

    /// Several records: a document each where JSON was asked for, else what `human` makes of all.
    pub(crate) fn records<T: Serialize>(
        self,
        values: &[T],
        human: impl FnOnce(&[T]) -> String,
    ) -> Result<(), Error> {
        if !self.json {
            self.line(human(values));
            return Ok(());
        }
        values.iter().try_for_each(|value| self.record(value, |_| String::new()))
    }

    /// A remark, on stderr.
    pub(crate) fn note(self, text: impl AsRef<str>) {
        if !self.quiet {
            self.always(text);
        }
    }

    /// A line on stderr that `--quiet` does not silence.
    pub(crate) fn always(self, text: impl AsRef<str>) {
        let _ = writeln!(std::io::stderr().lock(), "{}", text.as_ref());
    }

    /// A question on stderr, whose line goes on with the answer.
    pub(crate) fn ask(self, text: impl AsRef<str>) {
        let mut err = std::io::stderr().lock();
        let _ = write!(err, "{}", text.as_ref());
        let _ = err.flush();
    }

    /// An error, on stderr.
    pub(crate) fn error(self, error: &Error) {
        if self.json {
            return self.always(serde_json::json!({ "error": error }).to_string());
        }
        let mut err = std::io::stderr().lock();
        let (red, plain) = if err.is_terminal() { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
        let _ = writeln!(err, "{red}error{plain}: {}", visible(&error.message));
        if let Some(hint) = &error.hint {
            let _ = writeln!(err, "  hint: {}", visible(hint));
        }
    }

    /// What failed for one of several machines, on stderr.
    pub(crate) fn failure(self, failure: &Failure<'_>) {
        if self.json {
            let Failure { name, error } = failure;
            return self.always(serde_json::json!({ "vm": name, "error": error }).to_string());
        }
        self.error(&failure.named());
    }

    /// Whether progress may be drawn over, as on a terminal.
    pub(crate) fn draws(self) -> bool {
        !self.quiet && !self.json && std::io::stderr().is_terminal()
    }
}

/// Text that may come from a guest, with control characters made harmless: it must not drive the user's terminal.
pub(crate) fn visible(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let harmful = c.is_control() && c != '\n' && c != '\t';
            let escaped = harmful.then(|| c.escape_default());
            let plain = (!harmful).then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// A table without lines, as wide as its content. Columns named in `right` are aligned to the right.
pub(crate) fn table(header: &[&str], right: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| visible(cell)));
    }
    for (i, name) in header.iter().enumerate() {
        if let Some(column) = table.column_mut(i) {
            column.set_padding((0, 2));
            if right.contains(name) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    let lines: Vec<_> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

/// Names and values under one another.
pub(crate) fn facts(rows: impl IntoIterator<Item = (&'static str, String)>) -> String {
    let rows: Vec<_> = rows.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    let lines: Vec<_> =
        rows.iter().map(|(name, value)| format!("{name:<width$}{}", visible(value))).collect();
    lines.join("\n")
}

/// A duration given in microseconds, in the unit that suits it.
pub(crate) fn duration(us: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let seconds = us as f64 / 1e6;
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{} ms", us / 1_000),
        1_000_000..60_000_000 => format!("{seconds:.2} s"),
        _ => format!("{} min {} s", us / 60_000_000, us / 1_000_000 % 60),
    }
}

/// A size in bytes, in the unit that suits it.
pub(crate) fn size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    let b = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", b / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", b / 1_048_576.0),
        _ => format!("{:.1} GiB", b / 1_073_741_824.0),
    }
}

/// The text form of an enum that serialises as a string.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(duration(12), "12 us");
        assert_eq!(duration(3_456), "3 ms");
        assert_eq!(duration(3_456_000), "3.46 s");
        assert_eq!(duration(75_000_000), "1 min 15 s");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
    }

    #[test]
    fn guests_cannot_drive_the_terminal() {
        assert_eq!(visible("a\x1b[2Jb\rc\nd"), "a\\u{1b}[2Jb\\rc\nd");
    }
}
