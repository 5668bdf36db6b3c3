//! `--bootstrap`: the tools that a repository pins, installed in the machine by a script in the background, with a log there. What is
//! installed how is the script's to know; which tools, [`bothy_pack::Repository::pins`] finds here.

use crate::{Context, exec};
use bothy_contract::{Code, Error, net::Egress, vm::VmRecord};
use bothy_pack::{PIN_FILES, Pin, Repository};

const SCRIPT: &str = include_str!("bootstrap.sh");
/// Where the script learns its own text.
const TEXT: &str = "BOTHY_BOOTSTRAP";
/// What it says where an earlier one is at work, with its exit status.
const AT_WORK: u8 = 41;
/// Where it writes, in the machine.
pub(crate) const LOG: &str = "~/.cache/bothy/bootstrap.log";
/// How many pins are named in a hint.
const NAMED: usize = 4;

/// Refuses a bootstrap in a machine that reaches nothing. `mend` is what to do about it.
pub(crate) fn check(egress: &Egress, mend: &str) -> Result<(), Error> {
    match egress {
        Egress::None => Err(Error::new(
            Code::FailedPrecondition,
            "`--bootstrap` fetches tools from the outside, which the machine may not reach",
        )
        .hint(mend)),
        _ => Ok(()),
    }
}

/// What `repository` pins, or, since nothing depends on it unless it was asked for, a note why that is not known.
pub(crate) fn pins(context: &Context, repository: &Repository) -> Vec<Pin> {
    repository.pins().unwrap_or_else(|e| {
        context.printer.note(format!("which tools the repository pins is not known: {}", e.message));
        Vec::new()
    })
}

/// After an import: starts the bootstrap, or says that there could be one.
pub(crate) async fn after_import(
    context: &Context,
    vm: &VmRecord,
    guest_path: &str,
    pins: &[Pin],
    wanted: bool,
) -> Result<(), Error> {
    match (wanted, pins) {
        (false, []) => {}
        (false, pins) => {
            context.printer.note(format!("pinned: {}; `--bootstrap` installs that", named(pins)));
        }
        (true, []) => {
            let files = PIN_FILES.join(", ");
            context.printer.note(format!("nothing to bootstrap: no tool is pinned (looked into {files})"));
        }
        (true, pins) => {
            start(context, vm, guest_path, pins).await?;
            context.printer.note(format!(
                "installing {} in the background; `bothy workspace status {}` says how far it is, {LOG} there has the rest",
                named(pins),
                vm.name
            ));
        }
    }
    Ok(())
}

async fn start(context: &Context, vm: &VmRecord, guest_path: &str, pins: &[Pin]) -> Result<(), Error> {
    let mut words = vec!["start".to_owned(), guest_path.to_owned()];
    words.extend(pins.iter().flat_map(|pin| [pin.tool.clone(), pin.version.clone()]));
    let (status, said) = exec::capture(&context.gateway, vm, &command(words)).await?;
    match status {
        0 => Ok(()),
        AT_WORK => Err(Error::new(
            Code::FailedPrecondition,
            format!("a bootstrap is at work in {} already", vm.name),
        )
        .hint(format!("wait for it: `bothy workspace status {}`; {LOG} there says what it does", vm.name))),
        status => Err(Error::new(
            Code::Internal,
            format!("the bootstrap did not start in {} (exit status {status}): {}", vm.name, said.trim()),
        )),
    }
}

/// How the last bootstrap stands: `running`, `broken`, `done` or `failed <tool>...`; `None` where there was none.
pub(crate) async fn standing(context: &Context, vm: &VmRecord) -> Option<String> {
    let (status, said) =
        exec::capture(&context.gateway, vm, &command(vec!["status".to_owned()])).await.ok()?;
    let line = said.lines().next().map(str::trim).filter(|line| status == 0 && !line.is_empty())?;
    Some(line.to_owned())
}

/// That, for people.
pub(crate) fn told(standing: &str) -> String {
    match standing.split_once(' ') {
        Some(("failed", tools)) => format!("tools:  not installed: {tools} ({LOG} there says why)"),
        _ if standing == "running" => format!("tools:  being installed ({LOG} there)"),
        _ if standing == "done" => "tools:  installed".to_owned(),
        _ => format!("tools:  their installation broke off ({LOG} there)"),
    }
}

fn command(words: Vec<String>) -> exec::Command {
    let mut argv: Vec<String> = ["sh", "-c", SCRIPT, "bothy-bootstrap"].map(str::to_owned).into();
    argv.extend(words);
    exec::Command {
        argv,
        env: vec![(TEXT.to_owned(), SCRIPT.to_owned())],
        workdir: "/".to_owned(),
        user: "root".to_owned(),
        ..exec::Command::default()
    }
}

/// `rust 1.95 (rust-toolchain.toml), node 22 (package.json) and 2 more`.
fn named(pins: &[Pin]) -> String {
    let some: Vec<_> =
        pins.iter().take(NAMED).map(|pin| format!("{} {} ({})", pin.tool, pin.version, pin.file)).collect();
    let more = pins.len().saturating_sub(NAMED);
    if more > 0 { format!("{} and {more} more", some.join(", ")) } else { some.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        os::unix::fs::PermissionsExt,
        path::Path,
        process::{Command, Output},
        time::{Duration, Instant},
    };

    /// The script as a guest runs it, with nothing on PATH but the usual and what is in `bin`.
    fn run(home: &Path, bin: &Path, words: &[&str]) -> Output {
        Command::new("sh")
            .args(["-c", SCRIPT, "bothy-bootstrap"])
            .args(words)
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
            .env("HOME", home)
            .env(TEXT, SCRIPT)
            .output()
            .unwrap()
    }

    fn installer(bin: &Path, name: &str, script: &str) {
        let path = bin.join(name);
        fs_err::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn until(home: &Path, bin: &Path, wanted: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let said = run(home, bin, &["status"]).stdout;
            if String::from_utf8_lossy(&said).trim() == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{:?}, not {wanted}", String::from_utf8_lossy(&said));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn the_script_installs_in_the_background_one_at_a_time_and_tells_what_failed() {
        let dir = tempfile::tempdir().unwrap();
        let (home, bin) = (dir.path().join("home"), dir.path().join("bin"));
        for dir in [&home, &bin] {
            fs_err::create_dir(dir).unwrap();
        }
        assert!(run(&home, &bin, &["status"]).stdout.is_empty());
        let gate = dir.path().join("gate");
        installer(
            &bin,
            "rustup",
            &format!("echo rustup \"$*\"; until [ -e {} ]; do sleep 0.05; done", gate.display()),
        );
        installer(&bin, "mise", "echo mise \"$*\"; case $* in *bad*) echo no such tool >&2; exit 3;; esac");
        let start = ["start", "/", "rust", "1.95", "bad", "1", "ruby", "3; touch /tmp/never"];
        assert!(run(&home, &bin, &start).status.success());
        until(&home, &bin, "running");
        assert_eq!(run(&home, &bin, &start).status.code(), Some(i32::from(AT_WORK)));
        fs_err::write(gate, "").unwrap();
        until(&home, &bin, "failed bad");
        let log = home.join(".cache/bothy/bootstrap.log");
        let said = fs_err::read_to_string(&log).unwrap();
        let wanted = "== rust 1.95\nrustup toolchain install 1.95\n== bad 1\nmise install -y bad@1\nno such tool\n== bad failed\n\
                      == ruby 3; touch /tmp/never\nmise install -y ruby@3; touch /tmp/never\n";
        assert_eq!(said, wanted);
        assert_eq!(fs_err::metadata(log).unwrap().permissions().mode() & 0o777, 0o600);

        // One that was ended is no success, and does not keep the next one out.
        fs_err::remove_file(dir.path().join("gate")).unwrap();
        assert!(run(&home, &bin, &start).status.success());
        until(&home, &bin, "running");
        let status = fs_err::read_to_string(home.join(".cache/bothy/bootstrap.status")).unwrap();
        let pid = status.strip_prefix("running ").unwrap().split(' ').next().unwrap().parse().unwrap();
        nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        until(&home, &bin, "broken");
        // Nor does one of another boot, whoever has its process id by now.
        let other = format!("running {} another-boot\n", std::process::id());
        fs_err::write(home.join(".cache/bothy/bootstrap.status"), other).unwrap();
        until(&home, &bin, "broken");
        installer(&bin, "rustup", "");
        installer(&bin, "go", "echo $GOTOOLCHAIN \"$@\"");
        let start = ["start", "/", "rust", "1.95", "go", "1.25", "go", "1.25.3"];
        assert!(run(&home, &bin, &start).status.success());
        until(&home, &bin, "done");
        let said = fs_err::read_to_string(home.join(".cache/bothy/bootstrap.log")).unwrap();
        assert!(said.ends_with("== go 1.25\ngo1.25.0 version\n== go 1.25.3\ngo1.25.3 version\n"), "{said}");
    }

    #[test]
    fn a_machine_that_reaches_nothing_is_refused() {
        let e = check(&Egress::None, "add `--nat`").unwrap_err();
        assert!(e.code == Code::FailedPrecondition && e.hint.as_deref() == Some("add `--nat`"), "{e}");
        check(&Egress::Open, "").unwrap();
    }
}
