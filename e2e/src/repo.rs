//! Git repositories to run bothy on.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Runs git in `dir` and returns what it printed.
///
/// # Panics
/// If git fails.
#[track_caller]
pub fn git(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .current_dir(dir)
        .args([
            "-c",
            "user.name=A Tester",
            "-c",
            "user.email=tester@example.org",
            "-c",
            "init.defaultBranch=main",
        ])
        .args(args)
        .env_remove("GIT_DIR")
        .output()
        .expect("git");
    assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A small repository with two commits, a changed tracked file and an untracked one.
pub fn sample(parent: &Path) -> PathBuf {
    let dir = parent.join("sample");
    fs_err::create_dir_all(dir.join("src")).expect("a directory");
    git(&dir, &["init", "-q"]);
    fs_err::write(dir.join("README"), "one\n").expect("a file");
    fs_err::write(dir.join("src/with space.txt"), "two\n").expect("a file");
    fs_err::write(dir.join("binary"), [0, 159, 146, 150, 0, 255]).expect("a file");
    git(&dir, &["add", "."]);
    git(&dir, &["commit", "-qm", "first"]);
    fs_err::write(dir.join("README"), "one\ntwo\n").expect("a file");
    git(&dir, &["commit", "-qam", "second"]);
    fs_err::write(dir.join("src/with space.txt"), "two\nchanged on the host\n").expect("a file");
    fs_err::write(dir.join("secret.env"), "TOKEN=untracked\n").expect("a file");
    dir
}
