//! `cargo xtask test`: everything that must hold before a change goes in, and one summary line at the end.
//!
//! The steps are those a contributor could type: format, lints, the guest's binary, all tests. Tests print a line
//! `SKIPPED <name>: <why>` where they cannot run; those are counted here, and in CI (`CI=true`) a skip is a failure.

use crate::{
    guest,
    say::{Failure, line, root, step},
    setup,
};
use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

/// What the test runners said, added up.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: Vec<String>,
}

impl Tally {
    /// Takes one line of a runner's output into account.
    fn line(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            let count = |what: &str| {
                result
                    .split([';', '.'])
                    .find_map(|part| part.trim().strip_suffix(what)?.trim().parse::<u64>().ok())
                    .unwrap_or(0)
            };
            self.passed += count(" passed");
            self.failed += count(" failed");
        } else if let Some(at) = line.find("SKIPPED ") {
            self.skipped.push(line.get(at..).unwrap_or(line).to_owned());
        }
    }

    /// The closing line. A test that skipped itself counted as passed with its runner.
    fn summary(&self) -> String {
        let skipped = self.skipped.len() as u64;
        let passed = self.passed.saturating_sub(skipped);
        format!("{passed} passed, {} failed, {skipped} skipped", self.failed)
    }
}

/// Runs everything. `filter` narrows the tests to those whose name contains it.
pub(crate) fn run(filter: Option<&str>) -> Result<(), Failure> {
    setup::run()?;
    check("format", &["fmt", "--all", "--check"])?;
    check("lints", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    guest::run()?;
    check("build", &["build", "--workspace", "--bins"])?;
    let tally = tests(filter)?;
    for skipped in &tally.skipped {
        line(skipped);
    }
    line(tally.summary());
    let in_ci = std::env::var_os("CI").is_some();
    if tally.failed > 0 {
        Err(Failure(format!("{} tests failed", tally.failed)))
    } else if in_ci && !tally.skipped.is_empty() {
        Err(Failure("tests were skipped, which CI does not allow".to_owned()))
    } else if tally.passed == 0 {
        Err(Failure("no test ran".to_owned()))
    } else {
        Ok(())
    }
}

/// Cargo, the one that runs this program. What a script runs in its background has SIGINT and SIGQUIT ignored (POSIX shell
/// language, 2.11), which every process hands on: tests that send them would wait for ever.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal=INT,QUIT");
    command.arg(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(args);
    command
}

/// Runs a step of cargo, its output straight to the terminal.
pub(crate) fn check(name: &str, args: &[&str]) -> Result<(), Failure> {
    step(name, format!("cargo {}", args.join(" ")));
    let status = cargo(args).status().map_err(|e| Failure(format!("cannot start cargo: {e}")))?;
    if status.success() { Ok(()) } else { Err(Failure(format!("{name} failed ({status})"))) }
}

/// Runs all tests, shows their output as it comes, and adds it up. A test that died without a result line fails too.
fn tests(filter: Option<&str>) -> Result<Tally, Failure> {
    step("tests", "cargo test --workspace");
    let mut command = cargo(&["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"]);
    if let Some(filter) = filter {
        command.arg(filter);
    }
    if std::env::var_os("CI").is_some() {
        command.env("BOTHY_TEST_NO_SKIP", "1");
    }
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Failure(format!("cannot run the tests: {e}")))?;
    let tally = Arc::new(Mutex::new(Tally::default()));
    let mut readers = Vec::new();
    if let Some(out) = child.stdout.take() {
        readers.push(tee(out, std::io::stdout(), Arc::clone(&tally)));
    }
    if let Some(err) = child.stderr.take() {
        readers.push(tee(err, std::io::stderr(), Arc::clone(&tally)));
    }
    for reader in readers {
        let _ = reader.join();
    }
    let status = child.wait().map_err(|e| Failure(format!("cannot wait for the tests: {e}")))?;
    let mut tally = tally.lock().map_err(|e| Failure(e.to_string()))?.clone();
    if !status.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    Ok(tally)
}

fn tee(
    from: impl std::io::Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    tally: Arc<Mutex<Tally>>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut lines = BufReader::new(from);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let _ = to.write_all(&line);
            if let Ok(mut tally) = tally.lock() {
                tally.line(String::from_utf8_lossy(&line).trim_end());
            }
            line.clear();
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_runners_add_up() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s",
            "test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
            "test boots ... SKIPPED boots: needs root",
        ] {
            tally.line(line);
        }
        assert_eq!((tally.passed, tally.failed), (7, 2));
        assert_eq!(tally.summary(), "6 passed, 2 failed, 1 skipped");
    }
}
