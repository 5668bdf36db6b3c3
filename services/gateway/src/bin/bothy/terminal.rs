//! The user's terminal: raw while a guest's terminal is shown on it, and always put back.

use crate::printer::Printer;
use bothy_contract::{Code, Error};
use bothy_guest_proto::v1::WindowSize;
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use std::io::IsTerminal;

/// Whether a command can be given a terminal: stdin and stdout both are one.
pub(crate) fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Asks the user to confirm something. Only a plain yes is one.
///
/// # Errors
/// When nobody can be asked; `option` is what says yes beforehand.
pub(crate) fn confirm(printer: Printer, question: &str, option: &str) -> Result<bool, Error> {
    if printer.json || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Error::new(Code::FailedPrecondition, format!("nobody can be asked: {question}"))
            .hint(format!("`{option}` says yes")));
    }
    printer.ask(format!("{question} [y/N] "));
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(|e| Error::internal("cannot read the answer", &e))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
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

/// The terminal without the `^C` that it shows for an interrupt (ECHOCTL, termios(3)), until this is dropped: it would
/// end in the middle of what is drawn, and a spinner's line would stay behind.
pub(crate) struct Still(Termios);

impl Still {
    /// Changes the terminal on stdin; none where there is none.
    pub(crate) fn enter() -> Option<Self> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut still = before.clone();
        still.local_flags.remove(LocalFlags::ECHOCTL);
        set(&still).then_some(Self(before))
    }
}

/// Sets the terminal, unless bothy is in the background: there it would be stopped for it (SIGTTOU, tcsetattr(3p)).
fn set(to: &Termios) -> bool {
    let stdin = std::io::stdin();
    nix::unistd::tcgetpgrp(&stdin).is_ok_and(|group| group == nix::unistd::getpgrp())
        && tcsetattr(&stdin, SetArg::TCSANOW, to).is_ok()
}

impl Drop for Still {
    fn drop(&mut self) {
        set(&self.0);
    }
}
