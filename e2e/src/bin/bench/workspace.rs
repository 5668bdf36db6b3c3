//! A repository of 20,000 files and 400 MiB into a guest and out again: against `tar` of the same files through the same channel,
//! against a clone over ssh, against `git status` in the guest; and the memory of every process on the way.

use crate::median;
use bothy_e2e::{host::Host, repo::git};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

const VM: &str = "bench";
const SHAPE: [&str; 6] = ["--cpus", "2", "--memory", "2G", "--disk", "8G"];
/// How often the memory of processes is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// One file, in bytes: 20,000 of them are 400 MiB.
const FILE: usize = 20 << 10;
const DIRECTORIES: usize = 200;
/// The VMM, which calls itself by its VM's name: its memory is the guest's own.
const VMM: &str = "bothy-bench";

/// Lines of words, as different from each other as source code is.
struct Text(u64);

impl Text {
    fn next(&mut self) -> u64 {
        // xorshift64*: any spread will do.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn file(&mut self) -> String {
        let mut text = String::with_capacity(FILE + 64);
        while text.len() < FILE {
            let words = 4 + self.next() % 8;
            for _ in 0..words {
                let word = self.next() % 4000;
                let _ = write!(
                    text,
                    "{}{word:x} ",
                    ["fn_", "self.", "let ", "value", "=> ", "(", "type", "."][word as usize % 8]
                );
            }
            text.push('\n');
        }
        text.truncate(FILE);
        text
    }
}

fn repository(parent: &Path, files: usize) -> PathBuf {
    let dir = parent.join("repository");
    fs_err::create_dir(&dir).expect("a repository");
    git(&dir, &["init", "-q", "-b", "main"]);
    let mut text = Text(0x9e37_79b9_7f4a_7c15);
    for n in 0..files {
        let below = dir.join(format!("part{}", n % DIRECTORIES));
        fs_err::create_dir_all(&below).expect("a directory");
        fs_err::write(below.join(format!("file{n}.rs")), text.file()).expect("a file");
    }
    git(&dir, &["add", "-A"]);
    // A commit of so many files has git pack them in the background, beside what is to be measured: here that is done first.
    git(&dir, &["-c", "gc.auto=0", "-c", "maintenance.auto=false", "commit", "-q", "-m", "all of it"]);
    git(&dir, &["gc", "-q"]);
    dir
}

struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The most that each program of this host has had resident while `work` ran, in KiB.
fn watched<T>(host: &Host, work: impl FnOnce() -> T) -> (T, BTreeMap<String, u64>) {
    let (stop, mut most) = (AtomicBool::new(false), BTreeMap::new());
    let done = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most: BTreeMap<String, u64> = BTreeMap::new();
            while !stop.load(Ordering::Relaxed) {
                for pid in host.pids() {
                    let Ok(status) = fs_err::read_to_string(format!("/proc/{pid}/status")) else { continue };
                    let field =
                        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
                    let (Some(name), Some(kib)) = (field("Name:"), field("VmHWM:")) else { continue };
                    let kib = kib.trim_end_matches(" kB").parse().unwrap_or(0);
                    let most = most.entry(name.to_owned()).or_default();
                    *most = kib.max(*most);
                }
                std::thread::sleep(LOOK);
            }
            most
        });
        // Also where the work fails: the scope waits for the watcher.
        let stopper = Stopper(&stop);
        let done = work();
        drop(stopper);
        most = watcher.join().expect("the watcher");
        done
    });
    most.remove(VMM);
    (done, most)
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// `tar` of the tracked files into the guest over the same channel.
fn tar(host: &Host, repository: &Path) -> f64 {
    host.sh(VM, "rm -rf /root/by-tar && mkdir /root/by-tar && sync").ok();
    seconds(|| send(host, repository, "tar -C /root/by-tar -xf - && sync"))
}

/// The files in `dir` as a tar stream into `script` in the guest.
fn send(host: &Host, dir: &Path, script: &str) {
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(dir).args(["--exclude=./.git", "-cf", "-", "."]).stdout(Stdio::piped());
    let mut pack = pack.spawn().expect("tar");
    let mut exec = host.command("bothy");
    exec.args(["vm", "exec", "-i", VM, "--", "sh", "-c", script]);
    let mut exec = host.spawn(exec.stdin(pack.stdout.take().expect("its output")));
    assert!(exec.inner().wait().expect("an end").success() && pack.wait().expect("an end").success());
}

/// What an import cannot do without, by hand and with all that the host does done before: the history as one pack through the same
/// channel, and git's writing of the files.
fn by_hand(host: &Host, repository: &Path) -> f64 {
    let packs = host.scratch().join("packs");
    drop(fs_err::remove_dir_all(&packs));
    fs_err::create_dir(&packs).expect("a directory");
    let line = format!(
        "git -C {} rev-parse HEAD | git -C {0} -c pack.compression=1 pack-objects -q --revs --window=0 {}/pack",
        repository.display(),
        packs.display()
    );
    host.run_bash(&line).ok();
    let ready = "rm -rf /root/by-hand && git init -q -b main /root/by-hand && mkdir -p /root/by-hand/.git/objects/pack && sync";
    host.sh(VM, ready).ok();
    let head = git(repository, &["rev-parse", "HEAD"]);
    let script = format!(
        "cd /root/by-hand && tar -C .git/objects/pack -xf - && git update-ref HEAD {0} && \
         git -c checkout.workers=0 read-tree --reset -u {0} && sync",
        head.trim()
    );
    seconds(|| send(host, &packs, &script))
}

/// The same commits by git over ssh: a push to an empty repository of the guest, which moves what a clone moves, and a check-out.
fn ssh(host: &Host, repository: &Path) -> f64 {
    host.sh(VM, "rm -rf /root/by-ssh && git init -q -b main /root/by-ssh && sync").ok();
    let wrapper = host.scratch().join("ssh.sh");
    let bothy = host.program("bothy");
    // git calls it as `ssh HOST COMMAND`.
    fs_err::write(&wrapper, format!("#!/bin/sh\nshift\nexec {} vm ssh -q {VM} -- \"$@\"\n", bothy.display()))
        .expect("a script");
    seconds(|| {
        let line = format!(
            "chmod 755 {0}; GIT_SSH={0} GIT_SSH_VARIANT=simple git -C {1} push -q ssh://guest/root/by-ssh main:refs/heads/pushed",
            wrapper.display(),
            repository.display()
        );
        host.run_bash(&line).ok();
        host.sh(VM, "cd /root/by-ssh && git reset -q --hard pushed && sync").ok();
    })
}

fn import(host: &Host, repository: &Path) -> f64 {
    host.sh(VM, "rm -rf /root/repo && sync").ok();
    seconds(|| {
        host.bothy_in(repository, ["workspace", "prepare", VM, "."]).ok();
        host.sh(VM, "sync").ok();
    })
}

fn export(host: &Host, repository: &Path) -> (f64, f64) {
    let status = seconds(|| drop(host.sh(VM, "cd /root/repo && git status --porcelain").ok()));
    let patch = host.scratch().join("patch");
    let export = seconds(|| {
        host.bothy_in(repository, ["workspace", "export", VM, "-o", patch.to_str().expect("a path")]).ok();
    });
    (status, export)
}

/// `files` of them, imported and exported `pairs` times.
pub(crate) fn run(pairs: usize, files: usize) {
    let host = Host::start();
    host.bothy(["vm", "create", "--name", VM].iter().chain(&SHAPE)).ok();
    let repository = repository(&host.scratch(), files);
    println!("{files} files, {} MiB", (files * FILE) >> 20);
    println!(
        "{:>4} {:>10} {:>10} {:>10} {:>10} {:>12} {:>10}",
        "pair", "import, s", "tar, s", "by hand, s", "ssh, s", "status, s", "export, s"
    );
    let (mut over_tar, mut floor, mut over_ssh, mut over_status) = (vec![], vec![], vec![], vec![]);
    let mut memory: BTreeMap<String, u64> = BTreeMap::new();
    for pair in 1..=pairs {
        let (import, during) = watched(&host, || import(&host, &repository));
        let ((status, export), after) = watched(&host, || export(&host, &repository));
        let (tar, ssh) = (tar(&host, &repository), ssh(&host, &repository));
        let by_hand = by_hand(&host, &repository);
        println!(
            "{pair:>4} {import:>10.1} {tar:>10.1} {by_hand:>10.1} {ssh:>10.1} {status:>12.2} {export:>10.2}"
        );
        floor.push(tar / by_hand);
        over_tar.push(tar / import);
        over_ssh.push(import / ssh);
        over_status.push(export / status);
        for (name, kib) in during.into_iter().chain(after) {
            let most = memory.entry(name).or_default();
            *most = kib.max(*most);
        }
    }
    println!("import at {:.2} of the rate of tar (bar: 0.85)", median(&over_tar));
    println!("  a ready pack through the same channel and git's check-out, by hand: {:.2}", median(&floor));
    println!("import in {:.2} of the time of git over ssh (bar: less than 1)", median(&over_ssh));
    println!(
        "export with nothing changed: {:.2} of git status in the guest (bar: 1.3)",
        median(&over_status)
    );
    println!("most resident of any process (bar: 64 MiB):");
    for (name, kib) in memory {
        println!("  {name:<18} {:>8.1} MiB", kib as f64 / 1024.0);
    }
    let guest = host
        .sh(VM, "grep VmHWM /proc/1/status /proc/[0-9]*/status 2>/dev/null | sort -t: -k3 -n | tail -3")
        .stdout;
    println!("in the guest:\n{guest}");
}
