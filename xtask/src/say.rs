//! All that xtask says to people, and how it runs other programs.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Why a step failed, for people: what, on what, why, and on further lines what to do.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self(e.to_string())
    }
}

/// One line per step.
#[expect(clippy::print_stdout, reason = "the place where xtask speaks")]
pub(crate) fn step(name: &str, what: impl fmt::Display) {
    println!("{name:<14} {what}");
}

/// One line as it is.
#[expect(clippy::print_stdout, reason = "the place where xtask speaks")]
pub(crate) fn line(what: impl fmt::Display) {
    println!("{what}");
}

/// The last words.
#[expect(clippy::print_stderr, reason = "the place where xtask speaks")]
pub(crate) fn error(e: &Failure) {
    eprintln!("error: {e}");
}

/// The root of the workspace.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where builds and caches go: `CARGO_TARGET_DIR`, or `target` in the workspace.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The program of that name on `PATH`, or in the directories that a user's `PATH` may lack.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|dir| dir.join(name)).find(|p| p.is_file())
}

/// Runs a program to its end; what it said is shown only if it failed.
pub(crate) fn quietly(command: &mut Command) -> Result<String, Failure> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out =
        command.stdin(Stdio::null()).output().map_err(|e| Failure(format!("cannot start `{name}`: {e}")))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let said: Vec<_> = said.lines().collect();
    let last = said.get(said.len().saturating_sub(15)..).unwrap_or_default().join("\n  ");
    Err(Failure(format!("`{name}` failed ({}):\n  {last}", out.status)))
}
