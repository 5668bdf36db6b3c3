//! Log lines on stderr, in the form that whoever reads them needs: people, the journal (which adds the time itself), or
//! a program.

use std::io::IsTerminal;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

/// What is logged unless `BOTHY_LOG` says otherwise: the bus client tells at `info` of every connection it makes.
const DEFAULT: &str = "info,async_nats=warn";

enum Format {
    Human,
    Compact,
    Json,
}

impl Format {
    fn from_env() -> Self {
        match std::env::var("BOTHY_LOG_FORMAT").as_deref() {
            Ok("json") => Self::Json,
            Ok("compact") => Self::Compact,
            Ok("human") => Self::Human,
            _ if std::io::stderr().is_terminal() => Self::Human,
            _ => Self::Compact,
        }
    }
}

/// The layer, and what was wrong with `BOTHY_LOG`, if anything.
pub(crate) fn layer() -> (Box<dyn Layer<Registry> + Send + Sync>, Option<String>) {
    let (filter, bad) = match std::env::var("BOTHY_LOG") {
        Ok(text) if !text.is_empty() => match EnvFilter::try_new(&text) {
            Ok(filter) => (filter, None),
            Err(e) => (EnvFilter::new(DEFAULT), Some(format!("{text:?}: {e}"))),
        },
        _ => (EnvFilter::new(DEFAULT), None),
    };
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(true);
    // systemd sets JOURNAL_STREAM where stderr is the journal (systemd.exec(5)), which stamps each line itself.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let layer = match Format::from_env() {
        Format::Human => lines.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed(),
        Format::Compact if journal => {
            lines.with_ansi(false).compact().without_time().with_filter(filter).boxed()
        }
        Format::Compact => lines.with_ansi(false).compact().with_filter(filter).boxed(),
        Format::Json => lines.json().flatten_event(true).with_filter(filter).boxed(),
    };
    (layer, bad)
}
