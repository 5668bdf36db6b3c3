//! The user's terminal: raw while a guest's terminal is shown on it, and always put back.

use bothy_contract::Error;
use bothy_guest_proto::v1::WindowSize;
use std::io::IsTerminal;

/// Whether a command can be given a terminal: stdin and stdout both are one.
pub(crate) fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// The size of the terminal, where there is one.
pub(crate) fn window() -> Option<WindowSize> {
    crossterm::terminal::size().ok().map(|(cols, rows)| WindowSize { rows: rows.into(), cols: cols.into() })
}

/// The terminal in raw mode, until this is dropped: at a return, an error or a panic.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    /// Makes the terminal raw.
    pub(crate) fn enter() -> Result<Self, Error> {
        crossterm::terminal::enable_raw_mode()
            .map_err(|e| Error::internal("cannot make the terminal raw", &e))?;
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = crossterm::terminal::disable_raw_mode();
    }
}
