//! A repository into a real machine, five hundred changes of all kinds there, and back: several times, each with changes of its own. What
//! comes out, applied to a clean clone, is the tree that was in the machine. Such cases without a machine are a property test
//! of the workspace-agent.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's own helpers: what fails in them is a failed test"
)]

use bothy_e2e::{
    host::Host,
    repo::{self, git},
};
use bothy_testkit::require_root;
use std::{
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// As many as the whole check has time for; `BOTHY_MACHINE_TRIPS` says another number.
const ROUNDS: u64 = 3;
const CHANGES: usize = 500;
const FILES: usize = 400;

/// xorshift64*: any spread will do, and a seed that is printed brings a failure back.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    fn name(&mut self) -> PathBuf {
        let part = ["a", "b c", "dé", "line\nbreak", "-x", "quo\"te", ".hidden", "tab\there"];
        let mut path = PathBuf::new();
        for _ in 0..=self.below(3) {
            path.push(format!("{}{}", part[self.below(part.len())], self.below(12)));
        }
        path
    }

    fn content(&mut self) -> Vec<u8> {
        match self.below(5) {
            0 => Vec::new(),
            1 => (0..self.below(3000)).map(|_| self.below(256) as u8).collect(),
            2 => b"no newline at the end".to_vec(),
            3 => b"dos\r\nlines\r\n".repeat(1 + self.below(20)),
            _ => {
                (0..self.below(200)).flat_map(|_| format!("line {}\n", self.below(50)).into_bytes()).collect()
            }
        }
    }
}

/// One change below `root`; some have nothing to change.
fn change(random: &mut Random, root: &Path) {
    let path = root.join(random.name());
    let there = fs_err::symlink_metadata(&path);
    let make_way = |path: &Path| {
        let mut above = path.parent();
        while let Some(dir) = above.filter(|dir| *dir != root) {
            if fs_err::symlink_metadata(dir).is_ok_and(|m| !m.is_dir()) {
                fs_err::remove_file(dir).unwrap();
            }
            above = dir.parent();
        }
        match fs_err::symlink_metadata(path) {
            Ok(m) if m.is_dir() => fs_err::remove_dir_all(path).unwrap(),
            Ok(_) => fs_err::remove_file(path).unwrap(),
            Err(_) => {}
        }
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
    };
    match random.below(6) {
        0 if there.as_ref().is_ok_and(|m| m.is_dir()) => fs_err::remove_dir_all(&path).unwrap(),
        0 if there.is_ok() => fs_err::remove_file(&path).unwrap(),
        1 if there.as_ref().is_ok_and(|m| m.is_file()) => {
            let mode = [0o644, 0o755][random.below(2)];
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        2 => {
            make_way(&path);
            symlink(random.name(), &path).unwrap();
        }
        3 if there.is_ok() => {
            let to = root.join(random.name());
            if !to.starts_with(&path) && !path.starts_with(&to) {
                make_way(&to);
                // What made way may have been above the file.
                if fs_err::symlink_metadata(&path).is_ok() {
                    fs_err::rename(&path, &to).unwrap();
                }
            }
        }
        _ => {
            make_way(&path);
            fs_err::write(&path, random.content()).unwrap();
        }
    }
}

fn tar(dir: &Path, to: Stdio) -> std::process::Child {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(dir).args(["--exclude=./.git", "--owner=0", "--group=0", "-cf", "-", "."]).stdout(to);
    tar.spawn().unwrap()
}

/// The tree of all that is below `dir`, which is a repository.
fn tree(dir: &Path) -> String {
    git(dir, &["add", "-A"]);
    git(dir, &["write-tree"])
}

#[test]
fn what_is_done_in_a_machine_comes_out_whole() {
    require_root!();
    let host = Host::start_quick(|_| {});
    host.create_quick("trip", &[]);
    let work = host.scratch();
    let repository = work.join("repository");
    fs_err::create_dir(&repository).unwrap();
    git(&repository, &["init", "-q", "-b", "main"]);
    let mut random = Random(0x0b07_4e5e_ed00_0001);
    for _ in 0..FILES {
        change(&mut random, &repository);
    }
    repo::git(&repository, &["add", "-A"]);
    repo::git(&repository, &["commit", "-qm", "first"]);
    let here = repository.to_str().unwrap();
    let rounds = std::env::var("BOTHY_MACHINE_TRIPS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS);
    for round in 0..rounds {
        let seed = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(round + 1);
        let mut random = Random(seed);
        host.bothy(["workspace", "prepare", "trip", here, "--force"]).ok();
        // The changes are made here and carried there as they are: what matters is how they come back.
        let changed = work.join(format!("changed-{round}"));
        git(&work, &["clone", "-q", here, changed.to_str().unwrap()]);
        for _ in 0..CHANGES {
            change(&mut random, &changed);
        }
        let mut sent = tar(&changed, Stdio::piped());
        let clear =
            "cd /root/repo && find . -mindepth 1 -maxdepth 1 ! -name .git -exec rm -rf -- {} + && tar -xf -";
        let mut exec = host.command("bothy");
        exec.args(["vm", "exec", "-i", "trip", "--", "sh", "-c", clear]).stdin(sent.stdout.take().unwrap());
        assert!(host.spawn(&mut exec).inner().wait().unwrap().success() && sent.wait().unwrap().success());
        // Half of it committed there, some staged: a patch does not care.
        if round % 2 == 0 {
            host.sh("trip", "cd /root/repo && git add -A a* && git -c user.name=g -c user.email=g@g commit -qm half; git add -A 2>&1").ok();
        }
        let clean = work.join(format!("clean-{round}"));
        git(&work, &["clone", "-q", here, clean.to_str().unwrap()]);
        host.bothy(["workspace", "export", "trip", "--apply", "--repository", clean.to_str().unwrap()]).ok();
        assert_eq!(tree(&clean), tree(&changed), "round {round}, seed {seed:#x}");
        fs_err::remove_dir_all(&clean).unwrap();
        fs_err::remove_dir_all(&changed).unwrap();
    }
    host.bothy(["vm", "delete", "--force", "trip"]).ok();
    host.finish();
}
