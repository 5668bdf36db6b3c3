//! Whether KVM is of use here, found out by using it.
//!
//! That `/dev/kvm` opens and makes machines says little: there are nested and paravirtual KVMs on which a stock kernel
//! crawls in an instruction emulator until it dies. So a real kernel is booted under it, with a deadline that no working
//! KVM comes near, and the answer is remembered until QEMU or the host's kernel changes.

use super::{Accel, holder, qemu};
use bothy_config::Accelerator;
use bothy_contract::{Code, Error};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

/// How long the trial boot may take to get to its first process; a working KVM needs less than one second.
const DEADLINE: Duration = Duration::from_secs(5);
/// What the kernel says just before that (init/main.c, `run_init_process`).
const MARK: &str = "as init process";
const KVM: &str = "/dev/kvm";

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How guests are to be run.
    pub accel: Accel,
    /// Why, for `doctor`: what was tried and how it went.
    pub reason: String,
}

/// What a finding is remembered for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    qemu: String,
    host_kernel: String,
    finding: Finding,
}

/// Everything that the trial needs.
#[derive(Debug, Clone)]
pub struct Trial<'a> {
    /// QEMU's program.
    pub qemu: &'a Path,
    /// Its version.
    pub version: &'a str,
    /// A kernel of an image.
    pub kernel: &'a Path,
    /// Its initramfs; nothing of it has to run.
    pub initrd: &'a Path,
    /// Where the answer is remembered.
    pub memory: PathBuf,
}

/// Decides how guests are run: what the configuration says, or what a trial shows.
///
/// # Errors
/// The configuration asks for KVM and it is of no use here.
pub async fn decide(wanted: Accelerator, trial: &Trial<'_>) -> Result<Finding, Error> {
    match wanted {
        Accelerator::Tcg => Ok(Finding { accel: Accel::Tcg, reason: "set by `vm.accelerator`".into() }),
        Accelerator::Auto => Ok(find(trial).await),
        Accelerator::Kvm => {
            let finding = find(trial).await;
            if finding.accel == Accel::Kvm {
                return Ok(finding);
            }
            Err(Error::new(Code::FailedPrecondition, format!("KVM cannot be used: {}", finding.reason))
                .hint("set `vm.accelerator` to `auto` or `tcg` in bothy.toml"))
        }
    }
}

/// What is known without a trial: for a starting agent, so that it tells the truth before its first VM and no VM waits for
/// what was found out before. `None` where only a trial can tell, or KVM is asked for and known to be of no use.
pub fn known(wanted: Accelerator, version: &str, memory: &Path) -> Option<Finding> {
    if wanted == Accelerator::Tcg {
        return Some(Finding { accel: Accel::Tcg, reason: "set by `vm.accelerator`".into() });
    }
    // Not remembered: it costs nothing to see, and permissions change.
    fs_err::OpenOptions::new().read(true).write(true).open(KVM).ok()?;
    let known = recall(memory)?;
    let fits = known.qemu == version && known.host_kernel == host_kernel();
    let wanted = wanted == Accelerator::Auto || known.finding.accel == Accel::Kvm;
    (fits && wanted).then_some(known.finding)
}

fn host_kernel() -> String {
    fs_err::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// The remembered finding for this QEMU and this host kernel, or that of a trial boot, which is then remembered.
pub async fn find(trial: &Trial<'_>) -> Finding {
    match holder::program() {
        Ok(program) => find_with(trial, &program).await,
        Err(e) => Finding { accel: Accel::Tcg, reason: format!("KVM could not be tried: {e}") },
    }
}

/// The same; `program` is `bothy-vmm`.
async fn find_with(trial: &Trial<'_>, program: &Path) -> Finding {
    // Not remembered: it costs nothing to see, and permissions change.
    if let Err(err) = fs_err::OpenOptions::new().read(true).write(true).open(KVM) {
        return Finding { accel: Accel::Tcg, reason: format!("KVM cannot be opened: {err}") };
    }
    let host_kernel = host_kernel();
    if let Some(known) = recall(&trial.memory)
        && known.qemu == trial.version
        && known.host_kernel == host_kernel
    {
        return known.finding;
    }
    let finding = match boot(trial, program).await {
        Ok(Ok(took)) => Finding {
            accel: Accel::Kvm,
            reason: format!("a kernel booted to its first process under KVM in {} ms", took.as_millis()),
        },
        Ok(Err(why)) => Finding { accel: Accel::Tcg, reason: format!("{KVM} opens, but {why}") },
        // That says nothing about KVM, so it is not remembered.
        Err(why) => {
            return Finding {
                accel: Accel::Tcg,
                reason: format!("{KVM} opens, but could not be tried: {why}"),
            };
        }
    };
    let remembered = Remembered { qemu: trial.version.to_owned(), host_kernel, finding: finding.clone() };
    if let Err(err) = remember(&trial.memory, &remembered) {
        tracing::warn!(%err, "cannot remember whether KVM works; it will be tried again at the next start");
    }
    finding
}

fn recall(path: &Path) -> Option<Remembered> {
    serde_json::from_slice(&fs_err::read(path).ok()?).ok()
}

fn remember(path: &Path, what: &Remembered) -> std::io::Result<()> {
    let beside = path.with_extension("json.new");
    fs_err::write(&beside, serde_json::to_vec_pretty(what)?)?;
    fs_err::rename(&beside, path)
}

/// Boots under KVM until the kernel is about to start init, or says what happened instead. The outer error is that the
/// trial itself could not be made. QEMU is started as VMs' VMMs are, by `bothy-vmm exec`, so that it dies with this process,
/// however that ends.
async fn boot(trial: &Trial<'_>, program: &Path) -> Result<Result<Duration, String>, String> {
    for file in [trial.kernel, trial.initrd] {
        fs_err::File::open(file).map_err(|e| e.to_string())?;
    }
    let mut child = tokio::process::Command::new(program)
        .arg("exec")
        .arg(format!("--parent={}", std::process::id()))
        .arg("--")
        .args(qemu::machine(trial.qemu, Accel::Kvm).map_err(|e| e.message)?)
        .args(["-m", "256", "-smp", "1", "-append", "console=ttyS0 panic=-1 reboot=t"])
        .arg("-kernel")
        .arg(trial.kernel)
        .arg("-initrd")
        .arg(trial.initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("{} cannot be run: {e}", program.display()))?;
    let (Some(console), Some(errors)) = (child.stdout.take(), child.stderr.take()) else {
        return Err("its output cannot be read".into());
    };
    let started = tokio::time::Instant::now();
    let booted = tokio::time::timeout(DEADLINE, watch(BufReader::new(console))).await;
    let took = started.elapsed();
    if let Err(err) = child.kill().await {
        tracing::debug!(%err, "ending the trial boot");
    }
    Ok(match booted {
        Ok(true) => Ok(took),
        Err(_) => Err(format!("a stock kernel did not boot within {} s under it", DEADLINE.as_secs())),
        Ok(false) => {
            let mut said = Vec::new();
            // Its writer is dead, and what it says is short.
            drop(errors.take(4096).read_to_end(&mut said).await);
            let said = String::from_utf8_lossy(&said);
            let first = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim();
            Err(format!("QEMU gave up after {} ms: {first}", took.as_millis()))
        }
    })
}

/// Whether the mark is seen before the console ends.
async fn watch(mut console: impl tokio::io::AsyncBufRead + Unpin) -> bool {
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut console).take(4096).read_until(b'\n', &mut line).await {
            Ok(n) if n > 0 => {}
            _ => return false,
        }
        if String::from_utf8_lossy(&line).contains(MARK) {
            return true;
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// As if a trial on this host had found that.
    pub(in super::super) fn seen(memory: &Path, qemu: &str, accel: Accel) {
        let finding = Finding { accel, reason: "as a test says".into() };
        let qemu = qemu.to_owned();
        remember(memory, &Remembered { qemu, host_kernel: host_kernel(), finding }).unwrap();
    }

    fn trial(memory: PathBuf) -> Trial<'static> {
        Trial {
            qemu: Path::new("/nonexistent/qemu"),
            version: "10.0.2",
            kernel: Path::new("/nonexistent/vmlinux"),
            initrd: Path::new("/nonexistent/initrd"),
            memory,
        }
    }

    #[tokio::test]
    async fn a_kernel_that_speaks_up_counts_and_a_silent_end_does_not() {
        assert!(watch(&b"x\n[    0.5] Run /init as init process\nmore"[..]).await);
        assert!(!watch(&b"KVM internal error\n"[..]).await);
        assert!(!watch(&b""[..]).await);
    }

    #[tokio::test]
    async fn configuration_that_wants_kvm_gets_it_or_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let trial = trial(dir.path().join("accel.json"));
        assert_eq!(decide(Accelerator::Tcg, &trial).await.unwrap().accel, Accel::Tcg);
        assert_eq!(decide(Accelerator::Auto, &trial).await.unwrap().accel, Accel::Tcg);
        let err = decide(Accelerator::Kvm, &trial).await.unwrap_err();
        assert!(err.message.starts_with("KVM cannot be used: "), "{err}");
    }

    #[tokio::test]
    async fn a_finding_is_remembered_for_its_qemu_only() {
        if fs_err::OpenOptions::new().read(true).write(true).open(KVM).is_err() {
            return; // Without the device nothing is tried, so nothing is remembered.
        }
        let dir = tempfile::tempdir().unwrap();
        let trial = trial(dir.path().join("accel.json"));
        let host_kernel = fs_err::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_owned();
        let finding = Finding { accel: Accel::Kvm, reason: "seen before".into() };
        remember(&trial.memory, &Remembered { qemu: "10.0.2".into(), host_kernel, finding: finding.clone() })
            .unwrap();
        assert_eq!(find(&trial).await, finding);
        assert_eq!(known(Accelerator::Auto, "10.0.2", &trial.memory), Some(finding));
        assert_eq!(known(Accelerator::Auto, "11.0.0", &trial.memory), None);
        // Another QEMU is tried anew; a trial that cannot be made is not remembered, one that failed is.
        let program = bothy_testkit::binary("bothy-vmm");
        let other = find_with(&Trial { version: "11.0.0", ..trial.clone() }, &program).await;
        assert!(other.reason.contains("could not be tried"), "{}", other.reason);
        assert_eq!(recall(&trial.memory).unwrap().qemu, "10.0.2");
        let there = Path::new("/dev/null");
        let failing =
            Trial { version: "11.0.0", qemu: Path::new("false"), kernel: there, initrd: there, ..trial };
        let other = find_with(&failing, &program).await;
        assert!(other.accel == Accel::Tcg && other.reason.contains("gave up"), "{}", other.reason);
        assert_eq!(recall(&failing.memory).unwrap().finding, other);
    }
}
