//! The user's directories, by the XDG base directory specification
//! (<https://specifications.freedesktop.org/basedir-spec/latest/>).

use bothy_contract::{Code, Error};
use std::path::PathBuf;

/// The user's home.
pub(crate) fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").map(PathBuf::from).filter(|path| path.is_absolute())
}

fn base(variable: &str, below_home: &str) -> Result<PathBuf, Error> {
    // The specification: a relative path is to be ignored.
    if let Some(dir) = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute()) {
        return Ok(dir.join("bothy"));
    }
    home().map(|home| home.join(below_home).join("bothy")).ok_or_else(|| {
        Error::new(Code::FailedPrecondition, format!("neither HOME nor {variable} is set"))
            .hint(format!("set {variable} to an absolute path"))
    })
}

/// Keys and the like: `$XDG_DATA_HOME/bothy`.
pub(crate) fn data() -> Result<PathBuf, Error> {
    base("XDG_DATA_HOME", ".local/share")
}

/// What the user has set: `$XDG_CONFIG_HOME/bothy`.
pub(crate) fn config() -> Result<PathBuf, Error> {
    base("XDG_CONFIG_HOME", ".config")
}

/// Patches: `$XDG_STATE_HOME/bothy`.
pub(crate) fn state() -> Result<PathBuf, Error> {
    base("XDG_STATE_HOME", ".local/state")
}
