//! Demo and bench: set up, build for release, then run the program of `e2e` that does it.

use crate::{
    guest,
    say::{Failure, step, target},
    setup, test,
};
use std::process::Command;

/// Runs the e2e program `name` with `args`, on release binaries.
pub(crate) fn released(name: &str, args: &[String]) -> Result<(), Failure> {
    setup::run()?;
    guest::run()?;
    test::check("build", &["build", "--workspace", "--bins", "--release"])?;
    let program = target().join("release").join(name);
    step(name, program.display());
    let status = Command::new(&program)
        .args(args)
        .status()
        .map_err(|e| Failure(format!("cannot start {}: {e}", program.display())))?;
    if status.success() { Ok(()) } else { Err(Failure(format!("{name} failed ({status})"))) }
}
