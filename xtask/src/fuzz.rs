//! Coverage-guided fuzzing by libFuzzer, on the stable compiler: LLVM's pass that counts which code is reached is one that every
//! rustc has. What is found and what led there stays in `target/fuzz`; a finding becomes a file of `fuzz/seeds/<target>`, which every
//! run of the tests replays.

use crate::{
    say::{Failure, line, root, step, target as target_dir},
    test,
};
use clap::ValueEnum;
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// The largest input, in bytes.
const MAX_INPUT: u32 = 32 << 10;
/// The most memory, in MiB, and the longest that one input may take, in seconds.
const MAX_MIB: u32 = 1024;
const MAX_SECONDS: u32 = 20;
/// How libFuzzer ends with a finding: one that took too long, took too much memory, or died (FuzzerOptions.h).
const FINDINGS: [i32; 3] = [70, 71, 77];
const FLAGS: [&str; 9] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Coverflow-checks",
];

/// What can be tried.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Target {
    /// Archives and layers, to file systems.
    Tar,
    /// Layouts, their documents, and the layers that these lead to.
    Oci,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Tar => "tar",
            Self::Oci => "oci",
        }
    }
}

/// Builds the target and runs it for so many seconds, or with one input only.
pub(crate) fn run(target: Target, seconds: u32, input: Option<&Path>) -> Result<(), Failure> {
    let name = target.name();
    // The fuzzer runs in another directory than the caller.
    let input = input
        .map(|file| fs_err::canonicalize(file).map_err(|e| Failure(format!("cannot take the input: {e}"))))
        .transpose()?;
    let program = build(name)?;
    let io = |what: &str, e: std::io::Error| Failure(format!("cannot {what}: {e}"));
    let work = target_dir().join("fuzz");
    let (corpus, found) = (work.join("corpus").join(name), work.join("found").join(name));
    for dir in [&corpus, &found] {
        fs_err::create_dir_all(dir).map_err(|e| io("make a directory", e))?;
    }
    // Each input makes files: in memory, where there is such a place.
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let scratch = parent.join(format!("bothy-fuzz-{}", std::process::id()));
    fs_err::create_dir(&scratch).map_err(|e| io("make a directory", e))?;
    let mut prefix = OsString::from("-artifact_prefix=");
    prefix.push(found.join(""));
    let mut command = Command::new(&program);
    command.current_dir(root()).env("TMPDIR", &scratch).arg(prefix);
    command.args([format!("-rss_limit_mb={MAX_MIB}"), format!("-timeout={MAX_SECONDS}")]);
    match &input {
        Some(input) => command.arg(input),
        None => {
            command.args([format!("-max_total_time={seconds}"), format!("-max_len={MAX_INPUT}")]);
            command.args(["-print_final_stats=1"]);
            command.arg(&corpus).arg(root().join("fuzz/seeds").join(name))
        }
    };
    match &input {
        Some(input) => step("fuzz", format!("{name}, {}", input.display())),
        None => step("fuzz", format!("{name}, for {seconds} s")),
    }
    let ended = command.status();
    let _ = fs_err::remove_dir_all(&scratch);
    let status = ended.map_err(|e| io("start the fuzzer", e))?;
    match (status.code(), &input) {
        (Some(0), Some(input)) => line(format!("nothing found with {}", input.display())),
        (Some(0), None) => line(format!("nothing found; {} holds what was tried", corpus.display())),
        (Some(code), Some(input)) if FINDINGS.contains(&code) => {
            return Err(Failure(format!("{name} fails with {}: see above", input.display())));
        }
        (Some(code), None) if FINDINGS.contains(&code) => {
            return Err(Failure(format!(
                "{name} has a finding, the newest file in {}; again with `cargo xtask fuzz {name} --input FILE`; once it is mended, \
                 keep it in fuzz/seeds/{name}",
                found.display()
            )));
        }
        _ => return Err(Failure(format!("the fuzzer could not do its work ({status}): see above"))),
    }
    Ok(())
}

/// The machine that is built for. Said, so that build scripts and macros are built without the counters.
fn triple() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

fn build(name: &str) -> Result<PathBuf, Failure> {
    step("build", format!("fuzz target {name}"));
    let into = target_dir().join("fuzz");
    let mut build = test::cargo(&["build", "--manifest-path", "fuzz/Cargo.toml", "--bin", name]);
    build.args(["--target", &triple(), "--target-dir"]).arg(&into);
    // With the character that cargo parts them by.
    build.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"));
    let status = build.status().map_err(|e| Failure(format!("cannot start cargo: {e}")))?;
    if !status.success() {
        return Err(Failure(format!(
            "build failed ({status}); libFuzzer takes a C++ compiler (`apt-get install g++`)"
        )));
    }
    Ok(into.join(triple()).join("debug").join(name))
}
