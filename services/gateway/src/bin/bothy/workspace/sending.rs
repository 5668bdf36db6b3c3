//! A repository on its way, drawn where there is a terminal: first it is packed, then it goes, then the machine builds it.

use crate::{
    printer::{Printer, size},
    progress::Screen,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// How often it is drawn anew.
const TICK: Duration = Duration::from_millis(100);
/// What no pack is as large as: all of it has gone.
const ALL: u64 = u64::MAX;

/// How many bytes have gone. Clones count the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Gone(Arc<AtomicU64>);

impl Gone {
    pub(super) fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn all(&self) {
        self.0.store(ALL, Ordering::Relaxed);
    }
}

/// Draws until `done` is; nothing is left of it on the screen.
pub(super) async fn drawn<T>(
    printer: Printer,
    files: Option<u64>,
    gone: &Gone,
    done: impl Future<Output = T>,
) -> T {
    let screen = Screen::new(printer);
    let Some(bar) = screen.spinner("repository") else { return done.await };
    let mut tick = tokio::time::interval(TICK);
    tokio::pin!(done);
    loop {
        tokio::select! {
            done = &mut done => {
                bar.finish_and_clear();
                return done;
            }
            _ = tick.tick() => bar.set_message(words(gone.0.load(Ordering::Relaxed), files)),
        }
    }
}

fn words(gone: u64, files: Option<u64>) -> String {
    let of = match files {
        Some(1) => " of 1 file".to_owned(),
        Some(n) => format!(" of {n} files"),
        None => String::new(),
    };
    match gone {
        0 => format!("packing{}", of.trim_start_matches(" of")),
        ALL => format!("the machine builds it{}", of.replacen(" of", ":", 1)),
        sent => format!("{} sent{of}", size(sent)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_happens() {
        assert_eq!(words(0, Some(20_000)), "packing 20000 files");
        assert_eq!(words(0, None), "packing");
        assert_eq!(words(3 << 20, Some(1)), "3.0 MiB sent of 1 file");
        assert_eq!(words(ALL, Some(2)), "the machine builds it: 2 files");
        assert_eq!(words(ALL, None), "the machine builds it");
    }
}
